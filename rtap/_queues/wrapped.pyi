# SPDX-License-Identifier: BSD-3-Clause
from rtap._core.queue import RxQueueBase

class WrappedRxQueue(RxQueueBase):
    engine: str
    engine_reason: str
    def start(self) -> None: ...
