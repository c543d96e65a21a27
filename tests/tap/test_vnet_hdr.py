# SPDX-License-Identifier: BSD-3-Clause
"""The virtio-net header: kept from the read to the write, so that a super-frame stays one.

Packet sockets with PACKET_VNET_HDR stand at both ends: what is sent under one header into device
A, and forwarded by rtap from A to B, has to be seen under the same header on B.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from support import LOCAL, REMOTE, SOL_PACKET, PacketSocket, Tap, Task, add_ipv6, ip, pattern

from rtap import Burst, Mbuf, MbufFlag, Mempool, NetNS
from rtap._ring import RxQueue, TxQueue
from rtap.control import tun
from rtap.control.tun import TunFeature

pytestmark = pytest.mark.root

PACKET_VNET_HDR = 15  # linux/if_packet.h
UDP_SEGMENT = 103  # linux/udp.h

# linux/virtio_net.h
NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 4, 5, 0x80

OFFLOADS = TunFeature.CSUM | TunFeature.TSO4 | TunFeature.TSO6 | TunFeature.TSO_ECN
USO = TunFeature.USO4 | TunFeature.USO6
MAX_SUPER_FRAME = 65535 + 40 + 22
ROOMS = {"single": MAX_SUPER_FRAME + 1, "chains": 2048, "short": 120}


# ---- building frames


def rfc1071(data: bytes, total: int = 0) -> int:
    if len(data) % 2:
        data += b"\0"
    total += sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass(frozen=True)
class Shape:
    """A frame and the header it travels under."""

    name: str
    version: int
    protocol: int  # 6 or 17
    payload: int
    gso: int = GSO_NONE
    gso_size: int = 0
    options: int = 0  # bytes of TCP options
    ip_options: int = 0  # bytes of IPv4 options
    flags: int = NEEDS_CSUM
    tcp_flags: int = 0x10

    @property
    def l3_len(self) -> int:
        return 20 + self.ip_options if self.version == 4 else 40

    @property
    def l4_len(self) -> int:
        return 20 + self.options if self.protocol == 6 else 8

    @property
    def csum_start(self) -> int:
        return 14 + self.l3_len

    @property
    def csum_offset(self) -> int:
        return 16 if self.protocol == 6 else 6

    @property
    def features(self) -> TunFeature:
        features = TunFeature.CSUM if self.flags else TunFeature(0)
        if self.gso == GSO_UDP_L4:
            return features | USO
        return features | OFFLOADS if self.gso else features

    def header(self) -> bytes:
        if not self.flags:
            return bytes(10)
        hdr_len = self.csum_start + self.l4_len if self.gso else 0
        return struct.pack(
            "=BBHHHH",
            self.flags,
            self.gso,
            hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
        )

    def frame(self) -> bytes:
        length = self.l4_len + self.payload
        src, dst = (b"\x0a\0\0\2", b"\x0a\0\0\1") if self.version == 4 else (bytes(16), bytes(16))
        if self.protocol == 6:
            l4 = struct.pack(
                "!HHIIBBHHH",
                *(1000, 2000, 1, 1, (self.l4_len // 4) << 4, self.tcp_flags, 500, 0, 0),
            )
            l4 += b"\1" * self.options
        else:
            l4 = struct.pack("!HHHH", 1000, 2000, length & 0xFFFF, 0)
        pseudo = rfc1071(src + dst + struct.pack("!II", length, self.protocol))
        data = pattern(self.payload, self.payload)
        # Unfinished: the pseudo-header's sum, not complemented.
        check = pseudo if self.flags else ~rfc1071(l4 + data, pseudo) & 0xFFFF
        at = self.csum_offset
        l4 = l4[:at] + struct.pack("!H", check) + l4[at + 2 :]
        if self.version == 4:
            head = struct.pack(
                "!BBHHHBBH4s4s",
                *(0x40 | self.l3_len // 4, 0, self.l3_len + length, 7, 0x4000, 64, self.protocol),
                *(0, src, dst),
            )
            head += b"\1" * self.ip_options
            total = ~rfc1071(head) & 0xFFFF
            head = head[:10] + struct.pack("!H", total) + head[12:]
            ethertype = 0x0800
        else:
            head = struct.pack("!IHBB16s16s", 6 << 28, length, self.protocol, 64, src, dst)
            ethertype = 0x86DD
        return LOCAL + REMOTE + struct.pack("!H", ethertype) + head + l4 + data


SHAPES = [
    Shape("plain", 4, 6, 100, flags=0),
    Shape("plain udp6", 6, 17, 100, flags=0),
    Shape("tcp4 csum", 4, 6, 100),
    Shape("tcp4 csum, odd, options", 4, 6, 101, options=12, ip_options=8),
    Shape("tcp6 csum", 6, 6, 1000, options=40),
    Shape("udp4 csum", 4, 17, 33),
    Shape("udp6 csum", 6, 17, 1),
    Shape("tso4", 4, 6, 14480, GSO_TCPV4, 1448, options=12),
    Shape("tso4, last one short", 4, 6, 10001, GSO_TCPV4, 1000, options=40),
    # The kernel itself splits what has 65536 bytes or more with its Ethernet header.
    Shape("tso4, longest", 4, 6, 65535 - 14 - 20 - 20, GSO_TCPV4, 1460),
    Shape("tso4, ip options", 4, 6, 5000, GSO_TCPV4, 536, options=4, ip_options=40),
    Shape("tso4 ecn", 4, 6, 14480, GSO_TCPV4 | GSO_ECN, 1448, options=12, tcp_flags=0x90),
    Shape("tso6", 6, 6, 14280, GSO_TCPV6, 1428, options=12),
    Shape("tso6, longest", 6, 6, 65535 - 14 - 40 - 20, GSO_TCPV6, 1440),
    Shape("tso6 ecn", 6, 6, 14280, GSO_TCPV6 | GSO_ECN, 1428, options=12, tcp_flags=0x90),
    Shape("uso4", 4, 17, 14720, GSO_UDP_L4, 1472),
    Shape("uso4, last one short", 4, 17, 4001, GSO_UDP_L4, 1000),
    Shape("uso6", 6, 17, 14520, GSO_UDP_L4, 1452),
]
SUPER = [shape for shape in SHAPES if shape.gso]


class VnetSocket:
    """A packet socket on which every frame has its virtio-net header in front."""

    def __init__(self, tap: Tap, protocol: int = 3) -> None:
        self.socket: PacketSocket = tap.packets(protocol, rcvbuf=64 << 20)
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)

    def send(self, shape: Shape) -> None:
        self.socket.send(shape.header() + shape.frame())

    def recv(self) -> tuple[tuple[int, ...], bytes]:
        data = self.socket.recv(1 << 17)
        return struct.unpack("=BBHHHH", data[:10]), data[10:]


def offload(tap: Tap, features: TunFeature) -> None:
    if tun.set_offload(tap.fd, features, tap.name) != features:
        pytest.skip("needs UDP segmentation offload in the tun driver (Linux 6.2)")


class Pair:
    """Devices A and B in namespaces of their own, and the two queues between them."""

    def __init__(self, a: Tap, b: Tap, engine: str, room: int, **options: Any) -> None:
        self.a, self.b = a, b
        self.pool = Mempool(max(64, 4 * -(-MAX_SUPER_FRAME // room)), room)
        self.rx: RxQueue = a.rx(
            self.pool,
            engine=engine,
            max_frame=min(MAX_SUPER_FRAME, 128 * room - 1),
            scatter=True,
        )
        self.tx: TxQueue = b.tx(engine=engine, **options)

    def received(self) -> Mbuf:
        burst = self.rx.rx_burst(1, 5)
        assert len(burst) == 1
        return burst[0]


@pytest.fixture
def taps(netns: NetNS, netns2: NetNS) -> Iterator[tuple[Tap, Tap]]:
    with Tap(netns, "tap0") as a, Tap(netns2, "tap1") as b:
        yield a, b


def expected_header(shape: Shape) -> tuple[int, ...]:
    if not shape.flags:
        return (0, 0, 0, 0, 0, 0)
    size = shape.gso_size if shape.gso else 0
    return (NEEDS_CSUM, shape.gso, -1, size, shape.csum_start, shape.csum_offset)


def assert_came_through(shape: Shape, came: tuple[tuple[int, ...], bytes]) -> None:
    header, data = came
    assert data == shape.frame()
    wanted = expected_header(shape)
    # hdr_len is a hint, which the kernel makes up anew from what it finds linear.
    assert (*header[:2], *header[3:]) == (*wanted[:2], *wanted[3:])


# ---- one frame at a time


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS.keys())
def test_header_is_kept_from_read_to_write(
    taps: tuple[Tap, Tap], engine: str, shape: Shape, room: int
) -> None:
    if room == ROOMS["short"] and len(shape.frame()) > 128 * room:
        shape = Shape(**{**vars(shape), "payload": 10_000})
    a, b = taps
    offload(a, shape.features)
    pair = Pair(a, b, engine, room)
    source, sink = VnetSocket(a), VnetSocket(b)
    source.send(shape)
    mbuf = pair.received()
    assert bytes(mbuf) == shape.frame()
    assert mbuf.l2_len == (14 if shape.flags else mbuf.l2_len)
    flags = MbufFlag(mbuf.ol_flags)
    if shape.flags:
        assert flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_NONE
        assert (mbuf.l3_len, mbuf.l4_len) == (shape.l3_len, shape.l4_len)
    else:
        assert flags & (MbufFlag.RX_L4_CKSUM_MASK | MbufFlag.RX_LRO) == 0
    assert bool(flags & MbufFlag.RX_LRO) == bool(shape.gso)
    assert mbuf.tso_segsz == shape.gso_size
    burst = Burst([mbuf])
    del mbuf
    assert pair.tx.tx_burst(burst) == 1
    assert_came_through(shape, sink.recv())
    assert pair.pool.in_use == 0
    assert pair.rx.counters()["errors"] == pair.tx.counters()["errors"] == 0


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[7], SHAPES[12]], ids=lambda s: s.name)
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS.keys())
@pytest.mark.parametrize("how", ["reference", "clone", "both"])
def test_header_of_a_shared_frame(
    taps: tuple[Tap, Tap], engine: str, shape: Shape, room: int, how: str
) -> None:
    a, b = taps
    offload(a, shape.features)
    pair = Pair(a, b, engine, room)
    source, sink = VnetSocket(a), VnetSocket(b)
    source.send(shape)
    mbuf = pair.received()
    frames = {"reference": [mbuf], "clone": [mbuf.clone()], "both": [mbuf, mbuf.clone(), mbuf]}
    burst = Burst(frames[how])
    n = len(burst)
    assert pair.tx.tx_burst(burst) == n
    for _ in range(n):
        assert_came_through(shape, sink.recv())
    assert bytes(mbuf) == shape.frame()
    assert mbuf.tso_segsz == shape.gso_size


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[7], SHAPES[12]], ids=lambda s: s.name)
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS.keys())
@pytest.mark.parametrize("clone", [False, True], ids=["", "clone"])
def test_header_follows_when_the_front_of_the_frame_moves(
    taps: tuple[Tap, Tap], engine: str, shape: Shape, room: int, clone: bool
) -> None:
    """A tunnel takes the Ethernet header off and puts another one on; a router pushes a tag."""
    a, b = taps
    offload(a, shape.features)
    pair = Pair(a, b, engine, room)
    source, sink = VnetSocket(a), VnetSocket(b)
    source.send(shape)
    mbuf = pair.received()
    if clone:
        mbuf = mbuf.clone()
    mbuf.adj(14)
    mbuf.prepend(14)[:] = REMOTE + LOCAL + shape.frame()[12:14]
    assert pair.tx.tx_burst(Burst([mbuf])) == 1
    header, data = sink.recv()
    assert data == REMOTE + LOCAL + shape.frame()[12:]
    assert header[4:] == (shape.csum_start, shape.csum_offset)

    tag = b"\x81\x00\x00\x05"
    mbuf.prepend(4)
    mbuf[:16] = LOCAL + REMOTE + tag
    assert pair.tx.tx_burst(Burst([mbuf])) == 1
    header, data = sink.recv()
    # The kernel takes the tag out of the frame on reception, and accounts for that.
    untagged = LOCAL + REMOTE + shape.frame()[12:]
    tagged = LOCAL + REMOTE + tag + shape.frame()[12:]
    assert data in (untagged, tagged)
    assert header[:2] == (NEEDS_CSUM, shape.gso)
    assert header[4:] == (shape.csum_start + 4 * (data == tagged), shape.csum_offset)
    assert header[3] == shape.gso_size
    assert pair.tx.counters()["errors"] == 0


def test_frame_cut_past_its_headers_has_none(taps: tuple[Tap, Tap], engine: str) -> None:
    """What is left must not be sent under offsets that point in front of it."""
    a, b = taps
    shape = SHAPES[2]
    offload(a, shape.features)
    pair = Pair(a, b, engine, 2048)
    source, sink = VnetSocket(a), VnetSocket(b)
    source.send(shape)
    mbuf = pair.received()
    mbuf.adj(60)
    assert pair.tx.tx_burst(Burst([mbuf])) == 1
    header, data = sink.recv()
    assert data == shape.frame()[60:]
    assert header == (0, 0, 0, 0, 0, 0)


def test_flags_taken_off_take_the_header_off(taps: tuple[Tap, Tap], engine: str) -> None:
    """Who finishes a checksum says so in ol_flags, and the kernel is not asked to."""
    a, b = taps
    shape = SHAPES[2]
    offload(a, shape.features)
    pair = Pair(a, b, engine, 2048)
    source, sink = VnetSocket(a), VnetSocket(b)
    source.send(shape)
    burst = Burst([pair.received()])
    burst.ol_flags = 0
    assert pair.tx.tx_burst(burst) == 1
    header, data = sink.recv()
    assert data == shape.frame()
    assert header[0] & NEEDS_CSUM == 0


def test_metadata_of_one_frame_does_not_stick_to_the_next(
    taps: tuple[Tap, Tap], engine: str
) -> None:
    a, b = taps
    offload(a, OFFLOADS | USO)
    pair = Pair(a, b, engine, ROOMS["single"])
    source, sink = VnetSocket(a), VnetSocket(b)
    order = [shape for plain in SHAPES[:2] for shape in (*SHAPES, plain, plain)]
    for _ in range(6):
        for start in range(0, len(order), 20):
            part = order[start : start + 20]
            for shape in part:
                source.send(shape)
            burst = pair.rx.rx_burst(20, 5)
            assert len(burst) == len(part)
            for mbuf, shape in zip(burst, part, strict=True):
                assert mbuf.tso_segsz == shape.gso_size
                assert bool(mbuf.ol_flags & MbufFlag.RX_LRO) == bool(shape.gso)
            del mbuf
            assert pair.tx.tx_burst(burst) == len(part)
            for shape in part:
                assert_came_through(shape, sink.recv())
    assert pair.pool.in_use == 0


# ---- a device without the header


@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if s.flags and not s.gso], ids=lambda s: s.name
)
@pytest.mark.parametrize("room", [2048, 120], ids=["single", "chains"])
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_checksum_is_finished_for_a_device_without_headers(
    netns: NetNS, netns2: NetNS, engine: str, shape: Shape, room: int, shared: bool
) -> None:
    with Tap(netns, "tap0") as a, Tap(netns2, "tap1", vnet_hdr=False) as b:
        offload(a, shape.features)
        pair = Pair(a, b, engine, room)
        source = VnetSocket(a)
        sink = b.packets(3)
        source.send(shape)
        mbuf = pair.received()
        burst = Burst([mbuf])
        kept = burst[:] if shared else None
        del mbuf
        assert pair.tx.tx_burst(burst) == 1
        assert sink.frames(1) == [Shape(**{**vars(shape), "flags": 0}).frame()]
        if kept is not None:
            assert bytes(kept[0]) == shape.frame(), "the shared frame was written to"
            del kept
        assert pair.pool.in_use == 0


def test_super_frame_never_leaves_by_a_device_without_headers(
    netns: NetNS, netns2: NetNS, engine: str
) -> None:
    """It is split, never sent as if it were one frame."""
    shape = SHAPES[7]
    with Tap(netns, "tap0") as a, Tap(netns2, "tap1", vnet_hdr=False) as b:
        offload(a, shape.features)
        pair = Pair(a, b, engine, ROOMS["single"])
        sink = b.packets(3)
        VnetSocket(a).send(shape)
        assert pair.tx.tx_burst(Burst([pair.received()])) == 1
        got = sink.drain()
        counters = pair.tx.counters()
        assert all(len(f) <= 14 + shape.l3_len + shape.l4_len + shape.gso_size for f in got)
        assert len(got) == -(-shape.payload // shape.gso_size)
        assert counters["errors"] == 0
        assert pair.pool.in_use == 0


# ---- real transfers


class Forwarder:
    """Both directions between two devices, in two Python threads."""

    def __init__(self, a: Tap, b: Tap, engine: str, room: int) -> None:
        self.pool = Mempool(512 if room > 2048 else 16384, room)
        self.seen: list[tuple[int, int, int, int, int, int]] = []
        self.touch: Callable[[Mbuf], None] | None = None
        self.stop = threading.Event()
        options: dict[str, Any] = {"engine": engine, "scatter": True, "max_frame": MAX_SUPER_FRAME}
        self.queues = [(t.rx(self.pool, **options), t.tx(engine=engine)) for t in (a, b)]
        (rx_a, tx_a), (rx_b, tx_b) = self.queues
        self.tasks = [Task(self.run, rx_a, tx_b, True), Task(self.run, rx_b, tx_a, False)]

    def run(self, rx: RxQueue, tx: TxQueue, look: bool) -> None:
        while not self.stop.is_set():
            burst = rx.rx_burst(32, 0.05)
            if look:
                for m in burst:
                    if self.touch is not None:
                        self.touch(m)
                    seen = (m.ol_flags, len(m), m.tso_segsz, m.l2_len, m.l3_len, m.l4_len)
                    self.seen.append(seen)
                    m.free()
            while len(burst) and not self.stop.is_set():
                tx.tx_burst(burst)

    def close(self) -> None:
        self.stop.set()
        for task in self.tasks:
            task.result()

    def super_frames(self) -> list[tuple[int, int, int, int, int, int]]:
        return [entry for entry in self.seen if entry[0] & MbufFlag.RX_LRO]


@contextlib.contextmanager
def routed(
    ns1: NetNS, ns2: NetNS, engine: str, room: int, version: int, features: TunFeature
) -> Iterator[tuple[Forwarder, Tap, Tap, str]]:
    """Two kernels that talk over rtap: A at .1, B at .2."""
    with (
        Tap(ns1, "tap0", mac=LOCAL, up=False) as a,
        Tap(ns2, "tap1", mac=REMOTE, up=False) as b,
    ):
        for tap, n in ((a, 1), (b, 2)):
            offload(tap, features)
            if version == 4:
                tap.set("up")
                ip(tap.ns, "addr", "add", f"10.9.0.{n}/24", "dev", tap.name)
            else:
                # Before it is up: a report that is due when it goes down would count as dropped.
                tap.ns.call(_enable_ipv6)
                tap.set("addrgenmode", "none", "up")
                add_ipv6(tap.ns, tap.name, f"fd09::{n}")
        forwarder = Forwarder(a, b, engine, room)
        try:
            yield forwarder, a, b, "10.9.0.2" if version == 4 else "fd09::2"
        finally:
            forwarder.close()


def _enable_ipv6() -> None:
    for conf in ("all", "default", *(d for d in ("tap0", "tap1"))):
        path = f"/proc/sys/net/ipv6/conf/{conf}/disable_ipv6"
        if os.path.exists(path):
            with open(path, "w") as f:
                f.write("0")


def transfer(ns1: NetNS, ns2: NetNS, address: str, size: int) -> str:
    """Sends from the first namespace to the second over TCP; the digest of what arrived."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = ns2.call(socket.socket, family, socket.SOCK_STREAM)
    client = ns1.call(socket.socket, family, socket.SOCK_STREAM)
    with listener, client:
        listener.bind((address, 5001))
        listener.listen()
        listener.settimeout(20)
        client.settimeout(20)

        def receive() -> str:
            connection, _ = listener.accept()
            digest = hashlib.sha256()
            with connection:
                connection.settimeout(20)
                while data := connection.recv(1 << 18):
                    digest.update(data)
            return digest.hexdigest()

        receiver = Task(receive)
        client.connect((address, 5001))
        client.sendall(payload(size))
        client.shutdown(socket.SHUT_WR)
        return receiver.result(60)


def payload(size: int) -> bytes:
    return b"".join(struct.pack("!I", i) + pattern(i, 60) for i in range(size // 64))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("room", [ROOMS["single"], 2048], ids=["single", "chains"])
def test_tcp_super_frames_are_forwarded_whole(
    netns: NetNS, netns2: NetNS, engine: str, version: int, room: int
) -> None:
    size = 8 << 20
    with routed(netns, netns2, engine, room, version, OFFLOADS) as (forwarder, a, b, address):
        ear = b.packets(0x0800 if version == 4 else 0x86DD, rcvbuf=256 << 20)
        digest = transfer(netns, netns2, address, size)
        assert digest == hashlib.sha256(payload(size)).hexdigest()
        supers = forwarder.super_frames()
        assert sum(length for _, length, *_ in supers) > size // 2
        assert max(length for _, length, *_ in supers) > 3 * 1514
        for flags, length, segsz, l2, l3, l4 in supers:
            assert flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_NONE
            assert (l2, l3) == (14, 20 if version == 4 else 40)
            assert l4 >= 20
            assert segsz == 1500 - l3 - l4
            assert length > 14 + l3 + l4 + segsz
        # What left is what came: no super-frame was cut on the way.
        arrived = [len(f) for f in ear.drain()]
        assert arrived == [length for _, length, *_ in forwarder.seen][-len(arrived) :]
        assert sum(n > 1514 for n in arrived) >= len(supers)
        for rx, tx in forwarder.queues:
            assert rx.counters()["errors"] == tx.counters()["errors"] == 0
        assert a.counters()["tx_dropped"] == 0
    assert forwarder.pool.in_use == 0


def test_ecn_super_frames_are_not_lost(netns: NetNS, netns2: NetNS, engine: str) -> None:
    """Congestion is marked on the way, so that the sender's next super-frame carries CWR."""
    size = 4 << 20
    seen_cwr = 0
    count = 0

    def congest(mbuf: Mbuf) -> None:
        nonlocal seen_cwr, count
        if mbuf[12:14] != b"\x08\x00" or mbuf[23] != 6:
            return
        if mbuf.ol_flags & MbufFlag.RX_LRO and mbuf[14 + 20 + 13] & 0x80:
            seen_cwr += 1
        count += 1
        if mbuf[15] & 3 and count % 20 == 0:
            head = bytearray(mbuf[14:34])
            head[1] |= 3
            head[10:12] = bytes(2)
            head[10:12] = struct.pack("!H", ~rfc1071(bytes(head)) & 0xFFFF)
            mbuf[14:34] = head

    for ns in (netns, netns2):
        ns.call(_write, "/proc/sys/net/ipv4/tcp_ecn", "1")
    with routed(netns, netns2, engine, ROOMS["single"], 4, OFFLOADS) as (forwarder, _, _, address):
        forwarder.touch = congest
        assert transfer(netns, netns2, address, size) == hashlib.sha256(payload(size)).hexdigest()
        assert seen_cwr > 0, "no super-frame with CWR came by: the test is too easy"
        for rx, tx in forwarder.queues:
            assert rx.counters()["errors"] == tx.counters()["errors"] == 0


def _write(path: str, value: str) -> None:
    with open(path, "w") as f:
        f.write(value)


@pytest.mark.parametrize("version", [4, 6])
def test_udp_super_frames_are_forwarded_whole(
    netns: NetNS, netns2: NetNS, engine: str, version: int
) -> None:
    features = TunFeature.CSUM | USO
    room = ROOMS["single"]
    with routed(netns, netns2, engine, room, version, features) as (forwarder, _, _, address):
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        receiver = netns2.call(socket.socket, family, socket.SOCK_DGRAM)
        sender = netns.call(socket.socket, family, socket.SOCK_DGRAM)
        with receiver, sender:
            receiver.bind((address, 5002))
            receiver.settimeout(10)
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            sender.connect((address, 5002))
            sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1200)
            for i in range(30):
                data = pattern(i, 1200 * 40 + 7 * i)
                sender.send(data)
                parts = [data[at : at + 1200] for at in range(0, len(data), 1200)]
                assert [receiver.recv(1 << 16) for _ in parts] == parts
        supers = forwarder.super_frames()
        assert len(supers) == 30
        for flags, _, segsz, l2, l3, l4 in supers:
            assert flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_NONE
            assert (segsz, l2, l3, l4) == (1200, 14, 20 if version == 4 else 40, 8)
        for rx, tx in forwarder.queues:
            assert rx.counters()["errors"] == tx.counters()["errors"] == 0


def test_without_offloads_no_frame_is_longer_than_the_mtu(
    netns: NetNS, netns2: NetNS, engine: str
) -> None:
    size = 1 << 20
    features = TunFeature(0)
    with routed(netns, netns2, engine, 2048, 4, features) as (forwarder, _, _, address):
        assert transfer(netns, netns2, address, size) == hashlib.sha256(payload(size)).hexdigest()
        assert max(length for _, length, *_ in forwarder.seen) == 1514
        assert {flags for flags, *_ in forwarder.seen} == {0}
