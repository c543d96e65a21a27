# SPDX-License-Identifier: BSD-3-Clause
"""Frames of every kind, with their virtio-net headers."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from support import LOCAL, REMOTE, Tap, pattern
from this_kernel import skip_without_uso

from rtap.control import tun
from rtap.control.tun import TunFeature

# linux/virtio_net.h
NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 4, 5, 0x80

OFFLOADS = TunFeature.CSUM | TunFeature.TSO4 | TunFeature.TSO6 | TunFeature.TSO_ECN
USO = TunFeature.USO4 | TunFeature.USO6
MAX_SUPER_FRAME = 65535 + 40 + 22
ROOMS = {"single": MAX_SUPER_FRAME + 1, "chains": 2048, "short": 120}


def rfc1071(data: bytes, total: int = 0) -> int:
    if len(data) % 2:
        data += b"\0"
    total += sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass(frozen=True)
class Shape:
    """A frame and its virtio-net header."""

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
        # Unfinished: only the pseudo-header's sum, not complemented.
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
    # The kernel itself splits a frame of 65536 bytes or more, Ethernet header included.
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


def offload(tap: Tap, features: TunFeature) -> None:
    if features & USO:
        skip_without_uso()
    assert tun.set_offload(tap.fd, features, tap.name) == features
