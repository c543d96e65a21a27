# SPDX-License-Identifier: BSD-3-Clause
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Protocol

from typing_extensions import Self

from rtap._core.burst import Burst
from rtap._core.rx_queue import RxQueueBase
from rtap._core.tx_queue import TxQueueBase
from rtap._work.figures import WorkerStats
from rtap.stages import Stage

class _Source(Protocol):
    def rx_queue(self, queue: int, /) -> object: ...

class _Target(Protocol):
    def tx_queue(self, queue: int, /) -> object: ...

class _RingSource(Protocol):
    @property
    def rx_queue(self) -> RxQueueBase: ...

class _RingTarget(Protocol):
    @property
    def tx_queue(self) -> TxQueueBase: ...

class Worker:
    def __init__(
        self,
        cpu: int | None = None,
        wait: str = "adaptive",
        *,
        burst: int = 64,
        resume_latency: int | None = None,
        name: str = "rtap-worker",
    ) -> None: ...
    @property
    def cpu(self) -> int | None: ...
    @property
    def wait(self) -> str: ...
    @property
    def resume_latency(self) -> int | None: ...
    @property
    def name(self) -> str: ...
    @property
    def running(self) -> bool: ...
    def forward(
        self,
        source: tuple[_Source, int] | _RingSource,
        target: tuple[_Target, int] | _RingTarget | list[tuple[_Target, int] | _RingTarget],
        *,
        stages: Iterable[Stage | Callable[[Burst], Sequence[int] | None]] = (),
        on_full: str = "drop",
    ) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def join(self, timeout: float | None = None) -> bool: ...
    def stats(self) -> WorkerStats: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        *exc: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...
