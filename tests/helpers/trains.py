# SPDX-License-Identifier: BSD-3-Clause
"""Trains of TCP and UDP frames, regular or with a fault in the middle.

They are built with struct and a checksum written here, independent of the code under test.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << n for n in range(8))
TCP, UDP = 6, 17
HOP, ROUTING, FRAGMENT, DSTOPTS = 0, 43, 44, 60
DF, MF, RESERVED = 0x4000, 0x2000, 0x8000

MAC_A = bytes.fromhex("020000000a01")
MAC_B = bytes.fromhex("020000000b01")


def ones_sum(data: bytes) -> int:
    """The Internet checksum (RFC 1071), not complemented."""
    if len(data) % 2:
        data += b"\0"
    # A number is congruent to its digit sum: base 65536, modulo 65535.
    total = int.from_bytes(data, "big")
    return (total % 0xFFFF) or (0xFFFF if total else 0)


def checksum(data: bytes) -> int:
    return ~ones_sum(data) & 0xFFFF


@dataclass(frozen=True)
class F:
    """One frame. ``build`` fills in fields that are None."""

    version: int = 4
    proto: int = TCP
    dst_mac: bytes = MAC_B
    src_mac: bytes = MAC_A
    tags: tuple[tuple[int, int], ...] = ()  # (ethertype, tci)
    src: bytes = b"\x0a\x00\x00\x01"
    dst: bytes = b"\x0a\x00\x00\x02"
    tos: int = 0
    ttl: int = 64
    ident: int = 0
    frag: int = DF
    ip_options: bytes = b""
    label: int = 0
    extensions: tuple[tuple[int, bytes], ...] = ()  # (type, bytes after next header and length)
    sport: int = 1000
    dport: int = 2000
    seq: int = 0
    ack: int = 7
    flags: int = ACK
    reserved: int = 0
    window: int = 500
    urgent: int = 0
    options: bytes = b""
    payload: bytes = b""
    bad_l4: bool = False
    bad_l3: bool = False
    no_checksum: bool = False
    ulen: int | None = None
    padding: bytes = b""

    def l4(self, pseudo: bytes) -> bytes:
        if self.proto == TCP:
            offset = (20 + len(self.options)) // 4 << 4 | self.reserved
            body = struct.pack(
                "!HHIIBBHHH",
                self.sport,
                self.dport,
                self.seq & 0xFFFFFFFF,
                self.ack,
                offset,
                self.flags,
                self.window,
                0,
                self.urgent,
            )
            body += self.options + self.payload
            at = 16
        else:
            length = 8 + len(self.payload) if self.ulen is None else self.ulen
            body = struct.pack("!HHHH", self.sport, self.dport, length, 0) + self.payload
            at = 6
        value = checksum(pseudo + struct.pack("!IHH", len(body), 0, self.proto) + body)
        if self.proto == UDP:
            value = 0 if self.no_checksum else value or 0xFFFF
        if self.bad_l4:
            value = (value + 1) & 0xFFFF or 1
        return body[:at] + value.to_bytes(2, "big") + body[at + 2 :]

    def build(self) -> bytes:
        l2 = self.dst_mac + self.src_mac
        for ethertype, tci in self.tags:
            l2 += struct.pack("!HH", ethertype, tci)
        l2 += b"\x08\x00" if self.version == 4 else b"\x86\xdd"
        pseudo = self.src + self.dst
        l4 = self.l4(pseudo)
        if self.version == 4:
            ihl = 20 + len(self.ip_options)
            head = struct.pack(
                "!BBHHHBBH",
                0x40 | ihl // 4,
                self.tos,
                ihl + len(l4),
                self.ident & 0xFFFF,
                self.frag,
                self.ttl,
                self.proto,
                0,
            )
            head += pseudo + self.ip_options
            value = checksum(head)
            if self.bad_l3:
                value ^= 0x0101
            l3 = head[:10] + value.to_bytes(2, "big") + head[12:]
        else:
            chain = b""
            after = self.proto
            for kind, content in reversed(self.extensions):
                chain = bytes([after, (len(content) + 2) // 8 - 1]) + content + chain
                after = kind
            first = 6 << 28 | self.tos << 20 | self.label
            l3 = struct.pack("!IHBB", first, len(chain) + len(l4), after, self.ttl)
            l3 += pseudo + chain
        return l2 + l3 + l4 + self.padding


V6 = {
    "version": 6,
    "src": bytes.fromhex("fd00" + "00" * 13 + "01"),
    "dst": bytes.fromhex("fd00" + "00" * 13 + "02"),
    "label": 0x12345,
}
TIMESTAMP = b"\x01\x01\x08\x0a\x00\x00\x00\x01\x00\x00\x00\x02"


def regular(first: F, sizes: list[int], fill: random.Random) -> Iterator[F]:
    """Frames of one flow as a sender makes them."""
    seq, ident = first.seq, first.ident
    for size in sizes:
        yield replace(first, seq=seq, ident=ident & 0xFFFF, payload=fill.randbytes(size))
        seq += size
        ident += 1


# ---- what can be wrong with one frame


def _flag(bit: int) -> Callable[[F, random.Random], F]:
    return lambda f, r: replace(f, flags=f.flags ^ bit)


def _set(**values: Any) -> Callable[[F, random.Random], F]:
    return lambda f, r: replace(f, **values)


def _longer(f: F, r: random.Random) -> F:
    return replace(f, payload=f.payload + r.randbytes(r.randint(1, 40)))


def _shorter(f: F, r: random.Random) -> F:
    return replace(f, payload=f.payload[: len(f.payload) * r.randint(1, 9) // 10])


ANY: dict[str, Callable[[F, random.Random], F]] = {
    "tos": lambda f, r: replace(f, tos=f.tos ^ 0x10),
    "ecn": lambda f, r: replace(f, tos=f.tos ^ 3),
    "ttl": lambda f, r: replace(f, ttl=f.ttl - 1),
    "longer": _longer,
    "shorter": _shorter,
    "empty": _set(payload=b""),
    "bad checksum": _set(bad_l4=True),
    "padding": _set(padding=b"\0" * 4),
    "other port": lambda f, r: replace(f, sport=f.sport ^ 1),
    "other mac": _set(src_mac=bytes.fromhex("020000000a02")),
}
ONLY_TCP: dict[str, Callable[[F, random.Random], F]] = {
    "ack": lambda f, r: replace(f, ack=f.ack + 1),
    "window": lambda f, r: replace(f, window=f.window + 1),
    "seq": lambda f, r: replace(f, seq=f.seq + r.choice((-1, 1, 1000))),
    "options": lambda f, r: replace(
        f, options=f.options[:-1] + bytes([r.randint(3, 9)]) if f.options else TIMESTAMP
    ),
    "more options": lambda f, r: replace(f, options=f.options + b"\1\1\1\1"),
    "reserved": _set(reserved=2),
    "AE": _set(reserved=1),
    "FIN": _flag(FIN),
    "SYN": _flag(SYN),
    "RST": _flag(RST),
    "PSH": _flag(PSH),
    "no ACK": _flag(ACK),
    "URG": _flag(URG),
    "ECE": _flag(ECE),
    "CWR": _flag(CWR),
}
ONLY_UDP: dict[str, Callable[[F, random.Random], F]] = {
    "no checksum": _set(no_checksum=True),
    "UDP length": lambda f, r: replace(f, ulen=8 + len(f.payload) // 2),
}
ONLY_V4: dict[str, Callable[[F, random.Random], F]] = {
    "DF": lambda f, r: replace(f, frag=f.frag ^ DF),
    "reserved bit": lambda f, r: replace(f, frag=f.frag ^ RESERVED),
    "first fragment": lambda f, r: replace(f, frag=MF),
    "later fragment": lambda f, r: replace(f, frag=100),
    "bad IP checksum": _set(bad_l3=True),
    "IP options": _set(ip_options=b"\1\1\1\1"),
    "ID": lambda f, r: replace(f, ident=(f.ident + r.choice((-1, 1, 5))) & 0xFFFF),
}
ONLY_V6: dict[str, Callable[[F, random.Random], F]] = {
    "label": lambda f, r: replace(f, label=f.label ^ 1),
    "extension": lambda f, r: replace(f, extensions=((DSTOPTS, b"\1\4" + r.randbytes(4)),)),
    "IPv6 fragment": lambda f, r: replace(f, extensions=((FRAGMENT, b"\0\1" + bytes(4)),)),
}


def quirks(f: F) -> dict[str, Callable[[F, random.Random], F]]:
    """The faults that a frame like this can have."""
    return (
        ANY | (ONLY_TCP if f.proto == TCP else ONLY_UDP) | (ONLY_V4 if f.version == 4 else ONLY_V6)
    )


@dataclass
class Train:
    """Frames in sending order, and the faults by position."""

    frames: list[F] = field(default_factory=list)
    odd: dict[int, str] = field(default_factory=dict)

    def bytes(self) -> list[bytes]:
        return [f.build() for f in self.frames]


def first_of_flow(r: random.Random, number: int, *, tags: bool = False, udp: bool = True) -> F:
    """The first frame of a random flow, different for each number."""
    protocols = (TCP, TCP, UDP) if udp else (TCP,)
    f = F(proto=r.choice(protocols), sport=1000 + 10 * number, ident=r.randrange(0x10000))
    f = replace(f, seq=r.randrange(1 << 32), tos=r.choice((0, 0, 2, 0x48)))
    if r.random() < 0.5:
        f = replace(f, **V6)
        if r.random() < 0.3:
            kinds = r.choice(((DSTOPTS,), (HOP,), (HOP, DSTOPTS)))
            f = replace(f, extensions=tuple((kind, b"\1\4" + bytes(4)) for kind in kinds))
    if f.proto == TCP and r.random() < 0.7:
        f = replace(f, options=TIMESTAMP)
    if tags and r.random() < 0.5:
        kinds = r.choice(((0x8100,), (0x88A8, 0x8100)))
        f = replace(f, tags=tuple((kind, 100 + n) for n, kind in enumerate(kinds)))
    return f


def random_train(
    r: random.Random, *, longest: int = 24, tags: bool = False, udp: bool = True
) -> Train:
    """Up to three interleaved flows of up to ``longest`` frames each, some with quirks."""
    flows: list[list[tuple[F, str]]] = []
    for number in range(r.choice((1, 1, 2, 3))):
        first = first_of_flow(r, number, tags=tags, udp=udp)
        size = r.choice((1, 7, 100, 536, 1000, 1400, r.randint(1, 1400)))
        count = r.randint(2, longest)
        sizes = [size] * count
        if r.random() < 0.4:
            sizes[-1] = r.randint(1, size)
        flow = []
        for f in regular(first, sizes, r):
            name = ""
            if r.random() < 0.08:
                name, quirk = r.choice(list(quirks(f).items()))
                f = quirk(f, r)
            flow.append((f, name))
        if r.random() < 0.05:  # one frame is lost, and another comes twice
            del flow[r.randrange(len(flow))]
        if r.random() < 0.05:
            regular_ones = [item for item in flow if not item[1]]
            if regular_ones:
                flow.insert(r.randrange(len(flow)), r.choice(regular_ones))
        flows.append(flow)
    train = Train()
    while flow := r.choice(flows) if flows else []:
        for _ in range(min(len(flow), r.choice((1, 2, 8, 30)))):
            f, name = flow.pop(0)
            if name:
                train.odd[len(train.frames)] = name
            train.frames.append(f)
        flows = [flow for flow in flows if flow]
    return train


def flow_of(frame: bytes) -> bytes:
    """What GRO distinguishes flows by: L2 header, addresses, flow label, protocol, ports."""
    at = 14
    while frame[at - 2 : at] in (b"\x81\x00", b"\x88\xa8"):
        at += 4
    ip = frame[at:]
    if ip[0] >> 4 == 4:
        l4 = (ip[0] & 15) * 4
        return frame[:at] + ip[12:20] + ip[9:10] + ip[l4 : l4 + 4]
    kind, l4 = ip[6], 40
    while kind in (0, 43, DSTOPTS, FRAGMENT):
        kind, l4 = ip[l4], l4 + (8 if kind == FRAGMENT else (ip[l4 + 1] + 1) * 8)
    return frame[:at] + ip[1:4] + ip[8:40] + bytes([kind]) + ip[l4 : l4 + 4]


def per_flow(frames: list[bytes]) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for frame in frames:
        found.setdefault(flow_of(frame), []).append(frame)
    return found
