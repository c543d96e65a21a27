# SPDX-License-Identifier: BSD-3-Clause
from rtap._core.rx_queue import RxQueueBase
from rtap._queues.wrapped import WrappedRxQueue

class NoisyRxQueue(WrappedRxQueue):
    def __init__(
        self,
        inner: RxQueueBase,
        *,
        buffer_size: int = 0,
        flush_ms: int = 0,
        memory_mb: int = 0,
        reads: int = 0,
        writes: int = 0,
        reads_writes: int = 0,
    ) -> None: ...
    @property
    def buffered(self) -> int: ...
    def close(self) -> int: ...
