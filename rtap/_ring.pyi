# SPDX-License-Identifier: BSD-3-Clause
from collections.abc import Callable, Iterable

from typing_extensions import Buffer

from rtap._core.mempool import Mempool
from rtap._core.rx_queue import RxQueueBase
from rtap._core.tx_queue import TxQueueBase

STATE_SIZE: int

def purge(fd: int) -> int: ...

class RxQueue(RxQueueBase):
    def __init__(
        self,
        fd: int,
        pool: Mempool,
        *,
        name: str,
        queue_id: int = 0,
        port: int = 0xFFFF,
        nb_desc: int = 64,
        vnet_hdr: bool = True,
        max_frame: int = 1522,
        scatter: bool = False,
        l2: bool = True,
        offloads: int = 0,
        split: Mempool | None = None,
        shared: bool = False,
        packet: bool = False,
        state_fd: int = -1,
        engine: str = "auto",
        gil: str = "auto",
    ) -> None: ...
    @property
    def max_frame(self) -> int: ...
    @property
    def scatter(self) -> bool: ...
    @property
    def room(self) -> int: ...
    @property
    def wake(self) -> int: ...
    def resize(self, max_frame: int, pool: Mempool | None = None) -> None: ...
    def set_filter(
        self, on: bool, *, allmulticast: bool = False, addresses: Iterable[Buffer] = ()
    ) -> None: ...
    def purge(self) -> int: ...
    def renew(self) -> None: ...
    def lose(self) -> None: ...
    def close(self) -> None: ...

class TxQueue(TxQueueBase):
    def __init__(
        self,
        fd: int,
        *,
        name: str,
        queue_id: int = 0,
        port: int = 0xFFFF,
        nb_desc: int = 64,
        vnet_hdr: bool = True,
        l2: bool = True,
        ordered: bool = False,
        on_refused: Callable[[int], object] | None = None,
        gro: bool = False,
        gro_udp: bool = False,
        shared: bool = False,
        packet: bool = False,
        state_fd: int = -1,
        engine: str = "auto",
        gil: str = "auto",
    ) -> None: ...
    def renew(self) -> None: ...
    def close(self) -> None: ...
    software_gso: int
