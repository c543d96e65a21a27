# SPDX-License-Identifier: BSD-3-Clause
"""Frames of every length, 14 to 65535 bytes, byte for byte, in both directions.

The upper bound is the kernel's: the largest MTU of a TAP device is 65521, and a packet socket
refuses to send more than the MTU and an Ethernet header.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest
from support import ETHERTYPE, LOCAL, REMOTE, PacketSocket, Tap, pattern

from rtap import Mempool, NetNS

pytestmark = pytest.mark.root

MTU = 65521
LENGTHS = range(14, MTU + 14 + 1)
AT_ONCE = 64
PERIOD = 251
SMALL_ROOM = 2048

# Frame n is a 22-byte head followed by these bytes from n % PERIOD on, so that two frames which
# meet in a slot or in a queue differ in every byte.
BODY = pattern(0, 66_000 + PERIOD)
BODY_VIEW = memoryview(BODY)
HEAD = LOCAL + REMOTE + struct.pack("!H", ETHERTYPE)


def head(length: int) -> bytes:
    return (HEAD + struct.pack("!Q", length))[:length]


def body(length: int) -> memoryview:
    start = length % PERIOD
    return BODY_VIEW[start : start + max(0, length - 22)]


def check(data: bytes | bytearray | memoryview, length: int) -> None:
    """Compares in place: two gigabytes go through here in a test."""
    assert len(data) == length
    assert data[:22] == head(length)
    if not BODY.startswith(memoryview(data)[22:], length % PERIOD):
        pytest.fail(f"the frame of {length} bytes arrived with other bytes than were sent")


def batches() -> Iterator[range]:
    for i in range(0, len(LENGTHS), AT_ONCE):
        yield LENGTHS[i : i + AT_ONCE]


@pytest.fixture(params=[True, False], ids=["vnet", "plain"])
def tap(netns: NetNS, request: pytest.FixtureRequest) -> Iterator[Tap]:
    with Tap(netns, mtu=MTU, vnet_hdr=request.param) as device:
        yield device


@pytest.fixture
def packets(tap: Tap) -> PacketSocket:
    return tap.packets(rcvbuf=256 << 20)


@pytest.mark.parametrize("room", [MTU + 15, SMALL_ROOM], ids=["single", "chains"])
def test_every_length_sent(tap: Tap, packets: PacketSocket, engine: str, room: int) -> None:
    slots = AT_ONCE * -(-(MTU + 15) // room)
    pool = Mempool(slots, room)
    tx = tap.tx(engine=engine)
    buffer = bytearray(1 << 17)
    view = memoryview(buffer)
    for lengths in batches():
        burst = pool.alloc_burst(len(lengths), [body(n) for n in lengths])
        for mbuf, n in zip(burst, lengths, strict=True):
            # The head goes into the headroom.
            first = head(n)
            mbuf.prepend(len(first))[:] = first
        del mbuf
        assert tx.tx_burst(burst) == len(lengths)
        for n in lengths:
            check(view[: packets.recv_into(buffer)], n)
    assert packets.drain() == []
    assert pool.in_use == 0
    counters = tx.counters()
    assert (counters["packets"], counters["errors"]) == (len(LENGTHS), 0)
    assert counters["bytes"] == sum(LENGTHS)


@pytest.mark.parametrize("room", [MTU + 15, SMALL_ROOM], ids=["single", "chains"])
def test_every_length_received(tap: Tap, packets: PacketSocket, engine: str, room: int) -> None:
    chains = room == SMALL_ROOM
    pool = Mempool(2 * AT_ONCE * -(-(MTU + 15) // room), room)
    rx = tap.rx(pool, engine=engine, max_frame=MTU + 14, scatter=chains)
    for lengths in batches():
        for n in lengths:
            packets.sendmsg([head(n), body(n)])
        burst = rx.rx_burst(AT_ONCE, 5)
        assert len(burst) == len(lengths)
        for mbuf, n in zip(burst, lengths, strict=True):
            assert mbuf.nb_segs == -(-n // room)
            check(bytes(mbuf) if chains else mbuf.data, n)
        del burst, mbuf
    assert len(rx.rx_burst()) == 0
    assert pool.in_use == 0
    counters = rx.counters()
    assert counters["packets"] == len(LENGTHS)
    assert counters["bytes"] == sum(LENGTHS)
    assert counters["errors"] == counters["nombuf"] == 0


def test_upper_bound_is_the_kernels(tap: Tap, packets: PacketSocket, engine: str) -> None:
    """A packet socket refuses a longer frame, and frames that it sent before are not lost."""
    rx = tap.rx(Mempool(8, MTU + 15), engine=engine, max_frame=MTU + 14)
    packets.sendmsg([head(MTU + 14), body(MTU + 14)])
    with pytest.raises(OSError, match="long") as refused:
        packets.sendmsg([head(MTU + 15), body(MTU + 15)])
    assert refused.value.errno == errno.EMSGSIZE
    burst = rx.rx_burst(8, 5)
    assert len(burst) == 1
    check(burst[0].data, MTU + 14)
    with pytest.raises(OSError, match="mtu"):
        tap.set("mtu", str(MTU + 1))


def test_sends_are_not_limited_by_the_mtu(tap: Tap, packets: PacketSocket, engine: str) -> None:
    pool = Mempool(100, 4096)
    tx = tap.tx(engine=engine)
    tap.set("mtu", "1500")
    for n in (1515, 9000, 65535, 65536, 65549, 65600):
        assert tx.tx_burst(pool.alloc_burst(1, head(n) + body(n))) == 1
        assert [len(f) for f in packets.frames(1)] == [n]
    assert tx.counters()["errors"] == 0


def test_a_full_buffer_is_one_byte_short_of_legal(
    tap: Tap, packets: PacketSocket, engine: str
) -> None:
    """The longest frame leaves one byte free, so a full buffer means a truncated frame."""
    with pytest.raises(ValueError, match=r"65536.*65535"):
        tap.rx(Mempool(8, MTU + 14), engine=engine, max_frame=MTU + 14)
    rx = tap.rx(Mempool(8, MTU + 14), engine=engine, max_frame=MTU + 13)
    for n in (MTU + 13, MTU + 14, 60):
        packets.sendmsg([head(n), body(n)])
    got = [bytes(m) for m in rx.rx_burst(8, 5)]
    assert [len(f) for f in got] == [MTU + 13, 60]
    check(got[0], MTU + 13)
    assert rx.counters()["truncated"] == 1
