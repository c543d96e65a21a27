# SPDX-License-Identifier: BSD-3-Clause
"""Buffers shared between threads: nothing is corrupted or lost.

With a GIL, these tests cover the code that releases it; on a free-threaded interpreter, they cover
all that threads share (see docs/freethreading.md).
"""

from __future__ import annotations

import contextlib
import random
import sys
import sysconfig
import threading
from collections.abc import Iterator

import pytest
from support import PacketSocket, Tap, python
from together import THREADS, empty_after, in_threads, may_raise, together, tolerant

from rtap import Burst, Mbuf, Mempool, NetNS, PoolEmpty
from rtap._queues.null import NullRxQueue, NullTxQueue

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

pytestmark = pytest.mark.thread_unsafe(reason="makes its own threads")


@pytest.fixture
def pool() -> Iterator[Mempool]:
    yield from empty_after()


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """With a GIL, makes threads switch as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


EVERYTHING = """
import importlib, pkgutil, sys
has_gil = getattr(sys, "_is_gil_enabled", lambda: True)  # since 3.13
print(has_gil())
import rtap
for module in pkgutil.walk_packages(rtap.__path__, "rtap."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
compiled = [name for name, m in sys.modules.items()
            if name.startswith("rtap.") and str(getattr(m, "__file__", "")).endswith(".so")]
assert len(compiled) >= 13, compiled
print(has_gil())
"""


def test_the_gil_stays_as_it_was() -> None:
    """Where the GIL is off, it stays off.

    The import of a module that does not declare support would turn it on, with a warning.
    """
    done = python(EVERYTHING, warnings="error")
    has_gil = str(not FREE_THREADED)
    assert (done.stdout.split(), done.stderr) == ([has_gil, has_gil], "")


# ---- pools


def test_a_buffer_is_never_given_out_twice(pool: Mempool) -> None:
    def job(me: int) -> None:
        rng = random.Random(me)
        mine: list[tuple[Mbuf, bytes]] = []
        for i in range(1500):
            try:
                for mbuf in pool.alloc_burst(rng.randrange(1, 40)):
                    label = b"%d:%d" % (me, i)
                    mbuf.append(len(label))[:] = label
                    mine.append((mbuf, label))
                mine.append((pool.alloc(b"one"), b"one"))
            except PoolEmpty:
                pass
            rng.shuffle(mine)
            for mbuf, label in mine[50:]:
                assert bytes(mbuf) == label
                if rng.random() < 0.5:
                    mbuf.free()
            del mine[50:]

    in_threads(job)


def test_close_against_alloc() -> None:
    """Either the pool closes first, or a buffer keeps it open."""

    def job(me: int) -> None:
        for mempool in pools:
            for _ in range(3):
                with may_raise(PoolEmpty), may_raise(ValueError, says="closed"):
                    mbuf = mempool.alloc(b"x")
                    assert bytes(mbuf) == b"x"
                    assert mempool.available < 8
                    mbuf.free()
                    if me == 0:
                        with may_raise(BufferError):
                            mempool.close()

    pools = [Mempool(8, 64) for _ in range(300)]
    in_threads(job, 4)
    for mempool in pools:
        mempool.close()


def test_close_against_queues() -> None:
    def job(me: int) -> None:
        for mempool in pools:
            with may_raise(ValueError, says="closed"):
                rx = NullRxQueue(mempool, name="n")
                rx.start()
                assert len(rx.rx_burst(2)) == 2
                rx.close()
            with may_raise(BufferError):
                mempool.close()

    pools = [Mempool(32, 64) for _ in range(200)]
    in_threads(job, 4)
    for mempool in pools:
        mempool.close()


# ---- bursts


def test_a_burst_that_everybody_changes(pool: Mempool, quick_switches: None) -> None:
    shared = Burst()

    def job(me: int) -> None:
        rng = random.Random(me)
        other = Burst()
        for _ in range(1500):
            n = len(shared)
            choice = rng.randrange(12)
            # There are as many values as there were frames before.
            with may_raise(IndexError, PoolEmpty), may_raise(ValueError, says="burst of"):
                if choice < 3:
                    shared.append(pool.alloc(b"%d" % me))
                elif choice == 3:
                    shared.extend([pool.alloc(b"list")] * 3)
                elif choice == 4:
                    other.extend(shared)
                elif choice == 5:
                    shared.extend(other[:5])
                elif choice == 6:
                    other = shared.select(range(0, n, 2))
                elif choice == 7:
                    assert all(len(mbuf) > 0 for mbuf in shared)
                elif choice == 8:
                    lengths = shared.lengths
                    assert all(lengths)
                    shared.ol_flags = 1 << 60
                    assert set(shared.ol_flags) <= {0, 1 << 60}
                elif choice == 9:
                    assert bytes(shared.gather(0, 1)).count(0) == 0
                elif choice == 10:
                    assert len(bytes(shared[n // 2])) > 0
                elif n > 100 or rng.random() < 0.3:
                    shared.free()
            if len(other) > 200 or rng.random() < 0.1:
                other.free()

    in_threads(job)
    shared.free()


def test_two_bursts_into_each_other(pool: Mempool) -> None:
    """Two threads take the locks of both bursts in opposite orders."""
    for _ in range(100):
        a, b = Burst([pool.alloc(b"a")]), Burst([pool.alloc(b"b")])
        together(lambda a=a, b=b: a.extend(b), lambda a=a, b=b: b.extend(a))
        assert len(a) + len(b) in (4, 5)


def test_each_frame_is_sent_once(pool: Mempool) -> None:
    queues = [NullTxQueue(f"q{i}") for i in range(THREADS)]
    for queue in queues:
        queue.start()
    shared = Burst()
    appended = 0
    done = threading.Event()

    def send(me: int) -> int:
        sent = 0
        while not done.is_set() or len(shared):
            sent += queues[me].tx_burst(shared)
        return sent

    def fill() -> int:
        nonlocal appended
        for _ in range(3000):
            try:
                burst = pool.alloc_burst(7, b"frame")
            except PoolEmpty:
                continue
            shared.extend(burst)
            appended += len(burst)
        done.set()
        return 0

    sent = together(fill, *(lambda i=i: send(i) for i in range(THREADS)))
    assert sum(sent) == appended == sum(queue.counters()["packets"] for queue in queues)
    assert appended > 0
    for queue in queues:
        queue.close()


# ---- mbufs


def test_a_frame_that_everybody_resizes(pool: Mempool, quick_switches: None) -> None:
    """Several objects resize one frame: its window stays in its slot, and neighbours are intact."""
    burst = pool.alloc_burst(3, b"\x11" * 100)
    held = [bytes(burst[0]), bytes(burst[2])]
    slot = burst[1].headroom + 100 + burst[1].tailroom

    def job(me: int) -> None:
        rng = random.Random(me)
        mbuf = burst[1]
        for _ in range(3000):
            n = rng.randrange(1, 200)
            choice = rng.randrange(7)
            if choice == 0:
                tolerant(lambda n=n: mbuf.prepend(n), ValueError)
            elif choice == 1:
                with contextlib.suppress(ValueError):
                    mbuf.append(n)[:] = b"\x22" * n
            elif choice == 2:
                tolerant(lambda n=n: mbuf.adj(n), ValueError)
            elif choice == 3:
                tolerant(lambda n=n: mbuf.trim(n), ValueError)
            elif choice == 4:
                assert len(memoryview(mbuf)) <= slot
            elif choice == 5:
                tolerant(lambda: bytes(mbuf), ValueError)  # it shrank while it was read
            else:
                tolerant(lambda: bytes(mbuf.clone()), ValueError, PoolEmpty)

    in_threads(job)
    mbuf = burst[1]
    assert mbuf.headroom + mbuf.data_len + mbuf.tailroom == slot
    assert mbuf.pkt_len == mbuf.data_len
    assert [bytes(burst[0]), bytes(burst[2])] == held


def test_freed_while_others_look(pool: Mempool, quick_switches: None) -> None:
    for _ in range(150):
        mbuf = pool.alloc(b"z" * 600)  # in three segments

        def look(mbuf: Mbuf = mbuf) -> None:
            with may_raise(BufferError), may_raise(ValueError, says="freed"):
                for _ in range(20):
                    assert bytes(mbuf) == b"z" * 600
                    assert mbuf[3:9] == b"zzzzzz"
                    assert len(mbuf) == 600
                    mbuf.l2_len = 14
                    assert mbuf.nb_segs == 3
                    rest = mbuf.next
                    assert rest is not None
                    assert len(rest.data) > 0 or rest.nb_segs > 1

        together(look, look, mbuf.free)
        assert "freed" in repr(mbuf)


def test_a_view_or_free_but_not_both(pool: Mempool, quick_switches: None) -> None:
    freed = kept = 0
    for _ in range(300):
        mbuf = pool.alloc(b"view")

        def take(mbuf: Mbuf = mbuf) -> memoryview | None:
            try:
                return mbuf.data
            except ValueError:
                return None

        def drop(mbuf: Mbuf = mbuf) -> bool:
            try:
                mbuf.free()
            except BufferError:
                return False
            return True

        view, gone = together(take, drop)
        if view is None:
            assert gone
            freed += 1
        elif gone:
            view = None
        if view is not None:
            assert bytes(view) == b"view"
            assert not gone
            kept += 1
    assert freed + kept == 300


def test_growing_or_free_but_not_both(pool: Mempool) -> None:
    """The view from append keeps the frame in use from the moment it exists."""
    for _ in range(300):
        mbuf = pool.alloc(b"x")

        def grow(mbuf: Mbuf = mbuf) -> memoryview | None:
            try:
                return mbuf.append(4)
            except ValueError:
                return None

        def drop(mbuf: Mbuf = mbuf) -> None:
            tolerant(mbuf.free, BufferError)

        view, _ = together(grow, drop)
        if view is not None:
            view[:] = b"abcd"
            assert bytes(mbuf) == b"xabcd"


@pytest.mark.root
@pytest.mark.parametrize("vnet_hdr", [True, False])
def test_sent_while_it_is_resized(netns: NetNS, engine: str, vnet_hdr: bool) -> None:
    """Only bytes of the slot are sent, whatever part of them."""
    pool = Mempool(3, 1024)
    first, mbuf, last = (pool.alloc(bytes([n]) * 1024) for n in (0x55, 0xAA, 0x55))
    for other in (first, last):
        other.prepend(other.headroom)[:] = b"\x55" * 128
    mbuf.prepend(mbuf.headroom)[:] = b"\xaa" * 128
    mbuf.trim(len(mbuf) - 100)
    done = threading.Event()

    def resize() -> None:
        rng = random.Random(1)
        while not done.is_set():
            n = rng.randrange(1, 500)
            for step in (mbuf.append, mbuf.adj, mbuf.prepend, mbuf.trim):
                if step is not mbuf.trim or len(mbuf) > n + 14:
                    tolerant(lambda step=step, n=n: step(n), ValueError)

    with Tap(netns, vnet_hdr=vnet_hdr) as tap, PacketSocket(netns, "tap0", 3, 1 << 22) as sink:
        tx = tap.tx(engine=engine, gil="release")

        def send() -> list[bytes]:
            got = []
            for _ in range(400):
                tx.tx_burst(Burst([mbuf] * 16))
                got += sink.drain()
            done.set()
            return got

        _, got = together(resize, send)
    assert len(got) > 400
    assert {bytes(set(data)) for data in got} == {b"\xaa"}
