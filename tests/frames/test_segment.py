# SPDX-License-Identifier: BSD-3-Clause
"""Segmentation and checksum completion on bytes, with headers that fit the frame or do not."""

from __future__ import annotations

import contextlib
import random
import struct
from typing import Any

import pytest
from frames import CASES, DATA, ETHER, IP6
from guard import Guard
from hypothesis import given
from hypothesis import strategies as st
from oracle import Maker
from rigs import Shape, label, wrong_checksums
from scapy.layers.inet6 import IPv6

from rtap import Mempool, offload
from rtap.offload import ChecksumStatus, VnetHdr

GUARD = Guard(1 << 18)
SHAPES = [
    Shape(version, proto, vlans, options)
    for version in (4, 6)
    for proto in ("tcp", "udp")
    for vlans in (0, 1, 2)
    for options in (False, True)
]
PAYLOAD = random.Random(7).randbytes(70_000)


def header(shape: Shape, gso_size: int = 0, **changes: int) -> VnetHdr:
    """The header for a frame of that shape."""
    kind = VnetHdr.GSO_NONE
    if gso_size:
        kind = VnetHdr.GSO_UDP_L4
        if shape.proto == "tcp":
            kind = VnetHdr.GSO_TCPV4 if shape.version == 4 else VnetHdr.GSO_TCPV6
    start = shape.l2_len + shape.l3_len
    hdr = VnetHdr(
        VnetHdr.NEEDS_CSUM,
        kind,
        start + shape.l4_len,
        gso_size,
        start,
        16 if shape.proto == "tcp" else 6,
    )
    return VnetHdr(*hdr._replace(**changes))


def seeded(shape: Shape, payload: bytes) -> bytes:
    """The frame with the pseudo-header's sum as L4 checksum, as a stack hands it over."""
    frame = bytearray(shape.finished(payload))
    l3 = shape.l2_len
    l4 = l3 + shape.l3_len
    length = len(frame) - l4
    addresses = frame[l3 + 12 : l3 + 20] if shape.version == 4 else frame[l3 + 8 : l3 + 40]
    number = 6 if shape.proto == "tcp" else 17
    seed = offload.partial(bytes(addresses) + struct.pack("!HH", number, length))
    struct.pack_into("!H", frame, l4 + (16 if shape.proto == "tcp" else 6), seed)
    return bytes(frame)


# ---- VnetHdr


def test_the_header_packs_little_endian() -> None:
    hdr = VnetHdr(1, 0x81, 0x0203, 0x0405, 0x0607, 0x0809)
    assert hdr.pack() == bytes.fromhex("01 81 0302 0504 0706 0908")
    assert VnetHdr.unpack(hdr.pack()) == hdr
    assert VnetHdr.unpack(bytearray(hdr.pack() + b"the frame")) == hdr
    assert VnetHdr().pack() == bytes(10)
    assert len(hdr.pack()) == VnetHdr.SIZE
    assert (hdr.flags, hdr.gso_type, hdr.hdr_len, hdr.csum_offset) == (1, 0x81, 0x0203, 0x0809)


@given(st.binary(min_size=10, max_size=10))
def test_any_ten_bytes_are_a_header(data: bytes) -> None:
    assert VnetHdr.unpack(data).pack() == data


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"flags": 256}, "flags"),
        ({"gso_type": -1}, "gso_type"),
        ({"hdr_len": 65536}, "hdr_len"),
        ({"gso_size": 65536}, "gso_size"),
        ({"csum_start": -1}, "csum_start"),
        ({"csum_offset": 1 << 20}, "csum_offset"),
    ],
)
def test_header_fields_out_of_range(fields: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        VnetHdr(**fields)


def test_a_header_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="10 bytes, got 9"):
        VnetHdr.unpack(bytes(9))


# ---- against scapy


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize(
    ("payload", "gso_size"), [(2000, 1000), (2001, 1000), (1999, 1000), (60_000, 1448), (500, 13)]
)
def test_segments(shape: Shape, payload: int, gso_size: int) -> None:
    data = PAYLOAD[:payload]
    frame = seeded(shape, data)
    got = offload.segment(GUARD.put(frame), header(shape, gso_size))
    assert got == shape.segments(data, gso_size)
    for piece in got:
        assert offload.verify(piece) is ChecksumStatus.GOOD
    # The result depends neither on hdr_len nor on the sum in the frame.
    unsound = header(shape, gso_size, hdr_len=0)
    assert offload.segment(GUARD.put(shape.unfinished(data)), unsound) == got
    assert offload.segment(
        frame[shape.l2_len :], bare(header(shape, gso_size), shape), l2=False
    ) == [piece[shape.l2_len :] for piece in got]


def bare(hdr: VnetHdr, shape: Shape) -> VnetHdr:
    """The header for the frame without its Ethernet header."""
    return VnetHdr(
        *hdr._replace(hdr_len=hdr.hdr_len - shape.l2_len, csum_start=hdr.csum_start - shape.l2_len)
    )


@pytest.mark.parametrize("flags", ["A", "PA", "FA", "FPA", "CA", "CEA", "CEFPUA", "SA", "RA", "N"])
@pytest.mark.parametrize("version", [4, 6])
def test_flags(flags: str, version: int) -> None:
    shape = Shape(version, "tcp", tcp_flags=flags)
    data = PAYLOAD[:4321]
    kinds = [header(shape, 1000)]
    kinds.append(header(shape, 1000, gso_type=kinds[0].gso_type | VnetHdr.GSO_ECN))
    for hdr in kinds:
        assert offload.segment(seeded(shape, data), hdr) == shape.segments(data, 1000)


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("payload", [0, 1, 999, 1000])
def test_a_frame_that_need_not_be_split(shape: Shape, payload: int) -> None:
    data = PAYLOAD[:payload]
    got = offload.segment(GUARD.put(seeded(shape, data)), header(shape, 1000))
    assert got == [shape.finished(data)]


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_complete(shape: Shape) -> None:
    for n in (0, 1, 2, 3, 100, 1459, 9000):
        data = PAYLOAD[:n]
        frame = seeded(shape, data)
        whole = shape.finished(data)
        assert offload.complete(GUARD.put(frame), header(shape)) == whole
        assert offload.segment(frame, header(shape)) == [whole]
        padded = offload.complete(GUARD.put(frame + b"\xff" * 7), header(shape))
        assert padded == whole + b"\xff" * 7
        assert offload.complete(frame, VnetHdr()) == frame
        assert offload.complete(frame, VnetHdr(VnetHdr.DATA_VALID)) == frame


def test_tcp_without_needs_csum_is_split_all_the_same() -> None:
    """As in the kernel, the place of the checksum follows from the frame itself."""
    shape = Shape()
    hdr = header(shape, 1000, flags=0, csum_start=0, csum_offset=0)
    data = PAYLOAD[:2500]
    assert offload.segment(shape.finished(data), hdr) == shape.segments(data, 1000)


def test_bytes_behind_the_ip_packet_are_no_payload() -> None:
    shape = Shape()
    data = PAYLOAD[:2500]
    got = offload.segment(seeded(shape, data) + b"padding", header(shape, 1000))
    assert got == shape.segments(data, 1000)


def test_frames_of_several_segments() -> None:
    shape = Shape(6, "tcp", 1, l3_options=True)
    data = PAYLOAD[:2500]
    chain = Mempool(100, 99).alloc(seeded(shape, data))
    assert chain.nb_segs > 20
    assert offload.segment(chain, header(shape, 1000)) == shape.segments(data, 1000)
    chain = Mempool(100, 99).alloc(seeded(shape, data))
    assert offload.complete(chain, header(shape)) == shape.finished(data)


def test_sequence_numbers_and_identifications_wrap() -> None:
    shape = Shape(fields={"seq": 0xFFFFFFFF})
    data = PAYLOAD[:5000]
    assert offload.segment(seeded(shape, data), header(shape, 1000)) == shape.segments(data, 1000)


# ---- published case lists

MSS = {4: 1500 - 28, 6: 1500 - 48}
MOST = {4: 65535 - 28, 6: 65535 - 48}
#: tools/testing/selftests/net/udpgso.c: payload, gso_size, full segments, bytes of the last one.
#: None where the datagram is sent unchanged.
UDPGSO = [
    ("one mss", lambda v: (MSS[v], MSS[v], 1, 0)),
    ("one mss and a byte", lambda v: (MSS[v] + 1, MSS[v], 1, 1)),
    ("two mss", lambda v: (2 * MSS[v], MSS[v], 2, 0)),
    ("two mss and a byte", lambda v: (2 * MSS[v] + 1, MSS[v], 2, 1)),
    ("most segments", lambda v: (MOST[v] // MSS[v] * MSS[v], MSS[v], MOST[v] // MSS[v], 0)),
    ("most bytes", lambda v: (MOST[v], MSS[v], MOST[v] // MSS[v], MOST[v] % MSS[v])),
    ("one byte", lambda v: (1, 1, 1, 0)),
    ("two of one byte", lambda v: (2, 1, 2, 0)),
    ("two, two and one", lambda v: (5, 2, 2, 1)),
    ("most of one byte", lambda v: (128, 1, 128, 0)),
]


@pytest.mark.parametrize(("name", "case"), UDPGSO)
@pytest.mark.parametrize("version", [4, 6])
def test_linux_udpgso(name: str, case: Any, version: int) -> None:
    payload, gso_size, full, last = case(version)
    shape = Shape(version, "udp")
    got = offload.segment(seeded(shape, PAYLOAD[:payload]), header(shape, gso_size))
    start = shape.l2_len + shape.l3_len + 8
    assert [len(piece) - start for piece in got] == [gso_size] * full + [last] * bool(last)
    assert b"".join(piece[start:] for piece in got) == PAYLOAD[:payload]


def test_linux_udpgso_one_segment_too_many() -> None:
    shape = Shape(4, "udp")
    with pytest.raises(ValueError, match="more than 128"):
        offload.segment(seeded(shape, PAYLOAD[:129]), header(shape, 1))


#: wireguard-go's cases of reads from a TUN device: lengths of the IP packets.
WIREGUARD = {
    (4, "tcp"): [152, 152],
    (6, "tcp"): [172, 172],
    (4, "udp"): [128, 128],
    (6, "udp"): [148, 148],
}


@pytest.mark.parametrize(("version", "proto"), WIREGUARD)
def test_wireguard_reads(version: int, proto: str) -> None:
    """200 bytes in segments of 100, without Ethernet. Its TCP has no options; ours has 12 bytes."""
    shape = Shape(version, proto)
    frame = seeded(shape, PAYLOAD[:200])[14:]
    got = offload.segment(frame, bare(header(shape, 100), shape), l2=False)
    assert [len(piece) for piece in got] == WIREGUARD[version, proto]
    assert [wrong_checksums(piece, l2=False) for piece in got] == [[], []]


# ---- headers that do not fit

TCP4, UDP4 = Shape(), Shape(4, "udp")
TCP6, UDP6 = Shape(6, "tcp"), Shape(6, "udp", l3_options=True)
MISFITS: list[tuple[str, Shape, dict[str, int], str]] = [
    ("hdr_len > frame", TCP4, {"hdr_len": 3067}, "hdr_len"),
    ("hdr_len 65535", UDP6, {"hdr_len": 65535}, "hdr_len"),
    ("gso_size 0", TCP4, {"gso_size": 0}, "gso_size"),
    ("gso_size 0xffff", UDP4, {"gso_size": 0xFFFF}, "gso_size"),
    ("csum_start 0", TCP4, {"csum_start": 0}, "csum_start"),
    ("csum_start past the end", TCP4, {"csum_start": 3066}, "csum_start"),
    ("csum_start 65535", UDP4, {"csum_start": 65535}, "csum_start"),
    ("csum_start in the ethernet header", TCP4, {"csum_start": 12}, "csum_start"),
    ("csum_start in the ip header", TCP4, {"csum_start": 33}, "csum_start"),
    ("csum_start in an extension header", UDP6, {"csum_start": 54}, "csum_start"),
    ("csum_start behind the tcp header", TCP4, {"csum_start": 66}, "csum_start"),
    ("csum_offset of udp for tcp", TCP4, {"csum_offset": 6}, "csum_offset"),
    ("csum_offset of tcp for udp", UDP4, {"csum_offset": 16}, "csum_offset"),
    ("csum_offset 65535", TCP6, {"csum_offset": 65535}, "csum_offset"),
    ("gso_type 2", TCP4, {"gso_type": 2}, "gso_type"),
    ("gso_type 6", TCP4, {"gso_type": 6}, "gso_type"),
    ("gso_type 0x7f", TCP4, {"gso_type": 0x7F}, "gso_type"),
    ("only the ecn bit", TCP4, {"gso_type": 0x80}, "gso_type"),
    ("udp fragmentation", UDP4, {"gso_type": 3}, "fragmentation"),
    ("tcpv6 for ipv4", TCP4, {"gso_type": VnetHdr.GSO_TCPV6}, "IP version"),
    ("tcpv4 for ipv6", TCP6, {"gso_type": VnetHdr.GSO_TCPV4}, "IP version"),
    ("tcp for udp", UDP4, {"gso_type": VnetHdr.GSO_TCPV4}, "protocol"),
    ("udp for tcp", TCP6, {"gso_type": VnetHdr.GSO_UDP_L4}, "protocol"),
    ("uso without needs_csum", UDP4, {"flags": 0}, "NEEDS_CSUM"),
    ("uso with ecn", UDP4, {"gso_type": VnetHdr.GSO_UDP_L4 | VnetHdr.GSO_ECN}, "ECN"),
    ("too many udp segments", UDP4, {"gso_size": 20}, "128"),
]


@pytest.mark.parametrize(
    ("name", "shape", "changes", "message"), MISFITS, ids=[case[0] for case in MISFITS]
)
def test_super_frame_headers_that_do_not_fit(
    name: str, shape: Shape, changes: dict[str, int], message: str
) -> None:
    frame = seeded(shape, PAYLOAD[:3000])
    if name.startswith("hdr_len >"):
        changes = {"hdr_len": len(frame) + 1}
    hdr = header(shape, 1000)
    assert len(offload.segment(frame, hdr)) == 3
    with pytest.raises(ValueError, match=message):
        offload.segment(GUARD.put(frame), VnetHdr(*hdr._replace(**changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"csum_start": 0}, "csum_start"),
        ({"csum_start": 13}, "csum_start"),
        ({"csum_start": 33}, "csum_start"),
        ({"csum_start": 66 + 10}, "csum_start"),
        ({"csum_start": 0xFFFF}, "csum_start"),
        ({"csum_offset": 66 + 10 - 34 - 1}, "csum_offset"),
        ({"csum_offset": 0xFFFF}, "csum_offset"),
        ({"hdr_len": 77}, "hdr_len"),
    ],
)
def test_partial_checksums_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    frame = seeded(TCP4, PAYLOAD[:10])
    hdr = VnetHdr(*header(TCP4)._replace(**changes))
    for call in (offload.complete, offload.segment):
        with pytest.raises(ValueError, match=message):
            call(GUARD.put(frame), hdr)


def test_complete_does_not_take_super_frames() -> None:
    with pytest.raises(ValueError, match="super-frame"):
        offload.complete(seeded(TCP4, PAYLOAD[:3000]), header(TCP4, 1000))


def cut(frame: bytes, offset: int, value: int, form: str = "!H") -> bytes:
    data = bytearray(frame)
    struct.pack_into(form, data, offset, value)
    return bytes(data)


SOUND = seeded(TCP4, PAYLOAD[:3000])
UNSOUND = {
    "a fragment": (cut(SOUND, 20, 0x2000), "fragment"),
    "a later fragment": (cut(SOUND, 20, 0x0001), "fragment"),
    "an ip length past the end": (cut(SOUND, 16, 0xFFFF), "IP packet is longer"),
    "ihl 4": (cut(SOUND, 14, 0x44, "!B"), "malformed"),
    "doff 4": (cut(SOUND, 46, 0x40, "!B"), "malformed"),
    "cut in the tcp header": (SOUND[:50], "IP packet is longer"),
    "cut in the ip header": (SOUND[:30], "malformed"),
    "no bytes": (b"", "malformed"),
    "not ip": (cut(SOUND, 12, 0x88B5), "IP version"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_frames_that_cannot_be_split(name: str) -> None:
    frame, message = UNSOUND[name]
    with pytest.raises(ValueError, match=message):
        offload.segment(GUARD.put(frame), header(TCP4, 1000, hdr_len=0))


def test_an_authenticated_packet_is_not_split() -> None:
    """The authentication data would be wrong in every piece."""
    auth = bytes([6, 4, 0, 0]) + bytes(range(20))  # 24 bytes, TCP follows
    tcp = bytes(CASES["tcp6"].packet.getlayer("TCP")) + PAYLOAD[:3000]
    frame = bytes(ETHER / IPv6(src="fd00::1", dst="fd00::2", nh=51) / (auth + tcp))
    l4 = 14 + 40 + 24
    assert offload.parse(frame).l3_len == 64
    with pytest.raises(ValueError, match="authenticated"):
        offload.segment(frame, VnetHdr(1, VnetHdr.GSO_TCPV6, 0, 1000, l4, 16))


def test_arguments() -> None:
    for call in (offload.segment, offload.complete):
        with pytest.raises(TypeError):
            call(SOUND, None)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            call("text", VnetHdr())  # type: ignore[arg-type]
    assert offload.segment(bytearray(bytes(ETHER / IP6 / DATA)), VnetHdr()) == [
        bytes(ETHER / IP6 / DATA)
    ]


# ---- anything


def attempt(frame: bytes, hdr: VnetHdr, l2: bool) -> None:
    for call in (offload.segment, offload.complete):
        with contextlib.suppress(ValueError):
            call(GUARD.put(frame), hdr, l2=l2)


FIELD = st.one_of(st.integers(0, 100), st.sampled_from([0, 1, 16, 6, 0xFFFF, 0xFFFE]))
KIND = st.sampled_from([0, 1, 3, 4, 5, 0x81, 0x84, 0x85, 2])


@pytest.mark.fuzz
@given(
    st.builds(VnetHdr, st.integers(0, 3), KIND, FIELD, FIELD, FIELD, FIELD),
    st.binary(max_size=200),
    st.booleans(),
)
def test_any_header_over_any_bytes(hdr: VnetHdr, frame: bytes, l2: bool) -> None:
    attempt(frame, hdr, l2)


@pytest.mark.fuzz
@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(0, 120), st.binary(max_size=3))))
def test_damaged_super_frames(seed: int, damage: list[tuple[int, bytes]]) -> None:
    question = Maker(seed).super_frame()
    data = bytearray(question.hdr.pack() + question.frame[:3000])
    for at, new in damage:
        data[at : at + len(new)] = new
    attempt(bytes(data[10:]), VnetHdr.unpack(data), True)


@given(st.integers(0, 2**32))
def test_payloads_survive(seed: int) -> None:
    """The pieces' payloads add up to the super-frame's, and checksums and lengths are right."""
    question = Maker(seed).super_frame()
    got = offload.segment(question.frame, question.hdr)
    found = [offload.parse(piece) for piece in got]
    starts = {headers.l2_len + headers.l3_len + headers.l4_len for headers in found}
    (start,) = starts
    assert b"".join(piece[start:] for piece in got) == question.frame[start:]
    assert {len(piece) for piece in got[:-1]} == {start + question.hdr.gso_size}
    assert all(offload.verify(piece) is ChecksumStatus.GOOD for piece in got)
