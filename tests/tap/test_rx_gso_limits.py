# SPDX-License-Identifier: BSD-3-Clause
"""``rx_gso`` where mbufs are few, kept, or too small, and where its queue is stopped.

No frame blocks the ones after it, and each frame is received or counted.
"""

from __future__ import annotations

import contextlib
import functools
import random
import select
import signal
import socket
from collections.abc import Callable, Iterator

import pytest
from rigs import Shape
from rings import GSO_TCPV4, NEEDS_CSUM, header
from support import PacketSocket, eventually, frame, ip, netdev, skip_without_devices

import rtap
from rtap import DeviceStateError, EthConf, EthDev, Mbuf, Mempool, NetNS, Worker
from rtap._ring import RxQueue

PLAIN = bytes(10)


@functools.cache
def split(payload: bytes, size: int) -> tuple[bytes, tuple[bytes, ...]]:
    """A super-frame, and the frames it must be split into."""
    return Shape().unfinished(payload), tuple(Shape().segments(payload, size))


class End:
    """A queue that splits into ``pool``, and the other end of its descriptor."""

    def __init__(self, pool: Mempool, engine: str, reads: Mempool | None = None) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.pool = pool
        self.reads = Mempool(8, 66_000) if reads is None else reads
        self.queue = RxQueue(
            self.ours.fileno(),
            self.reads,
            name="raw",
            max_frame=65_600,
            split=pool,
            engine=engine,
        )
        self.queue.start()
        self.got = 0

    def super_frame(self, payload: bytes, size: int) -> list[bytes]:
        """Sends a super-frame; returns the frames that must arrive."""
        whole, parts = split(payload, size)
        self.theirs.send(header(NEEDS_CSUM, GSO_TCPV4, size) + whole)
        return list(parts)

    def plain(self, data: bytes) -> list[bytes]:
        self.theirs.send(PLAIN + data)
        return [data]

    def burst(self, n: int = 64) -> list[Mbuf]:
        burst = self.queue.rx_burst(n)
        self.got += len(burst)
        return list(burst)

    def frames(self, bursts: int, n: int = 64) -> list[bytes]:
        """The frames of that many bursts, when the application keeps none."""
        got: list[bytes] = []
        for _ in range(bursts):
            got += map(bytes, self.burst(n))
        return got

    def counted(self) -> dict[str, int]:
        return self.queue.counters() | self.queue.xcounters()

    def check(self, in_hand: int = 0) -> None:
        """Checks that every frame read is accounted for."""
        n = self.counted()
        assert n["errors"] == n["truncated"] + n["bad_vnet_hdr"] + n["too_long"] + n["read_errors"]
        made = n["packets"] - n["gso_super_packets"] + n["gso_split_packets"]
        assert made == self.got + n["stopped_packets"] + in_hand


@contextlib.contextmanager
def end(pool: Mempool, engine: str, reads: Mempool | None = None) -> Iterator[End]:
    """An End whose slots must all be free afterwards."""
    made = End(pool, engine, reads)
    with made.ours, made.theirs:
        try:
            yield made
        finally:
            made.queue.close()
        made.check()
        assert made.reads.in_use == 0


# ---- few mbufs


@pytest.mark.parametrize("slots", [1, 2, 7, 29, 30, 31])
@pytest.mark.parametrize("n", [1, 5, 64])
def test_a_pool_smaller_than_a_super_frame(engine: str, slots: int, n: int) -> None:
    """The super-frame comes in parts, and later frames come after it."""
    payload = random.Random(1).randbytes(29_500)
    with Mempool(slots) as pool, end(pool, engine) as e:
        expected = e.super_frame(payload, 1000) + e.plain(frame(1)) + e.super_frame(payload, 700)
        got: list[bytes] = []
        fruitless = 0
        while len(got) < len(expected):
            more = e.frames(1, n)
            fruitless = 0 if more else fruitless + 1
            assert fruitless < 2  # one that waits for all of its mbufs waits for one burst
            got += more
        assert got == expected
        assert e.frames(1) == []
        counted = e.counted()
        assert (counted["packets"], counted["errors"]) == (3, 0)
        assert counted["gso_super_packets"] == 2
        assert counted["gso_split_packets"] == len(expected) - 1
        assert pool.in_use == 0


@pytest.mark.parametrize("kept", [1, 5, 31])
def test_mbufs_that_are_never_given_back(engine: str, kept: int) -> None:
    """The pool would be large enough for the super-frame if none of its mbufs were held."""
    payload = random.Random(2).randbytes(31_500)
    with Mempool(32) as pool, end(pool, engine) as e:
        keep = pool.alloc_burst(kept)
        expected = e.super_frame(payload, 1000) + e.plain(frame(1))
        got = e.frames(1)
        assert got == []
        assert e.counted()["nombuf"] == 1
        for _ in range(33):
            got += e.frames(1)
        assert got == expected
        keep.free()


def test_frames_that_wait_come_without_others_behind_them(engine: str) -> None:
    """They come as soon as there are mbufs, even with nothing new to read."""
    payload = random.Random(1).randbytes(19_000)
    with Mempool(29) as pool, end(pool, engine) as e:
        expected = e.super_frame(payload, 1000) + e.super_frame(payload, 1900)
        assert e.frames(1) == expected
    with Mempool(24) as pool, end(pool, engine) as e:
        expected = e.super_frame(payload, 1000) + e.super_frame(payload, 1900)
        held = e.burst()
        assert len(held) == 19
        assert e.burst() == []  # waits for ten
        e.check(in_hand=1)
        held += e.burst()
        assert len(held) == 24
        assert e.burst() == []
        got = [bytes(mbuf) for mbuf in held]
        held.clear()
        assert got + e.frames(1) == expected


def test_each_super_frame_waits_for_one_burst(engine: str) -> None:
    """This also holds for a super-frame after one that has waited."""
    payload = random.Random(3).randbytes(31_500)
    with Mempool(32) as pool, end(pool, engine) as e:
        for n in (1, 2, 3):
            keep = pool.alloc_burst(1)
            expected = e.super_frame(payload, 1000)
            assert e.frames(1) == []
            assert e.counted()["nombuf"] == n
            keep.free()
            assert e.frames(1) == expected


@pytest.mark.parametrize(
    ("room", "size", "whole"), [(2048, 1000, 32), (300, 1400, 22 * 5 + 3)], ids=["one", "several"]
)
def test_one_that_the_pool_never_holds_does_not_wait(
    engine: str, room: int, size: int, whole: int
) -> None:
    """If the pool has one mbuf too few, there is nothing to wait for."""
    payload = random.Random(4).randbytes(31_500)
    with Mempool(whole, room) as pool, end(pool, engine) as e:
        keep = pool.alloc_burst(1)
        expected = e.super_frame(payload, size)
        assert e.frames(1) == []
        keep.free()
        assert e.frames(1) == expected
    with Mempool(whole - 1, room) as pool, end(pool, engine) as e:
        expected = e.super_frame(payload, size)
        got = e.frames(1)
        assert len(got) == len(expected) - 1
        assert got + e.frames(1) == expected


# ---- mbufs that are too small


@pytest.mark.parametrize("room", [64, 70, 100])
def test_frames_of_many_mbufs(engine: str, room: int) -> None:
    data = random.Random(room).randbytes(1514)
    payload = random.Random(room).randbytes(9000)
    with Mempool(1000, room) as pool, end(pool, engine) as e:
        expected = e.plain(data) + e.super_frame(payload, 4000) + e.plain(data)
        got = e.frames(3)
        assert got == expected
        e.plain(data)
        (mbuf,) = e.burst()
        assert mbuf.nb_segs == -(-1514 // room)
        del mbuf


def test_what_the_pool_could_never_hold_is_dropped(engine: str) -> None:
    """A plain frame and a super-frame's frames of five mbufs, where there are four; they are lost
    at once, with all mbufs in use as well."""
    with Mempool(4, 300) as pool, end(pool, engine) as e:
        held = pool.alloc_burst(4)
        e.plain(frame(1, 1500))
        e.super_frame(bytes(5000), 1400)
        e.super_frame(bytes(1300), 1400)
        expected = e.plain(frame(2, 1200))
        assert e.burst() == []
        counted = e.counted()
        assert (counted["too_long"], counted["errors"], counted["packets"]) == (3, 3, 1)
        assert counted["gso_too_long_packets"] == 3
        held.free()
        assert e.frames(1) == expected
        expected = e.super_frame(bytes(5000), 1100)  # each fits, one at a time
        assert e.frames(6) == expected


def test_bad_frames_do_not_prolong_a_burst(engine: str) -> None:
    with Mempool(64) as pool, end(pool, engine) as e:
        for _ in range(20):
            e.theirs.send(header(NEEDS_CSUM, GSO_TCPV4, 1) + Shape().unfinished(bytes(3000)))
        expected = e.plain(frame(1))
        assert e.frames(1, 8) == []
        assert e.counted()["bad_vnet_hdr"] == 8
        assert e.frames(2, 8) == expected
        assert e.counted()["bad_vnet_hdr"] == e.counted()["errors"] == 20
        assert e.counted()["packets"] == 1


def test_a_checksum_outside_the_packet(engine: str) -> None:
    """A checksum field in the padding cannot be finished: an error, and no packet."""
    udp = Shape(proto="udp").unfinished(b"data")
    with Mempool(8) as pool, end(pool, engine) as e:
        start = len(udp)
        e.theirs.send(header(NEEDS_CSUM, 0, 0, start + 40, 0) + udp + bytes(20))
        expected = e.plain(frame(1))
        assert e.frames(1) == expected
        assert (e.counted()["errors"], e.counted()["packets"]) == (1, 1)


# ---- payloads by reference


def test_kept_references_do_not_stop_reception(engine: str) -> None:
    """The application can keep half of the slots that are read into; the rest is copied."""
    with Mempool(256, 32_768) as pool, Mempool(8, 66_000) as reads, end(pool, engine, reads) as e:
        kept: list[Mbuf] = []
        expected: list[bytes] = []
        for n in range(12):
            expected += e.super_frame(random.Random(n).randbytes(60_000), 20_000)
            kept += e.burst()
        assert [bytes(mbuf) for mbuf in kept] == expected
        assert {mbuf.nb_segs for mbuf in kept[:12]} == {2}
        assert {mbuf.nb_segs for mbuf in kept[-12:]} == {1}
        assert reads.in_use == 4
        assert e.counted()["nombuf"] == 0
        assert pool.available > 0
        kept.clear()
        assert (reads.in_use, pool.in_use) == (0, 0)
        e.super_frame(bytes(60_000), 20_000)
        assert [mbuf.nb_segs for mbuf in e.burst()] == [2, 2, 2]


# ---- stopped queues


@pytest.mark.parametrize("how", ["stop", "purge", "close"])
@pytest.mark.parametrize("slots", [128, 25], ids=["whole", "in parts"])
def test_what_a_stopped_queue_has_in_hand(engine: str, how: str, slots: int) -> None:
    """The rest of one super-frame, and others not yet started, are counted."""
    with Mempool(slots) as pool, end(pool, engine) as e:
        for _ in range(2):
            e.super_frame(bytes(30_000), 1000)
        e.plain(frame(1))
        for _ in range(3):
            e.burst(7)
        assert e.got == 21  # of 30: the super-frame is begun
        getattr(e.queue, how)()
        assert (pool.in_use, e.reads.in_use) == (0, 0)
        e.check()
        assert e.counted()["stopped_packets"] > 0
        if how == "close":
            return
        e.queue.start()
        expected = e.super_frame(bytes(5000), 1000)
        got = e.frames(40, 2)  # once more it has frames in hand between bursts
        assert got[-5:] == expected
        assert bytes(1000) not in got[:-5]  # of the old ones, only what the kernel still had


def test_a_super_frame_after_a_stop_waits_as_the_first_did(engine: str) -> None:
    """It waits for one burst, until there are mbufs for all of it: the previous one was purged."""
    payload = bytes(31_500)
    with Mempool(32) as pool, end(pool, engine) as e:
        keep = pool.alloc_burst(1)
        for n in (1, 2):
            e.super_frame(payload, 1000)
            assert e.frames(1) == []
            assert e.counted()["nombuf"] == n
            e.queue.stop()
            e.queue.start()
        keep.free()
        expected = e.super_frame(payload, 1000)
        assert e.frames(1) == expected
        assert e.counted()["stopped_packets"] == 2


def test_a_handler_that_stops_a_queue_whose_burst_waits_for_mbufs(engine: str) -> None:
    """The burst owns the queue, so the next burst drops the frames in hand."""
    with Mempool(1) as pool, end(pool, engine) as e:
        keep = pool.alloc_burst(1)
        e.plain(frame(1))
        assert e.frames(1) == []
        before = signal.signal(signal.SIGALRM, lambda *_: e.queue.stop())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(DeviceStateError):
                e.queue.rx_burst(8, 10)
        finally:
            signal.signal(signal.SIGALRM, before)
        keep.free()
        e.queue.start()
        expected = e.plain(frame(2))
        assert e.frames(2) == expected
        assert e.counted()["stopped_packets"] == 1


# ---- a device's queues

UDP_SEGMENT = 103  # linux/udp.h
FRAMES = 10


@contextlib.contextmanager
def opened(ns: NetNS, engine: str, queues: int) -> Iterator[tuple[EthDev, Callable[[], None]]]:
    """A device with rx_gso, and a function that has the kernel send it super-frames."""
    with rtap.open("g0", netns=ns, engine=engine, rx_gso=True, queues=queues) as dev:
        ip(ns, "addr", "add", "10.9.0.1/24", "dev", "g0")
        ip(ns, "neigh", "add", "10.9.0.2", "dev", "g0", "lladdr", str(dev.app_mac))

        def send() -> None:
            with ns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as udp:
                udp.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1000)
                udp.sendto(bytes(1000 * FRAMES), ("10.9.0.2", 9))

        yield dev, send


def waiting(dev: EthDev, queue: int) -> bool:
    return bool(select.select([dev.rx_queue(queue).fd], [], [], 0)[0])


def split_and_lost(dev: EthDev, queue: int) -> tuple[int, int]:
    """The frames split from its super-frames, and those lost after the split."""
    x = dev.xstats()
    q = f"rx_q{queue}_"
    assert dev.stats().ierrors == 0
    made = dev.stats().q_ipackets[queue] - x[q + "gso_super_packets"] + x[q + "gso_split_packets"]
    return made, x[q + "stopped_packets"]


@pytest.mark.root
@pytest.mark.parametrize("kind", ["multi-queue", "single-queue"])
def test_a_device_queue_that_is_stopped(netns: NetNS, engine: str, kind: str) -> None:
    """The rest of a super-frame and the frames in the kernel are dropped, each with a counter."""
    skip_without_devices()
    queues = 2 if kind == "multi-queue" else 1
    if queues == 1:
        ip(netns, "tuntap", "add", "g0", "mode", "tap")
    with opened(netns, engine, queues) as (dev, send):
        while not all(waiting(dev, q) for q in range(queues)):
            send()
        for _ in range(3):  # so that more waits than one read brings
            send()
        assert dev.info().multi_queue == (queues == 2)
        before = len(dev.rx_burst(0, 3))
        assert before == 3
        dev.rx_queue_stop(0)
        dev.rx_queue_start(0)
        made, lost = split_and_lost(dev, 0)
        assert made == before + lost
        assert lost >= FRAMES - before  # and super-frames that nobody had begun
        assert dev.pool.in_use == 0
        assert len(dev.rx_burst(0)) == 0
        other = 0
        while queues == 2 and (burst := dev.rx_burst(1)):
            other += len(burst)
        purged = dev.xstats()["rx_q0_purged_packets"]
        stats = dev.stats()
        assert purged + stats.ipackets == netdev(netns, "g0")["tx_packets"]
        if queues == 2:
            assert split_and_lost(dev, 1) == (other, 0)
        # It starts again with no frames from before.
        dev.stop()
        dev.start()
        stopped = dev.xstats()["rx_q0_stopped_packets"]
        assert stopped == lost
        while not waiting(dev, 0):
            send()
        assert len(dev.rx_burst(0, 64)) % FRAMES == 0


@pytest.mark.root
def test_stop_of_a_device_whose_worker_has_frames_in_hand(netns: NetNS, engine: str) -> None:
    """With a small pool, the frames left in the worker's queue are counted."""
    skip_without_devices()
    with Mempool(4) as small, opened(netns, engine, 1) as (dev, send):
        dev.stop()
        dev.rx_queue_setup(0, 64, small)
        dev.start()
        held = small.alloc_burst(3)
        worker = Worker()
        worker.forward((dev, 0), (dev, 0))
        with worker:
            for _ in range(4):
                send()

            def through() -> bool:
                return worker.stats().routes[0].rx_packets >= FRAMES

            eventually(through, "one super-frame has passed, a frame at a time")
            dev.stop()
        made, lost = split_and_lost(dev, 0)
        assert made == worker.stats().routes[0].rx_packets + lost
        held.free()
        assert small.in_use == 0


@pytest.mark.root
def test_a_pool_that_holds_no_frame_is_refused(netns: NetNS) -> None:
    with netns.call(rtap.probe, "net_rtap0,iface=t0") as dev, Mempool(4, 300) as pool:
        dev.configure(1, 1, EthConf(rx_gso=True))
        with pytest.raises(ValueError, match="frames of 1522 bytes do not fit into a pool of 4 "):
            dev.rx_queue_setup(0, 64, pool)


@pytest.mark.root
def test_what_waits_in_the_kernel_at_a_stop(netns: NetNS, engine: str) -> None:
    """Those frames are counted at the next start, even after another configuration."""
    skip_without_devices()
    with rtap.open("t0", netns=netns, engine=engine) as dev, PacketSocket(netns, "t0") as peer:
        pool = dev.pool
        for queues in (1, 2):
            for n in range(5):
                peer.send(frame(n))
            dev.stop()
            if queues == 2:
                dev.configure(2, 2)
                for q in range(2):
                    dev.rx_queue_setup(q, 64, pool)
                    dev.tx_queue_setup(q, 64)
            dev.start()
            # A queue that is set up again starts at zero.
            assert dev.xstats()["rx_q0_purged_packets"] == 5
            assert len(dev.rx_burst(0)) == 0
        assert netdev(netns, "t0")["tx_packets"] == 10
