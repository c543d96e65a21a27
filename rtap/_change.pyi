# SPDX-License-Identifier: BSD-3-Clause
from rtap._queue import RxQueueBase
from rtap._wrapped import WrappedRxQueue

class ChangeRxQueue(WrappedRxQueue):
    def __init__(
        self,
        inner: RxQueueBase,
        change: str,
        *,
        destination: bytes = ...,
        source: bytes = ...,
    ) -> None: ...
    def close(self) -> None: ...
