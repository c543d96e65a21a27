# SPDX-License-Identifier: BSD-3-Clause
"""Rings of shared memory by name: made, found, given up."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from patience import patient
from sharing import MakeProcess, sockets_left
from support import PacketSocket, eventually, frame

import rtap
from rtap import Mempool, NetNS, ShmRing
from rtap.cli import main
from rtap.sharing.places import Allowed, Peer, peer_of

pytestmark = pytest.mark.usefixtures("runtime_dir")

DEQUEUE = f"[bytes(m) for m in ring.dequeue(64, {patient(10)})]"


def test_one_makes_it_and_others_find_it(process: MakeProcess) -> None:
    a, b = process(), process()
    with ShmRing("pipe", 64) as ring:
        assert (ring.name, ring.size, ring.pool.size, ring.pool.shared) == ("pipe", 64, 256, True)
        for other in (a, b):
            other("ring = rtap.ShmRing('pipe')")
            assert other("ring.name, ring.size, ring.pool.size") == ["pipe", 64, 256]
        ring.enqueue(ring.pool.alloc_burst(2, [b"one", b"two"]))
        assert a(DEQUEUE) == [b"one", b"two"]
        assert b("ring.enqueue(ring.pool.alloc_burst(1, b'three'))") == 1
        assert [bytes(m) for m in ring.dequeue(64, timeout=patient(10))] == [b"three"]
        assert ring.counters()["copied_packets"] == 0


def test_a_waiting_process_wakes_up(process: MakeProcess) -> None:
    with ShmRing("pipe", 64) as ring:
        a = process()
        a("ring = rtap.ShmRing('pipe', 64)")
        a.begin("[bytes(m) for m in ring.dequeue(1, None)]")
        ring.enqueue(ring.pool.alloc_burst(1, b"wake up"))
        assert a.result() == [b"wake up"]


def test_of_several_that_make_it_one_does(process: MakeProcess) -> None:
    others = [process() for _ in range(4)]
    for other in others:
        other.begin("ring = rtap.ShmRing('pipe', 64)")
    for other in others:
        other.result()
    assert others[0]("ring.enqueue(ring.pool.alloc_burst(1, b'all have the same'))") == 1
    for other in others[1:]:
        assert other("ring.count") == 1


def test_what_does_not_fit_is_refused(process: MakeProcess) -> None:
    a = process()
    a("ring = rtap.ShmRing('pipe', 64)")
    with pytest.raises(ValueError, match="room for 64 frames, not 128"):
        ShmRing("pipe", 128)
    with Mempool(64, shared=True) as pool, pytest.raises(ValueError, match="pool"):
        ShmRing("pipe", 64, pool=pool)
    with pytest.raises(ValueError, match=r"pipe is a ring \(rtap.ShmRing\), not a device"):
        rtap.attach("pipe")
    with pytest.raises(ValueError, match="cannot be the name"):
        ShmRing("a/b", 64)
    with pytest.raises(TypeError, match="event_fd belongs to a descriptor"):
        ShmRing("pipe", 64, event_fd=0)
    with pytest.raises(TypeError, match="needs the pool"):
        ShmRing(0, 64)
    with pytest.raises(FileNotFoundError, match="has a ring 'other'; with a size, it is made"):
        ShmRing("other")
    for size in (0, 3, -64):
        with pytest.raises(ValueError, match=r"size|n must be"):
            ShmRing("other", size)
    assert sockets_left() == ["pipe"]
    assert a("ring.enqueue(ring.pool.alloc_burst(1, b'it goes on'))") == 1


@pytest.mark.root
def test_the_name_of_a_device(netns: NetNS) -> None:
    with (
        rtap.open("tap0", netns=netns) as dev,
        rtap.share(dev, name="tap"),
        pytest.raises(ValueError, match="'tap' is no ring"),
    ):
        ShmRing("tap", 64)


def test_the_name_goes_with_the_maker_and_the_ring_stays(process: MakeProcess) -> None:
    a, b = process(), process()
    a("ring = rtap.ShmRing('pipe', 64)")
    b("ring = rtap.ShmRing('pipe')")
    a("ring.enqueue(ring.pool.alloc_burst(1, b'left'))")
    a("ring.close()")
    assert sockets_left() == []
    assert b(DEQUEUE) == [b"left"]
    with pytest.raises(FileNotFoundError, match="pipe"):
        ShmRing("pipe")


@pytest.mark.parametrize("how", ["killed", "left"])
def test_a_maker_that_ends(process: MakeProcess, how: str) -> None:
    a = process()
    a("ring = rtap.ShmRing('pipe', 64)")
    (a.kill if how == "killed" else a.leave)()
    with pytest.raises(FileNotFoundError):
        ShmRing("pipe")
    with ShmRing("pipe", 32) as ring:
        assert ring.size == 32
    assert sockets_left() == []


def test_a_forgotten_ring_gives_its_name_up() -> None:
    ring = ShmRing("pipe", 64)
    assert sockets_left() == ["pipe"]
    del ring
    eventually(lambda: sockets_left() == [], "the name is free")


def test_by_descriptor(process: MakeProcess, tmp_path: Path) -> None:
    with ShmRing("pipe", 64) as ring:
        pool = ring.pool
        assert pool.fd is not None
        again = ShmRing(ring.fd, 64, pool=pool, event_fd=ring.event_fd)
        again.enqueue(pool.alloc_burst(1, b"the same ring"))
        again.close()
        assert [bytes(m) for m in ring.dequeue(1)] == [b"the same ring"]
        with open(tmp_path / "file", "w+b") as file, pytest.raises(ValueError, match="memfd"):
            ShmRing(file.fileno(), 64, pool=pool)
        with pytest.raises(ValueError, match="descriptor"):
            ShmRing(999, 64, pool=pool)


@pytest.mark.root
def test_workers_of_two_processes_in_a_row(netns: NetNS, process: MakeProcess) -> None:
    """One reads a device and fills a ring; the other empties it into another device."""

    with (
        rtap.open("a", netns=netns, queues=1) as a,
        rtap.open("b", netns=netns) as b,
        rtap.share(b),
        PacketSocket(netns, "a") as near,
        PacketSocket(netns, "b") as far,
        ShmRing("pipe", 256, pool=Mempool(2048, shared=True)) as ring,
    ):
        other = process()
        other(
            "ring = rtap.ShmRing('pipe'); dev = rtap.attach(name); worker = rtap.Worker();"
            "worker.forward(ring, (dev, 0), on_full='retry'); worker.start()",
            name=b.name,
        )
        worker = rtap.Worker()
        worker.forward((a, 0), ring, on_full="retry")
        with worker:
            for n in range(50):
                near.send(frame(n))
            assert far.frames(50) == [frame(n) for n in range(50)]
        # The pool of a device is another one: its frames are copied into the ring's.
        assert ring.counters()["copied_packets"] == ring.counters()["tx_packets"] >= 50
        other("worker.stop()")


def test_it_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with ShmRing("pipe", 64):
        assert main(["ps"]) == 0
        assert capsys.readouterr().out.startswith(f"pipe: ring of 64, process {os.getpid()} (")
        assert main(["ps", "--json"]) == 0
        (listed,) = json.loads(capsys.readouterr().out)["shared"]
        assert (listed["name"], listed["ring"], listed["error"]) == ("pipe", 64, "")


def test_groups_of_a_process_count() -> None:
    here, there = socket.socketpair()
    with here, there:
        peer = peer_of(here)
        assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())
        assert peer.groups == set(os.getgroups())
    stranger = Peer(1, 65533, 65533, frozenset({7}))
    assert not Allowed().lets_in(stranger)
    assert not Allowed(gids=frozenset({8})).lets_in(stranger)
    for gid in (7, 65533):
        assert Allowed(gids=frozenset({gid})).lets_in(stranger)
