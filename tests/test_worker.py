# SPDX-License-Identifier: BSD-3-Clause
"""Worker: what it forwards, whom it keeps off its queues, and how it ends."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from rigs import iproute, redirect, wire
from support import (
    PacketSocket,
    child_environment,
    eventually,
    fds,
    frame,
    links,
    python,
    seq_of,
    settle,
    skip_without_devices,
    skip_without_engine,
)

import rtap
from rtap import Burst, DeviceStateError, EthDev, Mempool, NetNS, RxOffload, TxOffload, Worker

LRO = {"rx_offloads": RxOffload.CHECKSUM | RxOffload.TCP_LRO, "tx_offloads": TxOffload.TCP_TSO}
WAITS = ("poll", "sleep", "adaptive")


def both_ways(a: EthDev, b: EthDev, **options: Any) -> Worker:
    worker = Worker(**options)
    worker.forward((a, 0), (b, 0))
    worker.forward((b, 0), (a, 0))
    return worker


def thread_id(worker: Worker) -> int:
    (thread,) = (t for t in threading.enumerate() if t.name == worker.name)
    assert thread.native_id is not None
    return thread.native_id


def cpu_ticks(tid: int) -> int:
    with open(f"/proc/self/task/{tid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


class Line:
    """Devices ``a`` and ``b`` in one namespace, each with a packet socket at the kernel's end."""

    def __init__(self, stack: ExitStack, ns: NetNS, **options: Any) -> None:
        self.ns = ns
        self.a = stack.enter_context(rtap.open("a0", netns=ns, **options))
        self.b = stack.enter_context(rtap.open("b0", netns=ns, **options))
        self.at_a = stack.enter_context(PacketSocket(ns, "a0", rcvbuf=1 << 22))
        self.at_b = stack.enter_context(PacketSocket(ns, "b0", rcvbuf=1 << 22))

    def passes(self, seq: int = 1) -> None:
        """Fails unless a frame goes from a to b."""
        self.at_a.send(frame(seq))
        assert self.at_b.frames(1) == [frame(seq)]


@pytest.fixture
def line(netns: NetNS) -> Iterator[Line]:
    with ExitStack() as stack:
        yield Line(stack, netns)


# ---- forwarding


@pytest.mark.parametrize("options", [{}, LRO], ids=["plain", "offloads"])
def test_ping_and_tcp_both_ways(engine: str, options: dict[str, Any]) -> None:
    options = {**options, "engine": engine}
    with wire(a=options, b=options) as w:
        with both_ways(w.a, w.b) as worker:
            for ns, peer in ((w.left, "10.9.0.2"), (w.right, "10.9.0.1")):
                done = ns.run(
                    ["ping", "-c5", "-i0.02", "-W5", peer], capture_output=True, text=True
                )
                assert "5 received, 0% packet loss" in done.stdout
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
        w.left.run(["ping", "-c1", "-W5", "10.9.0.2"], check=True, capture_output=True)
        assert time.monotonic() - start < 2
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
    """Four routes share a transmit queue, and go on when others of them end."""
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
                # A flow stays on its queue; those of the queues that were stopped are lost.
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
        assert b.send(frame())  # given back by the last route


def test_it_works_while_python_holds_the_gil(netns: NetNS, engine: str) -> None:
    """In a closed loop frames go round for ever: a0 receives, b0 sends, the kernel redirects."""
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
            ctypes.PyDLL(None).usleep(200_000)  # a call that keeps the GIL
            moved = worker.stats().rx_packets - before
        assert moved > 1000
        stats = worker.stats()
        assert stats.rx_packets == stats.tx_packets + stats.drops


# ---- a target that is full


@contextmanager
def slow_line(ns: NetNS, engine: str) -> Iterator[tuple[EthDev, PacketSocket, EthDev, EthDev]]:
    """a0 receives from a packet socket; what b0 sends drips out of c0 at 20 Mb/s."""
    with (
        rtap.open("a0", netns=ns, engine=engine) as a,
        rtap.open("b0", netns=ns, engine=engine, sndbuf=20_000) as b,
        rtap.open("c0", netns=ns) as c,
        PacketSocket(ns, "a0") as at_a,
    ):
        redirect(ns, "b0", "c0", "20mbit")
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
        assert time.monotonic() - start < 1
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
            before = fds()
            for _ in range(3):
                with pytest.raises(DeviceStateError, match="rx queue 1 of a0 is in use"):
                    second.start()
                assert not second.running
                assert fds() == before
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


# ---- devices that go


def test_a_device_stopped_under_it(line: Line, engine: str) -> None:
    with both_ways(line.a, line.b) as worker:
        line.passes()
        start = time.monotonic()
        line.a.stop()
        assert time.monotonic() - start < 1
        # Both routes used it: nothing is left to do.
        eventually(lambda: not worker.running, "the worker has ended by itself")
        assert worker.join(1)
        assert [route.error for route in worker.stats().routes] == ["", ""]
        line.a.start()
        worker.start()
        line.passes(2)


@pytest.mark.parametrize("victim", ["source", "target"])
@pytest.mark.parametrize("way", ["stop", "close", "delete", "stop queue"])
def test_the_other_routes_go_on(netns: NetNS, engine: str, victim: str, way: str) -> None:
    with ExitStack() as stack:
        line = Line(stack, netns, engine=engine)
        c = stack.enter_context(rtap.open("c0", netns=netns, engine=engine))
        d = stack.enter_context(rtap.open("d0", netns=netns, engine=engine))
        at_c = stack.enter_context(PacketSocket(netns, "c0"))
        at_d = stack.enter_context(PacketSocket(netns, "d0"))
        worker = Worker()
        worker.forward((c, 0), (d, 0))
        worker.forward((line.a, 0), (line.b, 0))
        dev = c if victim == "source" else d
        with worker:
            at_c.send(frame(1))
            assert at_d.frames(1) == [frame(1)]
            line.passes(1)
            start = time.monotonic()
            if way == "delete":
                iproute(netns, f"link del {dev.ifname}")
                if victim == "target":
                    at_c.send(frame(2))
            elif way == "stop queue":
                queue: Any = dev.rx_queue(0) if victim == "source" else dev.tx_queue(0)
                queue.stop()
            else:
                getattr(dev, way)()
            assert time.monotonic() - start < 2
            for seq in range(20):
                line.passes(seq)
            assert worker.running
            if way == "delete":
                eventually(lambda: bool(worker.stats().routes[0].error), "the route has ended")
                assert "bad state" in worker.stats().routes[0].error
            stats = worker.stats()
            assert stats.routes[1].error == ""
            assert (stats.routes[1].rx_packets, stats.routes[1].drops) == (21, 0)
            if way == "delete":
                dev.close()
                assert dev.name not in [other.name for other in rtap.devices()]
            survivor = d if victim == "source" else c
            if victim == "source":
                eventually(lambda: can_send(survivor), "the target is given back")
        assert settle(line.a.pool) == settle(c.pool) == 0


def can_send(dev: EthDev) -> bool:
    try:
        return dev.send(frame())
    except DeviceStateError:
        return False


def test_an_interface_taken_down_and_up_again(line: Line) -> None:
    """No route ends for that."""
    with both_ways(line.a, line.b) as worker:
        line.passes()
        iproute(line.ns, "link set b0 down")
        line.at_a.send(frame(5))
        eventually(lambda: line.b.stats().oerrors == 1, "the kernel refuses it")
        iproute(line.ns, "link set b0 up")
        with PacketSocket(line.ns, "b0") as again:  # the other one reports that it was down
            line.at_a.send(frame(6))
            assert again.frames(1) == [frame(6)]
        assert worker.running
        assert [route.error for route in worker.stats().routes] == ["", ""]


def test_frames_that_find_no_mbuf(netns: NetNS, engine: str) -> None:
    """The worker waits for buffers without spinning, and goes on when there are some."""
    with ExitStack() as stack:
        line = Line(stack, netns, engine=engine, nb_mbufs=8)
        held = line.a.pool.alloc_burst(8)
        worker = Worker(name="starved")
        worker.forward((line.a, 0), (line.b, 0))
        with worker:
            for seq in range(20):
                line.at_a.send(frame(seq))
            eventually(lambda: line.a.stats().rx_nombuf > 0, "it is noticed")
            tid = thread_id(worker)
            before = cpu_ticks(tid)
            time.sleep(0.3)
            assert (cpu_ticks(tid) - before) / os.sysconf("SC_CLK_TCK") < 0.2
            held.free()
            assert [seq_of(f) for f in line.at_b.frames(20)] == list(range(20))


def test_moved_to_another_namespace(line: Line, netns2: NetNS) -> None:
    with both_ways(line.a, line.b) as worker:
        line.passes()
        iproute(line.ns, f"link set b0 netns {netns2.path}")
        iproute(netns2, "link set b0 up")
        with PacketSocket(netns2, "b0") as there:
            line.at_a.send(frame(7))
            assert there.frames(1) == [frame(7)]
        assert worker.running


# ---- processes


def test_ctrl_c_with_a_running_worker(netns: NetNS) -> None:
    code = """
import sys, time, rtap
with rtap.open("a0", netns=sys.argv[1]) as a, rtap.open("b0", netns=sys.argv[1]) as b:
    worker = rtap.Worker()
    worker.forward((a, 0), (b, 0))
    with worker:
        print("running", flush=True)
        getattr(worker, sys.argv[2])() if sys.argv[2] == "join" else time.sleep(60)
"""
    for how in ("join", "sleep"):
        with subprocess.Popen(
            [sys.executable, "-c", code, netns.path, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(),
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "running\n"
                assert links(netns) == ["lo", "a0", "b0"]
                time.sleep(0.05)
                process.send_signal(signal.SIGINT)
                start = time.monotonic()
                _, err = process.communicate(timeout=10)
                assert time.monotonic() - start < 5
            finally:
                process.kill()
        assert process.returncode == -signal.SIGINT, how
        assert err.rstrip().endswith("KeyboardInterrupt")
        assert links(netns) == ["lo"]


@pytest.mark.parametrize(
    "ending",
    ["pass", "del worker, a, b", "a.close()", "raise SystemExit(0)", "import gc; gc.collect()"],
)
def test_interpreter_exit_with_a_running_worker(netns: NetNS, ending: str) -> None:
    done = python(
        f"""
        import sys, warnings, rtap
        warnings.simplefilter("ignore", ResourceWarning)
        a = rtap.open("a0", netns=sys.argv[1])
        b = rtap.open("b0", netns=sys.argv[1])
        worker = rtap.Worker(wait="poll")
        worker.forward((a, 0), (b, 0))
        worker.start()
        print("running", flush=True)
        {ending}
        """,
        netns.path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "running\n", "")
    eventually(lambda: links(netns) == ["lo"], "the interfaces go with the process")


def test_fork_with_a_running_worker(netns: NetNS) -> None:
    done = python(
        """
        import os, sys, warnings, rtap
        warnings.simplefilter("ignore", DeprecationWarning)
        a = rtap.open("a0", netns=sys.argv[1])
        b = rtap.open("b0", netns=sys.argv[1])
        worker = rtap.Worker()
        worker.forward((a, 0), (b, 0))
        worker.start()
        pid = os.fork()
        if pid == 0:
            assert not worker.running
            worker.stop()
            try:
                worker.start()
            except rtap.DeviceStateError as exc:
                assert "fork" in str(exc), exc
            else:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert worker.running
        worker.stop()
        a.close()
        b.close()
        print("fine")
        """,
        netns.path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


# ---- leaks


def test_five_hundred_starts_leak_nothing(line: Line) -> None:
    worker = both_ways(line.a, line.b)
    for _ in range(5):
        with worker:
            line.passes()
    gc.collect()
    before, threads = fds(), threading.active_count()
    for n in range(500):
        with worker:
            if n % 50 == 0:
                line.passes(n)
    assert (fds(), threading.active_count()) == (before, threads)
    assert settle(line.a.pool) == settle(line.b.pool) == 0
    with worker:
        line.passes()


def test_a_hundred_workers(line: Line) -> None:
    before = fds()
    for n in range(100):
        with both_ways(line.a, line.b, wait=WAITS[n % 3]):
            line.passes(n)
    gc.collect()
    assert fds() <= before + 1
    assert settle(line.a.pool) == 0


def test_a_dropped_worker_object_keeps_running_until_stopped(line: Line) -> None:
    """Its thread holds it; closing a device is enough to end it."""
    both_ways(line.a, line.b, name="dropped").start()
    gc.collect()
    line.passes()
    line.a.close()
    eventually(
        lambda: not any(t.name == "dropped" for t in threading.enumerate()), "the thread ended"
    )
    assert line.b.send(frame())


def test_control_while_it_runs(netns: NetNS) -> None:
    """Statistics and settings of devices whose queues a worker has."""
    with ExitStack() as stack:
        line = Line(stack, netns)
        with Mempool(16), both_ways(line.a, line.b) as worker:
            for n in range(20):
                line.passes(n)
                line.a.mtu = 1400 + n
                line.a.stats_reset()
                line.b.set_link_down()
                line.b.set_link_up()
                assert line.a.link().link_status
                assert line.a.info().state == "started"
                assert worker.stats().rx_packets == n + 1
