# SPDX-License-Identifier: BSD-3-Clause
"""``tx_gro``: frames that a device sends are coalesced on the way into the kernel.

The kernel is the oracle: it splits what it was given for a device that needs frames within the MTU,
and the result must be the frames that were sent.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import pytest
from patience import patient, rate
from rigs import Bridge, Shape, bridged, redirect, wire
from rings import receive
from support import Tap, skip_without_devices
from trains import UDP, V6, F, per_flow, random_train, regular

import rtap
from rtap import MbufFlag, Mempool, NetNS, RxOffload, TxOffload, Worker
from rtap.control import tun
from rtap.offload import coalesce

pytestmark = pytest.mark.root

LRO = RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM | RxOffload.TCP_LRO | RxOffload.UDP_LRO
UDP_TOO: dict[str, Any] = {"tx_gro": True, "tx_offloads": TxOffload.UDP_TSO}


def frames_of(first: F, count: int = 20, size: int = 1000) -> list[bytes]:
    return [f.build() for f in regular(first, [size] * count, random.Random(size))]


def xstats(dev: rtap.EthDev) -> dict[str, int]:
    return {name.removeprefix("tx_q0_"): n for name, n in dev.xstats().items()}


def send_all(bridge: Bridge, frames: list[bytes]) -> None:
    burst = bridge.a.pool.alloc_burst(len(frames), frames)
    assert bridge.a.tx_burst(0, burst) == len(frames)
    assert len(burst) == 0
    assert bridge.a.pool.in_use == 0


FIRSTS = {
    "tcp4": F(),
    "tcp6": F(**V6),
    "udp4": F(proto=UDP),
    "udp6": F(proto=UDP, **V6),
    "tagged": F(tags=((0x8100, 5),)),
}


@pytest.mark.parametrize("name", FIRSTS)
def test_super_frames_enter_the_kernel(engine: str, name: str) -> None:
    """Twenty frames are one for the kernel, and one for a device that takes super-frames."""
    skip_without_devices()
    frames = frames_of(FIRSTS[name])
    ((header, whole),) = coalesce(frames, udp=True)
    with bridged(a={"engine": engine, **UDP_TOO}, b={"rx_offloads": LRO}) as bridge:
        send_all(bridge, frames)
        (mbuf,) = bridge.b.rx_burst(0, 64, 5)
        assert bytes(mbuf) == whole
        assert mbuf.tso_segsz == header.gso_size
        assert bridge.nothing_arrives()
        stats, counted = bridge.a.stats(), xstats(bridge.a)
        assert stats.opackets == 2  # the super-frame and nothing_arrives' own
        assert stats.obytes == len(whole) + 60
        assert counted["gro_merged_packets"] == 20
        assert counted["tso_packets"] == 1
        assert bridge.a.info().tx_gro


@pytest.mark.parametrize("name", FIRSTS)
def test_the_kernel_splits_them_into_what_was_sent(engine: str, name: str) -> None:
    skip_without_devices()
    frames = frames_of(FIRSTS[name])
    with bridged(a={"engine": engine, **UDP_TOO}) as bridge:
        send_all(bridge, frames)
        assert bridge.arriving(20) == frames


def test_random_traffic(engine: str) -> None:
    """Every frame arrives, byte for byte and in the order of its flow."""
    skip_without_devices()
    options = {"nb_mbufs": 4096, "engine": engine}
    with bridged(a={**UDP_TOO, **options}, b=options) as bridge:
        merged = 0
        for number in range(150):
            frames = random_train(random.Random(number)).bytes()
            send_all(bridge, frames)
            assert per_flow(bridge.arriving(len(frames))) == per_flow(frames), f"train {number}"
        merged = xstats(bridge.a)["gro_merged_packets"]
        assert merged > 1000


def test_many_flows_in_one_burst(engine: str) -> None:
    """There are more frames than one pass takes, and more flows than it holds."""
    skip_without_devices()
    r = random.Random(1)
    flows = [frames_of(F(sport=n), 10, 100) for n in range(100)]
    order = [n for n in range(100) for _ in range(10)]
    r.shuffle(order)
    frames = [flows[n].pop(0) for n in order]
    with bridged(a={"tx_gro": True, "engine": engine}) as bridge:
        send_all(bridge, frames)
        assert per_flow(bridge.arriving(1000)) == per_flow(frames)
        assert 0 < xstats(bridge.a)["gro_merged_packets"] < 1000


def test_datagrams_only_when_asked_for() -> None:
    skip_without_devices()
    frames = frames_of(F(proto=UDP))
    with bridged(a={"tx_gro": True}, b={"rx_offloads": LRO}) as bridge:
        send_all(bridge, frames)
        assert bridge.arriving(20) == frames
        assert xstats(bridge.a)["gro_merged_packets"] == 0


def test_checksums_asked_for_are_finished(engine: str) -> None:
    """Frames that request their checksum merge although it is not written yet."""
    skip_without_devices()
    shape = Shape()
    payload = random.Random(2).randbytes(5000)
    wanted = shape.segments(payload, 1000)
    with bridged(
        a={"tx_gro": True, "engine": engine, "tx_offloads": TxOffload.TCP_CKSUM}
    ) as bridge:
        burst = bridge.a.pool.alloc_burst(5, wanted)
        for mbuf in burst:
            mbuf[50:52] = b"\xbe\xef"
            shape.request(mbuf)
        assert bridge.a.tx_burst(0, burst) == 5
        assert bridge.arriving(5) == wanted
        assert xstats(bridge.a)["gro_merged_packets"] == 5


def test_wrong_checksums_stay_wrong() -> None:
    """If they merged, the kernel would write right ones."""
    skip_without_devices()
    good = list(regular(F(), [500] * 6, random.Random(6)))
    frames = [f.build() for f in [*good[:3], replace(good[3], bad_l4=True), *good[4:]]]
    with bridged(a={"tx_gro": True}) as bridge:
        burst = bridge.a.pool.alloc_burst(6, frames)
        burst.ol_flags = MbufFlag.RX_L4_CKSUM_GOOD  # what somebody said when they came in
        assert bridge.a.tx_burst(0, burst) == 6
        assert bridge.arriving(6) == frames
        assert xstats(bridge.a)["gro_merged_packets"] == 5


def test_frames_that_others_see(engine: str) -> None:
    """Shared frames are sent merged, and stay unchanged."""
    skip_without_devices()
    frames = frames_of(F())
    with bridged(a={"tx_gro": True, "engine": engine}) as bridge:
        burst = bridge.a.pool.alloc_burst(20, frames)
        mine, clones = burst[:], [mbuf.clone() for mbuf in burst]
        assert bridge.a.tx_burst(0, burst) == 20
        assert bridge.a.tx_burst(0, rtap.Burst(clones)) == 20
        assert [bytes(mbuf) for mbuf in mine] == [bytes(mbuf) for mbuf in clones] == frames
        assert bridge.arriving(40) == frames * 2
        assert xstats(bridge.a)["gro_merged_packets"] == 40
        mine.free()
        clones.clear()
        assert bridge.a.pool.in_use == 0


def test_chains_in_and_out(engine: str) -> None:
    skip_without_devices()
    frames = frames_of(F())
    with (
        bridged(a={"tx_gro": True, "engine": engine}) as bridge,
        Mempool(200, data_room=200) as small,
    ):
        burst = small.alloc_burst(20, frames)
        assert burst[0].nb_segs == 6
        assert bridge.a.tx_burst(0, burst) == 20
        assert bridge.arriving(20) == frames
        assert xstats(bridge.a)["gro_merged_packets"] == 20
        assert small.in_use == 0


@pytest.mark.parametrize("shape", ["plain", "shared", "some refused"])
def test_what_does_not_fit_stays(netns: NetNS, engine: str, shape: str) -> None:
    """When the kernel takes no more, the original frames stay, in the order of their flows."""
    pool = Mempool(400)
    r = random.Random(4)
    flows = [frames_of(F(sport=n), 50, 240) for n in range(4)]
    frames = [flows[n].pop(0) for n in r.sample([0, 1, 2, 3] * 50, 200)]
    refused = {1, 60, 199} if shape == "some refused" else set()
    for n in refused:
        frames[n] = bytes(13)
    wanted = [f for n, f in enumerate(frames) if n not in refused]
    with Tap(netns, "tap0") as a, Tap(netns, "tap1", mtu=9000) as slow:
        redirect(netns, "tap0", "tap1", rate=rate(20))
        tun.set_sndbuf(a.fd, 20_000)
        tx = a.tx(engine=engine, ordered=True, gro=True)
        rx = slow.rx(Mempool(2000), engine="syscall")
        burst = pool.alloc_burst(200, frames)
        kept = burst[:] if shape == "shared" else None
        consumed = partial = 0
        got: list[bytes] = []
        deadline = time.monotonic() + patient(30)
        while len(burst) and time.monotonic() < deadline:
            before = [bytes(m) for m in burst]
            sent = tx.tx_burst(burst)
            consumed += sent
            assert len(burst) == 200 - consumed
            left = [bytes(m) for m in burst]
            assert all(frame in before for frame in left)
            for flow, rest in per_flow([f for f in left if len(f) > 13]).items():
                assert per_flow(wanted)[flow][-len(rest) :] == rest
            if len(burst):
                partial += 1
                got += receive(rx, 1, timeout=0.05)
        got += receive(rx, len(wanted) - len(got))
        assert per_flow(got) == per_flow(wanted)
        assert partial > 0, "the send buffer never filled: the test is too easy"
        counters = tx.counters()
        assert counters["full"] == partial
        assert counters["refused"] == counters["errors"] == len(refused)
        if kept is not None:
            assert [bytes(m) for m in kept] == frames
            del kept
        assert pool.in_use == 0


def test_ends_of_flows_are_not_delayed(netns: NetNS) -> None:
    """Nothing waits in the queue after a burst: single frames leave at once."""
    with Tap(netns) as a:
        tx = a.tx(gro=True)
        ear = a.packets(protocol=0x0800)
        pool = Mempool(8)
        for f in regular(F(dst_mac=b"\xff" * 6), [50] * 4, random.Random(1)):
            assert tx.tx_burst(pool.alloc_burst(1, [f.build()])) == 1
            assert ear.frames(1) == [f.build()]


def test_tcp_through_a_worker_that_merges(engine: str) -> None:
    """A real connection is forwarded frame by frame in both directions."""
    skip_without_devices()
    options = {"tx_gro": True, "engine": engine}
    with wire(a=options, b=options) as w:
        worker = Worker()
        worker.forward((w.a, 0), (w.b, 0))
        worker.forward((w.b, 0), (w.a, 0))
        with worker:
            w.transfer(8 << 20)
            w.transfer(8 << 20, back=True)
        assert xstats(w.a)["gro_merged_packets"] > 100
        assert xstats(w.b)["gro_merged_packets"] > 100
        assert xstats(w.a)["kernel_refused_packets"] == 0


def test_options(netns: NetNS) -> None:
    with netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        dev.configure(1, 1, rtap.EthConf(tx_gro=True))
        assert dev.info().tx_gro
        assert dev.info().vnet_hdr
        dev.configure(1, 1, rtap.EthConf())
        assert not dev.info().tx_gro
    with pytest.raises(TypeError, match="tx_gro must be a bool, got int"):
        rtap.EthConf(tx_gro=1)  # type: ignore[arg-type]
    with (
        rtap.probe("net_null0") as null,
        pytest.raises(ValueError, match="tx_gro, rx_gso: net_null"),
    ):
        null.configure(1, 1, rtap.EthConf(tx_gro=True))
    with Tap(netns, "t1", vnet_hdr=False) as plain, pytest.raises(ValueError, match="gro needs"):
        plain.tx(gro=True)
