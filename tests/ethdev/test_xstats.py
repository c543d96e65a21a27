# SPDX-License-Identifier: BSD-3-Clause
"""Statistics: each counter moves when it should, by the right amount, and no other does."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest
from rigs import MAC_A, Shape, bridged, wire
from support import BROADCAST, LOCAL, PacketSocket, eventually, frame, ip, netdev

import rtap
from rtap import Burst, EthDev, Mempool, NetNS, RxOffload, TxOffload
from rtap._ring import RxQueue

SIZES = (
    "size_64_packets",
    "size_65_to_127_packets",
    "size_128_to_255_packets",
    "size_256_to_511_packets",
    "size_512_to_1023_packets",
    "size_1024_to_1518_packets",
    "size_above_1518_packets",
)
KINDS = ("broadcast_packets", "multicast_packets", "unicast_packets")
RX_NAMES = (
    *SIZES,
    *KINDS,
    "lro_packets",
    "checksum_good",
    "checksum_none",
    "checksum_bad",
    "mbuf_alloc_failed",
    "filtered_unicast_packets",
    "filtered_multicast_packets",
    "truncated_packets",
    "bad_header_packets",
    "read_errors",
    "gso_super_packets",
    "gso_split_packets",
    "gso_too_long_packets",
    "stopped_packets",
    "purged_packets",
)
TX_NAMES = (
    *SIZES,
    *KINDS,
    "tso_packets",
    "checksum_offload",
    "multiseg_packets",
    "software_gso_packets",
    "bad_request_packets",
    "kernel_refused_packets",
    "link_down_packets",
    "unsent_packets",
    "gro_merged_packets",
)
GROUP = bytes.fromhex("01005e000001")

#: Frame lengths on both sides of every bucket's border, with their buckets.
BORDERS = {
    14: 0, 63: 0, 64: 0, 65: 1, 127: 1, 128: 2, 255: 2, 256: 3, 511: 3, 512: 4, 1023: 4,
    1024: 5, 1517: 5, 1518: 5, 1519: 6, 9000: 6,
}  # fmt: skip


@pytest.fixture
def dev(netns: NetNS, engine: str) -> Iterator[EthDev]:
    with rtap.open("t0", netns=netns, engine=engine, mtu=9000) as device:
        yield device


@pytest.fixture
def peer(netns: NetNS, dev: EthDev) -> Iterator[PacketSocket]:
    with PacketSocket(netns, "t0", rcvbuf=1 << 22) as packets:
        yield packets


def moved(dev: EthDev) -> dict[str, int]:
    """The extended statistics that are not zero."""
    return {name: n for name, n in dev.xstats().items() if n}


def receive(dev: EthDev, n: int, queue: int = 0) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < n and (burst := dev.rx_burst(queue, n - len(got), 5)):
        got += map(bytes, burst)
    return got


def test_names_and_their_order(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=3) as dev:
        names = [f"rx_q{q}_{name}" for q in range(3) for name in RX_NAMES]
        names += [f"tx_q{q}_{name}" for q in range(3) for name in TX_NAMES]
        names += ["purged_packets", "link_down_drops"]
        assert dev.xstats_names() == names
        assert list(dev.xstats()) == names
        assert set(dev.xstats().values()) == {0}


def test_sizes_at_their_borders(dev: EthDev, peer: PacketSocket) -> None:
    for n, (length, bucket) in enumerate(BORDERS.items()):
        dev.xstats_reset()
        # A packet socket cannot send only an Ethernet header.
        if length > 14:
            peer.send(frame(n, length))
            assert receive(dev, 1) == [frame(n, length)]
            assert moved(dev) == {f"rx_q0_{SIZES[bucket]}": 1, "rx_q0_unicast_packets": 1}
        dev.xstats_reset()
        assert dev.send(frame(n, length))
        assert moved(dev) == {f"tx_q0_{SIZES[bucket]}": 1, "tx_q0_unicast_packets": 1}


def test_kinds_of_destination(dev: EthDev, peer: PacketSocket) -> None:
    for destination, n in ((LOCAL, 3), (GROUP, 5), (BROADCAST, 7)):
        for i in range(n):
            peer.send(frame(i, dst=destination))
            assert dev.send(frame(i, dst=destination))
    # One bit differs from a broadcast.
    peer.send(frame(0, dst=b"\xff\xff\xff\xff\xff\xfe"))
    assert len(receive(dev, 16)) == 16
    assert moved(dev) == {
        "rx_q0_size_64_packets": 16,
        "rx_q0_unicast_packets": 3,
        "rx_q0_multicast_packets": 6,
        "rx_q0_broadcast_packets": 7,
        "tx_q0_size_64_packets": 15,
        "tx_q0_unicast_packets": 3,
        "tx_q0_multicast_packets": 5,
        "tx_q0_broadcast_packets": 7,
    }


def test_queues_are_counted_apart(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=3) as dev:
        for q, n in enumerate((2, 3, 5)):
            assert dev.tx_burst(q, dev.pool.alloc_burst(n, frame(q, 200))) == n
        assert moved(dev) == {
            f"tx_q{q}_{name}": n
            for q, n in enumerate((2, 3, 5))
            for name in ("size_128_to_255_packets", "unicast_packets")
        }
        assert dev.stats().q_opackets == [2, 3, 5]
        assert dev.stats().q_obytes == [400, 600, 1000]
        assert dev.stats().q_ipackets == [0, 0, 0]


def test_basic_and_extended_are_reset_apart(dev: EthDev, peer: PacketSocket) -> None:
    peer.send(frame(1))
    assert receive(dev, 1) == [frame(1)]
    assert dev.send(frame(2))
    dev.xstats_reset()
    assert moved(dev) == {}
    assert (dev.stats().ipackets, dev.stats().opackets) == (1, 1)
    peer.send(frame(3))
    assert receive(dev, 1) == [frame(3)]
    dev.stats_reset()
    assert (dev.stats().ipackets, dev.stats().opackets) == (0, 0)
    assert moved(dev) == {"rx_q0_size_64_packets": 1, "rx_q0_unicast_packets": 1}


def test_stop_keeps_counters(dev: EthDev) -> None:
    assert dev.send(frame(1))
    before = dev.xstats()
    dev.stop()
    assert dev.xstats() == before
    dev.start()
    assert dev.xstats() == before


# ---- unread frames


def test_imissed_is_what_the_kernel_dropped(netns: NetNS, dev: EthDev, peer: PacketSocket) -> None:
    """imissed counts the unread frames only (the C driver used the kernel's rx_dropped)."""
    ip(netns, "link", "set", "t0", "txqueuelen", "16")
    for n in range(100):
        peer.send(frame(n))
    assert dev.stats().imissed == 84
    assert receive(dev, 16) == [frame(n) for n in range(16)]
    assert len(dev.rx_burst(0)) == 0
    stats = dev.stats()
    assert (stats.ipackets, stats.imissed) == (16, 84)
    assert stats.ierrors == stats.oerrors == stats.rx_nombuf == 0
    assert netdev(netns, "t0")["tx_dropped"] == 84


def test_imissed_is_not_what_we_sent_in_vain(netns: NetNS, dev: EthDev) -> None:
    """Frames that the stack ignores count as the kernel's rx_dropped, not as missed."""
    before = netdev(netns, "t0")["rx_dropped"]
    for n in range(50):
        assert dev.send(frame(n))  # an ethertype without a listener
    eventually(lambda: netdev(netns, "t0")["rx_dropped"] >= before + 50, "dropped by the stack")
    assert dev.stats().imissed == 0


def test_imissed_is_reset_and_survives_stop(netns: NetNS, dev: EthDev, peer: PacketSocket) -> None:
    def overflow() -> int:
        for n in range(1200):
            peer.send(frame(n))
        before = dev.stats().ipackets
        receive(dev, 1000)
        return 1200 - (dev.stats().ipackets - before)

    missed = overflow()
    assert missed == 200
    assert dev.stats().imissed == missed
    dev.stop()
    assert dev.stats().imissed == missed
    dev.start()
    assert dev.stats().imissed == missed
    dev.stats_reset()
    assert dev.stats().imissed == 0
    assert overflow() == dev.stats().imissed == 200


def test_mbuf_alloc_failed(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, nb_mbufs=4) as dev:
        with PacketSocket(netns, "t0") as peer:
            held = dev.pool.alloc_burst(4)
            assert len(dev.rx_burst(0)) == 0
            assert moved(dev) == {}  # nothing was lost by it
            peer.send(frame(1))
            assert len(dev.rx_burst(0)) == 0
            assert moved(dev) == {"rx_q0_mbuf_alloc_failed": 1}
            assert dev.stats().rx_nombuf == 1
            held.free()
            assert receive(dev, 1) == [frame(1)]
        assert dev.xstats()["rx_q0_mbuf_alloc_failed"] == 1
        dev.xstats_reset()
        assert moved(dev) == {}
        assert dev.stats().rx_nombuf == 1


# ---- checksums and large frames


def test_checksum_none_with_a_real_socket(netns: NetNS, engine: str) -> None:
    """The kernel hands over an unfinished checksum and says so (the C driver never counted it)."""
    with rtap.open("t0", netns=netns, engine=engine, rx_offloads=RxOffload.CHECKSUM) as dev:
        ip(netns, "addr", "add", "10.0.0.1/24", "dev", "t0")
        ip(netns, "neigh", "add", "10.0.0.2", "lladdr", "02:00:00:00:00:02", "dev", "t0")
        with closing(netns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)) as udp:
            for n in range(6):
                udp.sendto(bytes(100 + n), ("10.0.0.2", 9))
            assert len(receive(dev, 6)) == 6
        assert moved(dev) == {
            "rx_q0_checksum_none": 6,
            "rx_q0_unicast_packets": 6,
            "rx_q0_size_128_to_255_packets": 6,
        }


def test_checksum_good_and_none_by_header(engine: str) -> None:
    """The virtio-net header decides: NEEDS_CSUM, DATA_VALID, or neither."""
    data = bytes(Shape(proto="udp").packet(b"x" * 50))
    none = struct.pack("<BBHHHH", 1, 0, 0, 0, 34, 6)
    good = struct.pack("<BBHHHH", 2, 0, 0, 0, 0, 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    with ours, theirs, Mempool(16) as pool:
        rxq = RxQueue(ours.fileno(), pool, name="pair", engine=engine)
        rxq.start()
        for header, n in ((none, 3), (good, 2), (bytes(10), 4)):
            for _ in range(n):
                theirs.send(header + data)
        assert [bytes(m) for m in rxq.rx_burst(64)] == [data] * 9
        counters = {name: n for name, n in rxq.xcounters().items() if n}
        assert counters == {
            "checksum_none": 3,
            "checksum_good": 2,
            "unicast_packets": 9,
            "size_65_to_127_packets": 9,
        }
        rxq.close()


def test_lro_packets_with_real_tcp(engine: str) -> None:
    lro = RxOffload.TCP_CKSUM | RxOffload.TCP_LRO
    tx = TxOffload.TCP_CKSUM | TxOffload.TCP_TSO
    options = {"engine": engine, "rx_offloads": lro, "tx_offloads": tx}
    with wire(a=options, b=options) as w:
        worker = rtap.Worker()
        worker.forward((w.a, 0), (w.b, 0), on_full="retry")
        worker.forward((w.b, 0), (w.a, 0), on_full="retry")
        with worker:
            w.transfer(4 << 20)
        there, back = w.a.xstats(), w.b.xstats()
        stats = w.a.stats()
    assert there["rx_q0_lro_packets"] > 20
    # Every super-frame came with an unfinished checksum, and left the same way.
    assert there["rx_q0_checksum_none"] >= there["rx_q0_lro_packets"]
    assert back["tx_q0_tso_packets"] == there["rx_q0_lro_packets"]
    assert back["tx_q0_checksum_offload"] == there["rx_q0_checksum_none"]
    assert there["rx_q0_size_above_1518_packets"] >= there["rx_q0_lro_packets"]
    # The data took far fewer frames than segments.
    assert stats.ibytes > 4 << 20
    assert there["rx_q0_size_above_1518_packets"] < (4 << 20) / 1448 / 2
    assert there["rx_q0_checksum_bad"] == back["rx_q0_checksum_bad"] == 0


def test_tso_and_checksum_requests(engine: str) -> None:
    tx = TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM | TxOffload.TCP_TSO
    with bridged(a={"engine": engine, "tx_offloads": tx}) as rig:
        pool = Mempool(64, 16384)
        shape, udp = Shape(), Shape(proto="udp")
        payload = bytes(range(250)) * 20
        burst = Burst()
        burst.append(shape.request(pool.alloc(shape.unfinished(payload)), 1000))
        for _ in range(3):
            burst.append(udp.request(pool.alloc(udp.unfinished(b"y" * 60))))
        burst.append(pool.alloc(udp.finished(b"z" * 60)))
        assert rig.a.tx_burst(0, burst) == 5
        assert rig.arriving(9) == [
            *shape.segments(payload, 1000),
            *[udp.finished(b"y" * 60)] * 3,
            udp.finished(b"z" * 60),
        ]
        assert moved(rig.a) == {
            "tx_q0_tso_packets": 1,
            "tx_q0_checksum_offload": 4,
            "tx_q0_unicast_packets": 5,
            "tx_q0_size_65_to_127_packets": 4,
            "tx_q0_size_above_1518_packets": 1,
        }


def test_multiseg_packets(netns: NetNS, engine: str) -> None:
    """A chain counts once with its whole length, both when sent and when received scattered."""
    with (
        rtap.open(
            "t0",
            netns=netns,
            engine=engine,
            mtu=4000,
            rx_offloads=RxOffload.SCATTER,
            tx_offloads=TxOffload.MULTI_SEGS,
            data_room=512,
            mac=MAC_A,
        ) as dev,
        PacketSocket(netns, "t0") as peer,
    ):
        for n in range(4):
            peer.send(frame(n, 3000))
        burst = Burst()
        while len(burst) < 4:
            burst.extend(dev.rx_burst(0, 8, 5))
        assert {m.nb_segs for m in burst} == {6}
        burst.append(dev.pool.alloc(frame(4)))
        assert dev.tx_burst(0, burst) == 5
        assert peer.frames(5) == [*[frame(n, 3000) for n in range(4)], frame(4)]
        assert moved(dev) == {
            "rx_q0_unicast_packets": 4,
            "rx_q0_size_above_1518_packets": 4,
            "tx_q0_multiseg_packets": 4,
            "tx_q0_unicast_packets": 5,
            "tx_q0_size_64_packets": 1,
            "tx_q0_size_above_1518_packets": 4,
        }


def test_worker_counts_too(netns: NetNS, netns2: NetNS, engine: str) -> None:
    with (
        rtap.open("t0", netns=netns, engine=engine) as a,
        rtap.open("t1", netns=netns2, engine=engine) as b,
        PacketSocket(netns, "t0") as peer,
    ):
        worker = rtap.Worker()
        worker.forward((a, 0), (b, 0))
        with worker:
            for n in range(50):
                peer.send(frame(n, 300))
            eventually(lambda: b.stats().opackets == 50, "50 frames forwarded")
        assert a.xstats()["rx_q0_size_256_to_511_packets"] == 50
        assert b.xstats()["tx_q0_size_256_to_511_packets"] == 50
