# SPDX-License-Identifier: BSD-3-Clause
"""The virtio-net header as a value."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = ["TunnelVnetHdr", "VnetHdr"]

_LAYOUT = struct.Struct("<BBHHHH")
#: Then num_buffers, the hash, its kind and padding (all 0 here), and the two offsets.
_TUNNEL_LAYOUT = struct.Struct("<BBHHHHHIHHHH")


class _VnetFields(NamedTuple):
    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0


class VnetHdr(_VnetFields):
    """The virtio-net header of a frame (``struct virtio_net_hdr`` of linux/virtio_net.h).

    With ``flags & NEEDS_CSUM`` the checksum at ``csum_start + csum_offset`` is the sum of the
    pseudo-header, and has to be finished over all bytes from ``csum_start`` on; with ``DATA_VALID``
    the checksum was found right. A ``gso_type`` other than ``GSO_NONE`` makes the frame a
    super-frame, to be split into frames of ``gso_size`` payload bytes: ``GSO_TCPV4``,
    ``GSO_TCPV6``, ``GSO_UDP_L4`` (datagrams of one size) or ``GSO_UDP`` (IP fragments, no longer in
    use), with ``GSO_ECN`` if the first has CWR. ``hdr_len``, the bytes of the headers, is a hint.
    All lengths are in bytes; the packed header has ``SIZE``. ValueError for a field that is out of
    range.
    """

    __slots__ = ()

    NEEDS_CSUM: ClassVar[int] = 1
    DATA_VALID: ClassVar[int] = 2
    GSO_NONE: ClassVar[int] = 0
    GSO_TCPV4: ClassVar[int] = 1
    GSO_UDP: ClassVar[int] = 3
    GSO_TCPV6: ClassVar[int] = 4
    GSO_UDP_L4: ClassVar[int] = 5
    GSO_ECN: ClassVar[int] = 0x80
    #: Bytes of the packed header.
    SIZE: ClassVar[int] = _LAYOUT.size

    def __new__(
        cls,
        flags: int = 0,
        gso_type: int = 0,
        hdr_len: int = 0,
        gso_size: int = 0,
        csum_start: int = 0,
        csum_offset: int = 0,
    ) -> Self:
        self = super().__new__(cls, flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)
        for i, (name, value) in enumerate(zip(cls._fields, self, strict=True)):
            if not 0 <= value <= (0xFF if i < 2 else 0xFFFF):
                raise ValueError(f"{name} of a virtio-net header is out of range: {value}")
        return self

    def pack(self) -> bytes:
        """The ten bytes, little-endian, as on rtap's TAP descriptors (TUNSETVNETLE)."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, buf: Buffer) -> Self:
        """From the first ten bytes of a buffer; ValueError when there are fewer."""
        view = memoryview(buf)
        if view.nbytes < cls.SIZE:
            raise ValueError(f"a virtio-net header has {cls.SIZE} bytes, got {view.nbytes}")
        return cls(*_LAYOUT.unpack_from(view))


class _TunnelFields(NamedTuple):
    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    outer_th_offset: int = 0
    inner_nh_offset: int = 0


class TunnelVnetHdr(_TunnelFields):
    """The virtio-net header of a frame that may be a super-frame inside a UDP tunnel
    (``struct virtio_net_hdr_v1_hash_tunnel``, Linux 6.17).

    ``flags``, ``gso_type``, ``hdr_len``, ``gso_size``, ``csum_start`` and ``csum_offset`` are as in
    :class:`VnetHdr`, of the inner packet. A tunnel super-frame has ``GSO_UDP_TUNNEL_IPV4`` or
    ``GSO_UDP_TUNNEL_IPV6`` (the outer packet's version) beside its ``gso_type``, and
    ``UDP_TUNNEL_CSUM`` in its flags if the outer UDP checksum is to be computed.
    ``outer_th_offset`` is where the outer UDP header begins, ``inner_nh_offset`` where the inner IP
    header does, in bytes. The packed header has ``SIZE`` bytes. ValueError for a field that is out
    of range.
    """

    __slots__ = ()

    UDP_TUNNEL_CSUM: ClassVar[int] = 8
    GSO_UDP_TUNNEL_IPV4: ClassVar[int] = 0x20
    GSO_UDP_TUNNEL_IPV6: ClassVar[int] = 0x40
    #: Bytes of the packed header.
    SIZE: ClassVar[int] = _TUNNEL_LAYOUT.size

    def __new__(
        cls,
        flags: int = 0,
        gso_type: int = 0,
        hdr_len: int = 0,
        gso_size: int = 0,
        csum_start: int = 0,
        csum_offset: int = 0,
        outer_th_offset: int = 0,
        inner_nh_offset: int = 0,
    ) -> Self:
        inner = VnetHdr(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)
        for name, value in (
            ("outer_th_offset", outer_th_offset),
            ("inner_nh_offset", inner_nh_offset),
        ):
            if not 0 <= value <= 0xFFFF:
                raise ValueError(f"{name} of a virtio-net header is out of range: {value}")
        return super().__new__(cls, *inner, outer_th_offset, inner_nh_offset)

    def pack(self) -> bytes:
        """The 24 bytes, little-endian."""
        return _TUNNEL_LAYOUT.pack(*self[:6], 0, 0, 0, 0, *self[6:])

    @classmethod
    def unpack(cls, buf: Buffer) -> Self:
        """From the first 24 bytes of a buffer; ValueError when there are fewer."""
        view = memoryview(buf)
        if view.nbytes < cls.SIZE:
            raise ValueError(
                f"a tunnel's virtio-net header has {cls.SIZE} bytes, got {view.nbytes}"
            )
        fields = _TUNNEL_LAYOUT.unpack_from(view)
        return cls(*fields[:6], *fields[10:])
