# SPDX-License-Identifier: BSD-3-Clause
"""RxQueue and TxQueue on real TAP devices, both engines."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support import (
    Tap,
    Task,
    child_place,
    eventually,
    frame,
    ip,
    links,
    pattern,
    python,
    seq_of,
    skip_without_devices,
)

from rtap import Burst, DeviceGone, Mbuf, Mempool, NetNS
from rtap._ring import RxQueue, TxQueue
from rtap.control import tun

pytestmark = pytest.mark.root

BIG = 64 << 20


def send_all(tx: TxQueue, burst: Burst) -> None:
    while len(burst):
        assert tx.tx_burst(burst) > 0


def receive(rx: RxQueue, n: int, at_once: int = 64, timeout: float = 5) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < n:
        burst = rx.rx_burst(at_once, timeout)
        if not len(burst):
            break
        got += [bytes(m) for m in burst]
    return got


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
        assert queue.engine_reason == "asked for"


def test_auto_says_which_engine_and_why(tap: Tap) -> None:
    pool = Mempool(8)
    for queue in (tap.rx(pool, engine="auto"), tap.tx(engine="auto")):
        assert queue.engine in ("uring", "syscall")
        assert len(queue.engine_reason) > 10
    tap.tx(engine="auto").tx_burst(pool.alloc_burst(8, frame(1)))
    assert tap.counters()["rx_packets"] == 8


# ---- sending


@pytest.mark.parametrize("vnet_hdr", [True, False], ids=["vnet", "plain"])
@pytest.mark.parametrize("nb_desc", [1, 7, 64, 256, 1000, 32768])
def test_sends_whole_frames_in_order(
    netns: NetNS, engine: str, vnet_hdr: bool, nb_desc: int
) -> None:
    frames = [frame(i, 14 + i * 7 % 1501) for i in range(1000)]
    pool = Mempool(1000)
    with Tap(netns, vnet_hdr=vnet_hdr) as tap:
        packets = tap.packets(rcvbuf=BIG)
        tx = tap.tx(engine=engine, nb_desc=nb_desc)
        burst = pool.alloc_burst(1000, frames)
        assert tx.tx_burst(burst) == 1000
        assert len(burst) == 0
        assert pool.in_use == 0
        assert packets.drain() == frames
        assert tx.counters() == {
            "packets": 1000,
            "bytes": sum(map(len, frames)),
            "errors": 0,
            "refused": 0,
            "down": 0,
            "full": 0,
        }
        kernel = tap.counters()
        assert kernel["rx_packets"] == 1000
        assert kernel["rx_errors"] == 0
        tx.reset_counters()
        assert set(tx.counters().values()) == {0}


def test_empty_burst_sends_nothing(tap: Tap, engine: str) -> None:
    tx = tap.tx(engine=engine)
    burst = Burst()
    assert tx.tx_burst(burst) == 0
    assert tap.counters()["rx_packets"] == 0
    assert set(tx.counters().values()) == {0}


@pytest.mark.parametrize("vnet_hdr", [True, False], ids=["vnet", "plain"])
def test_sends_chains(netns: NetNS, engine: str, vnet_hdr: bool) -> None:
    """Chains beside plain frames, with empty segments in front, in between and behind."""
    pool = Mempool(1000, 64)
    sizes = [60, 64, 65, 128, 129, 500, 1000, 1514, 14, 63] * 8
    frames = [frame(i, n) for i, n in enumerate(sizes)]
    with Tap(netns, vnet_hdr=vnet_hdr) as tap:
        packets = tap.packets(rcvbuf=BIG)
        tx = tap.tx(engine=engine)
        burst = pool.alloc_burst(len(frames), frames)
        assert tx.tx_burst(burst) == len(frames)
        assert packets.drain() == frames
        assert pool.in_use == 0

        hollow = pool.alloc(frame(1, 3 * 64))
        hollow.adj(64)
        hollow.trim(64)
        hollow[:] = frame(2, 64)
        short = pool.alloc(bytes(10) + frame(3, 60))  # a 14-byte header over a border
        short.adj(10)
        assert tx.tx_burst(Burst([hollow, short])) == 2
        assert packets.drain() == [frame(2, 64), frame(3, 60)]


@pytest.mark.parametrize("segments", [1000, 1022, 1023, 1024, 1025, 1026, 3000])
@pytest.mark.parametrize("vnet_hdr", [True, False], ids=["vnet", "plain"])
def test_chain_as_long_as_the_kernel_takes(
    netns: NetNS, engine: str, vnet_hdr: bool, segments: int
) -> None:
    """writev(2) takes 1024 pieces; a longer chain is one refused frame, or sent another way."""
    pool = Mempool(3100, 64)
    mbuf = pool.alloc(bytes(64 * segments))
    # 14 bytes in front, the rest in one byte a segment, would need a way to trim inside a chain:
    # what counts here is the number of pieces, so let the frame be as long as it is.
    mbuf[:22] = frame(9, 22)
    with Tap(netns, vnet_hdr=vnet_hdr, mtu=65521) as tap:
        packets = tap.packets(rcvbuf=BIG)
        tx = tap.tx(engine=engine)
        burst = Burst([pool.alloc(frame(1)), mbuf, pool.alloc(frame(2))])
        expected = bytes(mbuf)
        mbuf.free()
        assert tx.tx_burst(burst) == 3
        assert pool.in_use == 0
        counters = tx.counters()
        assert counters["packets"] + counters["refused"] == 3
        assert counters["errors"] == counters["refused"] <= 1
        got = packets.drain()
        assert got in ([frame(1), expected, frame(2)], [frame(1), frame(2)])
        if segments + vnet_hdr <= 1024:
            assert len(got) == 3


def test_many_chains_in_one_burst(tap: Tap, engine: str) -> None:
    """More pieces than one kernel entry describes."""
    pool = Mempool(8000, 64)
    frames = [frame(i, 1514) for i in range(300)]
    packets = tap.packets(rcvbuf=BIG)
    tx = tap.tx(engine=engine, nb_desc=256)
    burst = pool.alloc_burst(300, frames)
    assert burst[0].nb_segs == 24
    assert tx.tx_burst(burst) == 300
    assert packets.drain() == frames
    assert pool.in_use == 0


@pytest.mark.parametrize("left", range(17))
def test_headroom_smaller_than_the_header(tap: Tap, engine: str, left: int) -> None:
    pool = Mempool(4, 2048, 64)
    packets = tap.packets()
    mbuf = pool.alloc(frame(1, 100))
    mbuf.prepend(64 - left)[:] = frame(2, 64 - left)
    expected = bytes(mbuf)
    burst = Burst([mbuf])
    mbuf.free()
    assert tap.tx(engine=engine).tx_burst(burst) == 1
    assert packets.drain() == [expected]


def test_sends_mbufs_of_many_pools(tap: Tap, engine: str) -> None:
    """More pools than a ring has places to register; they come and go."""
    packets = tap.packets(rcvbuf=BIG)
    tx = tap.tx(engine=engine)
    kept = [Mempool(64, 256, memfd=i % 2 == 1) for i in range(20)]
    seq = 0
    for i in range(60):
        pools = [*kept, Mempool(64, 256, memfd=i % 2 == 1)]
        for _ in range(20):
            frames = [frame(seq + j) for j in range(len(pools))]
            seq += len(pools)
            burst = Burst(p.alloc(f) for p, f in zip(pools, frames, strict=True))
            assert tx.tx_burst(burst) == len(pools)
            assert packets.drain() == frames
    assert [p.in_use for p in kept] == [0] * 20


def test_sending_never_stops(tap: Tap, engine: str) -> None:
    """A hundred times the pool's size, with mbufs of which no slot is lost."""
    pool = Mempool(512, 128)
    tx = tap.tx(engine=engine)
    for i in range(800):
        burst = pool.alloc_burst(64, frame(i))
        assert tx.tx_burst(burst) == 64
    assert pool.in_use == 0
    assert tap.counters()["rx_packets"] == 800 * 64 == tx.counters()["packets"]


# ---- frames that the kernel refuses


@pytest.mark.parametrize("vnet_hdr", [True, False], ids=["vnet", "plain"])
@pytest.mark.parametrize("length", [0, 13])
@pytest.mark.parametrize("where", ["front", "middle", "back", "neighbours", "all"])
@pytest.mark.parametrize("ordered", [False, True], ids=["", "ordered"])
def test_refused_frames_are_consumed_and_counted(
    netns: NetNS, engine: str, vnet_hdr: bool, length: int, where: str, ordered: bool
) -> None:
    bad = {
        "front": [0],
        "middle": [31],
        "back": [63],
        "neighbours": [0, 1, 20, 21, 22, 62, 63],
        "all": list(range(64)),
    }[where]
    frames = [bytes(length) if i in bad else frame(i) for i in range(64)]
    pool = Mempool(64)
    with Tap(netns, vnet_hdr=vnet_hdr) as tap:
        packets = tap.packets()
        tx = tap.tx(engine=engine, ordered=ordered)
        burst = pool.alloc_burst(64, frames)
        assert tx.tx_burst(burst) == 64
        assert len(burst) == 0
        assert packets.drain() == [f for f in frames if len(f) > 13]
        counters = tx.counters()
        assert counters["refused"] == counters["errors"] == len(bad)
        assert counters["packets"] == 64 - len(bad)
        assert counters["bytes"] == 64 * (64 - len(bad))
        assert counters["full"] == 0
        assert pool.in_use == 0


# ---- shared frames


def test_one_frame_many_times_in_a_burst(tap: Tap, engine: str) -> None:
    pool = Mempool(4)
    packets = tap.packets(rcvbuf=BIG)
    mbuf = pool.alloc(frame(5))
    burst = Burst([mbuf] * 200)
    assert tap.tx(engine=engine).tx_burst(burst) == 200
    assert packets.drain() == [frame(5)] * 200
    assert mbuf.refcnt == 1
    assert bytes(mbuf) == frame(5)


def test_flooding_to_several_devices(netns: NetNS, engine: str) -> None:
    pool = Mempool(64)
    frames = [frame(i) for i in range(32)]
    with Tap(netns, "tap0") as a, Tap(netns, "tap1") as b, Tap(netns, "tap2") as c:
        taps = [a, b, c]
        ears = [t.packets() for t in taps]
        received = pool.alloc_burst(32, frames)
        bursts = [received, received[:], received[:]]
        for t, burst in zip(taps, bursts, strict=True):
            assert t.tx(engine=engine).tx_burst(burst) == 32
        assert [e.drain() for e in ears] == [frames] * 3
    assert pool.in_use == 0


MARK = hashlib.sha256(b"headroom").digest()


def shared_by_reference(mbuf: Mbuf) -> tuple[Mbuf, Any]:
    return mbuf, mbuf


def shared_by_burst(mbuf: Mbuf) -> tuple[Mbuf, Any]:
    other = Burst([mbuf])
    return mbuf, other


def shared_by_clone(mbuf: Mbuf) -> tuple[Mbuf, Any]:
    return mbuf.clone(), mbuf


def shared_by_its_clone(mbuf: Mbuf) -> tuple[Mbuf, Any]:
    return mbuf, mbuf.clone()


def clone_of_a_clone(mbuf: Mbuf) -> tuple[Mbuf, Any]:
    clone = mbuf.clone()
    return clone.clone(), clone


def seen_through_a_view(mbuf: Mbuf) -> tuple[Mbuf, Any]:
    return mbuf, (mbuf.next or mbuf).data


@pytest.mark.parametrize(
    "share",
    [
        shared_by_reference,
        shared_by_burst,
        shared_by_clone,
        shared_by_its_clone,
        clone_of_a_clone,
        seen_through_a_view,
    ],
)
@pytest.mark.parametrize("chain", [False, True], ids=["", "chain"])
@pytest.mark.parametrize("vnet_hdr", [True, False], ids=["vnet", "plain"])
def test_sending_never_writes_into_a_shared_slot(
    netns: NetNS,
    engine: str,
    share: Callable[[Mbuf], tuple[Mbuf, Any]],
    chain: bool,
    vnet_hdr: bool,
) -> None:
    """Not even into the headroom, where a private frame gets its virtio-net header."""
    pool = Mempool(64, 128, memfd=True)
    data = frame(1, 200 if chain else 100)
    mbuf = pool.alloc(data)
    mbuf.prepend(32)[:] = MARK
    mbuf.append(16)[:] = MARK[:16]
    mbuf.adj(32)
    mbuf.trim(16)
    sent, other = share(mbuf)
    burst = Burst([sent])
    del sent
    arena = os.pread(pool.fd or 0, 64 * 256 + 4096, 0)
    with Tap(netns, vnet_hdr=vnet_hdr) as tap:
        packets = tap.packets()
        if share is not shared_by_reference:
            del mbuf
        assert tap.tx(engine=engine).tx_burst(burst) == 1
        assert packets.drain() == [data]
    assert os.pread(pool.fd or 0, 64 * 256 + 4096, 0) == arena
    assert arena.count(MARK) == 1
    if isinstance(other, Burst):
        other = other[0]
    if isinstance(other, Mbuf):
        assert bytes(other) == data
        assert other.prepend(32).tobytes() == MARK
    else:
        assert other.tobytes() == data[128:] if chain else data
    del other, burst
    if share is shared_by_reference:
        mbuf.free()
    assert pool.in_use == 0


def test_private_frame_of_one_segment_leaves_from_one_place(tap: Tap) -> None:
    """The test above could not fail if nothing were ever written into a headroom."""
    pool = Mempool(1, 128, memfd=True)
    mbuf = pool.alloc(frame(1))
    mbuf.prepend(32)[:] = MARK
    mbuf.adj(32)
    burst = Burst([mbuf])
    mbuf.free()
    tap.tx(engine="syscall").tx_burst(burst)
    assert MARK not in os.pread(pool.fd or 0, 512, 0)


# ---- receiving


@pytest.mark.parametrize("vnet_hdr", [True, False], ids=["vnet", "plain"])
@pytest.mark.parametrize("nb_desc", [1, 7, 64, 256, 32768])
def test_receives_whole_frames_in_order(
    netns: NetNS, engine: str, vnet_hdr: bool, nb_desc: int
) -> None:
    frames = [frame(i, 14 + i * 7 % 1501) for i in range(900)]
    pool = Mempool(1000)
    with Tap(netns, vnet_hdr=vnet_hdr) as tap:
        packets = tap.packets(rcvbuf=BIG)
        rx = tap.rx(pool, engine=engine, nb_desc=nb_desc, port=7)
        for f in frames:
            packets.send(f)
        burst = rx.rx_burst(900)
        assert len(burst) == 900
        assert [bytes(m) for m in burst] == frames
        assert pool.in_use == 900
        first = burst[0]
        assert (first.port, first.nb_segs, first.ol_flags, first.refcnt) == (7, 1, 0, 2)
        assert first.headroom == pool.headroom
        assert len(rx.rx_burst()) == 0
        counters = rx.counters()
        assert (counters["packets"], counters["bytes"]) == (900, sum(map(len, frames)))
        assert sum(counters.values()) == counters["packets"] + counters["bytes"]
        assert tap.counters()["tx_packets"] == 900
        rx.reset_counters()
        assert set(rx.counters().values()) == {0}
        del burst, first
        assert pool.in_use == 0


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 100, 499, 500])
def test_receives_at_most_what_was_asked_for(tap: Tap, engine: str, n: int) -> None:
    packets = tap.packets(rcvbuf=BIG)
    rx = tap.rx(Mempool(600), engine=engine)
    for i in range(500):
        packets.send(frame(i))
    seen: list[int] = []
    while len(seen) < 500:
        burst = rx.rx_burst(n)
        assert len(burst) == min(n, 500 - len(seen))
        seen += [seq_of(bytes(m)) for m in burst]
    assert seen == list(range(500))


@pytest.mark.parametrize("vnet_hdr", [True, False], ids=["vnet", "plain"])
@pytest.mark.parametrize("room", [64, 100, 512, 1514])
def test_scatter(netns: NetNS, engine: str, vnet_hdr: bool, room: int) -> None:
    sizes = [14, 15, *range(room - 1, 1514, room), *range(room, 1514, room), 1513, 1514]
    frames = [frame(i, n) for i, n in enumerate(sizes)]
    pool = Mempool(4000, room)
    with Tap(netns, vnet_hdr=vnet_hdr) as tap:
        packets = tap.packets(rcvbuf=BIG)
        rx = tap.rx(pool, engine=engine, scatter=True)
        for f in frames:
            packets.send(f)
        burst = rx.rx_burst(len(frames))
        assert [bytes(m) for m in burst] == frames
        assert [m.nb_segs for m in burst] == [-(-len(f) // room) for f in frames]
        assert [m.data_len for m in burst] == [min(len(f), room) for f in frames]
        assert pool.in_use == sum(m.nb_segs for m in burst)
        del burst
        assert pool.in_use == 0


def test_scatter_where_frames_fit_makes_no_chains(tap: Tap, engine: str) -> None:
    packets = tap.packets()
    rx = tap.rx(Mempool(8), engine=engine, scatter=True)
    packets.send(frame(1, 1514))
    assert rx.rx_burst(1, 5)[0].nb_segs == 1


def test_forwards_chains_as_they_came(netns: NetNS, engine: str) -> None:
    pool = Mempool(2000, 100)
    frames = [frame(i, 14 + i * 11 % 1500) for i in range(300)]
    with Tap(netns, "tap0") as a, Tap(netns, "tap1") as b:
        source, sink = a.packets(rcvbuf=BIG), b.packets(rcvbuf=BIG)
        rx, tx = a.rx(pool, engine=engine, scatter=True), b.tx(engine=engine)
        got = []
        for start in range(0, 300, 50):
            for f in frames[start : start + 50]:
                source.send(f)
            burst = rx.rx_burst(50)
            assert len(burst) == 50
            send_all(tx, burst)
            got += sink.drain()
        assert got == frames
    assert pool.in_use == 0


def test_depth_adapts_and_nothing_is_lost(tap: Tap, engine: str) -> None:
    """Arrivals and requests of all sizes, in the same thread and beside it."""
    rng = random.Random(4)
    packets = tap.packets(rcvbuf=BIG)
    pool = Mempool(900)
    rx = tap.rx(pool, engine=engine, nb_desc=64)
    sent = 0
    seen: list[int] = []
    for _ in range(300):
        for _ in range(rng.choice([0, 0, 0, 1, 1, 3, 60, 64, 65, 200])):
            packets.send(frame(sent))
            sent += 1
        for _ in range(rng.randrange(4)):
            before = len(seen)
            n = rng.choice([1, 2, 64, 300])
            seen += [seq_of(bytes(m)) for m in rx.rx_burst(n)]
            assert len(seen) - before == min(n, sent - before)
        while sent - len(seen) > 700:
            seen += [seq_of(bytes(m)) for m in rx.rx_burst(256)]

    def flood() -> None:
        for i in range(sent, sent + 5000):
            packets.send(frame(i))
            # Never more than the device queue holds, or the kernel drops.
            while i - len(seen) > 900:
                time.sleep(0)

    thread = threading.Thread(target=flood)
    thread.start()
    deadline = time.monotonic() + 30
    while len(seen) < sent + 5000 and time.monotonic() < deadline:
        burst = rx.rx_burst(rng.choice([1, 7, 64, 128]), rng.choice([0, 0.01]))
        seen += [seq_of(bytes(m)) for m in burst]
    thread.join()
    assert seen == list(range(sent + 5000))
    assert tap.counters()["tx_dropped"] == 0


def test_purge(tap: Tap, engine: str) -> None:
    packets = tap.packets(rcvbuf=BIG)
    pool = Mempool(8)
    rx = tap.rx(pool, engine=engine)
    for i in range(300):
        packets.send(frame(i, 1000))
    assert rx.purge() == 300
    assert rx.purge() == 0
    assert len(rx.rx_burst()) == 0
    assert set(rx.counters().values()) == {0}
    packets.send(frame(7))
    assert receive(rx, 1) == [frame(7)]


# ---- TUN


def packet(seq: int, length: int) -> bytes:
    """An IPv4 header and something behind it."""
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, seq, 0, 9, 253, 0, bytes(4), bytes(4))
    return head + pattern(seq, length - 20)


@pytest.mark.parametrize("vnet_hdr", [True, False], ids=["vnet", "plain"])
@pytest.mark.parametrize("room", [2048, 100], ids=["single", "chains"])
def test_tun_packets_have_no_ethernet_header(
    netns: NetNS, engine: str, vnet_hdr: bool, room: int
) -> None:
    pool = Mempool(4000, room)
    with Tap(netns, "tun0", mode="tun", vnet_hdr=vnet_hdr) as device:
        ear = device.packets(0x0800, rcvbuf=BIG)
        rx = device.rx(pool, engine=engine, max_frame=1500, scatter=True)
        tx = device.tx(engine=engine)
        whole = [packet(i, 20 + i * 37 % 1481) for i in range(100)]
        assert tx.tx_burst(pool.alloc_burst(100, whole)) == 100
        assert ear.drain() == whole
        for p in whole:
            ear.send(p)
        burst = rx.rx_burst(100)
        assert [bytes(m) for m in burst] == whole
        assert {m.l2_len for m in burst} == {0}
        # Neither IPv4 nor IPv6: the kernel cannot tell what it is, and refuses.
        assert tx.tx_burst(pool.alloc_burst(2, [b"\x15" * 40, whole[5]])) == 2
        assert tx.counters()["refused"] == 1
        assert ear.drain() == [whole[5]]


# ---- truncation


@pytest.mark.parametrize("vnet_hdr", [True, False], ids=["vnet", "plain"])
@pytest.mark.parametrize(
    ("room", "scatter", "capacity"), [(2048, False, 2048), (512, True, 1536), (1523, False, 1523)]
)
def test_truncated_frames_are_counted_never_delivered(
    netns: NetNS, engine: str, vnet_hdr: bool, room: int, scatter: bool, capacity: int
) -> None:
    """Somebody raises the MTU behind the queue's back."""
    pool = Mempool(200, room)
    with Tap(netns, vnet_hdr=vnet_hdr) as tap:
        rx = tap.rx(pool, engine=engine, max_frame=1522, scatter=scatter)
        tap.set("mtu", "9000")
        packets = tap.packets(rcvbuf=BIG)
        sizes = [60, capacity - 1, capacity, 61, capacity + 1, capacity + 9, capacity + 10, 62]
        sizes += [capacity + 11, 9014, 1522, 63]
        frames = [frame(i, n) for i, n in enumerate(sizes)]
        whole = [f for f in frames if len(f) < capacity]
        for f in frames:
            packets.send(f)
        assert receive(rx, len(whole), timeout=0.5) == whole
        assert len(rx.rx_burst()) == 0
        counters = rx.counters()
        assert counters["truncated"] == counters["errors"] == len(frames) - len(whole)
        assert counters["packets"] == len(whole)
        assert counters["bytes"] == sum(map(len, whole))
    assert pool.in_use == 0


# ---- an empty pool


def test_empty_pool_gives_empty_bursts_and_counts(tap: Tap, engine: str) -> None:
    pool = Mempool(10)
    packets = tap.packets()
    rx = tap.rx(pool, engine=engine)
    held = pool.alloc_burst(10)
    assert len(rx.rx_burst()) == 0
    assert rx.counters()["nombuf"] == 0, "nothing was there to lose"
    for i in range(3):
        packets.send(frame(i))
    for timeout in (0, 0.05, None):
        before = rx.counters()["nombuf"]
        assert len(rx.rx_burst(64, timeout)) == 0
        assert rx.counters()["nombuf"] > before
    held.free()
    assert receive(rx, 3) == [frame(i) for i in range(3)]
    assert rx.counters()["errors"] == 0


def test_wait_on_an_empty_pool_does_not_spin(tap: Tap, engine: str) -> None:
    pool = Mempool(10)
    rx = tap.rx(pool, engine=engine)
    held = pool.alloc_burst(10)
    cpu = time.thread_time()
    assert len(rx.rx_burst(64, 0.3)) == 0
    tap.packets().send(frame(0))
    calls = 0
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        assert len(rx.rx_burst(64, None)) == 0
        calls += 1
    assert time.thread_time() - cpu < 0.15
    # Each call counts once, whatever it tried inside.
    assert calls <= rx.counters()["nombuf"] <= 2 * calls
    assert calls <= 400
    del held


def test_pool_that_runs_dry_in_the_middle(tap: Tap, engine: str) -> None:
    """What finds no mbuf stays in the kernel and comes later, in order."""
    pool = Mempool(100)
    packets = tap.packets(rcvbuf=BIG)
    rx = tap.rx(pool, engine=engine)
    for i in range(500):
        packets.send(frame(i))
    seen: list[int] = []
    held: list[Burst] = []
    while len(seen) < 500:
        burst = rx.rx_burst(64)
        if not len(burst):
            assert pool.available == 0
            held.clear()
            continue
        seen += [seq_of(bytes(m)) for m in burst]
        held.append(burst)
        assert pool.in_use == sum(map(len, held))
    assert seen == list(range(500))
    assert rx.counters()["nombuf"] > 0


def test_chains_need_whole_sets_of_mbufs(tap: Tap, engine: str) -> None:
    pool = Mempool(10, 512)
    packets = tap.packets()
    rx = tap.rx(pool, engine=engine, scatter=True)  # three segments each
    held = pool.alloc_burst(8)
    packets.send(frame(1))
    assert len(rx.rx_burst()) == 0
    assert (rx.counters()["nombuf"], pool.in_use) == (1, 8)
    held = held[1:]
    burst = rx.rx_burst()
    assert [bytes(m) for m in burst] == [frame(1)]
    assert pool.in_use == 8


# ---- waiting


@pytest.mark.parametrize("timeout", [0, 0.0, 1e-9, 0.05, 0.25])
def test_timeout_is_honoured(tap: Tap, engine: str, timeout: float) -> None:
    rx = tap.rx(Mempool(8), engine=engine)
    took = []
    for _ in range(3):
        before = time.monotonic()
        assert len(rx.rx_burst(8, timeout)) == 0
        took.append(time.monotonic() - before)
    assert min(took) >= timeout
    assert min(took) < timeout + 0.05


def test_frame_that_is_there_ends_the_wait_at_once(tap: Tap, engine: str) -> None:
    rx = tap.rx(Mempool(8), engine=engine)
    tap.packets().send(frame(3))
    for timeout in (None, 30):
        before = time.monotonic()
        if timeout:
            tap.packets().send(frame(3))
        assert [bytes(m) for m in rx.rx_burst(8, timeout)] == [frame(3)]
        assert time.monotonic() - before < 1


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_frame_that_arrives_ends_the_wait(tap: Tap, engine: str, timeout: float | None) -> None:
    rx = tap.rx(Mempool(8), engine=engine)
    packets = tap.packets()
    late = []
    for i in range(5):
        sent_at: list[float] = []

        def send(i: int = i, sent_at: list[float] = sent_at) -> None:
            sent_at.append(time.monotonic())
            packets.send(frame(i))

        timer = threading.Timer(0.03, send)
        timer.start()
        assert [bytes(m) for m in rx.rx_burst(8, timeout)] == [frame(i)]
        late.append(time.monotonic() - sent_at[0])
        timer.join()
    assert min(late) < 0.02


def test_waiting_lets_other_threads_run(tap: Tap, engine: str) -> None:
    rx = tap.rx(Mempool(8), engine=engine, gil="hold")
    count = 0
    stop = threading.Event()

    def spin() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1

    thread = threading.Thread(target=spin)
    thread.start()
    before = count
    assert len(rx.rx_burst(8, 0.3)) == 0
    ran = count - before
    stop.set()
    thread.join()
    assert ran > 1000


def test_ctrl_c_ends_a_wait_within_100_ms(tap: Tap, engine: str) -> None:
    code = """
        import sys, time
        from support import Tap, quiet_netns
        from rtap import Mempool

        with quiet_netns() as ns, Tap(ns) as tap:
            rx = tap.rx(Mempool(8), engine=sys.argv[1])
            for timeout in (None, 60, None, 60, None):
                print("ready", flush=True)
                try:
                    rx.rx_burst(8, timeout)
                except KeyboardInterrupt:
                    print(time.monotonic(), flush=True)
            assert len(rx.rx_burst()) == 0   # the queue is free again
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), engine],
        stdout=subprocess.PIPE,
        text=True,
        **child_place(),
    )
    took = []
    with child:
        assert child.stdout is not None
        try:
            for _ in range(5):
                assert child.stdout.readline() == "ready\n"
                eventually(lambda: asleep(child.pid), "the child waits")
                before = time.monotonic()
                child.send_signal(signal.SIGINT)
                took.append(float(child.stdout.readline()) - before)
            assert child.wait(20) == 0
        finally:
            child.kill()
    assert sorted(took)[2] < 0.1, took


def asleep(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0] == "S"


# ---- one thread at a time


def test_second_thread_is_refused_while_the_first_waits(tap: Tap, engine: str) -> None:
    rx = tap.rx(Mempool(8), engine=engine)
    packets = tap.packets()
    waiter = Task(receive, rx, 1, 64, 20)
    try:

        def refused() -> bool:
            try:
                rx.rx_burst()
            except RuntimeError:
                return True
            return False

        eventually(refused, "the waiting thread owns the queue")
        for use in (rx.rx_burst, rx.purge):
            with pytest.raises(RuntimeError, match="another thread"):
                use()
    finally:
        packets.send(frame(4))
    assert waiter.result() == [frame(4)]
    packets.send(frame(5))
    assert receive(rx, 1) == [frame(5)], "the queue is free again"


def test_threads_that_share_queues_get_errors_not_corruption(netns: NetNS, engine: str) -> None:
    """Bursts are either whole or refused, whoever tries."""
    pool = Mempool(4096, 256)
    with Tap(netns, "tap0") as a:
        packets = a.packets(rcvbuf=BIG)
        tx = a.tx(engine=engine, gil="release")
        refused = [0] * 4
        sent: list[set[int]] = [set() for _ in range(4)]

        def work(me: int) -> None:
            for i in range(150):
                first = (me * 150 + i) * 20
                numbers = range(first, first + 20)
                burst = pool.alloc_burst(20, [frame(n) for n in numbers])
                done = 0
                while not done:
                    try:
                        done = tx.tx_burst(burst)
                    except RuntimeError:
                        refused[me] += 1
                        assert len(burst) == 20
                        time.sleep(0)
                assert done == 20
                sent[me].update(numbers)

        for task in [Task(work, i) for i in range(4)]:
            task.result()
        got = packets.drain()
        assert {seq_of(f) for f in got} == set().union(*sent)
        assert len(got) == 4 * 150 * 20 == tx.counters()["packets"]
        assert all(f == frame(seq_of(f)) for f in got)
        # Within a burst nothing of another's is mixed in.
        numbers = [seq_of(f) for f in got]
        assert all(numbers[i + 1] - numbers[i] == 1 for i in range(len(numbers)) if i % 20 != 19)
    assert pool.in_use == 0


def test_burst_that_is_being_sent_is_nobody_elses(tap: Tap, engine: str) -> None:
    """Another thread that looks at a burst in flight sees it empty, and may add to it."""
    pool = Mempool(8192, 128)
    tx = tap.tx(engine=engine, gil="release")
    looked: list[int] = []
    stop = threading.Event()
    burst = Burst()

    def look() -> None:
        while not stop.is_set():
            looked.append(len([bytes(m) for m in burst]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(20):
            burst.extend(pool.alloc_burst(4096, frame(1)))
            assert tx.tx_burst(burst) == 4096
            assert len(burst) == 0
    finally:
        stop.set()
        thread.join()
    assert len(looked) > 0
    assert pool.in_use == 0


def test_a_queue_may_change_threads(tap: Tap, engine: str) -> None:
    pool = Mempool(512)
    packets = tap.packets(rcvbuf=BIG)
    rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)

    def once(i: int) -> None:
        for _ in range(3):
            assert tx.tx_burst(pool.alloc_burst(32, frame(i))) == 32
            assert packets.frames(32) == [frame(i)] * 32
            for j in range(32):
                packets.send(frame(i + j))
            assert receive(rx, 32) == [frame(i + j) for j in range(32)]

    for i in range(30):
        Task(once, i).result()
        once(1000 + i)
    assert pool.in_use == 0


def test_threads_with_queues_of_their_own(netns: NetNS, engine: str) -> None:
    pool = Mempool(4096)
    taps = [Tap(netns, f"tap{i}") for i in range(12)]

    def work(tap: Tap, me: int) -> None:
        packets = tap.packets(rcvbuf=BIG)
        rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine, gil="release")
        for i in range(40):
            frames = [frame(me << 20 | i << 8 | j) for j in range(30)]
            send_all(tx, pool.alloc_burst(30, frames))
            assert packets.frames(30) == frames
            for f in frames:
                packets.send(f)
            assert receive(rx, 30) == frames

    try:
        for task in [Task(work, tap, i) for i, tap in enumerate(taps)]:
            task.result()
    finally:
        for tap in taps:
            tap.close()
    assert pool.in_use == 0
    assert links(netns) == ["lo"]


def test_more_queues_than_a_ring_has_places_for(tap: Tap, engine: str) -> None:
    pool = Mempool(64)
    packets = tap.packets(rcvbuf=BIG)
    queues = [TxQueue(tap.fd, name=tap.name, engine=engine) for _ in range(300)]
    for rounds in range(2):
        for i, tx in enumerate(queues):
            tx.start()
            assert tx.tx_burst(pool.alloc_burst(1, frame(i))) == 1
        assert packets.drain() == [frame(i) for i in range(300)]
        if not rounds:
            for tx in queues[::2]:
                tx.close()
            queues = [
                TxQueue(tap.fd, name=tap.name, engine=engine) if i % 2 == 0 else tx
                for i, tx in enumerate(queues)
            ]
    for tx in queues:
        tx.close()


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
    assert took < 0.2


def test_descriptor_is_free_when_the_queue_is_closed(netns: NetNS, engine: str) -> None:
    """No ring keeps the interface: it is gone soon after close(2)."""
    pool = Mempool(64)
    for _ in range(10):
        tap = Tap(netns)
        packets = tap.packets()
        rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)
        for i in range(20):
            tx.tx_burst(pool.alloc_burst(4, frame(i)))
            packets.send(frame(i))
            assert receive(rx, 1) == [frame(i)]
        before = time.monotonic()
        tap.close()
        while "tap0" in links(netns):
            assert time.monotonic() - before < 1
        assert time.monotonic() - before < 0.3
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
    assert 0.1 <= time.monotonic() - before < 1
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
    assert waiter.ended - before < 0.5


def test_interface_deleted_during_sends(netns: NetNS, engine: str) -> None:
    """`sent`, what is left in the burst and what the queue counted agree to the frame."""
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


# ---- partial sends


@pytest.mark.parametrize("shape", ["plain", "chains", "shared", "some refused"])
@pytest.mark.parametrize("nb_desc", [8, 256])
def test_partial_send_is_a_prefix(netns: NetNS, engine: str, shape: str, nb_desc: int) -> None:
    """A finite send buffer whose frames wait behind a slow shaper: what the kernel takes has no
    holes, and the first unsent frame is the burst's first."""
    pool = Mempool(4000, 256)
    with Tap(netns, "tap0") as a, Tap(netns, "tap1") as slow:
        for command in (
            "qdisc add dev tap1 root tbf rate 20mbit burst 3000 limit 10000000",
            "qdisc add dev tap0 ingress",
            # matchall is not in every kernel
            "filter add dev tap0 parent ffff: protocol all u32 match u32 0 0 "
            "action mirred egress redirect dev tap1",
        ):
            netns.run(["tc", *command.split()], check=True)
        tun.set_sndbuf(a.fd, 20_000)
        tx = a.tx(engine=engine, ordered=True, nb_desc=nb_desc)
        rx = slow.rx(Mempool(2000), engine="syscall")
        refused = {0, 1, 7, 50, 51, 199} if shape == "some refused" else set()
        length = 1000 if shape == "chains" else 250
        frames = [bytes(13) if i in refused else frame(i, length) for i in range(200)]
        burst = pool.alloc_burst(200, frames)
        kept = burst[:] if shape == "shared" else None
        consumed = 0
        partial = 0
        got: list[bytes] = []
        deadline = time.monotonic() + 30
        while len(burst) and time.monotonic() < deadline:
            sent = tx.tx_burst(burst)
            assert len(burst) == 200 - consumed - sent
            consumed += sent
            if len(burst):
                partial += 1
                assert bytes(burst[0]) == frames[consumed]
                assert [bytes(m) for m in burst] == frames[consumed:]
                counters = tx.counters()
                assert counters["packets"] + counters["refused"] == consumed
                got += receive(rx, 1, timeout=0.05)
        wanted = [f for i, f in enumerate(frames) if i not in refused]
        got += receive(rx, len(wanted) - len(got))
        assert got == wanted
        assert consumed == 200
        assert partial > 3, "the send buffer never filled: the test is too easy"
        counters = tx.counters()
        assert counters["full"] == partial
        assert counters["refused"] == counters["errors"] == len(refused)
        assert counters["packets"] == len(wanted)
        if kept is not None:
            assert [bytes(m) for m in kept] == frames
            del kept
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
    """Registered buffers where the limit allows, and sends without them where it does not."""
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
