# SPDX-License-Identifier: BSD-3-Clause
"""The model's frames: slots, whose bytes they show, and the next slot of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from rtap import Mbuf, MbufFlag, offload
from rtap.offload import VnetHdr

#: Slots, data room, headroom, memfd.
POOLS = ((50, 64, 32, False), (32, 2048, 128, True), (30, 256, 16, False), (12, 1 << 14, 16, False))
SEGS = MbufFlag.TX_TCP_SEG | MbufFlag.TX_UDP_SEG


@dataclass(eq=False)
class Slot:
    """One header: its own bytes, or those of the slot it borrows from."""

    pool: int
    off: int
    n: int
    store: bytearray
    owner: Slot | None = None
    next: Slot | None = None
    number: int = 0  # identifies the real slot
    # The head's request for its frame.
    flags: int = 0
    size: int = 0
    csum_at: int = 0
    csum_offset: int = 0
    gso_type: int = 0

    def say(self, other: Slot) -> None:
        """Copies the other head's request; the checksum stays at the same place in the frame."""
        self.flags, self.size, self.gso_type = other.flags, other.size, other.gso_type
        self.csum_at = other.csum_at - other.off + self.off
        self.csum_offset = other.csum_offset

    @property
    def is_super(self) -> bool:
        return bool(self.flags & MbufFlag.RX_LRO)


def segments(head: Slot) -> Iterator[Slot]:
    at: Slot | None = head
    while at is not None:
        yield at
        at = at.next


def content(head: Slot) -> bytes:
    return b"".join(bytes(s.store[s.off : s.off + s.n]) for s in segments(head))


def length(head: Slot) -> int:
    return sum(s.n for s in segments(head))


def write(head: Slot, offset: int, data: bytes) -> None:
    for s in segments(head):
        start, stop = max(offset, 0), min(offset + len(data), s.n)
        if start < stop:
            s.store[s.off + start : s.off + stop] = data[start - offset : stop - offset]
        offset -= s.n


def link(slots: list[Slot]) -> Slot:
    for at, after in itertools.pairwise(slots):
        at.next = after
    return slots[0]


def real_segments(mbuf: Mbuf) -> Iterator[Mbuf]:
    at: Mbuf | None = mbuf
    while at is not None:
        yield at
        at = at.next


def fresh(pool: int, data: bytes) -> Slot:
    """A new frame in as many slots as it needs."""
    _, room, headroom, _ = POOLS[pool]
    slots = []
    for i in range(0, max(len(data), 1), room):
        part = data[i : i + room]
        store = bytearray(headroom + room)
        store[headroom : headroom + len(part)] = part
        slots.append(Slot(pool, headroom, len(part), store))
    return link(slots)


def copy_of(head: Slot) -> Slot:
    """The copy that a writer gets of a frame that others share."""
    slots = []
    for s in segments(head):
        _, room, headroom, _ = POOLS[s.pool]
        data = bytes(s.store[s.off : s.off + s.n])
        while True:
            k = len(data) if len(data) <= headroom + room else room
            off = min(headroom, headroom + room - k)
            store = bytearray(headroom + room)
            store[off : off + k] = data[:k]
            slots.append(Slot(s.pool, off, k, store))
            data = data[k:]
            if not data:
                break
    slots[0].say(head)
    return link(slots)


def clone_of(head: Slot) -> Slot:
    slots = [Slot(s.pool, s.off, s.n, s.store, s.owner or s) for s in segments(head)]
    slots[0].say(head)
    return link(slots)


def header_of(head: Slot, data: bytes) -> VnetHdr:
    """The virtio-net header for a frame's request; ValueError when the frame cannot be parsed."""
    if head.is_super:
        start = max(head.csum_at - head.off, 0)
        return VnetHdr(1, head.gso_type, 0, head.size, start, head.csum_offset)
    h = offload.parse(data)
    start = h.l2_len + h.l3_len + h.outer_l2_len + h.outer_l3_len
    if head.flags & MbufFlag.TX_UDP_SEG:
        return VnetHdr(1, VnetHdr.GSO_UDP_L4, 0, head.size, start, 6)
    kind = VnetHdr.GSO_TCPV4 if data[h.l2_len] >> 4 == 4 else VnetHdr.GSO_TCPV6
    return VnetHdr(1, kind, 0, head.size, start, 16)


def parts_of(head: Slot) -> list[bytes]:
    """The frames after splitting; ValueError when the request does not fit the frame."""
    data = content(head)
    if not head.is_super and not head.flags & SEGS:
        return [data]
    hdr = header_of(head, data)
    parts = offload.segment(data, hdr)
    if len(parts) > 1:
        return parts
    if not head.is_super:
        return [offload.fill(data)]
    return [offload.complete(data, hdr._replace(gso_type=0, gso_size=0))]
