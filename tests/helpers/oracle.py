# SPDX-License-Identifier: BSD-3-Clause
"""The kernel's segmentation as the oracle for rtap's, and the frames to compare them with.

Frames are written to a TAP with virtio-net headers and read from another one on the same bridge,
which has none. So the kernel must split super-frames and finish checksums in between.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from patience import fewer, patient
from rigs import add_bridge
from support import REMOTE, Tap, eventually, ip, quiet_netns

from rtap.offload import VnetHdr

SRC = bytes.fromhex("02000000000b")
DST = bytes.fromhex("02000000000a")
TCP, UDP = 6, 17
HOPOPTS, ROUTING, DSTOPTS = 0, 43, 60
MTU = 65521
LARGEST = 65535
#: How many frames the suite tries.
SUPER_FRAMES = fewer(6000)
PARTIAL_FRAMES = fewer(3000)


def ones_sum(data: bytes) -> int:
    """The Internet checksum (RFC 1071), not complemented, without rtap's code."""
    if len(data) & 1:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass(frozen=True)
class Super:
    """A frame, its virtio-net header, and how it was made (for messages)."""

    frame: bytes
    hdr: VnetHdr
    about: str


class Maker:
    """Random frames, reproducible from a seed."""

    def __init__(self, seed: int, udp: bool = True) -> None:
        self.dice = random.Random(seed)
        #: The protocols of super-frames.
        self.protocols = [TCP, UDP] if udp else [TCP]
        self.bytes = random.Random(seed).randbytes(1 << 17)

    def data(self, n: int) -> bytes:
        start = self.dice.randrange(len(self.bytes) - n)
        return self.bytes[start : start + n]

    def tags(self) -> tuple[bytes, bytes]:
        """The first ethertype, and the rest of the VLAN tags without the last ethertype."""
        tci = struct.pack("!H", self.dice.randrange(1, 4095) | self.dice.randrange(8) << 13)
        kind = self.dice.choice(["", "", "vlan", "qinq", "double"])
        if kind == "vlan":
            return b"\x81\x00", tci
        if kind == "qinq":
            return b"\x88\xa8", tci + b"\x81\x00" + tci
        if kind == "double":
            return b"\x81\x00", tci + b"\x81\x00" + tci
        return b"", b""

    def extensions(self, last: int, destination: bytes) -> tuple[int, bytes, bytes]:
        """The first next-header value, the headers, and the pseudo-header's destination."""
        dice = self.dice
        kinds = dice.choice([[], [], [DSTOPTS], [HOPOPTS], [HOPOPTS, ROUTING, DSTOPTS], [ROUTING]])
        out, final = b"", destination
        for i, kind in enumerate(kinds):
            after = kinds[i + 1] if i + 1 < len(kinds) else last
            if kind == ROUTING:
                segments = dice.randrange(1, 4)
                addresses = self.data(16 * segments)
                left = dice.randrange(segments)
                if left:
                    final = addresses[:16]
                out += bytes([after, 2 * segments, 4, left, segments - 1, 0, 0, 0]) + addresses
            else:
                n = dice.choice([6, 6, 14, 30])  # one PadN option
                out += bytes([after, (n + 2) // 8 - 1, 1, n - 2]) + bytes(n - 2)
        return kinds[0] if kinds else last, out, final

    def network(self, version: int, protocol: int, l4_len: int) -> tuple[bytes, int]:
        """An IP header for `l4_len` bytes, and the sum of the pseudo-header."""
        dice = self.dice
        if version == 4:
            options = self.ip_options()
            head = struct.pack(
                "!BBHHHBBH",
                0x45 + len(options) // 4,
                dice.randrange(256),
                20 + len(options) + l4_len,
                dice.choice([0, 0xFFFE, dice.randrange(65536)]),
                dice.choice([0, 0x4000]),
                dice.randrange(1, 256),
                protocol,
                0,
            )
            addresses = b"\x0a" + self.data(3) + b"\x0a" + self.data(3)
            head += addresses + options
            checksum = ones_sum(head) ^ 0xFFFF
            head = head[:10] + struct.pack("!H", checksum) + head[12:]
            return head, ones_sum(addresses + struct.pack("!HH", protocol, l4_len))
        source, destination = b"\xfd" + self.data(15), b"\xfd" + self.data(15)
        first, extensions, final = self.extensions(protocol, destination)
        head = struct.pack(
            "!IHBB",
            6 << 28 | dice.randrange(1 << 28),
            len(extensions) + l4_len,
            first,
            dice.randrange(1, 256),
        )
        pseudo = source + final + struct.pack("!IHH", l4_len, 0, protocol)
        return head + source + destination + extensions, ones_sum(pseudo)

    def ip_options(self) -> bytes:
        n = self.dice.choice([0, 0, 0, 4, 12, 40])
        return b"\x01" * n

    def transport(self, protocol: int, payload: int) -> bytes:
        """A TCP or UDP header whose checksum is 0."""
        dice = self.dice
        if protocol == UDP:
            return struct.pack("!HHHH", dice.randrange(65536), 53, 8 + payload, 0)
        options = self.data(4 * dice.choice([0, 3, 3, dice.randrange(11)]))
        return (
            struct.pack(
                "!HHIIHHHH",
                dice.randrange(65536),
                dice.randrange(65536),
                dice.choice([0xFFFFFFF0, dice.randrange(1 << 32)]),
                dice.randrange(1 << 32),
                (5 + len(options) // 4) << 12 | dice.randrange(512),  # every flag, NS too
                dice.randrange(65536),
                0,
                dice.randrange(65536),
            )
            + options
        )

    def frame(self, version: int, protocol: int, payload: int) -> tuple[bytes, int, int]:
        """A frame with the pseudo-header's sum as checksum, and where L4 and payload start."""
        l4 = self.transport(protocol, payload)
        network, seed = self.network(version, protocol, len(l4) + payload)
        at = 6 if protocol == UDP else 16
        l4 = l4[:at] + struct.pack("!H", seed) + l4[at + 2 :]
        before, tags = self.tags()
        ethertype = b"\x08\x00" if version == 4 else b"\x86\xdd"
        head = DST + SRC + before + tags + ethertype + network
        return head + l4 + self.data(payload), len(head), len(head) + len(l4)

    def super_frame(self) -> Super:
        dice = self.dice
        version, protocol = dice.choice([4, 6]), dice.choice(self.protocols)
        count = dice.choice([2, 2, 3, 7, dice.randrange(2, 45)])
        room = LARGEST - 400
        gso_size = min(
            dice.choice([1, 536, 1000, 1220, 1448, 1460, 8948, dice.randrange(1, 9000)]),
            room // count,
        )
        # More than gso_size and the longest options: with less, the kernel drops the frame or does
        # not take it for a super-frame.
        least = gso_size + 41
        payload = max(least, (count - 1) * gso_size + dice.choice([1, gso_size, 1, gso_size // 2]))
        frame, l4, start = self.frame(version, protocol, payload)
        if protocol == UDP and -(-payload // gso_size) > 128:
            return self.super_frame()
        kind = VnetHdr.GSO_UDP_L4
        if protocol == TCP:
            kind = VnetHdr.GSO_TCPV4 if version == 4 else VnetHdr.GSO_TCPV6
            kind |= dice.choice([0, 0, VnetHdr.GSO_ECN])
        hdr_len = dice.choice([start, 0, l4, len(frame)])  # only a hint, which may be wrong
        hdr = VnetHdr(1, kind, hdr_len, gso_size, l4, 6 if protocol == UDP else 16)
        return Super(frame, hdr, f"IPv{version}, protocol {protocol}, {payload} bytes, {hdr}")

    def partial_frame(self) -> Super:
        """A plain frame with an unfinished checksum, sometimes padded."""
        dice = self.dice
        version, protocol = dice.choice([4, 6]), dice.choice([TCP, UDP])
        payload = dice.choice([0, 1, 2, 17, 64, 1400, dice.randrange(1, 9000), dice.randrange(64)])
        frame, l4, start = self.frame(version, protocol, payload)
        hdr = VnetHdr(1, 0, dice.choice([start, 0]), 0, l4, 6 if protocol == UDP else 16)
        if len(frame) < 60 and dice.randrange(2):
            frame = frame.ljust(60, b"\0")
        return Super(frame, hdr, f"IPv{version}, protocol {protocol}, {payload} bytes, {hdr}")


class Oracle:
    """Writes to `a`, and reads from `b` what the kernel made of it."""

    def __init__(self, a: Tap, b: Tap) -> None:
        self.a, self.b = a, b
        os.set_blocking(b.fd, False)
        self.patience = patient(0.05)
        probe = Super(DST + SRC + b"\x88\xb5" + bytes(46), VnetHdr(), "probe")
        # The bridge starts to forward a moment after its ports are up.
        eventually(lambda: self.ask(probe, 1) == [probe.frame], "a frame over the bridge")
        self.least_tcp = self._least_tcp()
        self.patience = patient(5)

    def _least_tcp(self) -> int:
        """The segment size that this kernel takes instead of a smaller one, of TCP: newer ones take
        8 (TCP_MIN_GSO_SIZE of net/tcp.h), and others take what they get."""
        maker = Maker(1)
        frame, l4, start = maker.frame(6, TCP, 42)
        hdr = VnetHdr(1, VnetHdr.GSO_TCPV6, start, 1, l4, 16)
        got = self.ask(Super(frame, hdr, "42 segments of a byte"), 42)
        return max(len(one) for one in got) - start

    def as_taken(self, hdr: VnetHdr) -> VnetHdr:
        """The header of a super-frame as this kernel takes it."""
        if hdr.gso_type in (VnetHdr.GSO_NONE, VnetHdr.GSO_UDP_L4):
            return hdr
        return hdr._replace(gso_size=max(hdr.gso_size, self.least_tcp))

    def ask(self, question: Super, expected: int) -> list[bytes]:
        """What the kernel makes of a frame: `expected` frames, or those that come in time."""
        os.write(self.a.fd, question.hdr.pack() + question.frame)
        got: list[bytes] = []
        while True:
            with contextlib.suppress(BlockingIOError):
                while True:
                    got.append(os.read(self.b.fd, 1 << 17))
            if len(got) >= expected or not select.select([self.b.fd], [], [], self.patience)[0]:
                return got


@contextlib.contextmanager
def oracle() -> Iterator[Oracle]:
    """Two TAPs on a bridge in a namespace of their own."""
    with (
        quiet_netns() as ns,
        Tap(ns, "a0", mtu=MTU) as a,
        Tap(ns, "b0", mtu=MTU, vnet_hdr=False, mac=REMOTE) as b,
    ):
        add_bridge(ns)
        ip(ns, "link", "set", "b0", "txqueuelen", "5000")
        for name in ("a0", "b0"):
            ip(ns, "link", "set", name, "master", "br0")
        yield Oracle(a, b)
