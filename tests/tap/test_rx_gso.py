# SPDX-License-Identifier: BSD-3-Clause
"""``rx_gso``: the kernel hands over super-frames, the application gets frames within the MTU.

They are compared with what a device without offloads receives, which the kernel itself splits.
"""

from __future__ import annotations

import os
import random
import select
import socket
from collections.abc import Iterator

import pytest
from rigs import HOST_A, HOST_B, Bridge, Shape, bridged, label, parse, wire, wrong_checksums
from rings import GSO_TCPV4, NEEDS_CSUM, header
from support import skip_without_devices
from trains import per_flow

import rtap
from rtap import Burst, EthDev, MbufFlag, Mempool, NetNS, RxOffload, TxOffload, Worker
from rtap._ring import RxQueue
from rtap.ethdev.ops import EthConf

pytestmark = pytest.mark.root

TSO = TxOffload.TCP_TSO | TxOffload.UDP_TSO | TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM
SHAPES = [
    Shape(version, proto, vlans, options)
    for version in (4, 6)
    for proto in ("tcp", "udp")
    for vlans in (0, 1)
    for options in (False, True)
]


def xstats(dev: EthDev) -> dict[str, int]:
    return {name.removeprefix("rx_q0_"): n for name, n in dev.xstats().items()}


def send_super(bridge: Bridge, shape: Shape, payload: bytes, segsz: int) -> None:
    mbuf = bridge.a.pool.alloc(shape.unfinished(payload))
    assert bridge.a.tx_burst(0, Burst([shape.request(mbuf, segsz)])) == 1


@pytest.fixture(params=["uring", "syscall"])
def split(request: pytest.FixtureRequest) -> Iterator[Bridge]:
    """A device that sends super-frames, and one that splits them."""
    skip_without_devices()
    with bridged(
        a={"tx_offloads": TSO, "data_room": 1 << 16, "nb_mbufs": 64},
        b={"rx_gso": True, "engine": request.param},
    ) as bridge:
        yield bridge


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_super_frames_arrive_in_frames(split: Bridge, shape: Shape) -> None:
    payload = random.Random(str(shape)).randbytes(20_500)
    send_super(split, shape, payload, 1000)
    got = split.arriving(21)
    assert got == shape.segments(payload, 1000)
    for frame in got:
        assert wrong_checksums(frame) == []
    counted = xstats(split.b)
    assert counted["lro_packets"] == 1  # it came whole
    assert counted["gso_split_packets"] == 21
    assert split.b.stats().ipackets == 1
    assert split.b.pool.in_use == 0


def test_unfinished_frames_are_finished(split: Bridge) -> None:
    shape = Shape()
    mbuf = split.a.pool.alloc(shape.unfinished(b"short"))
    assert split.a.tx_burst(0, Burst([shape.request(mbuf)])) == 1
    assert split.arriving(1) == [shape.finished(b"short")]
    assert xstats(split.b)["checksum_none"] == 1
    assert xstats(split.b)["gso_split_packets"] == 0


def test_other_frames_come_as_they_are(split: Bridge) -> None:
    for length in (60, 61, 1514):
        frame = bytes.fromhex(HOST_B.replace(":", "") + HOST_A.replace(":", "") + "88b6")
        frame = frame.ljust(length, b"x")
        assert split.a.send(frame)
        assert split.arriving(1) == [frame]


def test_mbufs_are_of_the_applications_pool(split: Bridge) -> None:
    """Received frames that the application keeps never stop the queue from reading."""
    held = []
    for n in range(100):
        send_super(split, Shape(), bytes([n]) * 3000, 1000)
        while len(held) < 3 * n + 3:
            held += split.b.rx_burst(0, 64, 5)
    assert split.b.pool.in_use == 300
    assert {mbuf.data_len for mbuf in held} == {1066}
    assert all(mbuf.nb_segs == 1 and not mbuf.ol_flags & MbufFlag.RX_LRO for mbuf in held)
    held.clear()
    assert split.b.pool.in_use == 0


@pytest.mark.parametrize("n", [1, 7, 20, 21, 22])
def test_bursts_shorter_than_a_super_frame(split: Bridge, n: int) -> None:
    """No burst is longer than requested, and the next one continues where it ended."""
    payload = random.Random(n).randbytes(20_500)
    frames = Shape().segments(payload, 1000)
    for _ in range(3):
        send_super(split, Shape(), payload, 1000)
    got: list[bytes] = []
    while len(got) < 63:
        burst = split.b.rx_burst(0, n, 5)
        assert 0 < len(burst) <= n
        got += map(bytes, burst)
    assert got == frames * 3
    assert len(split.b.rx_burst(0, n)) == 0


def test_what_waits_in_the_queue_signals(split: Bridge) -> None:
    """A receive interrupt signals until the last frame of a super-frame is taken."""
    fd = split.b.rx_queue_intr_fd(0)
    split.b.rx_queue_intr_enable(0)
    send_super(split, Shape(), bytes(5000), 1000)
    for _ in range(5):
        assert select.select([fd], [], [], 5)[0] == [fd]
        assert len(split.b.rx_burst(0, 1)) == 1
    assert select.select([fd], [], [], 0)[0] == []
    send_super(split, Shape(), bytes(5000), 1000)
    assert len(split.b.rx_burst(0, 2, 5)) == 2
    split.b.rx_queue_intr_disable(0)
    assert select.select([fd], [], [], 0)[0] == []
    split.b.rx_queue_intr_enable(0)
    assert select.select([fd], [], [], 0)[0] == [fd]


def test_too_few_buffers_lose_nothing(engine: str) -> None:
    skip_without_devices()
    payload = random.Random(9).randbytes(20_500)
    with bridged(
        a={"tx_offloads": TSO, "data_room": 1 << 16, "nb_mbufs": 64},
        b={"rx_gso": True, "engine": engine, "nb_mbufs": 30},
    ) as bridge:
        for _ in range(4):
            send_super(bridge, Shape(), payload, 1000)
        held = bridge.b.rx_burst(0, 64, 5)
        assert len(held) == 21  # the next one would not fit beside it
        assert len(bridge.b.rx_burst(0, 64)) == 0
        assert bridge.b.stats().rx_nombuf > 0
        got = list(map(bytes, held))
        held.free()
        got += bridge.arriving(63)
        assert got == Shape().segments(payload, 1000) * 4
        assert bridge.b.pool.in_use == 0


def test_stop_and_close_with_frames_waiting(split: Bridge) -> None:
    pool = split.b.pool
    for _ in range(3):
        send_super(split, Shape(), bytes(20_000), 1000)
    assert len(split.b.rx_burst(0, 1, 5)) == 1
    assert pool.in_use > 0
    split.b.stop()
    split.b.start()  # throws away what was queued before it
    assert len(split.b.rx_burst(0, 64)) == 0
    assert pool.in_use == 0
    send_super(split, Shape(), bytes(20_000), 1000)
    assert len(split.b.rx_burst(0, 1, 5)) == 1
    split.b.close()
    assert pool.in_use == 0


def test_random_super_frames_are_what_the_kernel_makes(split: Bridge) -> None:
    r = random.Random(11)
    plain = rtap.open("c0", netns=split.ns, nb_mbufs=4096)
    with plain:
        split.ns.run(["ip", "link", "set", "c0", "master", "br0"], check=True)
        compared = 0
        for _ in range(60):
            shape = r.choice(SHAPES)
            segsz = r.randint(50, 1400)
            most = min(128, 60_000 // segsz) if shape.proto == "udp" else 60_000 // segsz
            payload = r.randbytes(r.randint(1, most * segsz))
            send_super(split, shape, payload, segsz)
            count = -(-len(payload) // segsz)
            ours = split.arriving(count)
            kernels: list[bytes] = []
            while len(kernels) < count:
                burst = plain.rx_burst(0, 64, 5)
                assert len(burst) > 0
                kernels += map(bytes, burst)
            assert ours == kernels, shape
            compared += count
        assert compared > 500


def test_both_ways_through_a_worker(engine: str) -> None:
    """The kernel sends and gets super-frames, and the worker forwards plain frames."""
    skip_without_devices()
    options = {"tx_gro": True, "rx_gso": True, "engine": engine}
    with wire(a=options, b=options) as w:
        worker = Worker()
        worker.forward((w.a, 0), (w.b, 0))
        worker.forward((w.b, 0), (w.a, 0))
        with worker:
            w.transfer(32 << 20)
            w.transfer(32 << 20, back=True)
        for dev in (w.a, w.b):
            counted = xstats(dev)
            assert counted["lro_packets"] > 100
            assert counted["gso_split_packets"] > 10 * counted["lro_packets"]
            assert counted["bad_header_packets"] == 0
            assert counted["tx_q0_gro_merged_packets"] > 1000
            assert counted["tx_q0_kernel_refused_packets"] == 0


def test_the_application_sees_frames_within_the_mtu() -> None:
    skip_without_devices()
    options = {"tx_gro": True, "rx_gso": True}
    longest = wrong = 0
    with wire(a=options, b=options) as w:
        stop = False

        def forward() -> None:
            nonlocal longest, wrong
            while not stop:
                for one, other in ((w.a, w.b), (w.b, w.a)):
                    burst = one.rx_burst(0, 64)
                    longest = max([longest, *burst.lengths])
                    if len(burst) and longest > 1000:
                        frame = bytes(burst[0])
                        if parse(frame).haslayer("TCP"):
                            wrong += bool(wrong_checksums(frame))
                    other.tx_burst(0, burst)

        import threading

        thread = threading.Thread(target=forward)
        thread.start()
        try:
            w.transfer(1 << 20)
        finally:
            stop = True
            thread.join()
    assert longest == 1514
    assert wrong == 0


# ---- wrong headers, from a peer that is not a kernel


@pytest.fixture
def raw(engine: str) -> Iterator[tuple[socket.socket, RxQueue, Mempool]]:
    """The other end of a queue with rx_gso."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    pool = Mempool(4096)
    reads = Mempool(8, 66_000)
    queue = RxQueue(ours.fileno(), reads, name="raw", max_frame=65_600, split=pool, engine=engine)
    queue.start()
    with ours, theirs:
        yield theirs, queue, pool
        queue.close()
        assert reads.in_use == 0
        assert pool.in_use == 0


TCP = bytes(Shape().packet(bytes(30_000)))


@pytest.mark.parametrize(
    "hdr",
    [
        header(NEEDS_CSUM, GSO_TCPV4, 0),
        header(NEEDS_CSUM, GSO_TCPV4, 1),  # thirty thousand frames
        header(NEEDS_CSUM, GSO_TCPV4, 1000, 33),
        header(NEEDS_CSUM, GSO_TCPV4, 1000, 34, 6),
        header(NEEDS_CSUM, 4, 1000),
        header(NEEDS_CSUM, 5, 1000),
        header(NEEDS_CSUM, 3, 1000),
        header(0, GSO_TCPV4, 1000),
        header(NEEDS_CSUM, 0, 0, 0xFFFF),
    ],
)
def test_headers_that_do_not_fit_cost_their_frame(
    raw: tuple[socket.socket, RxQueue, Mempool], hdr: bytes
) -> None:
    theirs, queue, _ = raw
    theirs.send(hdr + TCP)
    theirs.send(header(NEEDS_CSUM, GSO_TCPV4, 1000) + TCP)
    got = list(queue.rx_burst(64, timeout=5))
    assert len(got) == 30
    counters = queue.counters()
    assert counters["bad_vnet_hdr"] == counters["errors"] == 1
    got.clear()


def test_small_slots_make_chains(engine: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs, Mempool(512, 300) as pool, Mempool(8, 66_000) as reads:
        queue = RxQueue(
            ours.fileno(), reads, name="raw", max_frame=65_600, split=pool, engine=engine
        )
        queue.start()
        long = bytes(range(250)) * 6
        theirs.send(bytes(10) + long)
        theirs.send(header(NEEDS_CSUM, GSO_TCPV4, 1000) + bytes(Shape().packet(bytes(3000))))
        first, *rest = queue.rx_burst(64, timeout=5)
        assert bytes(first) == long
        assert first.nb_segs == 5
        assert list(map(bytes, rest)) == Shape().segments(bytes(3000), 1000)
        del first, rest
        assert queue.pool is pool
        queue.close()


# ---- options


def test_options(netns: NetNS) -> None:
    with netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        dev.configure(1, 1, EthConf(rx_gso=True))
        assert dev.info().rx_gso
        assert dev.info().vnet_hdr
        assert dev.info().rx_offloads == RxOffload(0)
        dev.configure(1, 1, EthConf())
        assert not dev.info().rx_gso
    with pytest.raises(TypeError, match="rx_gso must be a bool, got str"):
        EthConf(rx_gso="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one or the other"):
        EthConf(rx_gso=True, rx_offloads=RxOffload.TCP_LRO | RxOffload.TCP_CKSUM)
    with rtap.probe("net_null0") as null, pytest.raises(ValueError, match="net_null"):
        null.configure(1, 1, EthConf(rx_gso=True))
    a, b = os.pipe()
    try:
        with Mempool(4) as pool, pytest.raises(ValueError, match="split needs vnet_hdr"):
            RxQueue(a, pool, name="x", vnet_hdr=False, split=pool)
    finally:
        os.close(a)
        os.close(b)


def test_an_mtu_that_is_raised(split: Bridge) -> None:
    """Frames that are longer than the pool's buffers arrive as chains."""
    for dev in (split.a, split.b):
        dev.mtu = 9000
    split.ns.run(["ip", "link", "set", "br0", "mtu", "9000"], check=True)
    payload = random.Random(1).randbytes(40_000)
    send_super(split, Shape(), payload, 8000)
    got = [mbuf for _ in range(5) for mbuf in split.b.rx_burst(0, 1, 5)]
    assert [bytes(mbuf) for mbuf in got] == Shape().segments(payload, 8000)
    assert per_flow([bytes(mbuf) for mbuf in got])
