# SPDX-License-Identifier: BSD-3-Clause
"""UDP frames of many flows, which the kernel spreads over the queues of a device."""

from __future__ import annotations

import struct

from support import LOCAL, REMOTE


def flow(n: int, back: bool = False, dst: bytes = LOCAL) -> bytes:
    """A UDP frame of flow `n`, or of its reverse direction, to an Ethernet address."""
    ends = [bytes((10, 0, n >> 8, n & 0xFF)), bytes((10, 1, 0, 1))]
    ports = [1024 + n, 7]
    if back:
        ends.reverse()
        ports.reverse()
    udp = struct.pack("!HHHH", *ports, 8 + 18, 0) + struct.pack("!Q", n).ljust(18, b"\0")
    total = 20 + len(udp)
    head = struct.pack("!BBHHHBBH", 0x45, 0, total, n, 0, 64, 17, 0) + ends[0] + ends[1]
    return dst + REMOTE + b"\x08\x00" + head + udp


def flow_of(data: bytes) -> int:
    """The flow number that :func:`flow` put into the frame."""
    number: int = struct.unpack_from("!Q", data, 42)[0]
    return number
