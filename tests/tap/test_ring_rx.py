# SPDX-License-Identifier: BSD-3-Clause
"""RxQueue on real TAP devices, both engines: reception, truncation, and empty pools."""

from __future__ import annotations

import random
import struct
import threading
import time

import pytest
from patience import patient
from rings import BIG, receive, send_all
from support import Tap, frame, pattern, seq_of

from rtap import Burst, Mempool, NetNS

pytestmark = pytest.mark.root


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
    """Arrivals and requests come in all sizes, from the same thread and from another."""
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


def test_a_filter_takes_64_addresses(tap: Tap, engine: str) -> None:
    """A list that is refused changes nothing."""
    addresses = [bytes([2, 0, 0, 0, 1, i]) for i in range(65)]
    rx = tap.rx(Mempool(128), engine=engine)
    rx.set_filter(True, addresses=addresses[:64])
    with pytest.raises(ValueError, match="at most 64 addresses, got 65"):
        rx.set_filter(True, addresses=addresses[::-1])
    with pytest.raises(ValueError, match="has 6 bytes"):
        rx.set_filter(True, addresses=[addresses[64], b"\x02" * 5])
    sender = tap.packets()
    for i, address in enumerate(addresses):
        sender.send(frame(i, dst=address))
    assert [data[:6] for data in receive(rx, 64)] == addresses[:64]
    assert len(rx.rx_burst(8)) == 0
    assert rx.xcounters()["filtered_unicast_packets"] == 1


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
    assert {name: n for name, n in rx.xcounters().items() if n} == {"purged_packets": 300}
    packets.send(frame(7))
    assert receive(rx, 1) == [frame(7)]


# ---- TUN


def packet(seq: int, length: int) -> bytes:
    """An IPv4 header with some payload."""
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
        # Neither IPv4 nor IPv6: the kernel cannot tell the protocol, and refuses.
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
    """Others raise the MTU behind the queue's back."""
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
    for timeout in (0, 0.05):
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
        assert len(rx.rx_burst(64, 0.05)) == 0
        calls += 1
    assert time.thread_time() - cpu < patient(0.15)
    # Each call counts once, however often it tries inside.
    assert calls <= rx.counters()["nombuf"] <= 2 * calls
    assert calls <= 400
    del held


def test_pool_that_runs_dry_in_the_middle(tap: Tap, engine: str) -> None:
    """Frames without an mbuf stay in the kernel and come later, in order."""
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


def test_a_pool_that_holds_no_frame_is_refused(tap: Tap) -> None:
    """No frame could ever be read."""
    for n in (1, 3):
        with Mempool(n, 512) as pool:
            for max_frame in (512 * n, 512 * n + 100):
                with pytest.raises(ValueError, match=rf"take {n + 1} mbufs .*the pool has {n}"):
                    tap.rx(pool, max_frame=max_frame, scatter=True)
    with Mempool(3, 512) as pool, Mempool(2, 512) as small:
        rx = tap.rx(pool, max_frame=1500, scatter=True)
        with pytest.raises(ValueError, match="the pool has 3"):
            rx.resize(1536)
        with pytest.raises(ValueError, match="the pool has 2"):
            rx.resize(1500, small)
        rx.close()


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
