# SPDX-License-Identifier: BSD-3-Clause
from rtap._queue import RxQueueBase

class NoisyRxQueue(RxQueueBase):
    engine: str
    engine_reason: str
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
    def start(self) -> None: ...
    def close(self) -> int: ...
