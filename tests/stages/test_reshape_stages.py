# SPDX-License-Identifier: BSD-3-Clause
"""Stages that merge or split frames: ``Gro`` and ``Gso``."""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from coalesced import expected, frames_of, sent
from hypothesis import given
from hypothesis import strategies as st
from rigs import Shape, Wire, iproute, label, redirect, wire
from rings import Ends, drained, header
from support import PacketSocket, eventually, frame, pattern, settle, skip_without_devices
from trains import UDP, V6, F, random_train

import rtap
from rtap import Burst, MbufFlag, Mempool, NetNS, RouteStats, RxOffload, TxOffload, Worker, stages
from rtap._ring import RxQueue, TxQueue
from rtap.offload import VnetHdr

LRO = RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM | RxOffload.TCP_LRO | RxOffload.UDP_LRO
TSO = TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM | TxOffload.TCP_TSO | TxOffload.UDP_TSO
IPV4 = 0x0800
SHAPES = [Shape(version, proto) for version in (4, 6) for proto in ("tcp", "udp")]


@pytest.fixture
def pool() -> Iterator[Mempool]:
    with Mempool(512, data_room=2048) as made:
        yield made


# ---- on a burst


@given(st.randoms(use_true_random=False), st.booleans())
def test_merging_and_splitting(r: random.Random, tags: bool) -> None:
    """Frames merge as with the functions over bytes, and a split restores them."""
    frames = random_train(r, longest=16, tags=tags).bytes()
    with Mempool(512, data_room=2048) as pool:
        burst = pool.alloc_burst(len(frames), frames)
        targets = stages.Gro(udp=True)(burst)
        assert targets.tolist() == [0] * len(burst)
        assert sorted(sent(burst)) == sorted(expected(frames))
        stages.Gso()(burst)
        assert sorted(map(bytes, burst)) == sorted(frames)
        burst.free()
        assert pool.in_use == 0


def test_what_is_merged(pool: Mempool) -> None:
    """The stage's arguments decide."""

    def lengths(stage: stages.Gro, first: F) -> list[int]:
        burst = pool.alloc_burst(6, frames_of(first))
        stage(burst)
        return [len(m) for m in burst]

    assert lengths(stages.Gro(), F()) == [654]
    assert lengths(stages.Gro(max_length=576), F()) == [554, 154]
    assert lengths(stages.Gro(), F(proto=UDP)) == [142] * 6
    assert lengths(stages.Gro(udp=True), F(proto=UDP)) == [642]
    packets = [f[14:] for f in frames_of(F())]
    burst = pool.alloc_burst(6, packets)
    stages.Gro(l2=False)(burst)
    assert [len(m) for m in burst] == [640]
    stages.Gso(l2=False)(burst)
    assert [bytes(m) for m in burst] == packets
    for length in (575, 65536):
        with pytest.raises(ValueError, match="max_length"):
            stages.Gro(max_length=length)


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_segments_that_were_asked_for(pool: Mempool, shape: Shape) -> None:
    """A frame with the application's request TX_TCP_SEG or TX_UDP_SEG is split too."""
    payload = random.Random(1).randbytes(5000)
    burst = Burst([shape.request(pool.alloc(shape.unfinished(payload)), 600)])
    stages.Gso()(burst)
    assert [bytes(m) for m in burst] == shape.segments(payload, 600)
    burst.free()
    assert pool.in_use == 0


def test_frames_around_keep_their_places(pool: Mempool) -> None:
    shape = Shape()
    plain = [frames_of(F(sport=n), 1)[0] for n in range(4)]
    burst = pool.alloc_burst(4, plain)
    payload = random.Random(2).randbytes(3000)
    request = shape.request(pool.alloc(shape.unfinished(payload)), 1000)
    burst = Burst([burst[0], request, burst[1], burst[2], request.clone(), burst[3]])
    del request
    stages.Gso()(burst)
    parts = shape.segments(payload, 1000)
    assert [bytes(m) for m in burst] == [plain[0], *parts, *plain[1:3], *parts, plain[3]]


def test_far_more_frames_than_came() -> None:
    """One stage call makes all of them, in its pool."""
    shape = Shape()
    with Mempool(8, data_room=1 << 16) as big, Mempool(6000, data_room=128) as small:
        payload = random.Random(3).randbytes(20 * 1100)
        burst = Burst(shape.request(big.alloc(shape.unfinished(payload)), 20) for _ in range(5))
        targets = stages.Gso(small)(burst, targets=3)
        assert targets.tolist() == [0] * 5500
        assert [bytes(m) for m in burst] == 5 * shape.segments(payload, 20)
        assert (big.in_use, small.in_use) == (0, 5500)
        burst.free()


@pytest.mark.parametrize("slots", [0, 4, 5, 14])
def test_no_buffers(pool: Mempool, slots: int) -> None:
    """Plain frames pass, and as many others as there are buffers, in order; the rest is dropped."""
    shape = Shape()
    with Mempool(max(slots, 1), data_room=1200) as small:
        taken = small.alloc_burst(1 if slots == 0 else 0)
        payload = bytes(5000)
        burst = Burst(shape.request(pool.alloc(shape.unfinished(payload)), 1000) for _ in range(3))
        last = frames_of(F(), 1)[0]
        burst.append(pool.alloc(last))
        stage = stages.Gso(small)
        targets = stage(burst)
        parts = shape.segments(payload, 1000)
        assert [bytes(m) for m in burst] == [*(3 * parts)[:slots], last]
        assert len(targets) == len(burst)
        burst.free()
        taken.free()
        assert (small.in_use, pool.in_use) == (0, 0)
        del stage


def test_the_pool_stays_open_while_it_is_used(pool: Mempool) -> None:
    small = Mempool(4)
    with rtap.probe("net_null0") as dev:
        dev.configure(1, 1)
        dev.rx_queue_setup(0, 64, pool)
        dev.tx_queue_setup(0, 64)
        dev.start()
        stage = stages.Gso(small)
        worker = Worker()
        worker.forward((dev, 0), (dev, 0), stages=[stage])
        with worker, pytest.raises(BufferError, match="1 rx queues or stages"):
            small.close()
        small.close()
        with pytest.raises(ValueError, match="closed"):
            worker.start()
        assert not worker.running
        dev.stop()
    with pytest.raises(ValueError, match="closed"):
        stage(Burst())


def test_a_super_frame_that_is_none(pool: Mempool) -> None:
    """A super-frame that contradicts its header is dropped, and the others pass."""
    shape = Shape()
    good = [frames_of(F(sport=n), 1)[0] for n in range(2)]
    bad = []
    for data in (
        b"",
        b"\0" * 60,
        shape.unfinished(bytes(3000))[:40],
        Shape(6).unfinished(b"")[:50],
    ):
        mbuf = pool.alloc(data)
        mbuf.ol_flags |= MbufFlag.TX_TCP_SEG | MbufFlag.TX_TCP_CKSUM
        mbuf.tso_segsz = 10
        mbuf.l2_len, mbuf.l3_len, mbuf.l4_len = 14, 20, 20
        bad.append(mbuf)
    too_many = shape.request(pool.alloc(shape.unfinished(bytes(2049))), 1)
    burst = Burst([pool.alloc(good[0]), *bad, too_many, pool.alloc(good[1])])
    del bad, too_many, mbuf
    stages.Gso()(burst)
    assert [bytes(m) for m in burst] == good
    burst.free()
    assert pool.in_use == 0


# ---- in a route


def route_of(worker: Worker) -> RouteStats:
    (route,) = worker.stats().routes
    return route


def accounted(route: RouteStats) -> bool:
    came = route.rx_packets
    for stage in route.stages:
        assert stage.packets == came
        came += stage.split - stage.merged - stage.drops
    return came == route.tx_packets + route.drops


@pytest.mark.root
def test_merged_for_each_target(netns: NetNS, engine: str) -> None:
    """Frames of one burst that go to different targets do not merge."""
    skip_without_devices()
    first, second = frames_of(F(sport=1)), frames_of(F(sport=2, **V6))
    with ExitStack() as stack:
        a = stack.enter_context(rtap.open("a0", netns=netns, engine=engine))
        outs = [
            stack.enter_context(rtap.open(f"b{n}", netns=netns, engine=engine, tx_offloads=TSO))
            for n in range(2)
        ]
        near = stack.enter_context(PacketSocket(netns, "a0"))
        far = [
            stack.enter_context(PacketSocket(netns, out.ifname, protocol))
            for out, protocol in zip(outs, (0x0800, 0x86DD), strict=True)
        ]
        for data in (f for pair in zip(first, second, strict=True) for f in pair):
            near.send(data)
        worker = Worker()
        worker.forward(
            (a, 0),
            [(out, 0) for out in outs],
            stages=[stages.Match(source_port=2, action=1), stages.Gro()],
        )
        with worker:
            got = [far[n].frames(1)[0] for n in range(2)]
            eventually(lambda: route_of(worker).tx_packets == 2, "they are counted")
            route = route_of(worker)
        # Headers are not compared: the whole frame's checksum is still unfinished.
        wanted = [expected(frames)[0][1] for frames in (first, second)]
        assert [len(f) for f in got] == [len(f) for f in wanted]
        assert [f[74:] for f in got] == [f[74:] for f in wanted]
        assert [t.packets for t in route.targets] == [1, 1]
        assert (route.stages[1].packets, route.stages[1].merged, route.stages[1].split) == (
            12,
            10,
            0,
        )
        assert accounted(route)
        assert settle(a.pool) == 0


@contextmanager
def forwarded(
    there: Callable[[], list[Any]], *, a: dict[str, Any], b: dict[str, Any]
) -> Iterator[tuple[Wire, Worker]]:
    """Two devices joined by a worker, with stages on the way from a to b."""
    with wire(a=a, b=b) as w:
        for ns, dev in ((w.left, w.a), (w.right, w.b)):
            iproute(ns, f"link set dev {dev.ifname} txqueuelen 20000")
        worker = Worker()
        worker.forward((w.a, 0), (w.b, 0), stages=there(), on_full="retry")
        worker.forward((w.b, 0), (w.a, 0), on_full="retry")
        with worker:
            yield w, worker


def finished(w: Wire, worker: Worker) -> RouteStats:
    """The figures of the way from a to b, once no frame is under way."""

    def through() -> bool:
        routes = worker.stats().routes
        came = [w.a.stats().ipackets, w.b.stats().ipackets]
        return [r.rx_packets for r in routes] == came and all(map(accounted, routes))

    eventually(through, "every frame is accounted for")
    return worker.stats().routes[0]


@pytest.mark.root
def test_super_frames_for_a_device_without_offloads(engine: str) -> None:
    """Real TCP: the stage splits the kernel's super-frames, not the sending queue."""
    with (
        Mempool(4096) as pool,
        forwarded(
            lambda: [stages.Gso(pool), stages.ChecksumVerify()],
            a={"rx_offloads": LRO, "engine": engine},
            b={"engine": engine},
        ) as (w, worker),
    ):
        w.transfer(20 << 20)
        route = finished(w, worker)
        split, verify = route.stages
        assert split.split > (20 << 20) / 1500 * 0.8
        assert verify.drops == 0
        assert w.b.xstats()["tx_q0_software_gso_packets"] == 0
        assert w.b.stats().opackets == route.tx_packets == split.packets + split.split
        worker.stop()
        del worker, split, verify, route
        assert pool.in_use == 0


@pytest.mark.root
def test_a_pool_for_one_super_frame_at_a_time(engine: str) -> None:
    """Other super-frames wait in the stage until the frames of earlier ones are sent."""
    with forwarded(
        lambda: [stages.Gso(Mempool(48))],
        a={"rx_offloads": LRO, "engine": engine},
        b={"engine": engine},
    ) as (w, worker):
        w.transfer(5 << 20)
        route = finished(w, worker)
        assert route.stages[0].split > 0
        assert (route.drops, route.stages[0].drops) == (0, 0)
        assert settle(w.a.pool) == 0


@pytest.mark.root
def test_frames_become_super_frames_on_the_way(engine: str) -> None:
    with forwarded(
        lambda: [stages.Gro()], a={"engine": engine}, b={"tx_offloads": TSO, "engine": engine}
    ) as (w, worker):
        w.transfer(20 << 20)
        route = finished(w, worker)
        assert route.stages[0].merged > 0
        assert w.b.xstats()["tx_q0_tso_packets"] > 0
        assert route.tx_packets == route.rx_packets - route.stages[0].merged
        assert route.drops == route.stages[0].drops == 0


def test_split_frames_go_where_an_earlier_stage_has_sent_them(engine: str) -> None:
    """All frames of a super-frame go there, and so do those between two super-frames."""
    shape = Shape()
    payloads = [pattern(n, 500) for n in range(2)]
    plain = [frame(n) for n in range(2)]
    with ExitStack() as stack:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        for one in (end for pair in pairs for end in pair):
            stack.enter_context(one).setblocking(False)
        (ours, theirs), *outs = pairs
        pool = stack.enter_context(Mempool(64, 2048))
        rx = RxQueue(ours.fileno(), pool, name="rx", engine=engine)
        txs = [TxQueue(out.fileno(), name="tx", vnet_hdr=False, engine=engine) for out, _ in outs]
        for queue in (rx, *txs):
            stack.callback(queue.close)
            queue.start()
        for payload, data in zip(payloads, plain, strict=True):
            theirs.send(header(1, VnetHdr.GSO_TCPV4, 100) + shape.unfinished(payload))
            theirs.send(bytes(10) + data)
        turns = itertools.cycle((1, 0, 0, 1))
        worker = Worker()
        worker.forward(
            (Ends(rx, txs[0]), 0),
            [(Ends(rx, tx), 0) for tx in txs],
            stages=[lambda burst: [next(turns) for _ in burst], stages.Gso()],
            on_full="retry",
        )
        with worker:
            eventually(lambda: worker.stats().tx_packets == 12, "all frames are sent")
        cut = [shape.segments(payload, 100) for payload in payloads]
        assert drained(outs[0][1]) == [plain[0], *cut[1]]
        assert drained(outs[1][1]) == [*cut[0], plain[1]]


class Fed:
    """A device that receives super-frames, and one that sends plain frames."""

    SHAPE = Shape(4, "tcp")
    COUNT = 40  # frames of one super-frame

    def __init__(self, netns: NetNS, engine: str, stack: ExitStack, **there: Any) -> None:
        skip_without_devices()
        self.a = stack.enter_context(rtap.open("a0", netns=netns, engine=engine, rx_offloads=LRO))
        self.b = stack.enter_context(rtap.open("b0", netns=netns, engine=engine, **there))
        self.near = stack.enter_context(
            rtap.open("n0", netns=netns, engine=engine, tx_offloads=TSO, data_room=1 << 16)
        )
        redirect(netns, "n0", "a0")
        self.seed = 0

    def super_frame(self) -> list[bytes]:
        """Sends a super-frame; returns the frames it must be split into."""
        self.seed += 1
        payload = random.Random(self.seed).randbytes(1400 * self.COUNT)
        mbuf = self.near.pool.alloc(self.SHAPE.unfinished(payload))
        assert self.near.tx_burst(0, Burst([self.SHAPE.request(mbuf, 1400)])) == 1
        return self.SHAPE.segments(payload, 1400)

    def plain(self) -> list[bytes]:
        self.seed += 1
        (data,) = frames_of(F(sport=self.seed), 1)
        assert self.near.send(data)
        return [data]

    def worker(self, pool: Mempool, on_full: str = "retry") -> Worker:
        worker = Worker()
        worker.forward((self.a, 0), (self.b, 0), stages=[stages.Gso(pool)], on_full=on_full)
        return worker


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.mark.root
@pytest.mark.parametrize("slots", [1, 7, 39, 40])
def test_a_pool_smaller_than_a_super_frame(
    netns: NetNS, engine: str, stack: ExitStack, slots: int
) -> None:
    """It goes in parts, even when no later frame pushes it on."""
    fed = Fed(netns, engine, stack)
    pool = stack.enter_context(Mempool(slots))
    peer = stack.enter_context(PacketSocket(netns, "b0", IPV4, rcvbuf=1 << 24))
    wanted = fed.super_frame() + fed.plain() + fed.super_frame() + fed.super_frame()
    with fed.worker(pool) as worker:
        assert peer.frames(len(wanted)) == wanted
        eventually(lambda: route_of(worker).tx_packets == len(wanted), "they are counted")
        route = route_of(worker)
        assert (route.drops, route.stages[0].drops) == (0, 0)
        assert route.stages[0].split == 3 * (Fed.COUNT - 1)
        assert accounted(route)
        assert (settle(pool), settle(fed.a.pool)) == (0, 0)


@pytest.mark.root
def test_buffers_that_the_application_keeps(netns: NetNS, engine: str, stack: ExitStack) -> None:
    """The route does not wait for them: frames without a buffer are dropped until some return."""
    fed = Fed(netns, engine, stack)
    pool = stack.enter_context(Mempool(64))
    peer = stack.enter_context(PacketSocket(netns, "b0", IPV4, rcvbuf=1 << 24))
    some, kept = pool.alloc_burst(10), pool.alloc_burst(54)
    with fed.worker(pool) as worker:
        fed.super_frame()
        fed.super_frame()
        wanted = fed.plain()
        assert peer.frames(1) == wanted
        eventually(lambda: route_of(worker).tx_packets == 1, "it is counted")
        assert route_of(worker).stages[0].drops == 2
        assert accounted(route_of(worker))
        some.free()
        wanted = fed.super_frame() + fed.plain()
        assert peer.frames(len(wanted)) == wanted
        kept.free()
        wanted = fed.super_frame()
        assert peer.frames(len(wanted)) == wanted
        eventually(lambda: route_of(worker).tx_packets == 82, "they are counted")
        assert route_of(worker).stages[0].drops == 2
        assert accounted(route_of(worker))
        assert (settle(pool), settle(fed.a.pool)) == (0, 0)


@pytest.mark.root
def test_frames_that_never_fit(netns: NetNS, engine: str, stack: ExitStack) -> None:
    """A super-frame is dropped if one of its frames needs more buffers than exist; others pass."""
    fed = Fed(netns, engine, stack)
    pool = stack.enter_context(Mempool(5, data_room=256))
    peer = stack.enter_context(PacketSocket(netns, "b0", IPV4, rcvbuf=1 << 24))
    fed.super_frame()
    wanted = fed.plain()
    fed.super_frame()
    wanted += fed.plain()
    with fed.worker(pool) as worker:
        assert peer.frames(2) == wanted
        eventually(lambda: route_of(worker).tx_packets == 2, "they are counted")
        route = route_of(worker)
        assert (route.stages[0].drops, route.stages[0].split) == (2, 0)
        assert accounted(route)
        assert (settle(pool), settle(fed.a.pool)) == (0, 0)


@pytest.mark.root
@pytest.mark.parametrize("slots", [64, 16], ids=["whole", "in parts"])
def test_a_target_that_takes_nothing(
    netns: NetNS, engine: str, stack: ExitStack, slots: int
) -> None:
    """Frames wait at the target and in the stage, and no others are read. A stop frees them."""
    fed = Fed(netns, engine, stack, sndbuf=20_000)
    pool = stack.enter_context(Mempool(slots))
    stack.enter_context(rtap.open("s0", netns=netns))
    redirect(netns, "b0", "s0", "8kbit")
    for _ in range(20):
        fed.super_frame()
    with fed.worker(pool) as worker:
        eventually(lambda: route_of(worker).retries > 2, "the target is full")
        assert 0 < pool.in_use <= min(slots, Fed.COUNT)
        route = route_of(worker)
        assert route.rx_packets == 20
        assert route.stages[0].split == (39 if slots == 64 else 16)
        assert fed.a.pool.in_use == (19 if slots == 64 else 20)
    route = route_of(worker)
    lost = route.stages[0].drops
    assert lost == (19 if slots == 64 else 19 + Fed.COUNT - 16)
    assert route.stages[0].split == 39  # all of the first super-frame's, with those lost
    assert lost + route.drops + route.tx_packets == 19 + Fed.COUNT
    assert accounted(route)
    assert (settle(pool), settle(fed.a.pool)) == (0, 0)
