# SPDX-License-Identifier: BSD-3-Clause
"""Makes frames for the wire fuzzer, and judges what comes out.

Most frames are *tracked*: TCP or UDP whose payload repeats one of 64 words of eight bytes. In a TCP
segment the words are aligned to the sequence number. So :func:`look` can check the bytes and
checksums of each frame that comes out, even after it was merged, split, tagged or sent back.
Frames that are damaged, or that carry a hostile header or request, repeat other words and are not
checked.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace

from rtap import MbufFlag
from rtap.offload import VnetHdr

TCP, UDP = 6, 17
TAGS = (0x8100, 0x88A8)
MARK = b"\xa5\x5a"
WORDS = [MARK + bytes([n, n ^ 0x3C, 0x11, n ^ 0x47, 0x66, 0x09]) for n in range(64)]
OTHERS = [b"\xee\x11" + word[2:] for word in WORDS]
#: Addresses between which a VLAN-aware bridge, a host and a router would pass frames.
MAC_A, MAC_B = bytes.fromhex("020000000b0a"), bytes.fromhex("020000000b0b")
GROUPS = (b"\xff" * 6, bytes.fromhex("01005e000001"), bytes.fromhex("333300000001"))
ODD = (0, 1, 2, 7, 8, 13, 14, 19, 20, 33, 34, 39, 40, 54, 60, 255, 1460, 32767, 65534, 65535)


#: A virtio-net header with no flag and no segmentation.
NOTHING = VnetHdr()


@dataclass(frozen=True)
class Template:
    """A frame, with its virtio-net header for the kernel's side and its TX request for rtap's."""

    data: bytes
    header: VnetHdr = NOTHING
    flags: int = 0
    l2_len: int = 0
    l3_len: int = 0
    l4_len: int = 0
    tso_segsz: int = 0
    vlan_tci: int = 0


def total(data: bytes) -> int:
    """The ones' complement sum of 16-bit words, modulo 65535."""
    return int.from_bytes(data + bytes(len(data) & 1), "big") % 0xFFFF


def checksum(data: bytes) -> bytes:
    return (0xFFFF - total(data)).to_bytes(2, "big")


def pseudo(addresses: bytes, proto: int, length: int) -> bytes:
    return addresses + struct.pack("!IHBB", length, 0, 0, proto)


def flow_of(n: int, version: int, tracked: bool) -> bytes:
    """Source and destination address of flow ``n``."""
    net = 9 if tracked else 66
    if version == 4:
        return bytes([10, net, 0, n + 1, 10, net, 1, n + 1])
    return b"".join(bytes([0xFD, net, *bytes(13), n + 1 + side * 128]) for side in range(2))


@dataclass
class Shape:
    """How the frames of a flow are built."""

    n: int
    version: int = 4
    proto: int = TCP
    tags: int = 0
    options: bool = False
    tracked: bool = True
    l2: bool = True
    partial: bool = False  # the checksum is unfinished

    @property
    def head(self) -> int:
        return 14 + 4 * self.tags if self.l2 else 0

    @property
    def l3_len(self) -> int:
        return (28 if self.options else 20) if self.version == 4 else (48 if self.options else 40)

    @property
    def l4_len(self) -> int:
        return 32 if self.proto == TCP else 8

    def payload(self, seq: int, length: int) -> bytes:
        word = (WORDS if self.tracked else OTHERS)[self.n]
        return (word * (length // 8 + 2))[seq % 8 : seq % 8 + length]

    def frame(self, seq: int, length: int, ident: int = 0, flags: int = 0x10) -> bytes:
        ports = struct.pack("!HH", 40000 + self.n, 50000 + self.n)
        if self.proto == TCP:
            body = ports + struct.pack("!IIBBHHH", seq, 7, 0x80, flags, 500, 0, 0)
            body += b"\x01\x01\x08\x0a" + struct.pack("!II", 1, 2) + self.payload(seq, length)
        else:
            body = ports + struct.pack("!HH", (8 + length) & 0xFFFF, 0) + self.payload(0, length)
        addresses = flow_of(self.n, self.version, self.tracked)
        at = 16 if self.proto == TCP else 6
        sums = pseudo(addresses, self.proto, len(body))
        value = total(sums).to_bytes(2, "big") if self.partial else checksum(sums + body)
        if self.proto == UDP and value == b"\0\0":
            value = b"\xff\xff"
        body = body[:at] + value + body[at + 2 :]
        return self.ethernet() + self.network(addresses, body, ident) + body

    def ethernet(self) -> bytes:
        if not self.l2:
            return b""
        tags = b"".join(
            struct.pack("!HH", TAGS[self.tags > t + 1], 7 + t) for t in range(self.tags)
        )
        return MAC_A + MAC_B + tags + (b"\x08\x00" if self.version == 4 else b"\x86\xdd")

    def network(self, addresses: bytes, body: bytes, ident: int, where: int = 0x4000) -> bytes:
        if self.version == 4:
            size = self.l3_len
            head = struct.pack("!BBHHHBB", 0x40 | size // 4, 0, (size + len(body)) & 0xFFFF,
                               ident & 0xFFFF, where, 64, self.proto)  # fmt: skip
            rest = addresses + b"\x01" * (size - 20)
            return head + checksum(head + rest) + rest
        ext = struct.pack("!BBBB", self.proto, 0, 1, 4) + bytes(4) if self.options else b""
        following = 60 if ext else self.proto
        size = (len(ext) + len(body)) & 0xFFFF
        return struct.pack("!IHBB", 6 << 28, size, following, 64) + addresses + ext

    def request(self, seq: int, length: int, segsz: int = 0) -> Template:
        """The frame with a TX request to finish its checksum, or to split it."""
        tcp = self.proto == TCP
        flags = MbufFlag.TX_TCP_CKSUM if tcp else MbufFlag.TX_UDP_CKSUM
        if segsz:
            flags |= MbufFlag.TX_TCP_SEG if tcp else MbufFlag.TX_UDP_SEG
        version4 = MbufFlag.TX_IPV4 | MbufFlag.TX_IP_CKSUM
        flags |= version4 if self.version == 4 else MbufFlag.TX_IPV6
        data = self.frame(seq, length, 9)
        lens = (self.head, self.l3_len, self.l4_len)
        return Template(data, VnetHdr(), int(flags), *lens, segsz)

    def header(self, segsz: int = 0) -> VnetHdr:
        """The same request as a virtio-net header, for the kernel's side."""
        kinds = {(4, TCP): VnetHdr.GSO_TCPV4, (6, TCP): VnetHdr.GSO_TCPV6}
        kind = kinds.get((self.version, self.proto), VnetHdr.GSO_UDP_L4) if segsz else 0
        start = self.head + self.l3_len
        at = 16 if self.proto == TCP else 6
        return VnetHdr(VnetHdr.NEEDS_CSUM, kind, start + self.l4_len, segsz, start, at)


class Frames:
    """Draws frames of all kinds that fit a device's mode and MTU."""

    def __init__(self, r: random.Random, l2: bool, mtu: int) -> None:
        self.r, self.l2, self.mtu = r, l2, mtu

    def shape(self, tracked: bool = True, partial: bool = False) -> Shape:
        r = self.r
        return Shape(
            r.randrange(64),
            r.choice([4, 4, 6]),
            r.choice([TCP, TCP, UDP]),
            r.choice([0, 0, 0, 1, 2]),
            r.random() < 0.2,
            tracked,
            self.l2,
            partial,
        )

    def room(self, shape: Shape) -> int:
        """The payload bytes that fit into one frame of this MTU."""
        return self.mtu - 4 * shape.tags - shape.l3_len - shape.l4_len

    def length(self, room: int) -> int:
        r = self.r
        return max(0, r.choice([r.randrange(0, 64), r.randrange(0, room), room, room - 1, 8]))

    def plain(self, tracked: bool = True) -> list[Template]:
        """One frame, or several of one flow in a row."""
        r, shape = self.r, self.shape(tracked)
        seq, ident = r.randrange(1 << 32), r.randrange(1 << 16)
        length = self.length(self.room(shape))
        if r.random() < 0.5:
            flags = r.choice([0x10, 0x10, 0x18, 0x11, 0x02, 0x14, 0x90, 0x50, 0x30])
            return [Template(shape.frame(seq, length, ident, flags))]
        out = []
        for n in range(r.randrange(2, 24)):
            out.append(Template(shape.frame(seq & 0xFFFFFFFF, length, ident + n)))
            seq += length
            if r.random() < 0.1:
                length = self.length(self.room(shape))
        return out

    def super_shape(self, tracked: bool = True) -> tuple[Shape, int, int]:
        """The shape, payload and segment size of a super-frame."""
        r, shape = self.r, self.shape(tracked, partial=True)
        most = 65535 - shape.l3_len - shape.l4_len
        segsz = r.choice(
            [r.randrange(8, self.room(shape)), self.room(shape), min(536, self.room(shape))]
        )
        if shape.proto == UDP:
            most = min(most, 100 * segsz)
        return shape, r.choice([r.randrange(segsz, most), 2 * segsz, most, segsz + 1]), segsz

    def super_frame(self) -> Template:
        shape, length, segsz = self.super_shape()
        return Template(shape.frame(self.r.randrange(1 << 32), length), shape.header(segsz))

    def unfinished(self) -> Template:
        shape = self.shape(partial=True)
        return Template(shape.frame(5, self.length(self.room(shape))), shape.header())

    def other(self) -> bytes:
        """Valid frames that are not tracked."""
        r = self.r
        shape = replace(self.shape(False), options=False)
        inner = replace(shape, l2=False, tags=0)
        data = inner.frame(r.randrange(1 << 32), self.length(max(self.mtu - 200, 60)))
        kind = r.randrange(7)
        addresses = flow_of(shape.n, shape.version, False)
        if kind == 0 and shape.version == 4:  # fragments
            where = r.choice([0x2000, 0x2064, 0x0064])
            cut = data[20 : 20 + max(8, len(data) // 16 * 8)]
            return shape.ethernet() + shape.network(addresses, cut, 3, where) + cut
        if kind == 1 and shape.version == 6:
            frag = struct.pack("!BBHI", shape.proto, 0, r.choice([0, 1, 801]), 5)
            return shape.ethernet() + replace(shape, proto=44).network(
                addresses, frag + data[40:], 0
            ) + frag + data[40:]  # fmt: skip
        if kind == 2:  # echo request
            proto = 1 if shape.version == 4 else 58
            body = bytes([8 if proto == 1 else 128, 0, 0, 0, 0, 1, 0, 1]) + bytes(r.randrange(64))
            sums = body if proto == 1 else pseudo(addresses, proto, len(body)) + body
            body = body[:2] + checksum(sums) + body[4:]
            return shape.ethernet() + replace(shape, proto=proto).network(addresses, body, 1) + body
        if kind == 3:  # IP in IP, GRE
            proto, more = r.choice([(4 if shape.version == 4 else 41, b""), (47, b"")])
            if proto == 47:
                more = b"\0\0" + (b"\x08\0" if shape.version == 4 else b"\x86\xdd")
            outer = replace(shape, proto=proto)
            return shape.ethernet() + outer.network(addresses, more + data, 1) + more + data
        if kind == 4:  # VXLAN
            frame = b"\x08\0\0\0\0\0\5\0" + replace(inner, l2=True).ethernet() + data
            udp = struct.pack("!HHHH", 4000, 4789, 8 + len(frame), 0) + frame
            return shape.ethernet() + replace(shape, proto=UDP).network(addresses, udp, 1) + udp
        if not self.l2:
            return data
        if kind == 5:
            arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + MAC_B + bytes([10, 66, 0, 1])
            return GROUPS[0] + MAC_B + b"\x08\x06" + arp + bytes(6) + bytes([10, 66, 0, 2])
        return r.choice(GROUPS) + MAC_B + r.choice([b"\x88\xb5", b"\x08\0", b"\0\x20"]) + data

    def damaged(self) -> bytes:
        """A frame with wrong bytes, a wrong length or a wrong end; or random bytes."""
        r = self.r
        data = bytearray(self.other() if r.random() < 0.5 else self.plain(False)[0].data)
        for _ in range(r.randrange(4)):
            at = r.randrange(min(len(data), r.choice([14, 40, 80, 2000])))
            data[at] = r.choice([0, 1, 0x45, 0x60, 0x7F, 0xFF, r.randrange(256)])
        how = r.random()
        if how < 0.3:
            del data[r.choice([r.randrange(1, 70), r.randrange(1, len(data) + 1)]) :]
        elif how < 0.4:
            data += bytes(r.randrange(1, 50))
        elif how < 0.5:
            data = bytearray(r.randbytes(r.choice([1, 14, 20, 60, 300])))
        if len(data) < 15 and r.random() < 0.9:
            data += bytes(15)  # a packet socket rejects a frame without an Ethernet header
        return bytes(data[: self.mtu + 14 * self.l2]).replace(MARK, b"\xee\x11")

    def hostile_header(self, data: bytes) -> VnetHdr:
        r = self.r

        def n() -> int:
            return r.choice([r.choice(ODD), r.randrange(80), r.randrange(len(data) + 1)]) & 0xFFFF

        good = self.shape(False).header(r.choice([0, 1, 100, 1400]))
        if r.random() < 0.6:
            field = r.choice(["flags", "gso_type", "hdr_len", "gso_size", "csum_start"])
            return good._replace(**{field: n() & (0xFF if field in ("flags", "gso_type") else -1)})
        kind = r.choice([0, 1, 3, 4, 5, 0x81, 0x84, 0x85, n() & 0xFF])
        return VnetHdr(r.choice([0, 1, 1, 2, 3]), kind, n(), n(), n(), r.choice([6, 16, n()]))

    def from_kernel(self, hostile: float, vnet: bool) -> list[Template]:
        """Templates that a packet socket sends next."""
        r = self.r
        if r.random() < hostile:
            if vnet and r.random() < 0.5:
                shape, length, _ = self.super_shape(False)
                data = r.choice([self.damaged(), shape.frame(3, length)])
                return [Template(data, self.hostile_header(data))]
            return [Template(self.damaged() if r.random() < 0.7 else self.other())]
        if vnet and r.random() < 0.4:
            return [r.choice([self.super_frame, self.unfinished])()]
        return self.plain()

    def hostile_request(self) -> Template:
        r = self.r
        shape, length, segsz = self.super_shape(False)
        base = shape.request(r.randrange(1 << 32), min(length, 9000), r.choice([0, segsz]))
        data = r.choice([base.data, base.data, self.damaged()])
        flags = r.choice([base.flags, base.flags ^ int(r.choice(list(MbufFlag)))])
        if r.random() < 0.2:
            flags = int(r.choice(list(MbufFlag)) | r.choice(list(MbufFlag)))

        def n(right: int) -> int:
            return r.choice([right, right, right, r.choice([0, 1, 13, 14, 20, 60, 127])])

        size = r.choice([base.tso_segsz, base.tso_segsz, r.choice(ODD)])
        flags &= ~int(MbufFlag.EXTERNAL | MbufFlag.INDIRECT)
        return Template(
            data, VnetHdr(), flags, n(base.l2_len), n(base.l3_len), n(base.l4_len), size
        )

    def from_rtap(self, hostile: float) -> list[Template]:
        """Templates that rtap sends next."""
        r = self.r
        if r.random() < hostile:
            return [self.hostile_request()]
        if r.random() < 0.6:
            return self.plain()
        if r.random() < 0.5:
            shape, length, segsz = self.super_shape()
            return [shape.request(r.randrange(1 << 32), length, segsz)]
        shape = self.shape(partial=r.random() < 0.5)
        made = shape.request(5, self.length(self.room(shape)))
        if self.l2 and r.random() < 0.3:
            made = replace(made, flags=made.flags | MbufFlag.TX_VLAN, vlan_tci=r.randrange(1, 4095))
        return [made]


# ---- judging what came out


def untagged(frame: bytes) -> bytes:
    """The frame as a packet socket shows it: without its first tag, which comes beside it."""
    if frame[12:14] in (b"\x81\x00", b"\x88\xa8"):
        return frame[:12] + frame[16:]
    return frame


def look(frame: bytes, l2: bool, finished: bool, segsz: int = 0) -> str:
    """What is wrong with a tracked frame; "" when nothing is, or when it is not tracked.

    `finished`: its checksum is complete, not just the pseudo-header's sum. `segsz`: the segment
    size of a super-frame.
    """
    at = 0
    if l2:
        kind, at = int.from_bytes(frame[12:14], "big"), 14
        while kind in TAGS:
            kind, at = int.from_bytes(frame[at + 2 : at + 4], "big"), at + 4
        if kind not in (0x0800, 0x86DD):
            return ""
    version = frame[at] >> 4 if at < len(frame) else 0
    if version == 4 and len(frame) >= at + 20:
        size = (frame[at] & 15) * 4
        end = at + int.from_bytes(frame[at + 2 : at + 4], "big")
        proto, addresses = frame[at + 9], frame[at + 12 : at + 20]
    elif version == 6 and len(frame) >= at + 48:
        size, proto, addresses = 40, frame[at + 6], frame[at + 8 : at + 40]
        end = at + 40 + int.from_bytes(frame[at + 4 : at + 6], "big")
        if proto == 60:
            size, proto = 48, frame[at + 40]
    else:
        return ""
    body = at + size
    start = body + 32 if proto == TCP else body + 8
    if proto not in (TCP, UDP) or MARK not in frame[start : start + 9]:
        return ""
    payload = frame[start:end]
    if end > len(frame):
        return "its IP length is beyond its end"
    if version == 4 and total(frame[at:body]) != 0:
        return "wrong IPv4 checksum"
    sums = pseudo(addresses, proto, end - body)
    if finished and total(sums + frame[body:end]) != 0:
        return "wrong checksum"
    check = body + (16 if proto == TCP else 6)
    if not finished and int.from_bytes(frame[check : check + 2], "big") % 0xFFFF != total(sums):
        return "wrong sum of the pseudo-header"
    if proto == TCP:
        return _repeats(payload, int.from_bytes(frame[body + 4 : body + 8], "big"))
    pieces = range(0, len(payload), segsz or len(payload))
    return "".join(_repeats(payload[at : at + (segsz or len(payload))], None) for at in pieces)


def _repeats(payload: bytes, seq: int | None) -> str:
    first = payload.find(MARK)
    word = payload[first : first + 8]
    if not 0 <= first <= 7 or len(word) < 8:
        return "" if len(payload) < 15 else "a payload that nobody sent"
    if word not in WORDS:
        return "a word that nobody sent"
    if seq is not None and (seq + first) % 8:
        return "payload and sequence number do not belong together"
    if payload != (word * (len(payload) // 8 + 2))[8 - first : 8 - first + len(payload)]:
        return "other bytes than went in"
    return ""
