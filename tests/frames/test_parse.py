# SPDX-License-Identifier: BSD-3-Clause
"""Parsing headers, and checking and writing checksums, against scapy and in guarded memory."""

from __future__ import annotations

import contextlib
import random
import struct

import numpy as np
import pytest
from frames import CASES, DATA, ETHER, IP4, IP6, TCP_OPTIONS, UDP_PLAIN, Case
from guard import Guard
from hypothesis import given
from hypothesis import strategies as st
from rigs import wrong_checksums
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Dot1Q

from rtap import Burst, MbufFlag, Mempool, offload
from rtap.offload import ChecksumStatus, Headers, PacketType, packet_type_names

GUARD = Guard()
NAMES = list(CASES)
STATUS_FLAGS = {
    ChecksumStatus.GOOD: MbufFlag.RX_L4_CKSUM_GOOD,
    ChecksumStatus.NONE: MbufFlag.RX_L4_CKSUM_NONE,
    ChecksumStatus.UNKNOWN: MbufFlag.RX_L4_CKSUM_UNKNOWN,
}


@pytest.fixture(scope="module")
def pool() -> Mempool:
    return Mempool(2000, 2048)


@pytest.fixture(scope="module")
def chains() -> Mempool:
    return Mempool(2000, 65)


# ---- parse


@pytest.mark.parametrize("name", NAMES)
def test_headers(name: str, chains: Mempool) -> None:
    case = CASES[name]
    assert offload.parse(GUARD.put(case.frame)) == case.headers
    assert offload.parse(chains.alloc(case.frame)) == case.headers
    assert offload.parse(GUARD.put(case.frame + bytes(18))) == case.headers  # padded
    assert packet_type_names(case.headers.packet_type) == [kind.name for kind in case.types]


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].headers.l3_len])
def test_headers_without_ethernet(name: str) -> None:
    case = CASES[name]
    l2 = case.headers.outer_l2_len or case.headers.l2_len
    expected = case.headers._replace(packet_type=case.headers.packet_type & ~PacketType.L2_MASK)
    if case.headers.outer_l2_len:
        expected = expected._replace(outer_l2_len=0)
    else:
        expected = expected._replace(l2_len=0)
    assert offload.parse(GUARD.put(case.frame[l2:]), l2=False) == expected


def total_length(headers: Headers) -> int:
    return sum(headers[1:6])


@pytest.mark.parametrize("name", NAMES)
def test_every_prefix(name: str) -> None:
    """A truncated frame is malformed, or has fewer headers, all inside it."""
    frame = CASES[name].frame
    for n in range(len(frame)):
        try:
            found = offload.parse(GUARD.put(frame[:n]))
        except ValueError:
            pass
        else:
            assert total_length(found) <= n
        assert offload.verify(GUARD.put(frame[:n])) in (
            ChecksumStatus.UNKNOWN,
            ChecksumStatus.NONE,
            ChecksumStatus.BAD,
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_changed(name: str) -> None:
    """With any value in any byte of the headers, nothing is read past the end."""
    frame = bytearray(CASES[name].frame)
    dice = random.Random(name)
    for at in range(min(len(frame), 140)):
        was = frame[at]
        for value in (0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)):
            frame[at] = value
            try:
                found = offload.parse(GUARD.put(bytes(frame)))
            except ValueError:
                continue
            assert total_length(found) <= len(frame)
        frame[at] = was


@pytest.mark.fuzz
@given(st.sampled_from(NAMES), st.lists(st.tuples(st.integers(0, 150), st.binary(max_size=4))))
def test_damaged_frames(name: str, damage: list[tuple[int, bytes]]) -> None:
    frame = bytearray(CASES[name].frame)
    for at, new in damage:
        frame[at : at + len(new)] = new
    for l2 in (True, False):
        with contextlib.suppress(ValueError):
            assert total_length(offload.parse(GUARD.put(bytes(frame)), l2=l2)) <= len(frame)
        offload.verify(GUARD.put(bytes(frame)), l2=l2)


def with_field(frame: bytes, offset: int, form: str, value: int) -> bytes:
    data = bytearray(frame)
    struct.pack_into(form, data, offset, value)
    return bytes(data)


TCP4, TCP6 = CASES["tcp"].frame, CASES["tcp6"].frame
MALFORMED = {
    "empty": b"",
    "short ethernet": TCP4[:13],
    "ethernet and nothing": TCP4[:14],
    "cut tag": CASES["vlan"].frame[:17],
    "cut ip header": TCP4[:33],
    "cut options": CASES["options"].frame[:40],
    "ip version 6 for ipv4": with_field(TCP4, 14, "!B", 0x65),
    "ip version 4 for ipv6": with_field(TCP6, 14, "!B", 0x45),
    "ip version 0": with_field(TCP4, 14, "!B", 0x05),
    "ihl 4": with_field(TCP4, 14, "!B", 0x44),
    "ihl 15, total 30": with_field(with_field(TCP4, 14, "!B", 0x4F), 16, "!H", 30),
    "total length 19": with_field(TCP4, 16, "!H", 19),
    "total length ends in the tcp header": with_field(TCP4, 16, "!H", 51),
    "doff 4": with_field(TCP4, 46, "!B", 0x40),
    "doff past the end": with_field(TCP4[:70], 46, "!B", 0xF0),
    "ipv6 payload length ends in an extension header": with_field(
        CASES["extension headers"].frame, 18, "!H", 12
    ),
    "ipv6 extension header past the end": with_field(
        CASES["extension headers"].frame, 14 + 40 + 8 + 1, "!B", 200
    ),
    "inner ihl": with_field(CASES["ip in ip"].frame, 34, "!B", 0x43),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str) -> None:
    with pytest.raises(ValueError, match="malformed frame"):
        offload.parse(GUARD.put(MALFORMED[name]))
    assert offload.verify(GUARD.put(MALFORMED[name])) in (
        ChecksumStatus.UNKNOWN,
        ChecksumStatus.BAD,
    )


def test_a_chain_of_extension_headers_is_not_followed_for_ever() -> None:
    option = bytes([60, 0, 1, 4, 0, 0, 0, 0])
    frame = bytes(ETHER / IP6)[:54] + option * 2000
    frame = with_field(with_field(frame, 18, "!H", 16000), 20, "!B", 60)
    found = offload.parse(frame)
    assert found.packet_type == PacketType.L2_ETHER | PacketType.L3_IPV6_EXT
    assert found.l4_len == 0


def test_only_one_tunnel_is_looked_into() -> None:
    frame = bytes(ETHER / IP(src="1.1.1.1", dst="2.2.2.2") / IP4 / IP4 / TCP() / DATA)
    found = offload.parse(frame)
    assert (found.outer_l3_len, found.l3_len, found.l4_len) == (20, 20, 0)


def test_what_only_looks_like_vxlan(pool: Mempool) -> None:
    plain = bytes(ETHER / IP4 / UDP(sport=1, dport=4789) / bytes(60))
    assert offload.parse(plain) == CASES["udp"].headers


def test_parse_a_burst(chains: Mempool) -> None:
    frames = [case.frame for case in CASES.values()] + list(MALFORMED.values())
    burst = chains.alloc_burst(len(frames), frames)
    types = offload.parse_burst(burst)
    assert types.format == "I"
    for mbuf, kind, case in zip(burst, types, CASES.values(), strict=False):
        assert mbuf.packet_type == kind
        expected = case.headers
        assert kind == expected.packet_type
        assert (mbuf.l2_len, mbuf.l3_len, mbuf.l4_len) == expected[1:4]
    assert len(types) == len(burst) == len(frames)
    bare = [case.frame[14:] for case in CASES.values() if case.headers.l2_len == 14]
    burst = chains.alloc_burst(len(bare), bare)
    assert all(kind & PacketType.L2_MASK == 0 for kind in offload.parse_burst(burst, l2=False))


# ---- verify


@pytest.mark.parametrize("name", NAMES)
def test_status(name: str, chains: Mempool) -> None:
    case = CASES[name]
    assert offload.verify(GUARD.put(case.frame)) is case.status
    assert offload.verify(chains.alloc(case.frame)) is case.status
    assert offload.verify(case.frame + b"\xff" * 18) is case.status  # padding is not summed


@pytest.mark.parametrize("name", [n for n in NAMES if CASES[n].status is ChecksumStatus.GOOD])
def test_no_bit_may_differ(name: str) -> None:
    """Any changed bit that a checksum covers makes it wrong."""
    case = CASES[name]
    frame = bytearray(case.frame)
    last = len(frame) - 1
    for at in (last, last - 1, last - len(DATA), last - len(DATA) - 1):
        frame[at] ^= 0x10
        assert offload.verify(bytes(frame)) is ChecksumStatus.BAD, at
        assert offload.verify(bytes(frame), layer=4) is ChecksumStatus.BAD
        assert offload.verify(bytes(frame), layer=3) is not ChecksumStatus.BAD
        frame[at] ^= 0x10
    assert offload.verify(bytes(frame)) is ChecksumStatus.GOOD


def ipv4_headers(case: Case) -> list[int]:
    """Offsets of the frame's IPv4 headers."""
    found = []
    at = 0
    layer = case.packet
    while layer:
        if isinstance(layer, IP):
            found.append(at)
        at += len(layer) - len(layer.payload)
        layer = layer.payload
    return found


@pytest.mark.parametrize("name", [n for n in NAMES if ipv4_headers(CASES[n])])
def test_a_wrong_ip_header_checksum(name: str) -> None:
    for at in ipv4_headers(CASES[name]):
        frame = bytearray(CASES[name].frame)
        frame[at + 8] ^= 1  # the time to live
        assert offload.verify(bytes(frame)) is ChecksumStatus.BAD
        assert offload.verify(bytes(frame), layer=3) is ChecksumStatus.BAD
        if (name, at) != ("vxlan", 64):  # where an outer checksum covers it
            assert offload.verify(bytes(frame), layer=4) is CASES[name].status


def test_udp_over_ipv6_needs_a_checksum() -> None:
    frame = bytes(ETHER / IP6 / UDP(sport=1, dport=2, chksum=0) / DATA)
    assert offload.verify(frame) is ChecksumStatus.BAD


def test_the_outer_checksum_of_a_tunnel() -> None:
    frame = bytearray(CASES["vxlan"].frame)
    struct.pack_into("!H", frame, 14 + 20 + 6, 0x1234)
    assert offload.verify(frame) is ChecksumStatus.BAD
    struct.pack_into("!H", frame, 14 + 20 + 6, 0)
    assert offload.verify(frame) is ChecksumStatus.GOOD


@pytest.mark.parametrize("length", [0, 7, 111, 0xFFFF])
def test_a_udp_length_that_lies(length: int) -> None:
    frame = with_field(CASES["udp"].frame, 38, "!H", length)
    assert offload.verify(GUARD.put(frame)) is ChecksumStatus.UNKNOWN
    with pytest.raises(ValueError, match="malformed"):
        offload.fill(GUARD.put(frame))


def test_bytes_behind_the_udp_length_are_not_summed() -> None:
    short = bytes(ETHER / IP4 / UDP_PLAIN / b"four")
    longer = bytearray(short + b"more")
    struct.pack_into("!H", longer, 16, 20 + 8 + 8)
    assert offload.verify(offload.fill(longer)) is ChecksumStatus.GOOD
    assert offload.fill(longer)[40:42] == short[40:42]


def test_layer_is_checked() -> None:
    with pytest.raises(ValueError, match="layer must be"):
        offload.verify(TCP4, layer=2)  # type: ignore[arg-type]


def test_verify_a_burst(chains: Mempool) -> None:
    cases = list(CASES.values())
    burst = chains.alloc_burst(len(cases) + 1, [case.frame for case in cases] + [TCP4[:-1] + b"?"])
    burst.ol_flags = MbufFlag.RX_VLAN | MbufFlag.RX_L4_CKSUM_BAD
    found = offload.verify_burst(burst)
    assert list(found[:-1]) == [case.status for case in cases]
    assert found[-1] == ChecksumStatus.BAD
    for mbuf, case in zip(burst, cases, strict=False):
        flags = mbuf.ol_flags
        assert flags & MbufFlag.RX_VLAN
        assert flags & MbufFlag.RX_L4_CKSUM_MASK == STATUS_FLAGS[case.status]
        is_ipv4 = bool(ipv4_headers(case)) and "L3_IPV4" in str(
            packet_type_names(case.headers.packet_type)[-2:]
        )
        assert bool(flags & MbufFlag.RX_IP_CKSUM_GOOD) == is_ipv4
        assert not flags & MbufFlag.RX_IP_CKSUM_BAD
    assert burst[len(cases)].ol_flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_BAD


# ---- fill

FILLED = [name for name in NAMES if CASES[name].checksums]


@pytest.mark.parametrize("name", FILLED)
def test_fill(name: str, chains: Mempool) -> None:
    """Wrong values in all checksum fields are replaced by the sums that scapy computes."""
    case = CASES[name]
    broken = ETHER.__class__(case.frame)
    for kind in (IP, TCP, UDP):
        n = 1
        while layer := broken.getlayer(kind, n):
            layer.chksum = 0xBEEF
            n += 1
    broken = bytes(broken)
    assert offload.fill(GUARD.put(broken)) == case.frame
    assert offload.fill(GUARD.put(broken + b"\xff" * 9)) == case.frame + b"\xff" * 9
    assert offload.fill(chains.alloc(broken)) == case.frame
    burst = chains.alloc_burst(2, [broken, case.frame])
    assert offload.fill_burst(burst) == 2
    assert [bytes(mbuf) for mbuf in burst] == [case.frame] * 2


def test_fill_leaves_the_argument_alone() -> None:
    frame = bytearray(with_field(TCP4, 14 + 20 + 16, "!H", 0))
    before = bytes(frame)
    assert offload.fill(frame) == TCP4
    assert frame == before


def test_fill_of_a_burst_counts_and_skips_the_malformed(chains: Mempool) -> None:
    bad = MALFORMED["doff 4"]
    burst = chains.alloc_burst(3, [TCP4, bad, TCP6])
    assert offload.fill_burst(burst) == 2
    assert bytes(burst[1]) == bad


@pytest.mark.parametrize("version", [4, 6])
def test_udp_sum_of_zero_is_sent_as_ffff(version: int) -> None:
    """The two bytes of data complement the rest of the sum."""
    packet = ETHER / (IP4 if version == 4 else IP6) / UDP_PLAIN / b"\0\0"
    whole = bytes(packet)
    data = whole[:-2] + whole[-4:-2]  # the checksum of zeros
    assert len(data) == len(whole)
    filled = offload.fill(data)
    assert filled[-4:-2] == b"\xff\xff"
    assert offload.verify(filled) is ChecksumStatus.GOOD
    assert wrong_checksums(filled) == []


@given(
    st.sampled_from(["tcp", "udp", "tcp6", "udp6"]),
    st.binary(max_size=3000),
    st.integers(0, 2),
)
def test_filled_frames_pass_scapy(name: str, data: bytes, tags: int) -> None:
    packet = ETHER
    for tag in range(tags):
        packet = packet / Dot1Q(vlan=tag)
    ip = IP6 if name.endswith("6") else IP4
    packet = packet / ip / (TCP_OPTIONS if name.startswith("tcp") else UDP_PLAIN) / data
    frame = offload.fill(bytes(packet))
    assert wrong_checksums(frame) == []
    assert offload.verify(frame) is ChecksumStatus.GOOD


# ---- arguments


def test_buffers_of_all_kinds() -> None:
    for buffer in (TCP4, bytearray(TCP4), memoryview(TCP4), np.frombuffer(TCP4, np.uint8)):
        assert offload.parse(buffer) == CASES["tcp"].headers
        assert offload.verify(buffer) is ChecksumStatus.GOOD
        assert offload.fill(buffer) == TCP4


def test_what_is_refused() -> None:
    for call in (offload.parse, offload.verify, offload.fill):
        with pytest.raises(TypeError):
            call("text")  # type: ignore[operator]
    for call in (offload.parse_burst, offload.verify_burst, offload.fill_burst):
        with pytest.raises(TypeError):
            call(None)  # type: ignore[operator]
        call(Burst())  # type: ignore[operator]
    with pytest.raises(ValueError, match="at most"):
        offload.verify(bytes((1 << 24) + 1))


def test_every_packet_type_has_a_layer_of_its_own() -> None:
    masks = [kind for kind in PacketType if kind.name.endswith("_MASK")]
    assert sum(masks) == 0xFFFFFFF
    for kind in PacketType:
        assert sum(bool(kind & mask) for mask in masks) == 1, kind
    assert packet_type_names(0) == []
    assert packet_type_names(0xE11) == ["L2_ETHER", "L3_IPV4", "0xe00"]
