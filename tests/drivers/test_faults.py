# SPDX-License-Identifier: BSD-3-Clause
"""Faults of the C driver that no other test rules out; docs/faults.md lists all."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

import pytest
from rigs import MAC_A, MAC_B, Shape
from support import PacketSocket, Tap, frame, python, settle, skip_without_devices

import rtap
from rtap import Burst, Mempool, NetNS
from rtap.control.channel import hold

pytestmark = pytest.mark.root

BIG = 64 << 20


def test_no_read_is_left_posted(netns: NetNS, engine: str) -> None:
    """A frame that arrives between bursts stays in the kernel.

    No buffer is posted for it, and its sender wakes no thread.
    """
    pool = Mempool(64)
    with Tap(netns, vnet_hdr=False) as tap, tap.packets() as peer:
        rx = tap.rx(pool, engine=engine)
        for seq in range(20):
            assert len(rx.rx_burst(32, 0.001 if seq % 2 else 0)) == 0
            assert pool.in_use == 0
            peer.send(frame(seq))
            assert tap.waiting()
            assert os.read(tap.fd, 2048) == frame(seq)
        assert rx.counters()["packets"] == 0


def test_more_frames_than_the_ring_has_entries(netns: NetNS, engine: str) -> None:
    """In both directions, each frame arrives once and in order, and no slot is lost."""
    n = 3000
    frames = [frame(seq) for seq in range(n)]
    pool = Mempool(n)
    with Tap(netns, vnet_hdr=False) as tap, tap.packets(rcvbuf=BIG) as peer:
        tap.set("txqueuelen", str(n))
        rx = tap.rx(pool, engine=engine, nb_desc=32768)
        tx = tap.tx(engine=engine, nb_desc=32768)
        for _ in range(10):
            burst = pool.alloc_burst(n, frames)
            assert tx.tx_burst(burst) == n
            assert len(burst) == 0
            assert settle(pool) == 0
            assert peer.drain() == frames
            for each in frames:
                peer.send(each)
            burst = rx.rx_burst(n)
            assert [bytes(m) for m in burst] == frames
            del burst
            assert settle(pool) == 0
        assert rx.counters()["packets"] == tx.counters()["packets"] == 10 * n


@pytest.mark.parametrize("front", [0, 1, 3])
def test_count_after_an_allocation_failed(netns: NetNS, engine: str, front: int) -> None:
    """A frame in the middle of a burst needs a buffer, and there is none.

    The frames before it are sent, and only these are counted.
    """
    shape = Shape(4, "udp")
    pool, small = Mempool(64), Mempool(2)
    with Tap(netns, vnet_hdr=False) as tap, tap.packets(3) as peer:
        tx = tap.tx(engine=engine)
        shared = shape.request(small.alloc(shape.unfinished(b"shared")))
        in_the_way = small.alloc()
        before = pool.alloc_burst(front, [frame(seq) for seq in range(front)])
        behind = pool.alloc_burst(2, [frame(8), frame(9)])
        burst = Burst([*before, shared, *behind])
        before.free()
        behind.free()
        for went in (front, 0, 0):
            assert tx.tx_burst(burst) == went
            assert len(burst) == 3
            assert bytes(burst[0]) == shape.unfinished(b"shared")
            assert peer.drain() == [frame(seq) for seq in range(went)]
            counters = tx.counters()
            assert (counters["packets"], counters["errors"]) == (front, 0)
            assert pool.in_use == 2
        in_the_way.free()
        assert tx.tx_burst(burst) == 3
        assert peer.drain() == [shape.finished(b"shared"), frame(8), frame(9)]
        assert tx.counters()["packets"] == front + 3
        assert pool.in_use == 0
        assert bytes(shared) == shape.unfinished(b"shared")


SUBMIT_FAILS = """
import errno
from support import Tap, block_io_uring, frame, quiet_netns
from rtap import Mempool

with quiet_netns() as ns, Tap(ns, vnet_hdr=False) as tap:
    peer = tap.packets(rcvbuf=1 << 24)
    pool = Mempool(256)
    rx, tx = tap.rx(pool, engine="uring"), tap.tx(engine="uring")
    assert tx.tx_burst(pool.alloc_burst(64, [frame(n) for n in range(64)])) == 64
    assert peer.drain() == [frame(n) for n in range(64)]
    frames = [frame(n) for n in range(100, 164)]
    burst = pool.alloc_burst(64, frames)
    kept = list(burst)
    peer.send(frame(7))
    assert rx.rx_burst(1) and pool.in_use == 64
    peer.send(frame(8))

    block_io_uring(errno.EPERM)  # io_uring_enter fails from here on

    for attempt in range(3):
        try:
            assert tx.tx_burst(burst) == 0
        except OSError as exc:
            assert exc.errno == errno.EPERM and attempt > 0, exc
        # All of them are still ours: not freed, not sent, not changed.
        assert len(burst) == 64 and pool.in_use == 64, (len(burst), pool.in_use)
        assert [bytes(m) for m in burst] == [bytes(m) for m in kept] == frames
        assert peer.drain() == []
        try:  # the broken ring is closed by now, and there is no other
            assert len(rx.rx_burst(32)) == 0
        except OSError as exc:
            assert exc.errno == errno.EPERM, exc
        assert pool.in_use == 64
    assert tx.counters()["packets"] == 64

    # What waited for the kernel is there for an engine that works, once.
    rx.close(), tx.close()
    rx, tx = tap.rx(pool, engine="syscall"), tap.tx(engine="syscall")
    assert tx.tx_burst(burst) == 64
    assert peer.drain() == frames
    assert [bytes(m) for m in rx.rx_burst(32)] == [frame(8)]
    del kept
    assert pool.in_use == 0, pool.in_use
print("fine")
"""


def test_submit_that_fails_frees_nothing() -> None:
    """The kernel refuses the whole batch."""
    skip_without_devices()
    done = python(SUBMIT_FAILS)
    assert (done.stdout, done.stderr) == ("fine\n", "")


class Stale:
    """Replaces a channel's socket in which answers to earlier requests wait."""

    REQUEST = struct.Struct("=IHHII BxHiII")  # struct nlmsghdr, struct ifinfomsg
    RTM_GETLINK, NLM_F_REQUEST, LOOPBACK = 18, 1, 1

    def __init__(self, real: Any) -> None:
        self.real = real
        self.sent = 0

    def send(self, message: bytearray) -> int:
        for sequence in (0, 0xDEAD, 0xFFFFFFFF):
            self.real.send(
                self.REQUEST.pack(
                    self.REQUEST.size,
                    self.RTM_GETLINK,
                    self.NLM_F_REQUEST,
                    sequence,
                    0,
                    socket.AF_UNSPEC,
                    0,
                    self.LOOPBACK,
                    0,
                    0,
                )
            )
            self.sent += 1
        return int(self.real.send(message))

    def recvfrom(self, size: int) -> Any:
        return self.real.recvfrom(size)

    def close(self) -> None:
        self.real.close()


def test_a_late_answer_is_not_taken_for_the_right_one(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rtap.open("t0", netns=netns, mac=MAC_A) as dev:
        with hold(netns.fd) as channel:
            stale = Stale(channel._sock)
            monkeypatch.setattr(channel, "_sock", stale)
        assert dev.mac == MAC_A
        dev.mac = MAC_B
        assert dev.mac == MAC_B
        dev.mtu = 1400
        info = dev.info()
        assert (info.ifname, info.mtu, info.mac) == ("t0", 1400, MAC_B)
        assert info.if_index != Stale.LOOPBACK
        assert dev.link().link_status
        assert stale.sent > 20
        with PacketSocket(netns, "t0") as peer:
            assert dev.send(frame(1))
            assert peer.frames(1) == [frame(1)]
