# SPDX-License-Identifier: BSD-3-Clause
from rtap._core.mempool import Mempool
from rtap._core.rx_queue import RxQueueBase
from rtap._core.tx_queue import TxQueueBase

class NullRxQueue(RxQueueBase):
    def __init__(
        self,
        pool: Mempool,
        *,
        name: str,
        size: int = 64,
        queue_id: int = 0,
        port: int = 0xFFFF,
        nb_desc: int = 64,
        gil: str = "auto",
    ) -> None: ...
    def close(self) -> None: ...

class NullTxQueue(TxQueueBase):
    def __init__(
        self,
        name: str,
        *,
        queue_id: int = 0,
        port: int = 0xFFFF,
        nb_desc: int = 64,
        gil: str = "auto",
    ) -> None: ...
