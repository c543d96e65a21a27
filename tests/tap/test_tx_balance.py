# SPDX-License-Identifier: BSD-3-Clause
"""Every frame that enters a worker and a queue leaves, or is a drop with a named reason."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import threading
from contextlib import ExitStack

import pytest
from rigs import Shape, redirect
from rings import Ends, drained, header
from support import PacketSocket, Tap, eventually, frame, ip, netdev, pattern, settle
from trains import F, regular

import rtap
from rtap import Burst, DeviceStateError, EthDev, MbufFlag, Mempool, NetNS, TxOffload, Worker
from rtap._ring import RxQueue, TxQueue
from rtap.drivers.observed import Drops
from rtap.offload import VnetHdr
from rtap.stages import DROP

pytestmark = [pytest.mark.root, pytest.mark.lifetime]

#: A frame that claims IPv4 and a checksum field, but has no UDP header.
IMPOSSIBLE = MbufFlag.TX_UDP_CKSUM
GENERATED = b"\xff" * 6 + bytes(6) + b"\x08\x00" + b"\x45" + bytes(75)


@pytest.mark.parametrize(
    ("started", "plugged", "missed", "unplugged"),
    [(True, True, 5, 0), (True, False, 0, 5), (False, True, 0, 0), (False, False, 0, 5)],
)
def test_whose_fault_the_kernels_drops_are(
    started: bool, plugged: bool, missed: int, unplugged: int
) -> None:
    drops = Drops(100)
    drops.turn(100, started=started, plugged=plugged)
    drops.count(105)
    assert (drops.missed, drops.unplugged) == (missed, unplugged)
    drops.turn(105, started=True, plugged=True)
    drops.count(106)
    assert (drops.missed, drops.unplugged) == (missed + 1, unplugged)
    drops.restart(3)
    drops.count(3)
    assert (drops.missed, drops.unplugged) == (missed + 1, unplugged)


def source(stack: ExitStack, args: str, pool: Mempool) -> EthDev:
    """A started net_null device, an endless source of frames."""
    dev = stack.enter_context(rtap.probe(args))
    dev.configure(1, 1)
    dev.rx_queue_setup(0, 64, pool)
    dev.tx_queue_setup(0, 64)
    dev.start()
    return dev


#: For each target, which of its frames have impossible requests.
REQUESTS = {
    "all": ["1", "1"],
    "one target's": ["0", "1"],
    "the other's": ["1", "0"],
    "some": ["011", "10010", "1101"],
    "of one among many": ["0", "0", "0", "1"],
}


@pytest.mark.parametrize("on_full", ["drop", "retry"])
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=list(REQUESTS))
def test_impossible_requests_to_several_targets(
    netns: NetNS, engine: str, requests: list[str], on_full: str
) -> None:
    """None of them is sent, whichever targets share a kernel entry."""
    turns = [itertools.cycle(map(int, turn)) for turn in requests]
    asked = [0] * len(turns)
    sent = [0] * len(turns)

    def mark(burst: Burst) -> list[int]:
        targets = [n % len(turns) for n in range(len(burst))]
        flags = [next(turns[t]) for t in targets]
        for t, bad in zip(targets, flags, strict=True):
            asked[t] += bad
            sent[t] += not bad
        burst.ol_flags = [int(IMPOSSIBLE) * bad for bad in flags]
        return targets

    with ExitStack() as stack:
        pool = stack.enter_context(Mempool(512))
        null = source(stack, "net_null0,size=90", pool)
        outs = [
            stack.enter_context(
                rtap.open(f"b{n}", netns=netns, engine=engine, tx_offloads=TxOffload.UDP_CKSUM)
            )
            for n in range(len(turns))
        ]
        worker = Worker(burst=8)
        worker.forward((null, 0), [(out, 0) for out in outs], stages=[mark], on_full=on_full)
        with worker:
            eventually(lambda: worker.stats().rx_packets > 500, "frames are forwarded")
        (route,) = worker.stats().routes
        assert not route.error
        assert route.rx_packets == route.tx_packets + route.drops == sum(asked) + sum(sent)
        for n, (out, target) in enumerate(zip(outs, route.targets, strict=True)):
            stats = out.stats()
            assert (stats.opackets, stats.oerrors) == (target.packets, target.drops)
            assert (target.packets, target.drops) == (sent[n], asked[n])
            assert out.xstats()["tx_q0_bad_request_packets"] == asked[n]
            assert netdev(netns, out.ifname)["rx_packets"] == sent[n]
        assert settle(pool) == 0


# ---- pieces that wait


PIECES = 60


class Slow:
    """A device ``out`` that splits super-frames itself and whose kernel takes a few frames at a
    time, and ``feed``, whose frames ask to be split."""

    def __init__(self, stack: ExitStack, ns: NetNS, engine: str, rate: str) -> None:
        self.out = stack.enter_context(
            rtap.open(
                "out",
                netns=ns,
                engine=engine,
                sndbuf=6000,
                tx_offloads=TxOffload.TCP_CKSUM | TxOffload.TCP_TSO,
            )
        )
        self.feed = stack.enter_context(rtap.open("feed", netns=ns, engine=engine, data_room=9000))
        stack.enter_context(rtap.open("end", netns=ns))
        redirect(ns, "out", "end", rate)
        self.at_feed = stack.enter_context(PacketSocket(ns, "feed", 0x0800))
        self.shape = Shape()
        self.queue = self.out._txq[0]
        self.queue.software_gso = 7
        ip(ns, "link", "set", "feed", "mtu", "4000")

    def ask(self, burst: Burst) -> None:
        for mbuf in burst:
            self.shape.request(mbuf, 50)

    def worker(self, on_full: str) -> Worker:
        worker = Worker()
        worker.forward((self.feed, 0), (self.out, 0), stages=[self.ask], on_full=on_full)
        return worker

    def offer(self) -> None:
        self.at_feed.send(self.shape.unfinished(pattern(3, 50 * PIECES)))

    def counted(self) -> tuple[int, int]:
        return self.out.stats().opackets, self.out.xstats()["tx_q0_unsent_packets"]


@pytest.mark.parametrize("on_full", ["drop", "retry"])
def test_a_worker_sends_what_waits_without_new_frames(
    netns: NetNS, engine: str, on_full: str
) -> None:
    with ExitStack() as stack:
        slow = Slow(stack, netns, engine, "1mbit")
        with slow.worker(on_full) as worker:
            slow.offer()
            # A look at the queue may come too late, but the counter stays.
            eventually(lambda: slow.queue.counters()["full"] > 0, "the kernel is full")
            eventually(lambda: slow.counted() == (PIECES, 0), "all pieces leave")
            (route,) = worker.stats().routes
            assert (route.rx_packets, route.tx_packets, route.drops) == (1, 1, 0)
            eventually(
                lambda: (
                    worker.stats().routes[0].tx_bytes
                    == sum(map(len, slow.shape.segments(pattern(3, 50 * PIECES), 50)))
                ),
                "all bytes are counted",
            )
        assert slow.queue.waiting == 0
        assert settle(slow.feed.pool) == 0


@pytest.mark.parametrize("end", ["worker", "queue", "device", "close"])
def test_what_waits_at_the_end_is_counted(netns: NetNS, engine: str, end: str) -> None:
    """This holds whatever ends, and whatever owns the queue then."""
    with ExitStack() as stack:
        slow = Slow(stack, netns, engine, "8kbit")
        worker = stack.enter_context(slow.worker("retry"))
        slow.offer()
        eventually(lambda: slow.queue.waiting > 0, "the kernel is full")
        if end == "worker":
            worker.stop()
        elif end == "queue":
            slow.queue.stop()
        elif end == "device":
            slow.out.stop()
        else:
            slow.out.close()
        assert slow.queue.waiting == 0
        counters = slow.queue.counters()
        assert 0 < counters["packets"] < PIECES
        assert counters["unsent"] == counters["errors"] == PIECES - counters["packets"]
        worker.stop()
        (route,) = worker.stats().routes
        assert (route.rx_packets, route.tx_packets, route.drops) == (1, 1, 0)
        assert settle(slow.feed.pool) == 0


# ---- descriptors of routes that have ended


def waits(target: socket.socket, data: bytes) -> int:
    """How many such writes the peer's buffer takes."""
    for n in itertools.count():
        try:
            target.send(data)
        except BlockingIOError:
            return n
    raise AssertionError("unreachable")


def test_what_waits_is_offered_once_more_at_the_end(engine: str) -> None:
    """The route ends in a stage, during which its target gets room again."""
    shape = Shape(4, "tcp")
    with ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs, out, peer):
            stack.enter_context(end).setblocking(False)
        out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)
        room = waits(out, shape.finished(bytes(50)))
        assert len(drained(peer)) == room > 10
        payload = pattern(3, 50 * (room + room // 2))
        pool = stack.enter_context(Mempool(8, 66_000))
        rx = RxQueue(ours.fileno(), pool, name="rx", max_frame=65_600, engine=engine)
        tx = TxQueue(out.fileno(), name="tx", vnet_hdr=False, ordered=True, engine=engine)
        for queue in (rx, tx):
            stack.callback(queue.close)
            queue.start()
        arrived: list[bytes] = []
        bursts = itertools.count()

        def last(_burst: Burst) -> None:
            if next(bursts) > 0:
                arrived.extend(drained(peer))
                raise RuntimeError("enough")

        worker = Worker()
        ends = Ends(rx, tx)
        worker.forward((ends, 0), (ends, 0), stages=[last], on_full="retry")
        with worker:
            theirs.send(header(1, VnetHdr.GSO_TCPV4, 50) + shape.unfinished(payload))
            eventually(lambda: tx.waiting > 0, "the target is full")
            theirs.send(bytes(10) + frame(1))
            eventually(lambda: bool(worker.stats().routes[0].error), "the route ends")
        arrived += drained(peer)
        assert arrived == shape.segments(payload, 50)
        assert (tx.waiting, tx.counters()["unsent"]) == (0, 0)


class Pairs:
    """Queues on sockets: a source, and targets that split super-frames themselves."""

    def __init__(self, stack: ExitStack, engine: str, sources: int, targets: int) -> None:
        ends = [
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for _ in range(sources + targets)
        ]
        for end in itertools.chain(*ends):
            stack.enter_context(end).setblocking(False)
        self.shape = Shape()
        self.outs = [ours for ours, _ in ends[sources:]]
        self.feeds = [theirs for _, theirs in ends[:sources]]
        self.peers = [theirs for _, theirs in ends[sources:]]
        self.pool = stack.enter_context(Mempool(64, 66_000))
        self.rxs = [
            RxQueue(ours.fileno(), self.pool, name="rx", max_frame=65_600, engine=engine)
            for ours, _ in ends[:sources]
        ]
        self.txs = [
            TxQueue(out.fileno(), name="tx", vnet_hdr=False, ordered=True, engine=engine)
            for out in self.outs
        ]
        for queue in (*self.rxs, *self.txs):
            stack.callback(queue.close)
            queue.start()

    def too_many(self, target: int = 0) -> bytes:
        """A payload of which the target takes two thirds, in pieces of 50 bytes."""
        self.outs[target].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)
        room = waits(self.outs[target], self.shape.finished(bytes(50)))
        assert len(drained(self.peers[target])) == room > 10
        return pattern(3, 50 * (room + room // 2))

    def super_frame(self, payload: bytes, feed: int = 0) -> list[bytes]:
        """Sends a super-frame in; returns the pieces it is split into."""
        hdr = header(1, VnetHdr.GSO_TCPV4, 50)
        self.feeds[feed].send(hdr + self.shape.unfinished(payload))
        return self.shape.segments(payload, 50)

    def plain(self, number: int, feed: int = 0) -> None:
        self.feeds[feed].send(bytes(10) + frame(number))

    def to(self, rx: int = 0) -> tuple[Ends, list[tuple[Ends, int]]]:
        return Ends(self.rxs[rx], self.txs[0]), [(Ends(self.rxs[rx], tx), 0) for tx in self.txs]


def test_nothing_overtakes_what_waits_at_one_of_several_targets(engine: str) -> None:
    """A target gets room again just when frames for all targets could be sent together."""
    with ExitStack() as stack:
        pairs = Pairs(stack, engine, 1, 3)
        payload = pairs.too_many()
        bursts: list[int] = []
        arrived: list[bytes] = []
        inside, go = threading.Event(), threading.Event()
        stack.callback(go.set)

        def stage(burst: Burst) -> list[int]:
            bursts.append(len(burst))
            if len(bursts) == 2:
                inside.set()
                go.wait(10)
                return [DROP]
            if len(bursts) == 3:
                arrived.extend(drained(pairs.peers[0]))
                return list(range(3))
            return [0]

        worker = Worker()
        source, targets = pairs.to()
        worker.forward((source, 0), targets, stages=[stage], on_full="retry")
        with worker:
            pieces = pairs.super_frame(payload)
            eventually(lambda: pairs.txs[0].waiting > 0, "the target is full")
            pairs.plain(9)
            assert inside.wait(5)
            for n in range(3):
                pairs.plain(n)
            go.set()
            eventually(lambda: worker.stats().tx_packets == 4, "all are sent")
        assert bursts == [1, 1, 3]
        arrived += drained(pairs.peers[0])
        assert arrived == [*pieces, frame(0)]
        assert [drained(peer) for peer in pairs.peers[1:]] == [[frame(1)], [frame(2)]]


@pytest.mark.parametrize("targets", [1, 2])
def test_pieces_that_are_refused_are_no_frames_of_the_route(engine: str, targets: int) -> None:
    """The kernel refuses all pieces: they are errors of the queue, and the route sent one frame."""
    with ExitStack() as stack:
        pairs = Pairs(stack, engine, 1, targets)
        pairs.peers[0].close()
        worker = Worker()
        source, ends = pairs.to()

        def stage(burst: Burst) -> list[int]:
            return [0] * len(burst)

        worker.forward((source, 0), ends, stages=[stage])
        with worker:
            pieces = pairs.super_frame(pattern(3, 500))
            eventually(lambda: worker.stats().tx_packets > 0, "it is sent")
        (route,) = worker.stats().routes
        assert (route.rx_packets, route.tx_packets, route.drops) == (1, 1, 0)
        counters = pairs.txs[0].counters()
        assert counters["errors"] == counters["refused"] == len(pieces)
        assert counters["packets"] == 0


def test_what_waits_when_a_route_ends_is_sent_by_an_idle_one(engine: str) -> None:
    """The target passes to a parked route, to which no frame comes."""
    with ExitStack() as stack:
        pairs = Pairs(stack, engine, 2, 1)
        payload = pairs.too_many()
        worker = Worker()
        for rx in range(2):
            source, targets = pairs.to(rx)
            worker.forward((source, 0), targets, on_full="retry")
        before = epolls()
        with worker:
            (epoll,) = epolls() - before
            eventually(lambda: pairs.rxs[1].fd in watched(epoll), "the other route is parked")
            pieces = pairs.super_frame(payload)
            eventually(lambda: pairs.txs[0].waiting > 0, "the target is full")
            pairs.rxs[0].stop()
            assert pairs.txs[0].waiting > 0
            arrived = drained(pairs.peers[0])
            eventually(lambda: pairs.txs[0].waiting == 0, "what waits is sent")
        assert arrived + drained(pairs.peers[0]) == pieces
        assert pairs.txs[0].counters()["unsent"] == 0


@pytest.mark.parametrize("end", ["stop", "close"])
def test_a_super_frame_that_is_split_in_portions_is_let_go_of(engine: str, end: str) -> None:
    """When its queue stops, only its first pieces exist."""
    shape = Shape()
    payload = pattern(3, 250) * 200
    with ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for one in (ours, theirs, out, peer):
            stack.enter_context(one).setblocking(False)
        out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 13)
        pool = stack.enter_context(Mempool(8, 66_000))
        rx = RxQueue(ours.fileno(), pool, name="rx", max_frame=65_600, engine=engine)
        tx = TxQueue(out.fileno(), name="tx", vnet_hdr=False, ordered=True, engine=engine)
        for queue in (rx, tx):
            stack.callback(queue.close)
            queue.start()
        theirs.send(header(1, VnetHdr.GSO_TCPV4, 50) + shape.unfinished(payload))
        assert tx.tx_burst(rx.rx_burst(1)) == 1
        assert tx.waiting > 256
        assert pool.in_use == 1
        getattr(tx, end)()
        counters = tx.counters()
        assert pool.in_use == 0
        assert counters["packets"] + counters["unsent"] == 1000
        assert len(drained(peer)) == counters["packets"]


def test_a_target_passes_to_the_route_that_still_has_it(engine: str) -> None:
    """When that route has ended too, the target has no owner."""
    with ExitStack() as stack:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        for one in (end for pair in pairs for end in pair):
            stack.enter_context(one).setblocking(False)
        pool = stack.enter_context(Mempool(64, 2048))
        rxs = [RxQueue(ours.fileno(), pool, name="rx", engine=engine) for ours, _ in pairs[:2]]
        tx = TxQueue(pairs[2][0].fileno(), name="tx", vnet_hdr=False, ordered=True, engine=engine)
        for queue in (*rxs, tx):
            queue.start()
        worker = Worker()
        for rx in rxs:
            worker.forward((Ends(rx, tx), 0), (Ends(rx, tx), 0))
        with worker:
            rxs[0].stop()
            with pytest.raises(DeviceStateError, match="in use"):
                tx.tx_burst(pool.alloc_burst(0))
            pairs[1][1].send(bytes(10) + frame(1))
            eventually(lambda: drained(pairs[2][1]) == [frame(1)], "the other route goes on")
        assert tx.tx_burst(pool.alloc_burst(1, frame(2))) == 1
        assert drained(pairs[2][1]) == [frame(2)]
        # Only now: close() waits for the queue's owner, and would wait for ever without one.
        for queue in (*rxs, tx):
            queue.close()


def watched(epoll: int) -> set[int]:
    with open(f"/proc/self/fdinfo/{epoll}") as f:
        return {int(line.split()[1]) for line in f if line.startswith("tfd:")}


def epolls() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                found.add(int(name))
    return found


def test_the_descriptor_of_a_route_that_has_ended_is_not_watched(netns: NetNS, engine: str) -> None:
    with ExitStack() as stack:
        a, b, out = (
            stack.enter_context(rtap.open(name, netns=netns, engine=engine))
            for name in ("a0", "b0", "out")
        )
        worker = Worker()
        for dev in (a, b):
            worker.forward((dev, 0), (out, 0))
        before = epolls()
        stack.enter_context(worker)
        (epoll,) = epolls() - before
        queues = {dev.rx_queue(0).fd for dev in (a, b)}
        eventually(lambda: queues <= watched(epoll), "both routes are parked")
        a._rxq[0].stop()
        assert watched(epoll) & queues == {b.rx_queue(0).fd}
        out._txq[0].stop()
        eventually(lambda: not watched(epoll) & queues, "the other route has ended")


# ---- frames shorter than a header


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_runts_are_bad_requests(netns: NetNS, engine: str, mode: str) -> None:
    """No such frame reaches the kernel by any path; frames beside them do."""
    least = 14 if mode == "tap" else 20
    good = frame() if mode == "tap" else b"\x45" + bytes(59)
    lengths = [1, least - 1, least]
    with ExitStack() as stack:
        outs = [
            stack.enter_context(rtap.open(f"r{n}", netns=netns, engine=engine, mode=mode))
            for n in range(2)
        ]
        pool = stack.enter_context(Mempool(64))
        frames = [good[:n] for n in lengths] + [good]
        dev = outs[0]
        assert dev.tx_burst(0, pool.alloc_burst(len(frames), frames)) == 4
        assert (dev.stats().opackets, dev.stats().oerrors) == (2, 2)
        assert dev.xstats()["tx_q0_bad_request_packets"] == 2
        assert netdev(netns, "r0")["rx_packets"] == 2
        for n in (0, 1, least - 1):
            with pytest.raises(ValueError, match=f"a frame of {n} bytes is too short"):
                dev.send(good[:n])
        assert dev.send(good)
        dev.stats_reset()
        dev.xstats_reset()

        def cut(burst: Burst) -> list[int]:
            for n, mbuf in enumerate(burst):
                mbuf[0:1] = good[:1]
                if n % 4 < 2:
                    mbuf.trim(mbuf.pkt_len - least + 1)
            return [n % 2 for n in range(len(burst))]

        null = source(stack, "net_null0,size=64", pool)
        kernel = netdev(netns, "r0")["rx_packets"]
        worker = Worker(burst=8)
        worker.forward((null, 0), [(out, 0) for out in outs], stages=[cut])
        with worker:
            eventually(lambda: worker.stats().rx_packets > 100, "frames are forwarded")
        (route,) = worker.stats().routes
        assert (route.rx_packets, route.error) == (route.tx_packets + route.drops, "")
        assert route.drops * 2 == route.rx_packets
        for out, target in zip(outs, route.targets, strict=True):
            assert out.xstats()["tx_q0_bad_request_packets"] == target.drops
            assert out.stats().opackets == target.packets
        assert netdev(netns, "r0")["rx_packets"] - kernel == route.targets[0].packets


# ---- merged frames


@pytest.mark.parametrize("up", [True, False])
def test_a_merged_frame_is_lost_as_the_frames_it_is_made_of(
    tap: Tap, engine: str, up: bool
) -> None:
    frames = [f.build() for f in regular(F(), [500] * 20, random.Random(1))] + [frame()]
    with Mempool(64) as pool:
        tx = TxQueue(tap.fd, name="tap", gro=True, engine=engine)
        tx.start()
        if not up:
            tap.set("down")
        assert tx.tx_burst(pool.alloc_burst(len(frames), frames)) == len(frames)
        counters, more = tx.counters(), tx.xcounters()
        lost = 0 if up else len(frames)
        assert counters["errors"] == counters["down"] == more["link_down_packets"] == lost
        assert (counters["packets"], more["tso_packets"], more["gro_merged_packets"]) == (
            (2, 1, 20) if up else (0, 0, 0)
        )
        tx.close()
        assert pool.in_use == 0
