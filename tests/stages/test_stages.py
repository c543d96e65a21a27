# SPDX-License-Identifier: BSD-3-Clause
"""Stages on a burst, each compared with the same change made by scapy."""

from __future__ import annotations

import ctypes
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from rtap import Burst, MacAddr, MbufFlag, Mempool, stages
from rtap.stages import DROP

A, B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
MINE = "02:00:00:00:00:99"


def ether(*layers: Packet) -> Packet:
    packet: Packet = Ether(src=A, dst=B)
    for layer in layers:
        packet = packet / layer
    return packet


FRAMES = [
    ether(IP(src="10.0.0.1", dst="10.0.0.2"), UDP(sport=1000, dport=53), Raw(b"query")),
    ether(IP(src="10.0.0.1", dst="10.0.0.2"), TCP(sport=1000, dport=80), Raw(b"x" * 100)),
    ether(IP(src="192.168.7.1", dst="10.0.0.2", options=b"\x01" * 4), UDP(sport=7, dport=8)),
    ether(Dot1Q(vlan=5), IP(src="10.1.0.1", dst="10.0.0.2"), UDP(sport=9, dport=1000)),
    ether(IPv6(src="fd00::1", dst="fd00::2"), TCP(sport=443, dport=50000), Raw(b"yy")),
    ether(IPv6(src="fd00::1", dst="fd01::2"), UDP(sport=443, dport=50000), Raw(b"z" * 31)),
    ether(IP(src="10.0.0.1", dst="10.0.0.2"), ICMP(id=5, seq=1), Raw(b"ping")),
    ether(ARP(psrc="10.0.0.1", pdst="10.0.0.2", hwsrc=A)),
    ether(Raw(b"\x00" * 46)),
    Raw(b"\x01\x02\x03"),
]


@pytest.fixture
def pool() -> Mempool:
    return Mempool(512)


def burst_of(pool: Mempool, frames: list[Packet] | list[bytes]) -> Burst:
    return pool.alloc_burst(len(frames), data=[bytes(f) for f in frames])


def after(stage: stages.Stage, pool: Mempool, frames: list[Any] = FRAMES) -> list[bytes]:
    burst = burst_of(pool, frames)
    assert stage(burst).tolist() == [0] * len(burst)
    return [bytes(m) for m in burst]


# ---- addresses and ports


def test_mac_swap(pool: Mempool) -> None:
    wanted = [f[6:12] + f[:6] + f[12:] if len(f) >= 12 else f for f in map(bytes, FRAMES)]
    assert after(stages.MacSwap(), pool) == wanted
    assert [bytes(m) for m in split(stages.MacSwap())] == wanted


@pytest.mark.parametrize(("dst", "src"), [(MINE, A), (MINE, None), (None, MINE)])
def test_mac_rewrite(pool: Mempool, dst: str | None, src: str | None) -> None:
    def rewritten(f: bytes) -> bytes:
        if len(f) < 12:
            return f
        return (
            (bytes(MacAddr(dst)) if dst else f[:6])
            + (bytes(MacAddr(src)) if src else f[6:12])
            + f[12:]
        )

    wanted = [rewritten(bytes(f)) for f in FRAMES]
    assert after(stages.MacRewrite(dst, src), pool) == wanted
    assert [bytes(m) for m in split(stages.MacRewrite(dst, src))] == wanted


def split(stage: stages.Stage) -> Burst:
    """The stage's result on frames with only 4 bytes in the first segment."""
    burst = Burst()
    pool = Mempool(256, 64)
    for f in FRAMES:
        mbuf = pool.alloc(bytes(60) + bytes(f))
        mbuf.adj(60)
        burst.append(mbuf)
    stage(burst)
    return burst


def test_five_tuple_swap(pool: Mempool) -> None:
    def swapped(frame: Packet) -> bytes:
        if not frame.haslayer(Ether):
            return bytes(frame)
        p = Ether(bytes(frame))
        p.src, p.dst = p.dst, p.src
        for kind in (IP, IPv6):
            if kind in p:
                p[kind].src, p[kind].dst = p[kind].dst, p[kind].src
        for kind in (TCP, UDP):
            if kind in p:
                p[kind].sport, p[kind].dport = p[kind].dport, p[kind].sport
        return bytes(p)

    assert after(stages.FiveTupleSwap(), pool) == [swapped(f) for f in FRAMES]
    assert [bytes(m) for m in split(stages.FiveTupleSwap())] == [swapped(f) for f in FRAMES]


# ---- checksums


def broken(frame: Packet) -> Packet:
    p = frame.copy()
    for kind in (IP, TCP, UDP):
        if kind in p:
            p[kind].chksum = 0x1234
    return p


def test_checksum_fill(pool: Mempool) -> None:
    wanted = [bytes(f) for f in FRAMES]
    assert [bytes(broken(f)) for f in FRAMES] != wanted
    assert after(stages.ChecksumFill(), pool, [broken(f) for f in FRAMES]) == wanted
    packets = [bytes(f)[14:] for f in FRAMES[:3]]
    damaged = [bytes(broken(f))[14:] for f in FRAMES[:3]]
    assert after(stages.ChecksumFill(l2=False), pool, damaged) == packets


def test_checksum_verify(pool: Mempool) -> None:
    good = after(stages.ChecksumVerify(), pool)
    assert good == [bytes(f) for f in FRAMES]
    mixed = [f for frame in FRAMES[:6] for f in (frame, broken(frame))]
    burst = burst_of(pool, mixed)
    stages.ChecksumVerify()(burst)
    assert [bytes(m) for m in burst] == [bytes(f) for f in FRAMES[:6]]
    assert all(m.ol_flags & MbufFlag.RX_L4_CKSUM_GOOD for m in burst)
    burst = burst_of(pool, mixed)
    verify = stages.ChecksumVerify(drop=False)
    verify(burst)
    assert (verify.bad_l4, verify.bad_ip, verify.bad_outer_ip, verify.bad_outer_l4) == (6, 4, 0, 0)
    assert [bool(m.ol_flags & MbufFlag.RX_L4_CKSUM_BAD) for m in burst] == [False, True] * 6


# ---- answers


def test_echo(pool: Mempool) -> None:
    arp = ether(ARP(psrc="10.0.0.1", pdst="10.0.0.2", hwsrc=A))
    ping = ether(IP(src="10.0.0.1", dst="10.0.0.2"), ICMP(id=5, seq=1), Raw(b"ping"))
    ping6 = ether(IPv6(src="fd00::1", dst="fd00::2"), ICMPv6EchoRequest(id=1, seq=2, data=b"p"))
    burst = burst_of(pool, [arp, FRAMES[0], ping, FRAMES[8], ping6])
    assert stages.Echo(MINE)(burst).tolist() == [0, 0, 0]
    got = [Ether(bytes(m)) for m in burst]
    assert {p.src for p in got} == {MINE}
    assert {p.dst for p in got} == {A}
    assert (got[0][ARP].op, got[0][ARP].hwsrc, got[0][ARP].psrc) == (2, MINE, "10.0.0.2")
    reply = Ether(src=MINE, dst=A) / IP(src="10.0.0.2", dst="10.0.0.1")
    assert bytes(got[1]) == bytes(reply / ICMP(type=0, id=5, seq=1) / b"ping")
    reply = Ether(src=MINE, dst=A) / IPv6(src="fd00::2", dst="fd00::1")
    assert bytes(got[2]) == bytes(reply / ICMPv6EchoReply(id=1, seq=2, data=b"p"))
    burst = burst_of(pool, [arp, FRAMES[0]])
    assert stages.Echo(MINE, others=1)(burst, 2).tolist() == [0, 1]


# ---- matching


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ({"protocol": "udp"}, {0, 2, 3, 5}),
        ({"protocol": 6}, {1, 4}),
        ({"protocol": "icmp"}, {6}),
        ({"source": "10.0.0.0/8"}, {0, 1, 3, 6}),
        ({"source": "10.0.0.0/16", "protocol": "udp"}, {0}),
        ({"source": "fd00::1"}, {4, 5}),
        ({"source": "fd00::1", "destination": "fd01::/16"}, {5}),
        ({"destination": "10.0.0.2", "destination_port": 53}, {0}),
        ({"destination_port": (50, 80)}, {0, 1}),
        ({"source_port": 1000}, {0, 1}),
        ({"source_port": 443, "destination_port": 50000}, {4, 5}),
        ({}, set(range(7))),
        ({"source": "10.99.0.0/16"}, set()),
    ],
)
def test_match(pool: Mempool, rule: dict[str, Any], wanted: set[int]) -> None:
    burst = burst_of(pool, FRAMES)
    verdicts = stages.Match(**rule, action=2, otherwise=1)(burst, 3).tolist()
    assert {i for i, v in enumerate(verdicts) if v == 2} == wanted
    assert set(verdicts) <= {1, 2}
    stages.Match(**rule)(burst)
    assert [bytes(m) for m in burst] == [bytes(f) for i, f in enumerate(FRAMES) if i not in wanted]
    burst = burst_of(pool, FRAMES)
    stages.Match(**rule, action=None, otherwise=DROP)(burst)
    assert [bytes(m) for m in burst] == [bytes(f) for i, f in enumerate(FRAMES) if i in wanted]


def test_fragments_match_no_port(pool: Mempool) -> None:
    whole = IP(src="10.0.0.1", dst="10.0.0.2", id=7) / UDP(sport=1, dport=2) / Raw(b"a" * 3000)
    parts = [ether(p) for p in fragment(whole, 1400)]
    assert len(parts) == 3
    burst = burst_of(pool, parts)
    assert stages.Match(source_port=1, action=1)(burst, 2).tolist() == [0, 0, 0]
    assert stages.Match(protocol="udp", action=1)(burst, 2).tolist() == [1, 1, 1]
    targets = stages.Spread()(burst, 64).tolist()
    assert len(set(targets)) == 1


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"protocol": "gre?"}, "protocol must be one of tcp"),
        ({"protocol": 256}, "protocol must be 0..255"),
        ({"source": "10.0.0.0/8", "destination": "fd00::/8"}, "different IP versions"),
        ({"source": "10.0.0.1/8"}, "has host bits set"),
        ({"source_port": 65536}, "source_port must be 0..65535"),
        ({"destination_port": (5, 4)}, "5 is more than 4"),
        ({"action": -1}, "action must be 0..65534"),
    ],
)
def test_match_arguments(rule: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        stages.Match(**rule)


# ---- spreading


def test_spread_is_symmetric_and_even(pool: Mempool) -> None:
    chance = random.Random(1)
    frames = []
    for n in range(2000):
        addresses = [f"10.{n % 7}.{n >> 8}.{n & 255}", f"10.99.0.{chance.randrange(4)}"]
        ports = [chance.randrange(65536), 443]
        for _ in range(2):
            frames.append(
                Ether(src=A, dst=B)
                / IP(src=addresses[0], dst=addresses[1])
                / UDP(sport=ports[0], dport=ports[1])
            )
            addresses.reverse()
            ports.reverse()
    big = Mempool(len(frames) + 64)
    burst = burst_of(big, frames)
    there = stages.Spread()(burst, 8).tolist()
    assert there[0::2] == there[1::2]
    counts = [there[0::2].count(k) for k in range(8)]
    assert min(counts) > 180
    assert max(counts) < 320
    alone = stages.Spread(ports=False)(burst, 8).tolist()
    assert alone[0::2] == alone[1::2]
    six = [
        Ether(src=A, dst=B) / IPv6(src=f"fd00::{n:x}", dst="fd00::9") / UDP(sport=n, dport=5)
        for n in range(64)
    ]
    back = [
        Ether(src=B, dst=A) / IPv6(dst=f"fd00::{n:x}", src="fd00::9") / UDP(dport=n, sport=5)
        for n in range(64)
    ]
    one = stages.Spread()(burst_of(pool, six), 8).tolist()
    assert one == stages.Spread()(burst_of(pool, back), 8).tolist()
    assert len(set(one)) == 8


def flows(n: int) -> list[Packet]:
    return [
        ether(IP(src="10.0.0.1", dst="10.0.0.2"), UDP(sport=1000 + k, dport=53)) for k in range(n)
    ]


def test_a_second_spread_needs_another_seed(pool: Mempool) -> None:
    """With the same seed, it would send all frames of one first target to one second target."""
    frames = flows(256)
    first = stages.Spread()(burst_of(pool, frames), 4).tolist()
    one_way = [frame for frame, target in zip(frames, first, strict=True) if target == 2]
    assert set(stages.Spread()(burst_of(pool, one_way), 4).tolist()) == {2}
    again = stages.Spread(seed=1)(burst_of(pool, one_way), 4).tolist()
    assert min(again.count(target) for target in range(4)) > 5
    with pytest.raises(ValueError, match=re.escape("seed must be 0..4294967295")):
        stages.Spread(seed=-1)


def test_padding_has_no_ports(pool: Mempool) -> None:
    """The IP packet may end before the ports while the frame ends after them."""
    frames = [
        ether(
            IP(src="10.0.0.1", dst="10.0.0.2", proto=17, len=20),
            Raw(bytes([0, n, 0, 53]) + bytes(22)),
        )
        for n in range(64)
    ]
    assert len(set(stages.Spread()(burst_of(pool, frames), 64).tolist())) == 1
    rule = stages.Match(destination_port=53, action=1)
    assert rule(burst_of(pool, frames), 2).tolist() == [0] * 64
    assert stages.Match("udp", action=1)(burst_of(pool, frames), 2).tolist() == [1] * 64


def test_what_is_wrong_after_an_ip_header(pool: Mempool) -> None:
    """A frame that is malformed after the IP header still has addresses and belongs to a flow."""
    sound = ether(IP(src="10.0.0.1", dst="10.0.0.2"), TCP(sport=7, dport=80), Raw(bytes(30)))
    frames = [sound]
    for offset in (0, 4, 15):
        frames.append(sound.copy())
        frames[-1][TCP].dataofs = offset
    assert len(set(stages.Spread()(burst_of(pool, frames), 64).tolist())) == 1
    for rule in (
        stages.Match(source="10.0.0.0/24", action=1),
        stages.Match("tcp", destination_port=80, action=1),
    ):
        assert rule(burst_of(pool, frames), 2).tolist() == [1] * 4


# ---- counting, composition, ownership


def test_counter(pool: Mempool) -> None:
    counter = stages.Counter()
    assert (counter.packets, counter.bytes) == (0, 0)
    for _ in range(3):
        counter(burst_of(pool, FRAMES))
    assert counter.packets == 3 * len(FRAMES)
    assert counter.bytes == 3 * sum(len(bytes(f)) for f in FRAMES)


@pytest.mark.parametrize(
    "stage",
    [stages.MacSwap(), stages.FiveTupleSwap(), stages.ChecksumFill(), stages.Echo(MINE, others=0)],
    ids=lambda stage: stage.name,
)
def test_shared_frames_are_not_written_to(pool: Mempool, stage: stages.Stage) -> None:
    frames = [broken(f) for f in FRAMES]
    burst = burst_of(pool, frames)
    kept = burst[:]
    stage(burst)
    assert [bytes(m) for m in kept] == [bytes(f) for f in frames]
    assert [bytes(m) for m in burst] != [bytes(f) for f in frames]
    del burst, kept
    assert pool.in_use == 0


def test_no_buffer_for_a_copy() -> None:
    pool = Mempool(4)
    burst = pool.alloc_burst(3, data=bytes(FRAMES[0]))
    kept = burst[:]
    assert len(stages.MacSwap()(burst)) == 1
    assert len(burst) == 1
    assert [bytes(m) for m in kept] == [bytes(FRAMES[0])] * 3
    burst.free()
    del kept
    assert pool.in_use == 0


def test_an_empty_burst() -> None:
    for stage in (stages.MacSwap(), stages.Spread(), stages.Counter(), stages.Call(len)):
        assert stage(Burst()).tolist() == []


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: stages.Stage()(Burst()), RuntimeError, "never initialised"),
        (lambda: stages.MacSwap()(Burst(), 0), ValueError, "targets must be 1..65535"),
        (lambda: stages.MacSwap()(5), TypeError, "Burst"),
        (lambda: stages.MacRewrite(), ValueError, "needs a destination or a source"),
        (lambda: stages.MacRewrite("xx"), ValueError, "Ethernet address"),
        (lambda: stages.Echo(5), TypeError, "Ethernet address"),
        (lambda: stages.Echo(MINE, others=-1), ValueError, "others must be"),
        (lambda: stages.Native(0), ValueError, "NULL"),
        (lambda: stages.Native("x"), TypeError, "function must be an address, a PyCapsule"),
        (lambda: stages.Native(1, "x"), TypeError, "ctx must be an address"),
        (lambda: stages.Native(1, b"read-only"), BufferError, "not writable"),
        (lambda: stages.Call(5), TypeError, "callable, got int"),
    ],
)
def test_arguments(make: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        make()


# ---- Python functions


def test_python_verdicts(pool: Mempool) -> None:
    def odd(burst: Burst) -> list[int]:
        return [i % 3 if i % 2 else DROP for i in range(len(burst))]

    burst = burst_of(pool, FRAMES)
    assert stages.Call(odd)(burst, 3).tolist() == [1, 0, 2, 1, 0]
    assert [bytes(m) for m in burst] == [bytes(f) for f in FRAMES[1::2]]


def test_python_writes_and_keeps(pool: Mempool) -> None:
    kept: list[Any] = []

    def mark(burst: Burst) -> None:
        for m in burst:
            m[0:1] = b"\xff"
        kept.append(burst)

    burst = burst_of(pool, FRAMES)
    stage = stages.Call(mark)
    assert stage.name == "mark"
    stage(burst)
    wanted = [b"\xff" + bytes(f)[1:] for f in FRAMES]
    assert [bytes(m) for m in burst] == wanted
    stages.MacSwap()(burst)
    assert [bytes(m) for m in kept[0]] == wanted  # a copy was written to


@pytest.mark.parametrize(
    ("returns", "error", "says"),
    [
        ([0], ValueError, "1 verdicts for a burst of 10"),
        ([0] * 9 + [1], ValueError, "verdict 1 is neither DROP nor one of 1 targets"),
        ([-1] * 10, ValueError, "verdict -1"),
        (["0"] * 10, TypeError, "str"),
        (5, TypeError, "len"),
    ],
)
def test_wrong_verdicts(pool: Mempool, returns: Any, error: type[Exception], says: str) -> None:
    burst = burst_of(pool, FRAMES)
    with pytest.raises(error, match=says):
        stages.Call(lambda burst: returns)(burst)
    assert len(burst) == 0
    assert pool.in_use == 0


# ---- native functions


class CBurst(ctypes.Structure):
    _fields_ = (
        ("abi", ctypes.c_uint32),
        ("n", ctypes.c_uint32),
        ("n_targets", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("data", ctypes.POINTER(ctypes.POINTER(ctypes.c_uint8))),
        ("len", ctypes.POINTER(ctypes.c_uint32)),
        ("ol_flags", ctypes.POINTER(ctypes.c_uint64)),
        ("verdict", ctypes.POINTER(ctypes.c_uint32)),
    )


STAGE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(CBurst))


def test_native_gets_the_arrays(pool: Mempool) -> None:
    seen: list[Any] = []

    @STAGE
    def look(ctx: int, burst: Any) -> int:
        b = burst.contents
        seen.append((ctx, b.abi, b.n, b.n_targets, [b.len[i] for i in range(b.n)]))
        for i in range(b.n):
            b.data[i][0] ^= 0xFF
            b.ol_flags[i] |= int(MbufFlag.RX_VLAN)
            b.verdict[i] = i % 4
        return 0

    burst = burst_of(pool, FRAMES)
    assert stages.Native(look, 1234)(burst, 3).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert seen == [(1234, 1, 10, 3, [len(bytes(f)) for f in FRAMES])]
    left = [bytes(f) for i, f in enumerate(FRAMES) if i % 4 != 3]
    assert [bytes(m) for m in burst] == [bytes([f[0] ^ 0xFF]) + f[1:] for f in left]
    assert all(flags & MbufFlag.RX_VLAN for flags in burst.ol_flags)


def test_native_context(pool: Mempool) -> None:
    @STAGE
    def count(ctx: int, burst: Any) -> int:
        ctypes.c_uint64.from_address(ctx).value += burst.contents.n
        return 0

    buffer = bytearray(8)
    number = ctypes.c_uint64()
    for ctx in (buffer, number, ctypes.addressof(number), ctypes.pointer(number)):
        stages.Native(count, ctx)(burst_of(pool, FRAMES))
    assert int.from_bytes(buffer, sys.byteorder) == 10
    assert number.value == 30
    stage = stages.Native(count, buffer)
    with pytest.raises(BufferError):
        buffer.append(0)  # it stays where it is
    del stage
    buffer.append(0)


def test_native_error(pool: Mempool) -> None:
    @STAGE
    def refuse(ctx: int, burst: Any) -> int:
        return -22

    burst = burst_of(pool, FRAMES)
    with pytest.raises(OSError, match=r"Invalid argument \(stage Native"):
        stages.Native(refuse)(burst)
    assert len(burst) == 0
    assert pool.in_use == 0
