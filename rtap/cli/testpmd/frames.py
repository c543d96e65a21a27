# SPDX-License-Identifier: BSD-3-Clause
"""The headers of the frames that txonly and flowgen make: UDP over IPv4, with a right IPv4
checksum.

Addresses are those of RFC 2544 (198.18.0.0/15) for txonly, and from 10.253.0.0/16 on for flowgen.
The UDP checksum is zero, which means that there is none (RFC 768).
"""

from __future__ import annotations

import struct

from rtap.cli.testpmd.modes import Ends
from rtap.ether import MacAddr

__all__ = ["FLOWGEN", "TXONLY", "Flow", "header"]

UDP = 17


class Flow(tuple[bytes, bytes, int, int]):
    """Source and destination address, source and destination port."""

    __slots__ = ()


TXONLY = Flow((bytes((198, 18, 0, 1)), bytes((198, 18, 0, 2)), 9, 9))
FLOWGEN = Flow((bytes((10, 254, 0, 0)), bytes((10, 253, 0, 0)), 1000, 1001))


def _ones_complement(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def header(ends: Ends, flow: Flow, length: int) -> bytes:
    """The 42 bytes in front of the payload of a frame of `length` bytes."""
    source, destination, source_port, destination_port = flow
    ethernet = bytes(MacAddr(ends.destination)) + bytes(MacAddr(ends.source)) + b"\x08\x00"
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, length - 14, 0, 0, 64, UDP, 0, source, destination)
    ip = ip[:10] + struct.pack("!H", _ones_complement(ip)) + ip[12:]
    udp = struct.pack("!HHHH", source_port, destination_port, length - 34, 0)
    return ethernet + ip + udp
