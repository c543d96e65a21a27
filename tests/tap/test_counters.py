# SPDX-License-Identifier: BSD-3-Clause
"""Every counter of a queue is provoked: it moves by the right amount, and no other does.

The other end of the descriptor is a datagram socket, which can send what the kernel never would:
any virtio-net header, any length. The only thing it cannot do is to be down.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import pytest
from rigs import Shape
from support import BROADCAST, LOCAL, Tap, frame, ip

import rtap
from rtap import Burst, Mempool, NetNS, RxOffload, Stats
from rtap._ring import RxQueue, TxQueue
from rtap.ethdev.stats import queue_stats, queue_xstats

GROUP = bytes.fromhex("01005e000001")
ROOM = 2048
LONGEST = 1522

NEEDS_CSUM, DATA_VALID = 1, 2
GSO_TCPV4 = 1
PLAIN = bytes(10)


class Pair:
    """A receive and a send queue on one descriptor, and the socket at its other end."""

    def __init__(self, stack: ExitStack, engine: str) -> None:
        ours, self.theirs = map(
            stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        )
        ours.setblocking(False)
        self.theirs.setblocking(False)
        self.pool = stack.enter_context(Mempool(64, ROOM))
        self.rx = RxQueue(
            ours.fileno(),
            self.pool,
            name="pair",
            max_frame=LONGEST,
            offloads=RxOffload.UDP_CKSUM,
            engine=engine,
        )
        self.tx = TxQueue(ours.fileno(), name="pair", engine=engine)
        for queue in (self.rx, self.tx):
            stack.callback(queue.close)
            queue.start()

    def receive(self, data: bytes, header: bytes = PLAIN, arrives: bool = True) -> None:
        """Sends one frame from the other end, which is received or counted as an error."""
        assert self.theirs.send(header + data) == len(header) + len(data)
        assert [bytes(m) for m in self.rx.rx_burst(8)] == [data] * arrives

    def send(self, *frames: bytes) -> None:
        """Sends frames to the other end, where all arrive."""
        assert self.tx.tx_burst(self.pool.alloc_burst(len(frames), list(frames))) == len(frames)
        assert [self.theirs.recv(1 << 16)[10:] for _ in frames] == list(frames)


@pytest.fixture
def pair(engine: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, engine)


def moved(queue: RxQueue | TxQueue) -> dict[str, int]:
    """All counters that are not zero, of both kinds."""
    return {name: n for name, n in (queue.counters() | queue.xcounters()).items() if n}


def counted(*lengths: int, kind: str = "unicast", **more: int) -> dict[str, int]:
    """The counts for frames that pass, with others added."""
    out = {"packets": len(lengths), "bytes": sum(lengths), f"{kind}_packets": len(lengths)} | more
    for length in lengths:
        size = next(name for most, name in SIZES if length <= most)
        out[size] = out.get(size, 0) + 1
    return out


SIZES = (
    (64, "size_64_packets"),
    (127, "size_65_to_127_packets"),
    (255, "size_128_to_255_packets"),
    (511, "size_256_to_511_packets"),
    (1023, "size_512_to_1023_packets"),
    (1518, "size_1024_to_1518_packets"),
    (1 << 16, "size_above_1518_packets"),
)

#: TCP with 1000 bytes of payload and an unfinished checksum.
TCP = bytes(Shape().packet(bytes(1000)))


def header(flags: int, gso: int = 0, size: int = 0, start: int = 34, offset: int = 16) -> bytes:
    return struct.pack("<BBHHHH", flags, gso, 0, size, start, offset)


# ---- receive


def rx_sizes(pair: Pair) -> dict[str, int]:
    lengths = [length for most, _ in SIZES for length in (most, most + 1) if length <= LONGEST]
    for n, length in enumerate(lengths):
        pair.receive(frame(n, length))
    return counted(*lengths)


def rx_broadcast(pair: Pair) -> dict[str, int]:
    pair.receive(frame(1, 100, dst=BROADCAST))
    return counted(100, kind="broadcast")


def rx_multicast(pair: Pair) -> dict[str, int]:
    pair.receive(frame(1, 100, dst=GROUP))
    return counted(100, kind="multicast")


def rx_lro(pair: Pair) -> dict[str, int]:
    pair.receive(TCP, header(NEEDS_CSUM, GSO_TCPV4, 500))
    return counted(len(TCP), lro_packets=1, checksum_none=1)


def rx_checksum_none(pair: Pair) -> dict[str, int]:
    pair.receive(TCP, header(NEEDS_CSUM))
    return counted(len(TCP), checksum_none=1)


def rx_checksum_good(pair: Pair) -> dict[str, int]:
    pair.receive(TCP, header(DATA_VALID))
    return counted(len(TCP), checksum_good=1)


def rx_checksum_unknown(pair: Pair) -> dict[str, int]:
    """TCP's checksums are not checked here, so neither wrong nor right ones count."""
    pair.receive(TCP)
    pair.receive(Shape().unfinished(bytes(1000)))
    return counted(len(TCP), len(TCP))


def rx_checksum_bad(pair: Pair) -> dict[str, int]:
    """UDP's checksums are checked."""
    good = Shape(proto="udp").finished(b"good")
    pair.receive(good)
    pair.receive(good[:-1] + b"?")
    return counted(len(good), len(good), checksum_good=1, checksum_bad=1)


def rx_truncated(pair: Pair) -> dict[str, int]:
    pair.receive(bytes(ROOM), arrives=False)
    return {"errors": 1, "truncated": 1, "truncated_packets": 1}


def rx_bad_vnet_hdr(pair: Pair) -> dict[str, int]:
    pair.receive(TCP, header(NEEDS_CSUM, start=len(TCP)), arrives=False)
    return {"errors": 1, "bad_vnet_hdr": 1, "bad_header_packets": 1}


def rx_read_errors(pair: Pair) -> dict[str, int]:
    pair.receive(b"", PLAIN[:5], arrives=False)
    return {"errors": 1, "read_errors": 1}


def rx_nombuf(pair: Pair) -> dict[str, int]:
    held = pair.pool.alloc_burst(64)
    assert len(pair.rx.rx_burst(8)) == 0  # nothing was lost by it
    pair.receive(frame(1, 100), arrives=False)
    held.free()
    assert [bytes(m) for m in pair.rx.rx_burst(8)] == [frame(1, 100)]
    return counted(100, nombuf=1, mbuf_alloc_failed=1)


def rx_filtered(pair: Pair) -> dict[str, int]:
    pair.rx.set_filter(True, addresses=[LOCAL])
    for _ in range(3):
        pair.receive(frame(1, 100, dst=b"\x02\x00\x00\x00\x00\x09"), arrives=False)
    pair.receive(frame(2, 100, dst=GROUP), arrives=False)
    pair.receive(frame(3, 100))
    return counted(100, filtered_unicast_packets=3, filtered_multicast_packets=1)


def rx_purged(pair: Pair) -> dict[str, int]:
    for n in range(3):
        pair.theirs.send(PLAIN + frame(n, 100))
    assert pair.rx.purge() == 3
    return {"purged_packets": 3}


# ---- send


def tx_sizes(pair: Pair) -> dict[str, int]:
    lengths = [length for most, _ in SIZES for length in (most, most + 1) if length <= LONGEST]
    pair.send(*(frame(n, length) for n, length in enumerate(lengths)))
    return counted(*lengths)


def tx_broadcast(pair: Pair) -> dict[str, int]:
    pair.send(frame(1, 100, dst=BROADCAST))
    return counted(100, kind="broadcast")


def tx_multicast(pair: Pair) -> dict[str, int]:
    pair.send(frame(1, 100, dst=GROUP))
    return counted(100, kind="multicast")


def tx_checksum(pair: Pair) -> dict[str, int]:
    mbuf = Shape().request(pair.pool.alloc(Shape().unfinished(bytes(1000))))
    assert pair.tx.tx_burst(Burst([mbuf])) == 1
    assert pair.theirs.recv(1 << 16)[0] == NEEDS_CSUM
    return counted(len(TCP), checksum_offload=1)


def tx_tso(pair: Pair) -> dict[str, int]:
    mbuf = Shape().request(pair.pool.alloc(Shape().unfinished(bytes(1000))), 500)
    assert pair.tx.tx_burst(Burst([mbuf])) == 1
    assert pair.theirs.recv(1 << 16)[1] == GSO_TCPV4
    return counted(len(TCP), tso_packets=1, checksum_offload=1)


def tx_software_gso(pair: Pair) -> dict[str, int]:
    """As on a kernel without super-frames of TCP over IPv4."""
    pair.tx.software_gso = 1
    mbuf = Shape().request(pair.pool.alloc(Shape().unfinished(bytes(1000))), 500)
    assert pair.tx.tx_burst(Burst([mbuf])) == 1
    segments = Shape().segments(bytes(1000), 500)
    assert [pair.theirs.recv(1 << 16) for _ in segments] == [PLAIN + f for f in segments]
    return counted(*map(len, segments), software_gso_packets=1)


def tx_multiseg(pair: Pair) -> dict[str, int]:
    with Mempool(2, 64) as small:
        burst = small.alloc_burst(1, frame(1, 100))
        assert burst[0].nb_segs == 2
        assert pair.tx.tx_burst(burst) == 1
    assert pair.theirs.recv(1 << 16)[10:] == frame(1, 100)
    return counted(100, multiseg_packets=1)


def tx_refused(pair: Pair) -> dict[str, int]:
    mbuf = Shape().request(pair.pool.alloc(Shape().unfinished(bytes(1000))))
    mbuf.l3_len = 4000
    burst = Burst([mbuf, pair.pool.alloc(frame(1, 100))])
    assert pair.tx.tx_burst(burst) == 2
    return counted(100, errors=1, refused=1, bad_request_packets=1)


def tx_header_does_not_fit(pair: Pair) -> dict[str, int]:
    """A frame that came with an unfinished checksum, and has lost the field for it since."""
    assert pair.theirs.send(header(NEEDS_CSUM) + TCP) == 10 + len(TCP)
    (mbuf,) = pair.rx.rx_burst(1)
    pair.rx.reset_counters()
    pair.rx.reset_xcounters()
    mbuf.trim(mbuf.pkt_len - 40)
    assert pair.tx.tx_burst(Burst([mbuf])) == 1
    return {"errors": 1, "refused": 1, "bad_request_packets": 1}


def tx_kernel_refused(pair: Pair) -> dict[str, int]:
    """The frame has too many segments for writev(2)."""
    with Mempool(1100, 64) as tiny:
        burst = tiny.alloc_burst(1, frame(1, 1100 * 64))
        assert burst[0].nb_segs == 1100
        assert pair.tx.tx_burst(burst) == 1
    return {"errors": 1, "refused": 1, "kernel_refused_packets": 1}


def tx_full(pair: Pair) -> dict[str, int]:
    """The other end's queue is full of datagrams."""
    sent = 0
    while pair.tx.tx_burst(burst := pair.pool.alloc_burst(1, frame(0, 100))) == 1:
        sent += 1
    assert len(burst) == 1
    assert sent > 0
    return counted(*[100] * sent, full=1)


def tx_no_copy(pair: Pair) -> dict[str, int]:
    """A shared frame requests a change, and there is no mbuf for a copy."""
    shape = Shape(proto="udp")
    with Mempool(1, ROOM) as one:
        mbuf = shape.request(one.alloc(shape.unfinished(bytes(40))))
        burst = Burst([mbuf])
        assert pair.tx.tx_burst(burst) == 0
        assert len(burst) == 1
        del burst, mbuf
    return {"full": 1}


CASES: dict[str, Callable[[Pair], dict[str, int]]] = {
    name: case
    for name, case in list(globals().items())
    if name.startswith(("rx_", "tx_")) and callable(case)
}


@pytest.mark.parametrize("case", CASES)
def test_what_moves(pair: Pair, case: str) -> None:
    queue, other = (pair.rx, pair.tx) if case.startswith("rx") else (pair.tx, pair.rx)
    expected = CASES[case](pair)
    assert moved(queue) == expected
    assert moved(other) == {}
    queue.reset_counters()
    queue.reset_xcounters()
    assert moved(queue) == {}


def test_down(tap: Tap, engine: str) -> None:
    with Mempool(8) as pool:
        tx = tap.tx(engine=engine)
        tap.set("down")
        assert tx.tx_burst(pool.alloc_burst(3, frame(1, 100))) == 3
        assert moved(tx) == {"errors": 3, "down": 3, "link_down_packets": 3}
        tx.close()


def test_no_counter_is_left_out() -> None:
    elsewhere = {
        "down",
        "link_down_packets",
        "unsent",
        "unsent_packets",
        "gro_merged_packets",
    }  # above; test_tx_gro, test_rx_gso_limits, test_gso_fallback
    split = {"gso_super_packets", "gso_split_packets", "gso_too_long_packets", "stopped_packets"}
    seen: dict[str, set[str]] = {"rx": {"too_long", *split}, "tx": elsewhere}
    for name, case in CASES.items():
        with ExitStack() as stack:
            pair = Pair(stack, "syscall")
            seen[name[:2]] |= case(pair).keys()
    assert seen["rx"] == pair.rx.counters().keys() | pair.rx.xcounters().keys()
    assert seen["tx"] == pair.tx.counters().keys() | pair.tx.xcounters().keys()


def test_a_tun_device_has_no_destinations(netns: NetNS, engine: str) -> None:
    """An IP header stands where an Ethernet address would."""
    with rtap.open("t0", netns=netns, engine=engine, mode="tun") as dev:
        ip(netns, "addr", "add", "10.0.0.1/24", "dev", "t0")
        with netns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.sendto(bytes(72), ("10.0.0.2", 9))
        packet = dev.recv(5)
        assert len(packet) == 100
        assert dev.send(packet)
        assert {name: n for name, n in dev.xstats().items() if n} == {
            "rx_q0_size_65_to_127_packets": 1,
            "tx_q0_size_65_to_127_packets": 1,
        }
        stats = dev.stats()
        assert (stats.ipackets, stats.ibytes) == (stats.opackets, stats.obytes) == (1, 100)


# ---- a device's sums of its queues' counters


class Fake:
    """A queue whose counters are all different: ``first``, then one more each."""

    def __init__(self, names: Iterable[str], first: int) -> None:
        self._names, self._first = list(names), first

    def counters(self) -> dict[str, int]:
        return {name: self._first + n for n, name in enumerate(self._names)}

    xcounters = counters


def test_device_statistics_from_queues(pair: Pair) -> None:
    """Queue 1 is not set up."""
    rx = {q: Fake(pair.rx.counters(), 100 * q + 1000) for q in (0, 2)}
    tx = {q: Fake(pair.tx.counters(), 100 * q + 5000) for q in (0, 2)}

    def each(queues: dict[int, Fake], name: str) -> list[int]:
        return [queues[q].counters()[name] if q in queues else 0 for q in range(3)]

    assert queue_stats(rx, tx, 3, 3) == Stats(
        ipackets=sum(each(rx, "packets")),
        opackets=sum(each(tx, "packets")),
        ibytes=sum(each(rx, "bytes")),
        obytes=sum(each(tx, "bytes")),
        imissed=0,
        ierrors=sum(each(rx, "errors")),
        oerrors=sum(each(tx, "errors")),
        rx_nombuf=sum(each(rx, "nombuf")),
        q_ipackets=each(rx, "packets"),
        q_opackets=each(tx, "packets"),
        q_ibytes=each(rx, "bytes"),
        q_obytes=each(tx, "bytes"),
        q_errors=each(rx, "errors"),
    )
    xstats = queue_xstats(rx, tx)
    assert xstats == {
        f"{way}_q{q}_{name}": n
        for way, queues in (("rx", rx), ("tx", tx))
        for q, queue in queues.items()
        for name, n in queue.xcounters().items()
    }
