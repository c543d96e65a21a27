# SPDX-License-Identifier: BSD-3-Clause
"""Rings on a kernel that refuses RWF_NOWAIT for TAP devices, as before Linux 6.4.

A cancel ends the reads that find no frame. The tests of rings run a second time in this way (see
tools/suite.py); these are about the cancel itself.
"""

from __future__ import annotations

from pathlib import Path

import preload
import pytest
from rigs import redirect
from rings import BIG
from support import Tap, Task, eventually, frame, seq_of

import rtap
from rtap import Mempool, NetNS

pytestmark = [pytest.mark.root, pytest.mark.lifetime]


@pytest.fixture(autouse=True)
def cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queues opened from now on, and processes started from now on, use rings in this way."""
    monkeypatch.setenv("RTAP_TEST_RING", "cancel")


def test_a_device_says_so(netns: NetNS) -> None:
    with rtap.open("t0", netns=netns, engine="uring") as dev:
        assert dev.info().engine == "uring"
        assert "without RWF_NOWAIT" in dev.info().engine_reason


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 255, 256, 400])
def test_a_burst_takes_what_is_there(netns: NetNS, n: int) -> None:
    """Fewer and more frames than the last time, and as many as a ring has entries."""
    pool = Mempool(900)
    with Tap(netns) as tap:
        packets = tap.packets(rcvbuf=BIG)
        rx = tap.rx(pool, engine="uring", nb_desc=256)
        for there in (n, n, n // 2, 0, n, 2 * n, 1):
            frames = [frame(i) for i in range(there)]
            for each in frames:
                packets.send(each)
            got = []
            while len(burst := rx.rx_burst(n)):
                got += [bytes(m) for m in burst]
            assert got == frames
            del burst
            assert pool.in_use == 0
        assert rx.counters()["errors"] == 0


def test_frames_that_come_during_bursts(netns: NetNS) -> None:
    """None is lost. That results are taken in the order of their completions shows rarely, and
    only with millions of frames: see whole/test_flow_order.py."""
    total, pool = 200_000, Mempool(1024)
    with Tap(netns, "tap0") as a, Tap(netns, "tap1") as b:
        netns.run(["ip", "link", "set", "tap0", "txqueuelen", "4096"], check=True)
        redirect(netns, "tap1", "tap0")
        rx, tx = a.rx(pool, engine="uring"), b.tx(engine="syscall")
        sent = seen = 0

        def near() -> bool:
            return sent - seen < 3000

        def send() -> None:
            nonlocal sent
            source = Mempool(64)
            while sent < total:
                n = 1 + sent % 37  # batches of the receiver are too long as often as too short
                burst = source.alloc_burst(n, [frame(sent + i) for i in range(n)])
                while len(burst):
                    tx.tx_burst(burst)
                sent += n
                eventually(near, "the receiver is near")

        sender = Task(send)
        while sender.is_alive() or seen < sent:
            numbers = [seq_of(bytes(mbuf)) for mbuf in rx.rx_burst(64, 0.02)]
            assert numbers == list(range(seen, seen + len(numbers)))
            seen += len(numbers)
        sender.result()
        assert seen == sent == a.counters()["tx_packets"]
        assert a.counters()["tx_dropped"] == 0
    assert pool.in_use == 0


# ---- a cancel that does not work, in a process of its own

PRELUDE = """
import ctypes, errno, json, sys
from support import Tap, frame, quiet_netns
from rtap import Mempool
from rtap._ring import RxQueue

shim = ctypes.CDLL(sys.argv[1])
NO_CANCEL, OLD, STUCK = 7, 8, 9  # as in enters.c
"""

LEFT_OVER = """
with Mempool(200) as pool, quiet_netns() as ns, Tap(ns) as tap:
    peer = tap.packets(rcvbuf=1 << 24)
    rx = tap.rx(pool, engine="uring")

    def turn(n):
        for seq in range(n):
            peer.send(frame(seq))
        burst = rx.rx_burst(64)
        assert [bytes(m) for m in burst] == [frame(seq) for seq in range(n)]

    for attempt in range(20):
        turn(64)  # so that the next burst asks for as many
        shim.watch(NO_CANCEL, 1)
        turn(20)
        assert shim.hit() == 1
        assert pool.in_use == 0  # the reads that were left over have ended
        shim.watch(0, 0)
        turn(0)
    counters = rx.counters()
    assert (counters["packets"], counters["errors"]) == (20 * 84, 0), counters
print(json.dumps("fine"))
"""

NEVER_END = """
with quiet_netns() as ns, Tap(ns) as tap:
    pool = Mempool(200)
    peer = tap.packets(rcvbuf=1 << 24)
    rx = tap.rx(pool, engine="uring")
    for n in (64, 20):
        for seq in range(n):
            peer.send(frame(seq))
        shim.watch(STUCK, n == 20)
        burst = rx.rx_burst(64)
        assert [bytes(m) for m in burst] == [frame(seq) for seq in range(n)]
    assert shim.hit() == 1
    shim.watch(0, 0)
    # The kernel may still write into the buffers of the other reads: nobody gets them again.
    del burst
    assert pool.in_use == 44, pool.in_use
    counters = rx.counters()
    assert (counters["read_errors"], counters["errors"]) == (44, 44), counters
    # Reads of the ring that was closed may take frames until the kernel has ended it.
    for attempt in range(100):
        peer.send(frame(attempt))
        burst = rx.rx_burst(1, 0.1)
        if len(burst):
            break
    assert [bytes(m) for m in burst] == [frame(attempt)]
    del burst
    assert pool.in_use == 44
    rx.close()
    try:
        pool.close()
    except BufferError as exc:
        assert "44 of 200 mbufs are in use" in str(exc), exc
    else:
        sys.exit("memory that the kernel may write to was unmapped")
print(json.dumps("fine"))
"""

UNKNOWN = """
with Mempool(8) as pool, quiet_netns() as ns, Tap(ns) as tap:
    shim.watch(OLD, 1)
    try:
        tap.rx(pool, engine="uring")
    except OSError as exc:
        assert exc.errno == errno.ENOSYS, exc
        assert "io_uring reads on TAP descriptors need Linux 5.19" in str(exc), exc
    else:
        sys.exit("it was not refused")
    assert shim.hit() == 1
    assert tap.rx(pool, engine="auto").engine == "syscall"
    assert shim.hit() == 1, "the kernel is asked once"
print(json.dumps("fine"))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """enters.c, compiled."""
    return preload.build("enters", tmp_path_factory.mktemp("shim"))


def test_reads_that_a_cancel_leaves_over(shim: Path) -> None:
    assert preload.run(shim, "uring", PRELUDE, LEFT_OVER) == "fine"


def test_reads_that_nothing_ends(shim: Path) -> None:
    assert preload.run(shim, "uring", PRELUDE, NEVER_END) == "fine"


def test_a_kernel_without_cancel(shim: Path) -> None:
    assert preload.run(shim, "syscall", PRELUDE, UNKNOWN) == "fine"
