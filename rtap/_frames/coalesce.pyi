# SPDX-License-Identifier: BSD-3-Clause
from typing import final

from typing_extensions import Buffer

from rtap._core.burst import Burst

@final
class Gro:
    timeout: float
    def __init__(
        self,
        *,
        udp: bool = False,
        timeout: float = 0.0,
        max_flows: int = 64,
        max_frames: int = 1024,
        max_length: int = 65535,
        fixed_id: bool = False,
        l2: bool = True,
    ) -> None: ...
    def coalesce(self, burst: Burst) -> Burst: ...
    def flush(self) -> Burst: ...
    def stats(self) -> dict[str, int]: ...
    @property
    def held(self) -> int: ...

def coalesce_bytes(
    frames: list[Buffer],
    *,
    udp: bool = False,
    fixed_id: bool = False,
    l2: bool = True,
    max_length: int = 65535,
) -> list[tuple[tuple[int, int, int, int, int, int], bytes]]: ...
