# SPDX-License-Identifier: BSD-3-Clause
"""Stages in the routes of a worker: between devices, and over net_null."""

from __future__ import annotations

import ctypes
import logging
import re
import threading
import time
from contextlib import ExitStack
from typing import Any

import pytest
from flows import flow, flow_of
from patience import rate
from rigs import iproute, redirect, wire
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from support import (
    PacketSocket,
    add_ipv6,
    eventually,
    ping,
    quiet_netns,
    settle,
    skip_without_devices,
)

import rtap
from rtap import Burst, EthDev, NetNS, RouteStats, Worker, stages
from rtap.stages import DROP

MINE = "02:00:00:00:00:99"


def route_of(worker: Worker) -> RouteStats:
    (route,) = worker.stats().routes
    return route


def accounted(route: RouteStats) -> bool:
    lost = route.drops + sum(stage.drops for stage in route.stages)
    return route.rx_packets == route.tx_packets + lost


class Line:
    """Frames go into device ``a``, and packet sockets listen on ``outs``."""

    def __init__(self, stack: ExitStack, ns: NetNS, engine: str, outs: int = 1) -> None:
        self.a = stack.enter_context(rtap.open("a0", netns=ns, engine=engine))
        self.outs = [
            stack.enter_context(rtap.open(f"b{n}", netns=ns, engine=engine)) for n in range(outs)
        ]
        self.near = stack.enter_context(PacketSocket(ns, "a0", 0x0800, rcvbuf=1 << 24))
        self.far = [
            stack.enter_context(PacketSocket(ns, f"b{n}", 0x0800, rcvbuf=1 << 24))
            for n in range(outs)
        ]

    @property
    def targets(self) -> list[tuple[EthDev, int]]:
        return [(dev, 0) for dev in self.outs]


def test_several_stages(netns: NetNS, engine: str) -> None:
    """Stages run in order, each with its own figures."""
    with ExitStack() as stack:
        line = Line(stack, netns, engine)
        counter = stages.Counter()
        worker = Worker()
        worker.forward(
            (line.a, 0),
            (line.outs[0], 0),
            stages=[
                stages.Match(protocol="udp", source_port=1024 + 3),
                stages.FiveTupleSwap(),
                stages.MacRewrite(MINE),
                counter,
            ],
        )
        with worker:
            for n in range(100):
                line.near.send(flow(n % 10))
            got = line.far[0].frames(90)
            eventually(lambda: route_of(worker).tx_packets == 90, "the last one is counted")
            route = route_of(worker)
        size = len(flow(0))
        names = ["Match", "FiveTupleSwap", "MacRewrite", "Counter"]
        assert [s.stage for s in route.stages] == names
        assert [(s.packets, s.bytes, s.drops) for s in route.stages] == [
            (100, 100 * size, 10),
            *[(90, 90 * size, 0)] * 3,
        ]
        assert all(s.cycles > 0 for s in route.stages)
        assert (route.rx_packets, route.tx_packets, route.drops) == (100, 90, 0)
        assert accounted(route)
        assert (counter.packets, counter.bytes) == (90, 90 * size)
        wanted = Ether(flow(4, back=True))
        assert [Ether(f)[IP].src for f in got] == [wanted[IP].src] * 90
        assert {Ether(f).dst for f in got} == {MINE}
        assert {Ether(f).src for f in got} == {Ether(flow(0)).dst}
        assert sorted({Ether(f)[UDP].dport for f in got}) == [1024 + n for n in range(10) if n != 3]
        assert settle(line.a.pool) == 0


def test_steering(netns: NetNS, engine: str) -> None:
    with ExitStack() as stack:
        line = Line(stack, netns, engine, outs=3)
        worker = Worker()
        worker.forward(
            (line.a, 0),
            line.targets,
            stages=[
                stages.Match(source_port=(1024, 1033), action=1),
                stages.Match(source_port=(1034, 1043), action=2),
                stages.Match(source_port=1050),
            ],
        )
        with worker:
            for n in range(40):
                line.near.send(flow(n))
            assert [flow_of(f) for f in line.far[1].frames(10)] == list(range(10))
            assert [flow_of(f) for f in line.far[2].frames(10)] == list(range(10, 20))
            others = [n for n in range(20, 40) if n != 26]
            assert [flow_of(f) for f in line.far[0].frames(19)] == others
            eventually(lambda: accounted(route_of(worker)), "all are counted")
            route = route_of(worker)
        assert [t.packets for t in route.targets] == [19, 10, 10]
        assert [t.target for t in route.targets] == [f"tx queue 0 of b{n}" for n in range(3)]
        assert route.target == ", ".join(t.target for t in route.targets)


def test_a_spread_never_reorders_a_flow(netns: NetNS, engine: str) -> None:
    flows, each = 50, 60
    with ExitStack() as stack:
        line = Line(stack, netns, engine, outs=4)
        worker = Worker()
        worker.forward((line.a, 0), line.targets, stages=[stages.Spread()], on_full="retry")
        with worker:
            for k in range(each):
                for n in range(flows):
                    line.near.send(flow(n, back=k % 2 == 1) + bytes([k]))
                eventually(
                    lambda k=k: route_of(worker).tx_packets == (k + 1) * flows,  # type: ignore[misc]
                    "they are through",
                )
            got = [far.drain() for far in line.far]
        assert sum(map(len, got)) == flows * each
        assert all(got)
        where: dict[int, int] = {}
        for target, frames in enumerate(got):
            for n in sorted({flow_of(f) for f in frames}):
                assert where.setdefault(n, target) == target, "a flow is on two targets"
                assert [f[60] for f in frames if flow_of(f) == n] == list(range(each))
        assert len(where) == flows


def test_a_spread_over_net_null_by_the_million() -> None:
    """The counters of all targets add up over millions of frames, with stages that drop."""
    null = rtap.probe("net_null0,size=64")
    with null:
        null.configure(4, 4)
        pool = rtap.Mempool(4096)
        for q in range(4):
            null.rx_queue_setup(q, 64, pool)
            null.tx_queue_setup(q, 64)
        null.start()
        worker = Worker(wait="poll")
        for q in range(2):
            worker.forward(
                (null, q),
                [(null, 2 * q), (null, 2 * q + 1)],
                stages=[stages.MacSwap(), stages.Counter(), stages.Spread()],
            )
        with worker:
            eventually(lambda: worker.stats().tx_packets > 2_000_000, "two million", 30)
        for route in worker.stats().routes:
            assert accounted(route)
            assert [s.packets for s in route.stages] == [route.rx_packets] * 3
            assert route.stages[0].bytes == route.rx_bytes == 64 * route.rx_packets
        assert null.stats().opackets == worker.stats().tx_packets
        assert settle(pool) == 0


# ---- real clients


@pytest.mark.parametrize("family", ["4", "6"])
def test_ping_is_answered(engine: str, family: str) -> None:
    skip_without_devices()
    with quiet_netns() as ns, rtap.open("a0", netns=ns, engine=engine) as dev:
        if family == "6":
            ns.run(["sysctl", "-qw", "net.ipv6.conf.a0.disable_ipv6=0"], check=True)
            add_ipv6(ns, "a0", "fd00::1")
        else:
            iproute(ns, "addr add 10.9.0.1/24 dev a0")
        worker = Worker()
        worker.forward((dev, 0), (dev, 0), stages=[stages.Echo(dev.app_mac)])
        with worker:
            peer = "10.9.0.7" if family == "4" else "fd00::7"
            ping(ns, peer, "-s1000")


def test_tcp_through_checked_and_filled_checksums(engine: str) -> None:
    skip_without_devices()
    with wire(a={"engine": engine}, b={"engine": engine}) as w:
        worker = Worker()
        for source, target in ((w.a, w.b), (w.b, w.a)):
            worker.forward(
                (source, 0),
                (target, 0),
                stages=[stages.ChecksumVerify(), stages.ChecksumFill(), stages.Counter()],
            )
        with worker:
            w.transfer(2_000_000)
            w.transfer(2_000_000, back=True)
        for route in worker.stats().routes:
            assert [s.drops for s in route.stages] == [0, 0, 0]
            assert route.tx_packets > 100


# ---- back-pressure with several targets


def test_retry_with_one_full_target_of_two(netns: NetNS, engine: str) -> None:
    """All frames arrive, in order on each target, though one of them is slow."""
    with ExitStack() as stack:
        line = Line(stack, netns, engine, outs=1)
        slow = stack.enter_context(rtap.open("s0", netns=netns, engine=engine, sndbuf=20_000))
        drip = stack.enter_context(rtap.open("d0", netns=netns))
        redirect(netns, "s0", "d0", rate(20))
        worker = Worker()
        worker.forward(
            (line.a, 0),
            [(slow, 0), (line.outs[0], 0)],
            stages=[stages.Match(source_port=(1024, 1123), action=1)],
            on_full="retry",
        )
        with worker:
            for n in range(200):
                line.near.send(flow(199 - n) + bytes(900))
            assert [flow_of(drip.recv(5)) for _ in range(100)] == list(range(199, 99, -1))
            assert [flow_of(f) for f in line.far[0].frames(100)] == list(range(99, -1, -1))
            eventually(lambda: route_of(worker).tx_packets == 200, "the last one is counted")
            assert route_of(worker).targets[0].retries > 0
            assert route_of(worker).targets[1].retries == 0
            assert route_of(worker).drops == 0


# ---- Python in a route


def test_a_python_stage(netns: NetNS, engine: str) -> None:
    threads: set[str] = set()

    def odd_ones(burst: Burst) -> list[int]:
        threads.add(threading.current_thread().name)
        return [0 if flow_of(bytes(m)) % 2 else DROP for m in burst]

    with ExitStack() as stack:
        line = Line(stack, netns, engine)
        worker = Worker(name="python-stages")
        worker.forward((line.a, 0), line.targets[0], stages=[odd_ones, stages.MacSwap()])
        with worker:
            for n in range(100):
                line.near.send(flow(n))
            got = line.far[0].frames(50)
            assert [flow_of(f) for f in got] == list(range(1, 100, 2))
            assert got[0][:12] == flow(1)[6:12] + flow(1)[:6]
            eventually(lambda: accounted(route_of(worker)), "all are counted")
            assert [s.stage for s in route_of(worker).stages] == ["odd_ones", "MacSwap"]
        assert threads == {"python-stages"}
        assert settle(line.a.pool) == 0


def test_a_stage_that_fails_ends_its_route(
    netns: NetNS, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The error names it, the other route goes on, and nothing leaks."""
    proto = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    refuse = proto(lambda ctx, burst: -22)

    def wrong(burst: Burst) -> None:
        raise KeyError("no such flow")

    with ExitStack() as stack:
        line = Line(stack, netns, engine)
        c = stack.enter_context(rtap.open("c0", netns=netns, engine=engine))
        at_c = stack.enter_context(PacketSocket(netns, "c0", 0x0800))
        chain: list[Any]
        for chain, says in (
            ([stages.Counter(), stages.Native(refuse)], r"stage 1 \(Native.*\) of .*: Invalid arg"),
            ([wrong], r"stage 0 \(wrong\) of the route from .* of c0: KeyError: 'no such flow'$"),
        ):
            worker = Worker()
            worker.forward((line.a, 0), line.targets[0])
            worker.forward((c, 0), line.targets[0], stages=chain)
            with caplog.at_level(logging.CRITICAL, logger="rtap"), worker:
                at_c.send(flow(1))
                eventually(
                    lambda worker=worker: bool(worker.stats().routes[1].error),  # type: ignore[misc]
                    "the route ends",
                )
                route = worker.stats().routes[1]
                assert re.match(says, route.error)
                assert accounted(route)
                line.near.send(flow(2))
                assert [flow_of(f) for f in line.far[0].frames(1)] == [2]
                assert worker.running
        assert settle(c.pool) == 0


def test_stop_while_a_python_stage_waits(netns: NetNS) -> None:
    """The stage delays the worker, not the program."""
    inside, go_on = threading.Event(), threading.Event()

    def slow(burst: Burst) -> None:
        inside.set()
        go_on.wait(10)

    with ExitStack() as stack:
        line = Line(stack, netns, "syscall")
        worker = Worker()
        worker.forward((line.a, 0), line.targets[0], stages=[slow])
        worker.start()
        line.near.send(flow(1))
        assert inside.wait(5)
        assert not worker.join(0.01)
        go_on.set()
        start = time.monotonic()
        worker.stop()
        assert time.monotonic() - start < 5
        assert accounted(route_of(worker))


def test_route_arguments(netns: NetNS) -> None:
    with ExitStack() as stack:
        line = Line(stack, netns, "syscall")
        worker = Worker()
        cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
            ([], {}, ValueError, "a route needs a target"),
            ([line.targets[0]] * 2, {}, ValueError, "a target is named twice"),
            (line.targets[0], {"stages": [5]}, TypeError, "Stage or a callable, got int"),
            (line.targets[0], {"stages": [stages.Stage()]}, RuntimeError, "never initialised"),
        ]
        for target, options, error, says in cases:
            with pytest.raises(error, match=says):
                worker.forward((line.a, 0), target, **options)
        with pytest.raises(rtap.DeviceStateError, match="no route"):
            worker.start()
