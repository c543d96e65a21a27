# SPDX-License-Identifier: BSD-3-Clause
"""Worker: what it forwards, how it owns its queues, and how it ends."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from patience import patient, rate
from rigs import iproute, redirect, wire
from support import (
    PacketSocket,
    eventually,
    frame,
    none_left,
    open_fds,
    ping,
    seq_of,
    settle,
    skip_without_devices,
    skip_without_engine,
)
from workers import Line, both_ways, can_send, cpu_ticks, thread_id

import rtap
from rtap import Burst, DeviceStateError, EthDev, NetNS, RxOffload, TxOffload, Worker

LRO = {"rx_offloads": RxOffload.CHECKSUM | RxOffload.TCP_LRO, "tx_offloads": TxOffload.TCP_TSO}
WAITS = ("poll", "sleep", "adaptive")


# ---- forwarding


@pytest.mark.parametrize("options", [{}, LRO], ids=["plain", "offloads"])
def test_ping_and_tcp_both_ways(engine: str, options: dict[str, Any]) -> None:
    options = {**options, "engine": engine}
    with wire(a=options, b=options) as w:
        with both_ways(w.a, w.b) as worker:
            for ns, peer in ((w.left, "10.9.0.2"), (w.right, "10.9.0.1")):
                ping(ns, peer)
            w.transfer(5_000_000)
            w.transfer(5_000_000, back=True)
        stats = worker.stats()
        there, back = stats.routes
        for route in (there, back):
            assert route.rx_packets == route.tx_packets > 100
            assert (route.drops, route.error) == (0, "")
        assert (there.source, there.target) == ("rx queue 0 of a0", "tx queue 0 of b0")
        assert (back.source, back.target) == ("rx queue 0 of b0", "tx queue 0 of a0")
        assert stats.rx_packets == there.rx_packets + back.rx_packets
        assert stats.tx_packets == there.tx_packets + back.tx_packets
        assert w.a.stats().ipackets == w.b.stats().opackets == there.rx_packets
        assert w.b.stats().ipackets == w.a.stats().opackets == back.rx_packets
        size = w.a.stats().ibytes / w.a.stats().ipackets
        if options.get("rx_offloads"):
            assert size > 3000, "super-frames were split on the way"
        else:
            assert size < 1515


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"rx_offloads": RxOffload.CHECKSUM}, {}),
        ({"rx_offloads": RxOffload.CHECKSUM, "engine": "syscall"}, {"engine": "uring"}),
        (LRO | {"rx_offloads": LRO["rx_offloads"] | RxOffload.SCATTER, "data_room": 2048}, LRO),
        ({"mtu": 1400}, {"mtu": 1400, "tx_offloads": TxOffload.TCP_CKSUM}),
    ],
    ids=["checksum-plain", "engines", "scatter-lro", "plain-header"],
)
def test_tcp_between_unlike_devices(a: dict[str, Any], b: dict[str, Any]) -> None:
    skip_without_devices()
    skip_without_engine("uring")
    with wire(a=a, b=b) as w, both_ways(w.a, w.b) as worker:
        w.transfer(2_000_000)
        w.transfer(2_000_000, back=True)
        assert worker.stats().drops == 0
        assert w.a.stats().oerrors == w.b.stats().oerrors == 0


@pytest.mark.parametrize("wait", WAITS)
def test_waits(wait: str) -> None:
    skip_without_devices()
    with wire() as w, both_ways(w.a, w.b, wait=wait) as worker:
        assert worker.wait == wait
        w.transfer(1_000_000)
        time.sleep(0.1)  # it has gone to sleep
        start = time.monotonic()
        w.left.run(
            ["ping", "-c1", f"-W{patient(5):.0f}", "10.9.0.2"], check=True, capture_output=True
        )
        assert time.monotonic() - start < patient(2)
        if wait != "poll":
            tid = thread_id(worker)
            before = cpu_ticks(tid)
            time.sleep(0.5)
            used = (cpu_ticks(tid) - before) / os.sysconf("SC_CLK_TCK")
            assert used < 0.1, "an idle worker that sleeps uses the processor"


def test_a_worker_for_each_direction() -> None:
    skip_without_devices()
    with wire() as w:
        there, back = Worker(name="there"), Worker(name="back")
        there.forward((w.a, 0), (w.b, 0))
        back.forward((w.b, 0), (w.a, 0))
        with there, back:
            w.transfer(1_000_000)
        assert there.stats().tx_packets > 0
        assert back.stats().tx_packets > 0


def test_order_and_contents(netns: NetNS, engine: str) -> None:
    """Frames of all lengths, in bursts of several sizes."""
    with ExitStack() as stack:
        line = Line(stack, netns, engine=engine)
        wanted = [frame(seq, 14 + seq % 1500) for seq in range(900)]
        for size in (1, 7, 512):
            worker = Worker(burst=size)
            worker.forward((line.a, 0), (line.b, 0))
            for data in wanted:
                line.at_a.send(data)
            with worker:
                assert line.at_b.frames(len(wanted)) == wanted
        assert settle(line.a.pool) == 0


def test_many_queues_onto_one(netns: NetNS, engine: str) -> None:
    """Four routes share a transmit queue, and the rest go on when some end."""
    with ExitStack() as stack:
        a = stack.enter_context(rtap.open("a0", netns=netns, engine=engine, queues=4))
        b = stack.enter_context(rtap.open("b0", netns=netns, engine=engine))
        at_b = stack.enter_context(PacketSocket(netns, "b0", 0x0800))
        iproute(netns, "addr add 10.9.0.1/24 dev a0")
        iproute(netns, "neigh add 10.9.0.2 lladdr 02:00:00:00:00:09 dev a0")
        flows = [
            stack.enter_context(netns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM))
            for _ in range(64)
        ]
        worker = Worker()
        for q in range(4):
            worker.forward((a, q), (b, 0))
        with worker:
            expected = [0] * 4
            for round_ in range(4):
                for flow in flows:
                    flow.sendto(b"", ("10.9.0.2", 9))
                if round_ == 0:
                    assert len(at_b.frames(64)) == 64
                    counts = [route.rx_packets for route in worker.stats().routes]
                    assert sum(counts) == 64
                    assert sum(1 for n in counts if n) > 1
                else:
                    assert len(at_b.frames(sum(counts[round_:]))) == sum(counts[round_:])
                # A flow stays on its queue; flows on stopped queues are lost.
                for q in range(round_, 4):
                    expected[q] += counts[q]
                assert [route.rx_packets for route in worker.stats().routes] == expected
                assert worker.running
                assert not can_send(b)
                queue: Any = a.rx_queue(round_)
                queue.stop()
            assert worker.join(5)
            assert not worker.running
        assert [route.tx_packets for route in worker.stats().routes] == expected
        assert b.send(frame())  # the last route has released the queue


def test_it_works_while_python_holds_the_gil(netns: NetNS, engine: str) -> None:
    """Frames go round a closed loop for ever: a0 receives, b0 sends, the kernel redirects."""
    with (
        rtap.open("a0", netns=netns, engine=engine) as a,
        rtap.open("b0", netns=netns, engine=engine) as b,
        PacketSocket(netns, "a0") as at_a,
    ):
        redirect(netns, "b0", "a0")
        worker = Worker(wait="poll")
        worker.forward((a, 0), (b, 0))
        with worker:
            for seq in range(100):
                at_a.send(frame(seq))
            eventually(lambda: worker.stats().rx_packets > 1000, "the loop is closed")
            before = worker.stats().rx_packets
            ctypes.PyDLL(None).usleep(200_000)  # a call that holds the GIL
            moved = worker.stats().rx_packets - before
        assert moved > 1000
        stats = worker.stats()
        assert stats.rx_packets == stats.tx_packets + stats.drops


# ---- a target that is full


@contextmanager
def slow_line(ns: NetNS, engine: str) -> Iterator[tuple[EthDev, PacketSocket, EthDev, EthDev]]:
    """a0 receives from a packet socket; frames that b0 sends leave c0 at 20 Mb/s."""
    with (
        rtap.open("a0", netns=ns, engine=engine) as a,
        rtap.open("b0", netns=ns, engine=engine, sndbuf=20_000) as b,
        rtap.open("c0", netns=ns) as c,
        PacketSocket(ns, "a0") as at_a,
    ):
        redirect(ns, "b0", "c0", rate(20))
        yield a, at_a, b, c


def test_on_full_drop(netns: NetNS, engine: str) -> None:
    with slow_line(netns, engine) as (a, at_a, b, c):
        worker = Worker()
        worker.forward((a, 0), (b, 0), on_full="drop")
        for seq in range(300):
            at_a.send(frame(seq, 1000))
        with worker:
            eventually(lambda: worker.stats().rx_packets == 300, "all frames are read")
            eventually(
                lambda: worker.stats().tx_packets + worker.stats().drops == 300, "and dealt with"
            )
            stats = worker.stats()
            assert stats.drops > 0
            assert stats.tx_packets > 0
            assert stats.routes[0].retries == 0
            got = [seq_of(c.recv(5)) for _ in range(stats.tx_packets)]
            assert got == sorted(set(got))
            assert b.stats().opackets == stats.tx_packets
            assert b.stats().oerrors == 0
        assert settle(a.pool) == 0


def test_on_full_retry(netns: NetNS, engine: str) -> None:
    with slow_line(netns, engine) as (a, at_a, b, c):
        worker = Worker()
        worker.forward((a, 0), (b, 0), on_full="retry")
        for seq in range(300):
            at_a.send(frame(seq, 1000))
        with worker:
            assert [seq_of(c.recv(5)) for _ in range(300)] == list(range(300))
            eventually(lambda: worker.stats().tx_packets == 300, "the last one is counted")
            stats = worker.stats()
            assert (stats.rx_packets, stats.drops) == (300, 0)
            assert stats.routes[0].retries > 0
        assert settle(a.pool) == 0


def test_stopped_with_frames_in_hand(netns: NetNS, engine: str) -> None:
    with slow_line(netns, engine) as (a, at_a, b, c):
        worker = Worker()
        worker.forward((a, 0), (b, 0), on_full="retry")
        for seq in range(300):
            at_a.send(frame(seq, 1000))
        worker.start()
        eventually(lambda: worker.stats().routes[0].retries > 0, "the target is full")
        start = time.monotonic()
        worker.stop()
        assert time.monotonic() - start < patient(1)
        stats = worker.stats()
        assert stats.rx_packets == stats.tx_packets + stats.drops
        assert stats.drops > 0
        assert settle(a.pool) == 0
        assert [seq_of(c.recv(5)) for _ in range(stats.tx_packets)] == list(range(stats.tx_packets))


# ---- started, stopped


def test_life(line: Line) -> None:
    worker = Worker(name="w")
    assert repr(worker) == "<Worker w stopped, 0 routes>"
    with pytest.raises(DeviceStateError, match=r"no route: call forward\(\) first"):
        worker.start()
    worker.forward((line.a, 0), (line.b, 0))
    worker.stop()
    assert worker.stats().rx_packets == 0
    for n in range(1, 4):
        worker.start()
        assert worker.running
        assert repr(worker) == "<Worker w running, 1 routes>"
        with pytest.raises(DeviceStateError, match="is running"):
            worker.start()
        with pytest.raises(DeviceStateError, match="before the worker is started"):
            worker.forward((line.b, 0), (line.a, 0))
        for seq in range(n):
            line.passes(seq)
        assert worker.stats().rx_packets == n  # since it was started
        assert not worker.join(0)
        worker.stop()
        worker.stop()
        assert worker.join()
        assert not worker.running
        assert worker.stats().rx_packets == n
    worker.forward((line.b, 0), (line.a, 0))
    with worker:
        line.passes()
        line.at_b.send(frame(9))
        assert line.at_a.frames(1) == [frame(9)]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"wait": "nap"}, ValueError, "wait must be one of poll, sleep, adaptive, got 'nap'"),
        ({"wait": None}, ValueError, "None"),
        ({"cpu": 10_000}, ValueError, "cpu 10000 is not one of this process's [0"),
        ({"cpu": "0"}, ValueError, "cpu '0'"),
        ({"burst": 0}, ValueError, "burst must be 1..512, got 0"),
        ({"burst": 513}, ValueError, "burst must be 1..512, got 513"),
        ({"burst": 1.5}, TypeError, "float"),
        ({"name": 5}, TypeError, "str"),
    ],
)
def test_worker_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        Worker(**options)


def test_route_arguments(line: Line) -> None:
    a, b = line.a, line.b
    worker = Worker()
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: worker.forward((a, 1), (b, 0)), ValueError, "queue 1 is not set up"),
        (lambda: worker.forward((a, 0), (b, -1)), ValueError, "queue -1 is not set up"),
        (lambda: worker.forward((a, 0), (b, 0), on_full="wait"), ValueError, "got 'wait'"),
        (lambda: worker.forward(a, b), TypeError, "EthDev"),  # type: ignore[arg-type]
        (lambda: worker.forward((a, "0"), (b, 0)), ValueError, "'0'"),  # type: ignore[arg-type]
        (lambda: worker.forward((5, 0), (b, 0)), Exception, "int"),  # type: ignore[arg-type]
    ]
    for call, error, says in cases:
        with pytest.raises(error, match=re.escape(says)):
            call()
    worker.forward((a, 0), (b, 0))
    with pytest.raises(ValueError, match="rx queue 0 of a0 has a route already"):
        worker.forward((a, 0), (a, 0))
    with worker:
        line.passes()
    line.a.close()
    with pytest.raises(DeviceStateError, match="closed"):
        worker.forward((a, 0), (b, 0))


def test_a_device_that_is_not_started(line: Line) -> None:
    worker = Worker()
    worker.forward((line.a, 0), (line.b, 0))
    for dev in (line.a, line.b):
        dev.stop()
        with pytest.raises(DeviceStateError, match="not started"):
            worker.start()
        assert not worker.running
        dev.start()
    with worker:
        line.passes()


def test_start_in_use_gives_back_what_it_took(netns: NetNS) -> None:
    with ExitStack() as stack:
        line = Line(stack, netns, queues=2)
        first, second = Worker(name="first"), Worker(name="second")
        first.forward((line.a, 1), (line.b, 1))
        second.forward((line.a, 0), (line.b, 0))
        second.forward((line.a, 1), (line.b, 0))
        with first:
            before = open_fds()
            for _ in range(3):
                with pytest.raises(DeviceStateError, match="rx queue 1 of a0 is in use"):
                    second.start()
                assert not second.running
            none_left(before, but=1)  # the ring that the first worker's thread makes
            assert line.a.rx_burst(0) is not None
            assert line.b.send(frame(), queue=0)
            assert first.running
        with second:
            assert second.running


def test_the_queues_of_a_worker_are_its_own(line: Line) -> None:
    with both_ways(line.a, line.b) as worker:
        for call in (
            lambda: line.a.rx_burst(0),
            lambda: line.a.rx_burst(0, timeout=1),
            lambda: line.a.recv(0),
            lambda: line.b.tx_burst(0, Burst()),
            lambda: line.b.send(frame()),
            lambda: line.a.rx_queue(0).purge(),  # type: ignore[attr-defined]
        ):
            with pytest.raises(RuntimeError, match="in use by another thread or worker"):
                call()
        line.passes()
        assert worker.stats().drops == 0
    line.at_a.send(frame(3))
    assert line.a.recv(5) == frame(3)
    assert line.b.send(frame(4))


def test_a_frame_is_not_lost_to_a_refused_send(line: Line) -> None:
    burst = line.b.pool.alloc_burst(3, frame(1))
    with both_ways(line.a, line.b):
        with pytest.raises(DeviceStateError):
            line.b.tx_burst(0, burst)
        assert len(burst) == 3
    assert line.b.tx_burst(0, burst) == 3


def test_pinned(line: Line) -> None:
    for cpu in sorted(os.sched_getaffinity(0)):
        worker = both_ways(line.a, line.b, cpu=cpu, name=f"pinned{cpu}")
        assert worker.cpu == cpu
        with worker:
            line.passes()
            assert os.sched_getaffinity(thread_id(worker)) == {cpu}
        assert os.sched_getaffinity(0) >= {cpu}
