# SPDX-License-Identifier: BSD-3-Clause
"""A state machine that compares operations on frames in bursts, with stages, with a model.

The model is in frame_machine.py, with the operations other than stages.
"""

from __future__ import annotations

from contextlib import suppress

import pytest
from frame_machine import FrameMachine, Held, indices, pool_numbers
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from slots import (
    SEGS,
    Slot,
    clone_of,
    content,
    copy_of,
    fresh,
    length,
    link,
    parts_of,
    real_segments,
    segments,
    write,
)

from rtap import Burst, Mbuf, MbufFlag, offload, stages
from rtap.offload import Gro, VnetHdr

REQUESTS = SEGS | MbufFlag.TX_L4_MASK
#: The most frames that a stage makes of one.
SPLIT_MAX = 2048


class StageMachine(FrameMachine):
    """Adds stages that write to frames, and stages that make other frames."""

    # ---- those that write

    def own_all(self, held: Held) -> None:
        """Each shared frame of the burst is copied; one without a buffer for that is dropped."""
        lost = []
        for k, head in enumerate(held.heads):
            copy = self.private_of(head)
            if copy is None:
                lost.append(k)
            else:
                held.heads[k] = copy
        held.heads = [h for k, h in enumerate(held.heads) if k not in lost]

    def private_of(self, head: Slot) -> Slot | None:
        counts = self.references()
        if all(s.owner is None and counts[s] == 1 for s in segments(head)):
            return head
        copy = copy_of(head)
        return copy if self.fits(s.pool for s in segments(copy)) else None

    @precondition(FrameMachine.has_bursts)
    @rule(i=indices)
    def mac_swap(self, i: int) -> None:
        held = self.pick(i)
        stages.MacSwap()(held.burst)
        self.own_all(held)
        for head in held.heads:
            if length(head) >= 12:
                data = content(head)
                write(head, 0, data[6:12] + data[:6])
        self.adopt_all(held.burst, held.heads)

    @staticmethod
    def fill_in(head: Slot) -> None:
        with suppress(ValueError):
            write(head, 0, offload.fill(content(head)))

    @precondition(FrameMachine.has_bursts)
    @rule(i=indices, stage=st.booleans())
    def fill_checksums(self, i: int, stage: bool) -> None:
        held = self.pick(i)
        if any(h.is_super for h in held.heads):
            return
        if stage:
            stages.ChecksumFill()(held.burst)
            self.own_all(held)
        else:
            offload.fill_burst(held.burst)
        for head in held.heads:
            self.fill_in(head)
        self.adopt_all(held.burst, held.heads)

    @precondition(FrameMachine.has_bursts)
    @rule(i=indices, drop=st.sets(indices, max_size=3), kept=st.integers(0, 3))
    def call(self, i: int, drop: set[int], kept: int) -> None:
        """A stage that writes to each frame, drops some, and keeps some after the call."""
        held = self.pick(i)
        marks: list[bytes] = []
        keeps: list[Burst] = []

        def function(burst: Burst) -> list[int]:
            for mbuf in burst:
                marks.append(self.fresh_bytes(min(3, len(mbuf))))
                mbuf[:3] = marks[-1]
            keeps.append(burst[:kept])
            return [stages.DROP if k in drop else 0 for k in range(len(burst))]

        targets = stages.Call(function)(held.burst)
        self.own_all(held)
        heads = held.heads
        for head, mark in zip(heads, marks, strict=True):
            write(head, 0, mark)
        held.heads = [h for k, h in enumerate(heads) if k not in drop]
        assert targets.tolist() == [0] * len(held.heads)
        self.adopt_all(held.burst, held.heads)
        for burst in keeps:
            self.keep(self.adopt_all(burst, heads[:kept]))

    # ---- those that make other frames

    @precondition(FrameMachine.has_bursts)
    @rule(i=indices, into=st.none() | pool_numbers, stage=st.booleans())
    def split(self, i: int, into: int | None, stage: bool) -> None:
        held = self.pick(i, is_split=True)
        pool = None if into is None else self.pools[into]
        if stage:
            stages.Gso(pool)(held.burst)
            held.heads = self.split_all(held, into, drops=True)[0]
            self.adopt_all(held.burst, held.heads)
            self.note_flags(held)
            return
        try:
            for head in held.heads:
                parts_of(head)
        except ValueError:
            with pytest.raises(ValueError, match="cannot be segmented"):
                offload.gso(held.burst, pool)
            return
        out = offload.gso(held.burst, pool)
        heads, rest = self.split_all(held, into, drops=False)
        held.heads = rest
        made = self.adopt_all(out, heads)
        self.note_flags(made)
        self.keep(made)

    def split_all(
        self, held: Held, target: int | None, *, drops: bool
    ) -> tuple[list[Slot], list[Slot]]:
        """The frames made, and those left from the first that finds no buffers."""
        came = held.heads
        made: list[Slot] = []
        for k, head in enumerate(came):
            held.heads = made + came[k:]
            parts = self.split_one(head, target, in_parts=drops)
            if parts is not None:
                made += parts
            elif not drops:
                return made, came[k:]
        return made, []

    def split_one(self, head: Slot, target: int | None, *, in_parts: bool) -> list[Slot] | None:
        """The frames made of one; with `in_parts`, as many as there are buffers for."""
        try:
            parts = parts_of(head)
        except ValueError:
            return None
        if not head.is_super and not head.flags & SEGS:
            return [head]
        if in_parts and len(parts) > SPLIT_MAX:
            return None
        if len(parts) == 1:
            own = self.private_of(head)
            if own is not None:
                write(own, 0, parts[0])
                own.size = 0
            return None if own is None else [own]
        new = [fresh(head.pool if target is None else target, part) for part in parts]
        while new and not self.fits(s.pool for n in new for s in segments(n)):
            new = new[:-1] if in_parts else []
        return new or None

    @staticmethod
    def note_flags(held: Held) -> None:
        for mbuf, head in zip(held.burst, held.heads, strict=True):
            assert not mbuf.ol_flags & (MbufFlag.RX_LRO | SEGS)
            head.flags = mbuf.ol_flags

    @precondition(FrameMachine.has_bursts)
    @rule(i=indices, udp=st.booleans(), how=st.sampled_from(["stage", "gro", "two calls"]))
    def merge(self, i: int, udp: bool, how: str) -> None:
        held = self.pick(i, 2)
        if not self.fits(s.pool for h in held.heads for s in segments(copy_of(h))):
            return  # some would not be merged: which ones is not modelled
        for head in held.heads:
            if not head.is_super and not head.flags & REQUESTS:
                head.flags = 0  # checksums are checked
        held.burst.ol_flags = [head.flags for head in held.heads]
        came = held.heads
        simple = all(h.next is None and h.owner is None and h.flags == 0 for h in came) and len(
            set(came)
        ) == len(came)
        if how == "stage":
            stages.Gro(udp=udp)(held.burst)
            out = held.burst
        else:
            gro = Gro(udp=udp, timeout=3600.0 if how == "two calls" else 0.0)
            rest = held.burst[len(came) // 2 :]
            first = held.burst[: len(came) // 2]
            held.burst.free()
            out = gro.coalesce(first)
            out.extend(gro.coalesce(rest))
            out.extend(gro.flush())
            assert gro.held == 0
            del first, rest
        if simple and how != "gro":
            wanted = offload.coalesce([content(h) for h in came], udp)
            assert sorted(map(bytes, out)) == sorted(frame for _, frame in wanted)
        held.burst, held.heads = out, self.merged(out, came)

    def merged(self, out: Burst, came: list[Slot]) -> list[Slot]:
        """Finds the frames from which each result was made; none is left over."""
        known = {s.number: s for h in came for s in segments(h)}
        bytes_of = [content(h) for h in came]
        left = list(range(len(came)))

        def took(slot: Slot | None, data: bytes) -> Slot:
            for k in left:
                if came[k] is slot or (slot is None and bytes_of[k] == data):
                    left.remove(k)
                    return came[k]
            raise AssertionError("a frame out of nothing")

        heads = []
        for mbuf in out:
            head = known.get(hash(mbuf))
            if head is not None and head.is_super == bool(mbuf.ol_flags & MbufFlag.RX_LRO):
                heads.append(took(head, b""))
                assert bytes(mbuf) == bytes_of[came.index(head)]
                assert mbuf.ol_flags in (head.flags, head.flags | MbufFlag.RX_L4_CKSUM_GOOD)
                head.flags = mbuf.ol_flags
                continue
            heads.append(self.super_frame(mbuf, known, took))
        assert left == []
        return heads

    def super_frame(self, mbuf: Mbuf, known: dict[int, Slot], took: object) -> Slot:
        assert callable(took)
        data = bytes(mbuf)
        l4 = mbuf.l2_len + mbuf.l3_len
        headers = l4 + mbuf.l4_len
        udp = mbuf.l4_len == 8
        version = data[mbuf.l2_len] >> 4
        kind = (
            VnetHdr.GSO_UDP_L4
            if udp
            else VnetHdr.GSO_TCPV4
            if version == 4
            else (VnetHdr.GSO_TCPV6)
        )
        csum_offset = 6 if udp else 16
        hdr = VnetHdr(1, kind, headers, mbuf.tso_segsz, l4, csum_offset)
        real = list(real_segments(mbuf))
        slots: list[Slot] = []
        for k, frame in enumerate(offload.segment(data, hdr)):
            at = len(slots)
            slot = known.get(hash(real[at]))
            while slot is not None and k > 0 and self.before(slot, known) is not None:
                slot = self.before(slot, known)  # its headers were a segment of their own
            source = took(slot, frame)
            new = source
            if slot is None:
                new = clone_of(source) if k > 0 else copy_of(source)
            if k > 0:
                new.off, new.n = new.off + headers, new.n - headers
                if new.n == 0 and new.next is not None:
                    new = new.next
            for seg in segments(new):
                seg.number = hash(real[len(slots)])
                slots.append(seg)
        assert len(slots) == len(real)
        head = link(slots)
        head.store[head.off : head.off + headers] = data[:headers]
        head.flags, head.size, head.gso_type = mbuf.ol_flags, mbuf.tso_segsz, kind
        head.csum_at, head.csum_offset = head.off + l4, csum_offset
        return head

    @staticmethod
    def before(slot: Slot, known: dict[int, Slot]) -> Slot | None:
        return next((s for s in known.values() if s.next is slot and s.n == 0), None)


# An example has fifty steps, so the suite runs fewer examples than for other tests.
EXAMPLES = settings().max_examples
StageMachine.TestCase.settings = settings(max_examples=EXAMPLES if EXAMPLES > 100 else 40)
TestFrameModel = pytest.mark.fuzz(pytest.mark.lifetime(StageMachine.TestCase))
