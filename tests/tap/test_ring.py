# SPDX-License-Identifier: BSD-3-Clause
"""RxQueue and TxQueue on real TAP devices, both engines: arguments, states, how they end.

Sending is in test_ring_tx.py, receiving in test_ring_rx.py, waiting and threads in
test_ring_threads.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from patience import patient
from rings import receive
from support import Tap, Task, eventually, frame, ip, links, python, skip_without_devices

from rtap import DeviceGone, Mempool, NetNS

pytestmark = pytest.mark.root


# ---- arguments and states


@pytest.mark.parametrize("make", ["rx", "tx"])
@pytest.mark.parametrize(
    "options",
    [
        {"nb_desc": 0},
        {"nb_desc": -1},
        {"nb_desc": 32769},
        {"engine": "fast"},
        {"engine": ""},
        {"gil": "keep"},
    ],
    ids=str,
)
def test_bad_options(tap: Tap, make: str, options: dict[str, Any]) -> None:
    pool = Mempool(8)
    args = (pool,) if make == "rx" else ()
    with pytest.raises(ValueError, match=r"must be") as caught:
        getattr(tap, make)(*args, **options)
    assert str(next(iter(options.values()))) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_frame": 2048}, r"2049.*2048"),
        ({"max_frame": 1 << 16}, r"65537.*2048"),
        ({"max_frame": 13}, r"max_frame must be"),
        ({"max_frame": 1 << 21}, r"max_frame must be"),
        ({"max_frame": 1 << 20, "scatter": True}, r"segments"),
    ],
)
def test_pool_has_to_fit_the_frames(tap: Tap, options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        tap.rx(Mempool(8), **options)


def test_closed_pool_is_refused(tap: Tap) -> None:
    pool = Mempool(8)
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        tap.rx(pool)


@pytest.mark.lifetime
def test_pool_cannot_be_pulled_from_under_a_queue(engine: str) -> None:
    skip_without_devices()
    done = python(
        """
        import sys
        from support import Tap, frame, quiet_netns
        from rtap import Mempool

        with quiet_netns() as ns, Tap(ns) as tap:
            pool = Mempool(8)
            rx = tap.rx(pool, engine=sys.argv[1])
            try:
                pool.close()
            except BufferError as exc:
                print(exc)
            else:
                sys.exit("the pool was closed")
            tap.packets().send(frame(0))
            assert [bytes(m) for m in rx.rx_burst(8, 5)] == [frame(0)]
            rx.close()
            pool.close()
            assert rx.counters()["packets"] == 1
        """,
        engine,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("n", [0, -1, 1 << 31, 1 << 40])
def test_rx_burst_size(tap: Tap, n: int) -> None:
    with pytest.raises(ValueError, match=r"n must be"):
        tap.rx(Mempool(8)).rx_burst(n)


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), float("inf")])
def test_rx_burst_bad_timeout(tap: Tap, timeout: float) -> None:
    with pytest.raises(ValueError, match=r"timeout must be None or at least 0"):
        tap.rx(Mempool(8)).rx_burst(8, timeout)


@pytest.mark.parametrize("arguments", [("8",), (None,), (8, "1"), (8, [])])
def test_rx_burst_of_other_types(tap: Tap, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        tap.rx(Mempool(8)).rx_burst(*arguments)


@pytest.mark.parametrize("burst", [None, [], b"frame", 5])
def test_tx_burst_takes_a_burst(tap: Tap, burst: Any) -> None:
    with pytest.raises(TypeError):
        tap.tx().tx_burst(burst)


@pytest.mark.lifetime
@pytest.mark.parametrize("kind", ["RxQueue", "TxQueue"])
def test_never_initialised_queue(kind: str) -> None:
    done = python(
        f"""
        from rtap._ring import {kind}
        queue = {kind}.__new__({kind})
        for use in ("counters", "reset_counters", "start", "stop", "close", "__repr__"):
            try:
                getattr(queue, use)()
            except (RuntimeError, ValueError):
                pass
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_states(tap: Tap, engine: str) -> None:
    pool = Mempool(8)
    rx = tap.rx(pool, engine=engine, start=False)
    tx = tap.tx(engine=engine, start=False)
    burst = pool.alloc_burst(1, frame(1))
    uses: list[Callable[[], Any]] = [rx.rx_burst, lambda: tx.tx_burst(burst)]
    for use in uses:
        with pytest.raises(RuntimeError, match="not started"):
            use()
    rx.start()
    tx.start()
    assert len(rx.rx_burst()) == 0
    assert tx.tx_burst(burst) == 1
    burst = pool.alloc_burst(1, frame(1))
    for queue in (rx, tx):
        queue.stop()
        queue.stop()
    for use in uses:
        with pytest.raises(RuntimeError, match="not started"):
            use()
    rx.start()
    tx.start()
    assert len(rx.rx_burst()) == 0
    assert tx.tx_burst(burst) == 1
    burst = pool.alloc_burst(1, frame(1))
    for queue in (rx, tx):
        queue.close()
        queue.close()
        queue.stop()
        with pytest.raises(RuntimeError, match="closed"):
            queue.start()
    for use in uses:
        with pytest.raises(RuntimeError, match="closed"):
            use()
    assert len(burst) == 1
    assert tx.counters()["packets"] == 2
    assert rx.counters()["packets"] == 0


def test_reports_its_engine(tap: Tap, engine: str) -> None:
    pool = Mempool(8)
    for queue in (tap.rx(pool, engine=engine), tap.tx(engine=engine)):
        assert queue.engine == engine
        assert queue.engine_reason.startswith("asked for")


def test_auto_says_which_engine_and_why(tap: Tap) -> None:
    pool = Mempool(8)
    for queue in (tap.rx(pool, engine="auto"), tap.tx(engine="auto")):
        assert queue.engine in ("uring", "syscall")
        assert len(queue.engine_reason) > 10
    tap.tx(engine="auto").tx_burst(pool.alloc_burst(8, frame(1)))
    assert tap.counters()["rx_packets"] == 8


# ---- stop, close


@pytest.mark.parametrize("how", ["stop", "close"])
@pytest.mark.parametrize("timeout", [None, 30.0])
def test_stop_ends_a_waiter(tap: Tap, engine: str, how: str, timeout: float | None) -> None:
    rx = tap.rx(Mempool(8), engine=engine)
    waiter = Task(rx.rx_burst, 8, timeout)
    time.sleep(0.03)
    before = time.monotonic()
    getattr(rx, how)()
    took = time.monotonic() - before
    with pytest.raises(RuntimeError, match=r"stopped|not started|closed"):
        waiter.result(10)
    assert took < patient(0.2)


def test_descriptor_is_free_when_the_queue_is_closed(netns: NetNS, engine: str) -> None:
    """No ring holds the interface: it goes away although this thread keeps its ring."""
    pool = Mempool(64)
    for _ in range(10):
        tap = Tap(netns)
        packets = tap.packets()
        rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)
        for i in range(20):
            tx.tx_burst(pool.alloc_burst(4, frame(i)))
            packets.send(frame(i))
            assert receive(rx, 1) == [frame(i)]
        tap.close()
        eventually(lambda: "tap0" not in links(netns), "the interface is gone, the ring is not")
    assert pool.in_use == 0


# ---- interface down, gone


def test_interface_down(tap: Tap, engine: str) -> None:
    pool = Mempool(64)
    rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)
    tap.set("down")
    burst = pool.alloc_burst(64, frame(1))
    assert tx.tx_burst(burst) == 64
    assert (len(burst), pool.in_use) == (0, 0)
    counters = tx.counters()
    assert (counters["down"], counters["errors"], counters["packets"]) == (64, 64, 0)
    before = time.monotonic()
    assert len(rx.rx_burst(8, 0.1)) == 0
    assert 0.1 <= time.monotonic() - before < patient(1)
    assert len(rx.rx_burst(8, 0)) == 0
    assert set(rx.counters().values()) == {0}
    tap.set("up")
    packets = tap.packets()
    assert tx.tx_burst(pool.alloc_burst(3, frame(2))) == 3
    assert packets.drain() == [frame(2)] * 3
    packets.send(frame(3))
    assert receive(rx, 1) == [frame(3)]


def test_interface_goes_down_and_up_during_a_wait(tap: Tap, engine: str) -> None:
    rx = tap.rx(Mempool(8), engine=engine)
    waiter = Task(receive, rx, 1, 64, 20)
    tap.set("down")
    tap.set("up")
    tap.packets().send(frame(8))
    assert waiter.result() == [frame(8)]


def test_deleted_interface(tap: Tap, engine: str) -> None:
    pool = Mempool(64)
    rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)
    rx.name = tx.name = "renamed7"
    ip(tap.ns, "link", "del", "tap0")
    burst = pool.alloc_burst(32, frame(1))
    for timeout in (0, 0.5, None):
        with pytest.raises(DeviceGone, match="renamed7") as gone:
            rx.rx_burst(8, timeout)
        assert (gone.value.ifname, gone.value.sent) == ("renamed7", 0)
        assert isinstance(gone.value, OSError)
    for _ in range(2):
        with pytest.raises(DeviceGone, match="renamed7") as gone:
            tx.tx_burst(burst)
        assert (gone.value.ifname, gone.value.sent) == ("renamed7", 0)
        assert len(burst) == 32
        assert burst[0][:] == frame(1)
    assert tx.counters()["errors"] == 0
    burst.free()
    assert pool.in_use == 0
    for queue in (rx, tx):
        queue.close()


def test_interface_deleted_during_a_wait(tap: Tap, engine: str) -> None:
    rx = tap.rx(Mempool(8), engine=engine)
    waiter = Task(rx.rx_burst, 8, None)
    time.sleep(0.03)
    ip(tap.ns, "link", "del", tap.name)
    before = time.monotonic()
    with pytest.raises(DeviceGone) as gone:
        waiter.result(10)
    assert gone.value.ifname == tap.name
    assert waiter.ended - before < patient(0.5)


def test_interface_deleted_during_sends(netns: NetNS, engine: str) -> None:
    """`sent`, the frames left in the burst, and the queue's counters agree to the frame."""
    pool = Mempool(8192, 128)
    for delay in (0.0, 0.002, 0.01):
        with Tap(netns) as tap:
            tx = tap.tx(engine=engine, gil="release")
            total = 0
            thread = threading.Timer(delay, ip, (netns, "link", "del", tap.name))
            thread.start()
            gone = None
            while gone is None:
                burst = pool.alloc_burst(8000, frame(1))
                try:
                    total += tx.tx_burst(burst)
                except DeviceGone as exc:
                    gone = exc
            total += gone.sent
            assert len(burst) == 8000 - gone.sent
            assert pool.in_use == len(burst)
            thread.join()
            counters = tx.counters()
            assert counters["packets"] + counters["errors"] == total
            del burst
            assert pool.in_use == 0


# ---- where io_uring is not allowed


@pytest.mark.parametrize("code", ["EPERM", "ENOSYS"])
def test_io_uring_blocked_by_seccomp(code: str) -> None:
    """As in a container with Docker's default profile."""
    skip_without_devices()
    done = python(
        """
        import errno, os, sys
        from support import Tap, block_io_uring, frame, quiet_netns
        import rtap
        from rtap import Mempool

        block_io_uring(getattr(errno, sys.argv[1]))
        with quiet_netns() as ns, Tap(ns) as tap:
            pool = Mempool(64)
            for queue in (tap.rx(pool, engine="auto"), tap.tx(engine="auto")):
                assert queue.engine == "syscall", queue.engine
                print(queue.engine_reason)
            rx, packets = tap.rx(pool), tap.packets()
            packets.send(frame(1))
            assert [bytes(m) for m in rx.rx_burst(8, 5)] == [frame(1)]
            assert tap.tx().tx_burst(pool.alloc_burst(9, frame(2))) == 9
            assert packets.drain() == [frame(2)] * 9
            for make in (lambda: tap.tx(engine="uring"), lambda: tap.rx(pool, engine="uring")):
                try:
                    make()
                except OSError as exc:
                    print(exc)
                else:
                    sys.exit("engine='uring' was not refused")
            with rtap.open("tap1", netns=ns) as dev:
                info = dev.info()
                assert info.engine == "syscall", info
                print(info.engine_reason)
                assert dev.send(frame(3)) is True
            try:
                rtap.open("tap2", netns=ns, engine="uring")
            except OSError as exc:
                print(exc)
            else:
                sys.exit("engine='uring' was not refused")
        """,
        code,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert "io_uring is blocked" in line
        assert {"EPERM": "Operation not permitted", "ENOSYS": "not implemented"}[code] in line
        assert line.count("\n") == 0


def test_little_locked_memory(engine: str) -> None:
    """Buffers are registered where the limit allows; otherwise sends work without them."""
    skip_without_devices()
    done = python(
        """
        import os, resource, sys
        from support import Tap, frame, quiet_netns
        from rtap import Mempool

        with quiet_netns() as ns, Tap(ns) as tap:
            packets = tap.packets(rcvbuf=1 << 24)
            rx_pool, pool = Mempool(1024), Mempool(1024, memfd=True)
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            rx, tx = tap.rx(rx_pool, engine=sys.argv[1]), tap.tx(engine=sys.argv[1])
            for i in range(100):
                frames = [frame(64 * i + j) for j in range(64)]
                assert tx.tx_burst(pool.alloc_burst(64, frames)) == 64
                assert packets.drain() == frames
                for f in frames:
                    packets.send(f)
                assert [bytes(m) for m in rx.rx_burst(64)] == frames
            assert rx_pool.in_use == pool.in_use == 0
        """,
        engine,
    )
    assert (done.returncode, done.stderr) == (0, "")
