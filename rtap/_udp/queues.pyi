# SPDX-License-Identifier: BSD-3-Clause
from rtap._core.mempool import Mempool
from rtap._core.rx_queue import RxQueueBase
from rtap._core.tx_queue import TxQueueBase
from rtap._udp.peers import Peers

class UdpRxQueue(RxQueueBase):
    def __init__(
        self,
        fd: int,
        pool: Mempool,
        peers: Peers,
        *,
        name: str,
        connected: bool = False,
        queue_id: int = 0,
        port: int = 0xFFFF,
        nb_desc: int = 64,
        gil: str = "auto",
    ) -> None: ...
    @property
    def wake(self) -> int: ...
    def purge(self) -> int: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...

class UdpTxQueue(TxQueueBase):
    def __init__(
        self,
        fd: int,
        peers: Peers,
        *,
        name: str,
        connected: bool = False,
        queue_id: int = 0,
        port: int = 0xFFFF,
        nb_desc: int = 64,
        gil: str = "auto",
    ) -> None: ...
    @property
    def gso_refused(self) -> str | None: ...
    def stop(self) -> None: ...
