# SPDX-License-Identifier: BSD-3-Clause
"""A worker writes to several queues in one kernel entry, even when the kernel does not take all."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import preload
import pytest
from flows import flow, flow_of
from rigs import iproute
from support import PacketSocket, eventually, settle

import rtap
from rtap import NetNS, Worker

pytestmark = [pytest.mark.root, pytest.mark.lifetime]

NONE, REFUSED, FULL, GONE, CUT = range(5)  # as in enters.c


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """enters.c, compiled."""
    return preload.build("enters", tmp_path_factory.mktemp("shim"))


PRELUDE = """
import ctypes, json, sys
from contextlib import ExitStack
from flows import flow, flow_of
from support import PacketSocket, eventually, quiet_netns, settle
import rtap
from rtap import Worker, stages

shim = ctypes.CDLL(sys.argv[1])
engine = sys.argv[2]
QUEUES, FLOWS, EACH = 8, 40, 20

def routes(shape, a, b, on_full):
    worker = Worker(wait="poll")
    for q in range(QUEUES if shape != "spread" else 1):
        if shape == "spread":       # one route, over all queues
            to, through = [(b, t) for t in range(QUEUES)], [stages.Spread()]
        else:
            to, through = (b, q if shape == "own" else 0), []
        worker.forward((a, q), to, stages=through, on_full=on_full)
    return worker

def over(stats):
    return any(route.error for route in stats.routes) or (
        stats.rx_packets == FLOWS * EACH == stats.tx_packets + stats.drops)

def forward(shape, fault, times=0, on_full="drop"):
    # The frames are there before the worker: its first entries find all queues with some.
    with ExitStack() as stack:
        ns = stack.enter_context(quiet_netns())
        queues = 1 if shape == "spread" else QUEUES
        a = stack.enter_context(rtap.open("a0", netns=ns, engine=engine, queues=queues))
        b = stack.enter_context(rtap.open("b0", netns=ns, engine=engine, queues=QUEUES))
        at_a = stack.enter_context(PacketSocket(ns, "a0", 0x0800))
        at_b = stack.enter_context(PacketSocket(ns, "b0", 0x0800, rcvbuf=1 << 24))
        for k in range(EACH):
            for n in range(FLOWS):
                at_a.send(flow(n) + bytes([k]))
        worker = routes(shape, a, b, on_full)
        shim.watch(fault, times)
        with worker:
            eventually(lambda: over(worker.stats()), "all are forwarded, or a route has ended")
        stats = worker.stats()
        got = {n: [] for n in range(FLOWS)}
        for data in at_b.drain():
            got[flow_of(data)].append(data[-1])
        targets = [target for route in stats.routes for target in route.targets]
        sent = b.stats()
        return {
            "most": shim.most_files(), "hits": shim.hit(),
            "served": sum(1 for target in targets if target.packets),
            "errors": [route.error for route in stats.routes if route.error],
            "rx": stats.rx_packets, "tx": stats.tx_packets, "drops": stats.drops,
            "retries": sum(route.retries for route in stats.routes),
            "accounted": all(route.rx_packets == route.tx_packets + route.drops
                             and route.tx_packets == sum(t.packets for t in route.targets)
                             for route in stats.routes),
            "bytes": all(route.tx_bytes == route.tx_packets * len(flow(0) + b"k")
                         for route in stats.routes),
            "cycles": all(route.cycles > 0 for route in stats.routes if route.tx_packets),
            "arrived": sum(map(len, got.values())),
            "ordered": all(ks == sorted(set(ks)) for ks in got.values()),
            "opackets": sent.opackets, "oerrors": sent.oerrors,
            "in_use": settle(a.pool),
        }
"""

TOTAL = 40 * 20
SHAPES = ["own", "shared", "spread"]


def run(shim: Path, shape: str, fault: int, **options: Any) -> dict[str, Any]:
    """Runs the forwarding; checks what holds whatever the kernel does, and returns the figures."""
    code = f"print(json.dumps(forward({shape!r}, {fault}, **{options!r})))"
    found: dict[str, Any] = preload.run(shim, "uring", PRELUDE, code)
    assert found["accounted"]
    assert found["bytes"]
    assert found["cycles"]
    assert found["ordered"]
    assert found["in_use"] == 0
    assert found["arrived"] == found["tx"] == found["opackets"]
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_one_entry_for_all_targets(shim: Path, shape: str) -> None:
    """The targets may be of several routes of a worker, or of one route."""
    found = run(shim, shape, NONE)
    assert found["most"] == (1 if shape == "shared" else found["served"])
    assert found["served"] > 4
    assert (found["rx"], found["tx"], found["drops"]) == (TOTAL, TOTAL, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_refused_frames_are_nobody_elses(shim: Path, shape: str) -> None:
    found = run(shim, shape, REFUSED, times=1000)
    assert found["hits"] > 20
    assert found["drops"] == found["oerrors"] == found["hits"]
    assert (found["rx"], found["tx"]) == (TOTAL, TOTAL - found["hits"])
    assert found["errors"] == []


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fault", [FULL, CUT], ids=["full", "cut"])
@pytest.mark.parametrize("on_full", ["drop", "retry"])
def test_what_is_not_taken_is_kept_in_order(
    shim: Path, shape: str, fault: int, on_full: str
) -> None:
    found = run(shim, shape, fault, times=5, on_full=on_full)
    assert found["hits"] >= 5
    assert found["rx"] == TOTAL
    assert found["errors"] == []
    assert found["oerrors"] == 0
    if on_full == "retry":
        assert (found["tx"], found["drops"]) == (TOTAL, 0)
        assert found["retries"] > 0
    else:
        assert found["tx"] + found["drops"] == TOTAL
        assert found["drops"] > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_queue_that_is_gone_ends_its_routes_alone(shim: Path, shape: str) -> None:
    found = run(shim, shape, GONE, times=1, on_full="retry")
    assert found["hits"] > 0
    assert found["drops"] >= found["hits"]
    assert set(found["errors"]) == {found["errors"][0]}
    assert found["errors"][0].endswith("of b0: Bad file descriptor")
    if shape == "own":
        assert len(found["errors"]) == 1


def test_targets_of_all_kinds_in_one_pass(netns: NetNS, engine: str) -> None:
    """Targets that cannot share an entry get their frames in turn, each by itself."""
    kinds: list[dict[str, Any]] = [
        {},
        {"sndbuf": 1 << 24},
        {"tx_gro": True, "tx_offloads": rtap.TxOffload.TCP_CKSUM | rtap.TxOffload.TCP_TSO},
        {"engine": "syscall"},
        {"nb_desc": 4},
        {},
    ]
    each = 30
    with ExitStack() as stack:
        a = stack.enter_context(rtap.open("a0", netns=netns, engine=engine, queues=2 * len(kinds)))
        outs = [
            stack.enter_context(rtap.open(f"b{n}", **{"netns": netns, "engine": engine, **kind}))
            for n, kind in enumerate(kinds)
        ]
        at_a = stack.enter_context(PacketSocket(netns, "a0", 0x0800))
        far = [
            stack.enter_context(PacketSocket(netns, f"b{n}", 0x0800, rcvbuf=1 << 24))
            for n in range(len(kinds))
        ]
        outs[-1].set_link_down()
        for k in range(each):
            for n in range(60):
                at_a.send(flow(n) + bytes([k]))
        worker = Worker()
        for q in range(2 * len(kinds)):
            worker.forward((a, q), (outs[q % len(kinds)], 0))
        with worker:
            eventually(lambda: worker.stats().rx_packets == 60 * each, "all are read")
        stats = worker.stats()
        assert stats.tx_packets + stats.drops == stats.rx_packets
        for n, (dev, peer) in enumerate(zip(outs, far, strict=True)):
            mine = stats.routes[n :: len(kinds)]
            came = sum(route.rx_packets for route in mine)
            lost = sum(route.drops for route in mine)
            assert came > 0
            if n == len(kinds) - 1:
                assert (dev.stats().opackets, dev.stats().oerrors, lost) == (0, came, came)
                continue
            got = peer.drain()
            assert (len(got), lost, dev.stats().opackets) == (came, 0, came)
            for number in {flow_of(data) for data in got}:
                assert [x[-1] for x in got if flow_of(x) == number] == list(range(each))
        assert settle(a.pool) == 0


def test_a_target_that_disappears(netns: NetNS, engine: str) -> None:
    """Its routes end. Other routes lose nothing, nor do their other targets until then."""
    with ExitStack() as stack:
        a = stack.enter_context(rtap.open("a0", netns=netns, engine=engine, queues=4))
        outs = [
            stack.enter_context(rtap.open(f"b{n}", netns=netns, engine=engine)) for n in range(4)
        ]
        at_a = stack.enter_context(PacketSocket(netns, "a0", 0x0800))
        worker = Worker()
        for q, dev in enumerate(outs):
            worker.forward((a, q), (dev, 0), on_full="retry")
        with worker:
            for n in range(200):
                at_a.send(flow(n))
            eventually(lambda: worker.stats().tx_packets == 200, "all are forwarded")
            iproute(netns, "link del b2")

            def gone() -> bool:
                for n in range(20):
                    at_a.send(flow(n))
                return bool(worker.stats().routes[2].error)

            eventually(gone, "it is noticed")
            rest = worker.stats().routes
            assert [bool(route.error) for route in rest] == [False, False, True, False]
            assert rest[2].error == "tx queue 0 of b2: File descriptor in bad state"
            eventually(
                lambda: all(r.rx_packets == r.tx_packets for r in worker.stats().routes[:2]),
                "the others go on",
            )
        assert [route.drops > 0 for route in worker.stats().routes] == [False, False, True, False]
        for route in worker.stats().routes:
            assert route.rx_packets == route.tx_packets + route.drops
        assert settle(a.pool) == 0
