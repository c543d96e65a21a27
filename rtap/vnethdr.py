# SPDX-License-Identifier: BSD-3-Clause
"""The virtio-net header as a value."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = ["VnetHdr"]

_LAYOUT = struct.Struct("<BBHHHH")


class VnetHdr(NamedTuple):
    """``struct virtio_net_hdr`` of ``linux/virtio_net.h``, 10 bytes, little-endian.

    `flags` is NEEDS_CSUM (1: the checksum of the bytes from `csum_start` on is to be written
    `csum_offset` bytes behind it) or DATA_VALID (2: it was found right). `gso_type` says what the
    frame is to be cut into: nothing (0), TCP over IPv4 (1) or IPv6 (4), UDP datagrams (5), with
    0x80 for ECN; `gso_size` how many bytes of payload each piece has; `hdr_len` how long the
    headers are.
    """

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def pack(self) -> bytes:
        """The 10 bytes; ValueError when a number does not fit its field."""
        try:
            return _LAYOUT.pack(*self)
        except struct.error as exc:
            raise ValueError(f"{self!r} does not fit a virtio-net header: {exc}") from None

    @classmethod
    def unpack(cls, buf: Buffer) -> Self:
        """From the first 10 bytes of `buf`; ValueError when there are fewer."""
        try:
            return cls(*_LAYOUT.unpack_from(buf))
        except struct.error:
            raise ValueError(
                f"a virtio-net header has {_LAYOUT.size} bytes, got {len(memoryview(buf))}"
            ) from None
