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
from rtap.vnethdr import VnetHdr

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

__all__ = [
    "ChecksumStatus",
    "Gro",
    "Headers",
    "PacketType",
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


def complete(frame: Buffer, hdr: VnetHdr, *, l2: bool = True) -> bytes:
    """Return the frame with a finished checksum, if `hdr` says that it is unfinished (NEEDS_CSUM).

    Sums from csum_start to the end of the IP packet, over the pseudo-header sum in the frame,
    as the kernel does; a result of 0 is written as 0xffff. Without NEEDS_CSUM the frame is
    returned unchanged.

    Raises
    ------
    ValueError
        for a header that does not fit the frame, or describes a super-frame.
    """
    return _offload.complete(frame, tuple(hdr), l2)


def segment(frame: Buffer, hdr: VnetHdr, *, l2: bool = True) -> list[bytes]:
    """Splits a super-frame into frames of at most ``hdr.gso_size`` payload bytes (TSO, USO), byte
    for byte as the kernel does, all checksums written.

    TCP and UDP over both IP versions, with tags, options and extension headers. Does not rely on
    ``hdr.hdr_len`` nor on the pseudo-header sum in the frame. A frame with no more payload than
    ``gso_size``, or with GSO_NONE, stays one frame, with its checksum finished if necessary.

    Raises
    ------
    ValueError
        for a header that does not fit the frame, a fragment, more than 128 UDP segments.
    """
    return _offload.segment(frame, tuple(hdr), l2)


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
