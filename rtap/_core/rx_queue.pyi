# SPDX-License-Identifier: BSD-3-Clause
from collections.abc import Callable
from typing import Any

from rtap._core.burst import Burst
from rtap._core.mempool import Mempool
from rtap._core.queue import QueueBase

class RxQueueBase(QueueBase):
    @property
    def pool(self) -> Mempool: ...
    route_ended: Callable[[Any], object] | None
    @property
    def fd(self) -> int: ...
    def cut_off(self) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def rx_burst(self, n: int = 64, timeout: float | None = 0) -> Burst: ...
