# SPDX-License-Identifier: BSD-3-Clause
"""Offloads in software: checksums and headers of frames in memory, without a device.

A frame is any object with the buffer protocol (bytes, bytearray, memoryview, a NumPy array) or an
:class:`~rtap.Mbuf`, with one or several segments. It starts with its Ethernet header, or with
``l2=False`` with its IP header, as on a TUN device. Functions named ``..._burst`` do the same for
all frames of a :class:`~rtap.Burst` in one pass without the GIL.

    from rtap import offload

    offload.checksum(b"\\x45\\x00\\x00\\x1c")
    offload.verify(frame) is offload.ChecksumStatus.GOOD
    offload.parse(frame).l4_len
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

from rtap import _offload
from rtap._frames.coalesce import Gro, coalesce_bytes
from rtap._offload import (
    checksum,
    checksum_burst,
    fill,
    fill_burst,
    gso,
    parse_burst,
    partial,
    update,
    verify_burst,
)
from rtap.ptypes import PacketType, packet_type_names
from rtap.vnethdr import TunnelVnetHdr, VnetHdr

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

__all__ = [
    "ChecksumStatus",
    "Gro",
    "Headers",
    "PacketType",
    "TunnelVnetHdr",
    "VnetHdr",
    "checksum",
    "checksum_burst",
    "coalesce",
    "complete",
    "fill",
    "fill_burst",
    "gso",
    "packet_type_names",
    "parse",
    "parse_burst",
    "partial",
    "segment",
    "update",
    "verify",
    "verify_burst",
]


class ChecksumStatus(IntEnum):
    """The state of a frame's checksums, in the sense of DPDK's ``RTE_MBUF_F_RX_*_CKSUM_*``."""

    #: Nothing to check, or it cannot be checked: no IP, no TCP or UDP, a fragment, missing bytes.
    UNKNOWN = 0
    #: A checksum is wrong.
    BAD = 1
    #: All checked checksums are right.
    GOOD = 2
    #: The frame has no checksum, as UDP over IPv4 may; or its checksum is unfinished (an mbuf from
    #: a device with checksum offload).
    NONE = 3


class Headers(NamedTuple):
    """The places of a frame's headers: lengths in bytes, 0 for missing ones.

    The lengths mean the same as in an mbuf. In a tunnel, `outer_l2_len` and `outer_l3_len` are
    those of the carrying packet, and `l2_len` reaches from the end of its IP header to the inner IP
    header (UDP and VXLAN, or GRE, and an inner Ethernet header). `l3_len` includes options and
    extension headers. `l4_len` is 0 when the header is unknown or incomplete.
    """

    #: See :class:`PacketType`.
    packet_type: int
    l2_len: int
    l3_len: int
    l4_len: int
    outer_l2_len: int
    outer_l3_len: int
    #: The (inner or outer) IP packet is a fragment, even the first one.
    fragment: bool


def parse(frame: Buffer, *, l2: bool = True) -> Headers:
    """The headers of a frame, through VLAN tags, IPv4 options, IPv6 extension headers and one
    level of VXLAN (port 4789), GRE or IP in IP.

    Raises
    ------
    ValueError
        for a malformed frame: one that ends inside a header, or whose lengths or IP versions
        contradict each other. Padding behind the IP packet, or an IP packet that claims to be
        longer than the frame, is no error.
    """
    return Headers(*_offload.parse(frame, l2))


def verify(frame: Buffer, *, l2: bool = True, layer: Literal[3, 4] | None = None) -> ChecksumStatus:
    """Check the IPv4 header checksum and that of TCP or UDP, in a tunnel those of both packets.

    `layer` 3 or 4 checks only that one. Without it the result is BAD when either is wrong, and else
    the state of layer 4. No content of a frame makes it raise.
    """
    if layer not in (None, 3, 4):
        raise ValueError(f"layer must be 3, 4 or None, got {layer!r}")
    return ChecksumStatus(_offload.verify(frame, l2, layer != 4, layer != 3))


def complete(frame: Buffer, hdr: VnetHdr | TunnelVnetHdr, *, l2: bool = True) -> bytes:
    """Return the frame with a finished checksum, if `hdr` says that it is unfinished (NEEDS_CSUM).

    Sums from csum_start to the end of the IP packet, over the pseudo-header sum in the frame,
    as the kernel does; a result of 0 is written as 0xffff. Without NEEDS_CSUM the frame is
    returned unchanged.

    Raises
    ------
    ValueError
        for a header that does not fit the frame, or describes a super-frame.
    """
    if isinstance(hdr, TunnelVnetHdr):
        if hdr.gso_type & _TUNNEL_KINDS:
            raise ValueError("the header describes a super-frame in a tunnel")
        hdr = _without_tunnel(hdr)
    return _offload.complete(frame, tuple(hdr), l2)


def segment(frame: Buffer, hdr: VnetHdr | TunnelVnetHdr, *, l2: bool = True) -> list[bytes]:
    """Splits a super-frame into frames of at most ``hdr.gso_size`` payload bytes (TSO, USO), byte
    for byte as the kernel does, all checksums written.

    TCP and UDP over both IP versions, with tags, options and extension headers. Does not rely on
    ``hdr.hdr_len`` nor on the pseudo-header sum in the frame. A frame with no more payload than
    ``gso_size``, or with GSO_NONE, stays one frame, with its checksum finished if necessary.

    With a :class:`TunnelVnetHdr` of a tunnel super-frame the inner packet is split. Each frame
    repeats everything in front of it, with outer lengths, IPv4 identification and checksum of its
    own, and an outer UDP checksum if the header has UDP_TUNNEL_CSUM.

    Raises
    ------
    ValueError
        for a header that does not fit the frame, a fragment, more than 128 UDP segments.
    """
    if isinstance(hdr, TunnelVnetHdr):
        if hdr.gso_type & _TUNNEL_KINDS:
            return _segment_tunnel(bytes(memoryview(frame)), hdr, l2)
        hdr = _without_tunnel(hdr)
    return _offload.segment(frame, tuple(hdr), l2)


_TUNNEL_KINDS = TunnelVnetHdr.GSO_UDP_TUNNEL_IPV4 | TunnelVnetHdr.GSO_UDP_TUNNEL_IPV6
_IPPROTO_UDP = 17
#: Hop-by-hop options, routing, destination options.
_EXTENSIONS = (0, 43, 60)
_ROUTING = 43


def _without_tunnel(hdr: TunnelVnetHdr) -> VnetHdr:
    """The header of a frame that is no tunnel super-frame."""
    if hdr.flags & hdr.UDP_TUNNEL_CSUM:
        raise ValueError("UDP_TUNNEL_CSUM without a tunnel in gso_type")
    return VnetHdr(*hdr[:6])


def _outer_network(frame: bytes, hdr: TunnelVnetHdr, l2: bool) -> tuple[int, bytes]:
    """Where the outer IP header is, and the addresses of the outer UDP checksum. ValueError unless
    the outer UDP header follows the IP header, at the header's outer_th_offset."""
    at = 0
    if l2:
        at = 14
        while frame[at - 2 : at] in (b"\x81\x00", b"\x88\xa8"):
            at += 4
    udp = hdr.outer_th_offset
    ipv6 = hdr.gso_type & _TUNNEL_KINDS == hdr.GSO_UDP_TUNNEL_IPV6
    if udp < at + (40 if ipv6 else 20) or udp + 8 > len(frame):
        raise ValueError(f"outer_th_offset {udp} is not behind the outer IP header")
    if l2 and frame[at - 2 : at] != (b"\x86\xdd" if ipv6 else b"\x08\x00"):
        raise ValueError("the outer ethertype is not that of gso_type's tunnel")
    if frame[at] >> 4 != (6 if ipv6 else 4):
        raise ValueError("the outer IP version is not that of gso_type's tunnel")
    if ipv6:
        protocol, end, final = frame[at + 6], at + 40, at + 24
        while protocol in _EXTENSIONS and end < udp:
            length = 8 * (frame[end + 1] + 1)
            if protocol == _ROUTING and length >= 24 and frame[end + 3]:
                # As parse_extensions: the last address of types 0 and 2, the first of a list.
                if frame[end + 2] in (0, 2):
                    final = end + 8 + (length - 8) // 16 * 16 - 16
                elif frame[end + 2] == 4:
                    final = end + 8
            protocol, end = frame[end], end + length
        addresses = frame[at + 8 : at + 24] + frame[final : final + 16]
    else:
        addresses = frame[at + 12 : at + 20]
        protocol, end = frame[at + 9], at + 4 * (frame[at] & 15)
        if frame[at + 6] & 0x3F or frame[at + 7]:
            raise ValueError("the outer packet is a fragment")
    if protocol != _IPPROTO_UDP or end != udp:
        raise ValueError(f"no outer UDP header at outer_th_offset {udp}")
    return at, addresses


def _segment_tunnel(frame: bytes, hdr: TunnelVnetHdr, l2: bool) -> list[bytes]:
    kind = hdr.gso_type & ~_TUNNEL_KINDS
    udp, inner = hdr.outer_th_offset, hdr.inner_nh_offset
    if hdr.gso_type & _TUNNEL_KINDS == _TUNNEL_KINDS:
        raise ValueError("gso_type has both kinds of tunnel")
    if not kind & ~VnetHdr.GSO_ECN:
        raise ValueError("a tunnel without segmentation in gso_type")
    network, addresses = _outer_network(frame, hdr, l2)
    if inner < udp + 8 or inner >= len(frame):
        raise ValueError(f"inner_nh_offset {inner} is not behind the outer UDP header")
    if hdr.csum_start <= inner:
        raise ValueError(f"csum_start {hdr.csum_start} is not behind the inner IP header")
    if hdr.hdr_len > len(frame):
        raise ValueError(f"hdr_len {hdr.hdr_len} is more than the frame has")
    flags = hdr.flags & ~hdr.UDP_TUNNEL_CSUM
    start = hdr.csum_start - inner
    packet = VnetHdr(flags, kind, 0, hdr.gso_size, start, hdr.csum_offset)
    pieces = _offload.segment(frame[inner:], tuple(packet), False)
    ipv4 = frame[network] >> 4 == 4
    identification = int.from_bytes(frame[network + 4 : network + 6], "big")
    frames = []
    for i, piece in enumerate(pieces):
        one = bytearray(frame[:inner] + piece)
        length, datagram = len(one) - network, len(one) - udp
        if length > 0xFFFF:
            raise ValueError(f"an outer packet of {length} bytes")
        if ipv4:
            struct.pack_into("!HH", one, network + 2, length, (identification + i) & 0xFFFF)
            struct.pack_into("!H", one, network + 10, 0)
            struct.pack_into("!H", one, network + 10, checksum(one[network:udp]))
        else:
            struct.pack_into("!H", one, network + 4, length - 40)
        struct.pack_into("!H", one, udp + 4, datagram)
        if hdr.flags & hdr.UDP_TUNNEL_CSUM:
            pseudo = addresses + struct.pack("!HH", _IPPROTO_UDP, datagram)
            struct.pack_into("!H", one, udp + 6, 0)
            struct.pack_into("!H", one, udp + 6, checksum(pseudo + one[udp:]) or 0xFFFF)
        frames.append(bytes(one))
    return frames


def coalesce(
    frames: Iterable[Buffer],
    udp: bool = False,
    *,
    fixed_id: bool = False,
    l2: bool = True,
    max_length: int = 65535,
) -> list[tuple[VnetHdr, bytes]]:
    """Software LRO over one batch: merge consecutive frames of each TCP flow.

    A super-frame has a header with NEEDS_CSUM, a `gso_type` and the size to cut it at; its L4
    checksum field holds the pseudo-header sum. A frame that was not merged is unchanged,
    with DATA_VALID if its checksum was found right. Results are in the order of the first frame of
    each; the order within a flow is kept. `udp` merges datagrams of equal size too, up to 64.
    `max_length` bounds the IP packet of a super-frame (576..65535). `fixed_id` lets IPv4 frames
    with DF repeat their ID (the kernel increments it when it splits). :class:`Gro` does this for
    bursts of mbufs, without copies and across calls.

    The rules are those of the Linux stack; docs/offload.md names the differences.
    """
    found = coalesce_bytes(list(frames), udp=udp, fixed_id=fixed_id, l2=l2, max_length=max_length)
    return [(VnetHdr(*header), frame) for header, frame in found]
