# SPDX-License-Identifier: BSD-3-Clause
"""A process may die, or stand still, after any instruction of a call on a ring or a shared pool.

The call is run one instruction at a time. Each time that it has changed what processes share, a
copy of that is taken: what would be there if the process was killed now. And for each change,
another run stands still there while others go on.
"""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable
from typing import Any

import pytest
from ring_mates import SEALS, number_of, sealed, whole
from single_step import Stepped

from rtap import Burst, Mempool
from rtap._queues.shm_ring import ShmRing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("RTAP_TEST_BUILD", "").endswith("sanitize"),
        reason="the sanitizers make a call many times as long",
    ),
]

SLOTS, ROOM, SIZE = 12, 64, 4
PAGE = 4096
POOL_END = PAGE + 128 + SLOTS * 64  # of the words and of what travels with slots
RING_END = PAGE + SIZE * 8

Act = Callable[[], int]


class Scene:
    """A pool and a ring with one frame in it, number 1."""

    def __init__(self, length: int) -> None:
        self.pool = Mempool(SLOTS, ROOM, 64, shared=True)
        self.ring = ShmRing.create(self.pool, SIZE)
        self.ring.enqueue(Burst([self.pool.alloc(whole(1, length))]))
        self.fds = (self.pool.fd or -1, self.ring.fd)
        self._maps = [mmap.mmap(fd, 0) for fd in self.fds]

    def look(self) -> bytes:
        """All that processes share, but for the bytes of frames."""
        return self._maps[0][:POOL_END] + self._maps[1][:RING_END]

    def copy(self) -> tuple[bytes, bytes]:
        return self._maps[0][:], self._maps[1][:]

    def start(self, act: Callable[[Mempool, ShmRing], Act]) -> Stepped:
        def prepare() -> Act:
            pool = Mempool.attach(self.fds[0])
            ring = ShmRing(self.fds[1], pool=pool)
            return act(pool, ring)

        return Stepped(prepare)


def send(pool: Mempool, ring: ShmRing) -> Act:
    burst = pool.alloc_burst(1, whole(2, 60))
    return lambda: int(ring.enqueue(burst))


def send_two(pool: Mempool, ring: ShmRing) -> Act:
    burst = pool.alloc_burst(2, [whole(2, 60), whole(3, 60)])
    return lambda: int(ring.enqueue(burst))


def send_chain(pool: Mempool, ring: ShmRing) -> Act:
    burst = Burst([pool.alloc(whole(2, 150))])
    return lambda: int(ring.enqueue(burst))


def send_copy(pool: Mempool, ring: ShmRing) -> Act:
    mbuf = pool.alloc(whole(2, 100))
    burst = Burst([mbuf])
    return lambda: int(ring.enqueue(burst)) + 0 * len(mbuf)


def receive(pool: Mempool, ring: ShmRing) -> Act:
    kept: list[Burst] = []

    def act() -> int:
        kept.append(ring.dequeue(2))
        return len(kept[0])

    return act


def receive_and_free(pool: Mempool, ring: ShmRing) -> Act:
    return lambda: len(ring.dequeue(2))


def take(pool: Mempool, ring: ShmRing) -> Act:
    kept: list[Burst] = []

    def act() -> int:
        kept.append(pool.alloc_burst(3))
        return 0

    return act


def give_back(pool: Mempool, ring: ShmRing) -> Act:
    kept = [pool.alloc_burst(3)]

    def act() -> int:
        kept.clear()
        return 0

    return act


def close_ring(pool: Mempool, ring: ShmRing) -> Act:
    def act() -> int:
        ring.close()
        return 0

    return act


ACTS = [send, send_two, send_chain, send_copy, receive, receive_and_free, take, give_back]
#: Numbers of frames that an act sends, and whether it receives.
SENDS: dict[Any, list[int]] = {send: [2], send_two: [2, 3], send_chain: [2], send_copy: [2]}
RECEIVES = {receive, receive_and_free}

acts = pytest.mark.parametrize("act", [*ACTS, close_ring], ids=lambda act: act.__name__)
lengths = pytest.mark.parametrize("length", [60, 150], ids=["", "chains"])


def drained(ring: ShmRing) -> list[int]:
    return [number_of(bytes(mbuf)) for mbuf in ring.dequeue()]


def recovered(state: tuple[bytes, bytes]) -> list[int]:
    """The frames that are left to a process that comes after the death of all others, when
    everything else is free again."""
    with (
        sealed(state[0], len(state[0]), SEALS) as pool_fd,
        sealed(state[1], len(state[1]), SEALS) as ring_fd,
    ):
        pool = Mempool.attach(pool_fd)
        with ShmRing(ring_fd, pool=pool) as ring:
            numbers = drained(ring)
            assert pool.available == SLOTS
            # And all goes on.
            for _ in range(SIZE + 1):
                burst = Burst([pool.alloc(whole(7, 60)), pool.alloc(whole(8, 150))])
                assert ring.enqueue(burst) == 2
                assert drained(ring) == [7, 8]
            assert pool.available == SLOTS
        pool.close()
    return numbers


@lengths
@acts
def test_killed_after_any_instruction(act: Any, length: int) -> None:
    scene = Scene(length)
    child = scene.start(act)
    states = [scene.copy()]
    while child.steps(scene.look):
        states.append(scene.copy())
    child.finish()
    assert len(states) > 1 or act is close_ring
    possible = [[], [1]] if act in RECEIVES else [[1]]
    sends = SENDS.get(act, [])
    possible += [[1, *sends[: i + 1]] for i in range(len(sends))]
    seen = [recovered(state) for state in states]
    for numbers in seen:
        assert numbers in possible
    assert seen[0] == [1]
    assert seen[-1] == ([] if act in RECEIVES else [1, *sends])


@lengths
@acts
def test_standing_still_after_any_instruction(act: Any, length: int) -> None:
    """Others send and receive meanwhile; every frame arrives once, and every buffer comes back."""
    changes = 0
    while True:
        scene = Scene(length)
        child = scene.start(act)
        for _ in range(changes):
            if child.steps(scene.look) == 0:
                child.finish()
                assert changes > 1 or act is close_ring
                return
        got = drained(scene.ring)
        for number in (11, 12):
            assert scene.ring.enqueue(scene.pool.alloc_burst(1, whole(number, 60))) == 1
            got += drained(scene.ring)
        scene.pool.reclaim()
        gc.collect()
        child.go_on()
        got += drained(scene.ring)
        status = child.finish()
        assert status != 99
        if act in RECEIVES:
            assert len(got) + status == 3
            assert set(got) <= {1, 11, 12}
        else:
            assert sorted(got) == sorted([1, 11, 12, *SENDS.get(act, [])])
        assert [n for n in got if n > 10] == [11, 12][: len(got)]
        assert scene.pool.available == SLOTS
        changes += 1


def meeting(act: Any, changes: int) -> tuple[Scene, Stepped, Stepped]:
    """An empty ring, a sender that stands still after so many changes, and a receiver."""
    scene = Scene(60)
    drained(scene.ring)
    sender = scene.start(act)
    for _ in range(changes):
        assert sender.steps(scene.look)
    return scene, sender, scene.start(receive)


@pytest.mark.parametrize("act", [send, send_chain], ids=lambda act: act.__name__)
def test_a_sender_goes_on_while_a_receiver_stands_still(act: Any) -> None:
    """Right before the receiver's first change, where it has looked and not yet acted."""
    met = 0
    scene, sender, receiver = meeting(act, 0)
    receiver.go_on()
    assert receiver.finish() == 0
    total = 0
    while sender.steps(scene.look):
        total += 1
    sender.finish()
    for changes in range(1, total + 1):
        scene, sender, receiver = meeting(act, changes)
        first = receiver.steps(scene.look)
        receiver.kill()
        sender.kill()
        if first == 0:
            continue  # the frame is not in the ring yet
        for earlier in range(1, 13):
            scene, sender, receiver = meeting(act, changes)
            for _ in range(first - earlier):
                assert receiver.step()
            sender.go_on()
            receiver.go_on()
            left = drained(scene.ring)
            assert sender.finish() == 1
            assert receiver.finish() + len(left) == 1, (changes, earlier)
            assert scene.pool.available == SLOTS
            met += 1
    assert met >= 12
