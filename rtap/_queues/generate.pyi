# SPDX-License-Identifier: BSD-3-Clause
from collections.abc import Sequence

from rtap._core.mempool import Mempool
from rtap._core.rx_queue import RxQueueBase

class GenerateRxQueue(RxQueueBase):
    def __init__(
        self,
        pool: Mempool,
        header: bytes,
        lengths: Sequence[int],
        *,
        name: str = "generator",
        flows: int = 1,
        vary: str = "destination",
    ) -> None: ...
    @property
    def frame_len(self) -> int: ...
    def close(self) -> None: ...
