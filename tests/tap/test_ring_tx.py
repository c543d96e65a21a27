# SPDX-License-Identifier: BSD-3-Clause
"""TxQueue on real TAP devices, both engines: frames sent, refused, shared and left over."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from patience import patient, rate
from rings import BIG, receive
from support import Tap, frame

from rtap import Burst, Mbuf, Mempool, NetNS
from rtap.control import tun

pytestmark = pytest.mark.root


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
            "unsent": 0,
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
    """Chains and plain frames are sent together, with empty segments anywhere in a chain."""
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
    """writev(2) takes 1024 pieces; a longer chain is refused, or sent another way."""
    pool = Mempool(3100, 64)
    mbuf = pool.alloc(bytes(64 * segments))
    # Only the number of pieces matters here, not the length of the frame.
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
    """The chains have more pieces than one kernel entry can describe."""
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
    """Pools come and go, more than a ring has places to register."""
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
    """A hundred times the pool's size is sent, and no slot is lost."""
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
    """Sending does not even write into the headroom, where a private frame gets its header."""
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
    """Private frames do get a header in their headroom, so the test above can fail."""
    pool = Mempool(1, 128, memfd=True)
    mbuf = pool.alloc(frame(1))
    mbuf.prepend(32)[:] = MARK
    mbuf.adj(32)
    burst = Burst([mbuf])
    mbuf.free()
    tap.tx(engine="syscall").tx_burst(burst)
    assert MARK not in os.pread(pool.fd or 0, 512, 0)


# ---- partial sends


@pytest.mark.parametrize("shape", ["plain", "chains", "shared", "some refused"])
@pytest.mark.parametrize("nb_desc", [8, 256])
def test_partial_send_is_a_prefix(netns: NetNS, engine: str, shape: str, nb_desc: int) -> None:
    """A finite send buffer whose frames wait behind a slow shaper: what the kernel takes has no
    holes, and the first unsent frame is the burst's first."""
    pool = Mempool(4000, 256)
    with Tap(netns, "tap0") as a, Tap(netns, "tap1") as slow:
        for command in (
            f"qdisc add dev tap1 root tbf rate {rate(20)} burst 3000 limit 10000000",
            "qdisc add dev tap0 ingress",
            # some kernels have no matchall
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
        deadline = time.monotonic() + patient(30)
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
