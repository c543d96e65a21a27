# SPDX-License-Identifier: BSD-3-Clause
"""A state machine that compares operations on frames in bursts, without stages, with a model.

The model knows each slot: whose bytes it shows, its window, and the next slot of the frame. This
gives the bytes of every frame, the references to it, and how many slots of each pool are in use.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from slots import (
    POOLS,
    SEGS,
    Slot,
    clone_of,
    content,
    fresh,
    length,
    real_segments,
    segments,
    write,
)
from support import pattern
from trains import TCP, F, first_of_flow, random_train

from rtap import Burst, Mbuf, MbufFlag, Mempool, PoolEmpty


@functools.cache
def train(seed: int) -> list[bytes]:
    return random_train(random.Random(seed), longest=6, tags=True).bytes()


@functools.cache
def to_be_split(seed: int) -> tuple[F, bytes]:
    r = random.Random(seed)
    f = first_of_flow(r, 0, tags=True)
    f = F(**{**vars(f), "payload": r.randbytes(r.choice((0, 1, 100, 1000, 2500)))})
    return f, f.build()


@dataclass(eq=False)
class Held:
    burst: Burst
    heads: list[Slot]


indices = st.integers(0, 11)
seeds = st.integers(0, 255)
pool_numbers = st.integers(0, len(POOLS) - 1)
steps = st.integers(0, 80) | st.sampled_from([0, 1, 14, 32, 33, 64, 65, 128])
offsets = st.integers(0, 90) | st.sampled_from([0, 6, 14, 63, 64, 255, 1000])


class FrameMachine(RuleBasedStateMachine):
    """Random operations on bursts, on frames taken from them, and on views."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = [Mempool(n, room, head, memfd=fd) for n, room, head, fd in POOLS]
        self.held: list[Held] = []
        self.mbufs: list[tuple[Mbuf, Slot]] = []
        self.rests: list[tuple[Mbuf, Slot]] = []  # frames from a later segment on
        self.views: list[tuple[memoryview, Slot, int, int]] = []
        self.fill = 0

    # ---- what the model says

    def roots(self) -> Iterator[Slot]:
        for held in self.held:
            yield from held.heads
        for _, slot in self.mbufs + self.rests:
            yield slot
        for _, slot, _, _ in self.views:
            yield slot

    def references(self, extra: Iterable[Slot] = ()) -> Counter[Slot]:
        """The number of references to each slot in use."""
        counts: Counter[Slot] = Counter()
        todo = [*self.roots(), *extra]
        while todo:
            slot = todo.pop()
            counts[slot] += 1
            if counts[slot] == 1:
                todo += [s for s in (slot.owner, slot.next) if s is not None]
        return counts

    def fits(self, need: Iterable[int], extra: Iterable[Slot] = ()) -> bool:
        """Whether each pool has that many free slots."""
        used = Counter(slot.pool for slot in self.references(extra))
        return all(n <= POOLS[p][0] - used[p] for p, n in Counter(need).items())

    def fresh_bytes(self, n: int) -> bytes:
        self.fill += 1
        return pattern(self.fill, n)

    def adopt(self, mbuf: Mbuf, head: Slot) -> Slot:
        """Records which real slots belong to which slots of the model."""
        for seg, slot in zip(real_segments(mbuf), segments(head), strict=True):
            slot.number = hash(seg)
        return head

    def adopt_all(self, burst: Burst, heads: list[Slot]) -> Held:
        for mbuf, head in zip(burst, heads, strict=True):
            self.adopt(mbuf, head)
        return Held(burst, heads)

    def keep(self, held: Held) -> None:
        self.held.append(held)

    def pick(self, i: int, least: int = 0, *, is_split: bool = False) -> Held:
        """One of the bursts: with that many frames, or with one to split, if there is one."""
        some = [h for h in self.held if len(h.heads) >= least]
        if is_split:
            some = [h for h in some if any(f.is_super or f.flags & SEGS for f in h.heads)]
        some = some or self.held
        return some[i % len(some)]

    def has_bursts(self) -> bool:
        return bool(self.held)

    def has_mbufs(self) -> bool:
        return bool(self.mbufs)

    # ---- frames come

    @precondition(lambda self: len(self.held) < 6)
    @rule(pool=pool_numbers, seed=seeds, n=st.integers(0, 8))
    def train_arrives(self, pool: int, seed: int, n: int) -> None:
        """As many frames of a train as there is room for."""
        burst = Burst()
        heads: list[Slot] = []
        for data in train(seed)[:n]:
            head = fresh(pool, data)
            if not self.fits((pool for _ in segments(head)), heads):
                with pytest.raises(PoolEmpty):
                    self.pools[pool].alloc(data)
                break
            burst.append(self.pools[pool].alloc(data))
            heads.append(head)
        self.keep(self.adopt_all(burst, heads))

    @precondition(lambda self: len(self.held) < 6)
    @rule(pool=pool_numbers, n=st.integers(0, 9), size=st.integers(0, 200))
    def burst_of_slots(self, pool: int, n: int, size: int) -> None:
        data = self.fresh_bytes(size)
        heads = [fresh(pool, data) for _ in range(n)]
        if not self.fits(pool for head in heads for _ in segments(head)):
            with pytest.raises(PoolEmpty):
                self.pools[pool].alloc_burst(n, data)
            return
        self.keep(self.adopt_all(self.pools[pool].alloc_burst(n, data), heads))

    @precondition(lambda self: len(self.held) < 6)
    @rule(pool=pool_numbers, seed=seeds, size=st.sampled_from([1, 100, 700, 1400, 3000]))
    def request(self, pool: int, seed: int, size: int) -> None:
        """One frame with a request to split it."""
        f, data = to_be_split(seed)
        head = fresh(pool, data)
        if not self.fits(pool for _ in segments(head)):
            return
        mbuf = self.pools[pool].alloc(data)
        if f.proto == TCP:
            head.flags = MbufFlag.TX_TCP_SEG | MbufFlag.TX_TCP_CKSUM
        else:
            head.flags = MbufFlag.TX_UDP_SEG | MbufFlag.TX_UDP_CKSUM
        head.size = mbuf.tso_segsz = size
        mbuf.ol_flags = head.flags
        self.keep(self.adopt_all(Burst([mbuf]), [head]))

    # ---- frames move

    @precondition(has_bursts)
    @rule(i=indices, j=indices)
    def extend(self, i: int, j: int) -> None:
        a, b = self.pick(i), self.pick(j)
        if len(a.heads) + len(b.heads) <= 40:
            a.burst.extend(b.burst)
            a.heads = a.heads + b.heads

    @precondition(lambda self: 0 < len(self.held) < 8)
    @rule(i=indices, which=st.lists(indices, max_size=6), mask=st.booleans())
    def select(self, i: int, which: list[int], mask: bool) -> None:
        held = self.pick(i)
        n = len(held.heads)
        if mask:
            bits = [k in which for k in range(n)]
            part = held.burst.select(bits)
            chosen = [h for h, bit in zip(held.heads, bits, strict=True) if bit]
        else:
            at = [k % (2 * n) - n for k in which] if n else []
            part = held.burst.select(at)
            chosen = [held.heads[k] for k in at]
        self.keep(Held(part, chosen))

    @precondition(lambda self: 0 < len(self.held) < 8)
    @rule(i=indices, a=st.integers(-9, 9), b=st.integers(-9, 9), step=st.sampled_from([1, 2, -1]))
    def cut(self, i: int, a: int, b: int, step: int) -> None:
        held = self.pick(i)
        self.keep(Held(held.burst[a:b:step], held.heads[a:b:step]))

    @precondition(has_bursts)
    @rule(i=indices)
    def free_burst(self, i: int) -> None:
        held = self.pick(i)
        self.held.remove(held)
        held.burst.free()

    @precondition(lambda self: self.held and len(self.mbufs) < 8)
    @rule(i=indices, k=indices)
    def take(self, i: int, k: int) -> None:
        held = self.pick(i)
        if held.heads:
            k %= len(held.heads)
            self.mbufs.append((held.burst[k], held.heads[k]))

    @precondition(lambda self: self.mbufs and len(self.rests) < 4)
    @rule(i=indices)
    def rest_of(self, i: int) -> None:
        mbuf, slot = (self.mbufs + self.rests)[i % len(self.mbufs + self.rests)]
        rest = mbuf.next
        assert (rest is None) == (slot.next is None)
        if rest is not None and slot.next is not None:
            self.rests.append((rest, slot.next))

    @precondition(lambda self: bool(self.rests))
    @rule(i=indices, a=offsets, n=steps, drop=st.booleans())
    def use_rest(self, i: int, a: int, n: int, drop: bool) -> None:
        i %= len(self.rests)
        self.overwrite(*self.rests[i], a, n)
        if drop:
            del self.rests[i]

    @precondition(has_mbufs)
    @rule(i=indices)
    def clone(self, i: int) -> None:
        mbuf, slot = self.mbufs[i % len(self.mbufs)]
        if not self.fits(s.pool for s in segments(slot)):
            with pytest.raises(PoolEmpty):
                mbuf.clone()
            return
        copy = mbuf.clone()
        self.keep(self.adopt_all(Burst([copy]), [clone_of(slot)]))

    @precondition(has_mbufs)
    @rule(i=indices)
    def free_mbuf(self, i: int) -> None:
        mbuf, _ = self.mbufs.pop(i % len(self.mbufs))
        mbuf.free()

    # ---- views

    @precondition(lambda self: self.held and len(self.views) < 4)
    @rule(i=indices, k=indices)
    def view(self, i: int, k: int) -> None:
        held = self.pick(i)
        if not held.heads:
            return
        k %= len(held.heads)
        head = held.heads[k]
        if head.next is not None:
            with pytest.raises(BufferError):
                _ = held.burst[k].data
            return
        self.views.append((held.burst[k].data, head, head.off, head.off + head.n))

    @precondition(lambda self: bool(self.views))
    @rule(i=indices, value=st.integers(0, 255), drop=st.booleans())
    def use_view(self, i: int, value: int, drop: bool) -> None:
        i %= len(self.views)
        view, slot, start, stop = self.views[i]
        if stop > start:
            view[0] = slot.store[start] = value
        if drop:
            del self.views[i]

    # ---- one frame's window and bytes

    @precondition(has_mbufs)
    @rule(i=indices, n=steps, what=st.sampled_from(["prepend", "append", "adj", "trim"]))
    def resize(self, i: int, n: int, what: str) -> None:
        mbuf, head = self.mbufs[i % len(self.mbufs)]
        last = list(segments(head))[-1]
        room = {
            "prepend": head.off,
            "append": len(last.store) - last.off - last.n,
            "adj": head.n,
            "trim": last.n,
        }[what]
        if n > room:
            with pytest.raises(ValueError, match="n must be"):
                getattr(mbuf, what)(n)
            return
        made = getattr(mbuf, what)(n)
        if what == "prepend":
            head.off, head.n = head.off - n, head.n + n
            made[:] = data = self.fresh_bytes(n)
            head.store[head.off : head.off + n] = data
        elif what == "append":
            made[:] = data = self.fresh_bytes(n)
            end = last.off + last.n
            last.store[end : end + n] = data
            last.n += n
        elif what == "adj":
            head.off, head.n = head.off + n, head.n - n
        else:
            last.n -= n

    @precondition(has_mbufs)
    @rule(i=indices, a=offsets, n=steps)
    def write_slice(self, i: int, a: int, n: int) -> None:
        self.overwrite(*self.mbufs[i % len(self.mbufs)], a, n)

    def overwrite(self, mbuf: Mbuf, head: Slot, a: int, n: int) -> None:
        data = self.fresh_bytes(len(range(*slice(a, a + n).indices(length(head)))))
        mbuf[a : a + n] = data
        write(head, a, data)

    # ---- arrays

    @precondition(has_bursts)
    @rule(i=indices, offset=offsets, n=st.integers(1, 70))
    def gather(self, i: int, offset: int, n: int) -> None:
        held = self.pick(i)
        rows = held.burst.gather(offset, n)
        assert rows.shape == (len(held.heads), n)
        wanted = [content(h)[offset : offset + n].ljust(n, b"\0") for h in held.heads]
        assert rows.tobytes() == b"".join(wanted)

    @precondition(has_bursts)
    @rule(i=indices, offset=offsets, n=st.integers(1, 20))
    def scatter(self, i: int, offset: int, n: int) -> None:
        held = self.pick(i)
        if not held.heads:
            return
        data = self.fresh_bytes(n * len(held.heads))[: n * len(held.heads)].ljust(
            n * len(held.heads), b"\7"
        )
        rows = memoryview(data).cast("B", (len(held.heads), n))
        if any(offset + n > length(h) for h in held.heads):
            with pytest.raises(ValueError, match="are needed"):
                held.burst.scatter(offset, rows)
            return
        held.burst.scatter(offset, rows)
        for k, head in enumerate(held.heads):
            write(head, offset, data[k * n : k * n + n])

    # ---- what holds at all times

    @invariant()
    def frames_are_what_they_should_be(self) -> None:
        for held in self.held:
            assert [bytes(m) for m in held.burst] == [content(h) for h in held.heads]
            assert held.burst.lengths.tolist() == [length(h) for h in held.heads]
            assert held.burst.ol_flags.tolist() == [h.flags for h in held.heads]
        counts = self.references()
        for mbuf, slot in self.mbufs:
            slots = list(segments(slot))
            assert bytes(mbuf) == content(slot)
            assert (mbuf.nb_segs, mbuf.refcnt) == (len(slots), counts[slot])
            assert mbuf.headroom == slot.off
            assert mbuf.tailroom == len(slots[-1].store) - slots[-1].off - slots[-1].n
        for mbuf, slot in self.rests:
            assert (bytes(mbuf), mbuf.refcnt) == (content(slot), counts[slot])
        for view, slot, start, stop in self.views:
            assert view == slot.store[start:stop]
        used = Counter(slot.pool for slot in counts)
        for p, pool in enumerate(self.pools):
            assert pool.in_use == used[p]
            assert pool.available + pool.in_use == pool.size

    def teardown(self) -> None:
        self.views.clear()
        for mbuf, _ in self.mbufs + self.rests:
            mbuf.free()
        for held in self.held:
            held.burst.free()
        for pool in self.pools:
            assert pool.in_use == 0
            pool.close()
