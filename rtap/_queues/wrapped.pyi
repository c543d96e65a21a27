# SPDX-License-Identifier: BSD-3-Clause
from rtap._core.rx_queue import RxQueueBase

class WrappedRxQueue(RxQueueBase):
    def start(self) -> None: ...
