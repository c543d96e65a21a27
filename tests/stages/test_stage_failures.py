# SPDX-License-Identifier: BSD-3-Clause
"""Stages that fail: no frame passes them, and the reason is reported."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from forks import alone
from support import eventually

import rtap
from rtap import Burst, EthDev, Mempool, RouteStats, Worker, stages

STAGE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
INT_MIN = -(1 << 31)


@pytest.fixture
def pool() -> Iterator[Mempool]:
    with Mempool(256) as pool:
        yield pool


@pytest.fixture
def null(pool: Mempool) -> Iterator[EthDev]:
    """A started net_null device with two queue pairs."""
    with rtap.probe("net_null0,size=64") as dev:
        dev.configure(2, 2)
        for q in range(2):
            dev.rx_queue_setup(q, 64, pool)
            dev.tx_queue_setup(q, 64)
        dev.start()
        yield dev


def fate(dev: EthDev, *chain: Any) -> RouteStats:
    """The final figures of a route that ends by itself."""
    worker = Worker()
    worker.forward((dev, 0), (dev, 0), stages=chain)
    worker.start()
    assert worker.join(10)
    (route,) = worker.stats().routes
    return route


@contextlib.contextmanager
def ignored(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Exceptions that Python reports as unraisable."""
    found: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda seen: found.append(seen.exc_type))
        yield found


class Mute(Exception):
    """An exception that cannot be printed."""

    def __init__(self, why: BaseException) -> None:
        super().__init__()
        self.why = why

    def __str__(self) -> str:
        raise self.why


# ---- closed, whatever fails on the way


class Broken(logging.Handler):
    def __init__(self, why: BaseException) -> None:
        super().__init__()
        self.why = why

    def handle(self, record: logging.LogRecord) -> bool:
        raise self.why


@pytest.fixture
def broken_log(request: pytest.FixtureRequest) -> Iterator[BaseException]:
    handler = Broken(request.param)
    logger = logging.getLogger("rtap")
    logger.addHandler(handler)
    yield handler.why
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    "broken_log",
    [KeyboardInterrupt(), SystemExit(3), MemoryError(), ValueError("disk full")],
    ids=lambda why: type(why).__name__,
    indirect=True,
)
def test_closed_when_the_log_fails(
    null: EthDev, pool: Mempool, broken_log: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(burst: Burst) -> None:
        raise LookupError("no customer 4711")

    with ignored(monkeypatch) as seen:
        route = fate(null, refuse)
    assert seen == [type(broken_log)] * 2  # for the stage, and for its route's end
    assert route.tx_packets == 0
    assert route.rx_packets == route.stages[0].drops > 0
    assert "no customer 4711" in route.error
    burst = pool.alloc_burst(4, bytes(60))
    with pytest.raises(LookupError, match="4711"):
        stages.Call(refuse)(burst)
    assert len(burst) == 0
    assert pool.in_use == 0


def test_closed_when_its_clearing_up_fails(
    null: EthDev,
    pool: Mempool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def cannot(tb: Any) -> None:
        raise MemoryError

    def refuse(burst: Burst) -> None:
        raise LookupError("no customer 4711")

    with ignored(monkeypatch) as seen, monkeypatch.context() as patch:
        patch.setattr(traceback, "clear_frames", cannot)
        route = fate(null, refuse)
        burst = pool.alloc_burst(4, bytes(60))
        with pytest.raises(LookupError, match="4711"):
            stages.Call(refuse)(burst)
        assert len(burst) == 0
    caplog.clear()  # a record holds the exception, which holds the frames
    assert seen == [MemoryError] * 2
    assert (route.tx_packets, route.stages[0].drops) == (0, route.rx_packets)
    assert "no customer 4711" in route.error


@pytest.mark.parametrize("why", [ValueError(), KeyboardInterrupt(), SystemExit()], ids=repr)
def test_closed_when_the_exception_cannot_be_printed(null: EthDev, why: BaseException) -> None:
    def refuse(burst: Burst) -> None:
        raise Mute(why)

    logging.getLogger("rtap").addHandler(quiet := logging.NullHandler())
    try:
        route = fate(null, refuse)
    finally:
        logging.getLogger("rtap").removeHandler(quiet)
    assert (route.tx_packets, route.stages[0].drops) == (0, route.rx_packets)
    assert route.error.endswith(": Mute, whose message cannot be read")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exceptions_that_end_programs_end_a_route(null: EthDev, kind: type[BaseException]) -> None:
    def refuse(burst: Burst) -> None:
        raise kind

    route = fate(null, refuse)
    assert (route.tx_packets, route.stages[0].drops) == (0, route.rx_packets)
    assert route.error.endswith(f": {kind.__name__}")


# ---- told


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tof text", "ValueError: two lines of text"),
        ("é" * 1000, "ValueError: " + "é" * 121),
        ("\udcff", "ValueError: \\udcff"),
        ("a\0b", "ValueError: a"),
        ("", "ValueError"),
    ],
)
def test_its_text_is_one_line_of_bounded_length(null: EthDev, text: str, shown: str) -> None:
    def refuse(burst: Burst) -> None:
        raise ValueError(text)

    error = fate(null, refuse).error
    assert error == f"stage 0 (refuse) of the route from rx queue 0 of net_null0: {shown}"
    assert len(shown.encode()) < 256


def test_each_route_has_its_own(null: EthDev) -> None:
    """Each use of a stage has its own error: in two concurrent routes, and in two threads."""
    both = threading.Barrier(2)

    def refuse(burst: Burst) -> None:
        both.wait(10)
        raise LookupError(threading.current_thread().name)

    stage = stages.Call(refuse)
    workers = [Worker(name=f"worker-{n}") for n in range(2)]
    for n, worker in enumerate(workers):
        worker.forward((null, n), (null, n), stages=[stage])
        worker.start()
    for n, worker in enumerate(workers):
        assert worker.join(10)
        assert worker.stats().routes[0].error.endswith(f": LookupError: worker-{n}")
    assert isinstance(stage.exception, LookupError)

    raised: dict[str, str] = {}

    def use() -> None:
        with Mempool(2) as pool:
            try:
                stage(pool.alloc_burst(2))
            except LookupError as exc:
                raised[threading.current_thread().name] = str(exc)

    threads = [threading.Thread(target=use, name=f"thread-{n}") for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert raised == {f"thread-{n}": f"thread-{n}" for n in range(2)}


def test_what_it_raised_holds_no_frames(null: EthDev, pool: Mempool) -> None:
    """The exception that caused it holds none either."""

    def inner(burst: Burst) -> None:
        _held = list(burst)
        raise KeyError("first")

    def outer(burst: Burst) -> None:
        _kept = burst[0]
        try:
            inner(burst)
        except KeyError as exc:
            raise ValueError("second") from exc

    stage = stages.Call(outer)
    assert fate(null, stage).error.endswith("ValueError: second")
    assert isinstance(stage.exception, ValueError)
    eventually(lambda: pool.in_use == 0, "the frames are back")


def test_a_name_is_asked_for_once(null: EthDev) -> None:
    """A stage's name is read when the stage is made; reading figures runs no user code."""

    class Odd:
        asked = 0

        @property
        def __name__(self) -> str:
            Odd.asked += 1
            if Odd.asked > 1:
                raise RuntimeError("again")
            return "odd"

        def __call__(self, burst: Burst) -> None:
            raise ValueError("no")

    route = fate(null, Odd())
    assert (route.stages[0].stage, route.stages[0].name) == ("odd", "odd")
    assert "stage 0 (odd) of" in route.error


# ---- native ones


def returns(value: int) -> stages.Native:
    return stages.Native(STAGE(lambda ctx, burst: value))


@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        (-errno.EINVAL, errno.EINVAL, "Invalid argument"),
        (errno.EINVAL, errno.EINVAL, "Invalid argument"),
        (-4095, 4095, "Unknown error 4095"),
        (-4096, errno.EPROTO, "it returned -4096, which is neither 0 nor -errno"),
        (4096, errno.EPROTO, "it returned 4096, which is neither 0 nor -errno"),
        (INT_MIN, errno.EPROTO, f"it returned {INT_MIN}, which is neither 0 nor -errno"),
        (-INT_MIN - 1, errno.EPROTO, f"it returned {-INT_MIN - 1}, which is neither"),
    ],
)
def test_whatever_it_returns_is_an_error(
    null: EthDev, pool: Mempool, value: int, code: int, says: str
) -> None:
    route = fate(null, returns(value))
    assert says in route.error
    assert (route.tx_packets, route.stages[0].drops) == (0, route.rx_packets)
    burst = pool.alloc_burst(4, bytes(60))
    with pytest.raises(OSError, match=says) as failed:
        returns(value)(burst)
    assert failed.value.errno == code
    assert len(burst) == 0


def test_the_event_says_what_was_raised(null: EthDev) -> None:
    heard: list[RouteStats] = []
    come = threading.Event()

    def hear(dev: EthDev, event: rtap.EthEvent, data: Any) -> None:
        heard.append(data)
        come.set()

    def refuse(burst: Burst) -> None:
        raise LookupError("no customer 4711")

    handle = null.callback_register(rtap.EthEvent.ROUTE_END, hear)
    fate(null, refuse)
    assert come.wait(10)
    handle.unregister()
    assert heard[0].error.endswith("LookupError: no customer 4711")
    assert (heard[0].device, heard[0].port, heard[0].queue) == ("net_null0", null.port_id, 0)


def test_frames_added_meanwhile_come_behind(pool: Mempool) -> None:
    """While a stage works on a burst's frames, it looks empty, and others may add to it."""
    burst = pool.alloc_burst(2, bytes(60))
    seen: list[int] = []

    def add(context: int | None, frames: int | None) -> int:
        seen.append(len(burst))
        burst.extend(pool.alloc_burst(40, bytes(70)))
        return 0

    stages.Native(STAGE(add))(burst)
    assert seen == [0]
    assert [len(mbuf) for mbuf in burst] == [60] * 2 + [70] * 40
    burst.free()
    assert pool.in_use == 0


# ---- no memory


def call_without_memory(testcapi: Any) -> None:
    """One allocation of each call fails: the first, the second, and so on."""
    with Mempool(64) as pool, Mempool(64) as split:
        chain: list[Callable[[Burst, int], Any]] = [stages.Gso(split), stages.Counter()]
        for stage in chain:
            for step in range(40):
                burst = pool.alloc_burst(4, bytes(60))
                testcapi.set_nomemory(step, step + 1)
                try:
                    stage(burst, 1)
                except MemoryError:
                    failed = True
                else:
                    failed = False
                finally:
                    testcapi.remove_mem_hooks()
                assert len(burst) == 4, (stage, step, failed)
                burst.free()
        assert pool.in_use == 0


def test_no_memory_for_a_burst_from_python() -> None:
    """At whatever step it fails, the burst is complete again and the stage and its pool work."""
    testcapi = pytest.importorskip("_testcapi")
    alone(lambda: call_without_memory(testcapi))
