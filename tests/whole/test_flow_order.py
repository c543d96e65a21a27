# SPDX-License-Identifier: BSD-3-Clause
"""Flows keep their order through workers that spread them: millions of numbered frames."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from rigs import redirect
from streams import SIZES, Arrivals, Numbers, Streams, faults
from support import settle

import rtap
from rtap import Burst, EthDev, NetNS, Worker, offload, stages

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]

FLOWS = 300
TARGETS = 4
CHUNK = 2048
TOTAL = {"uring": 3_000_000, "syscall": 500_000}
#: The most frames in flight. Each queue on the way has room for all of them.
WINDOW, ROOM = 8192, 16384
#: The last target is behind a shaper with room for a few frames.
SNDBUF = 4000
RATES = {"retry": "100mbit", "drop": "10mbit"}


def mark(target: int) -> str:
    return f"02:00:00:00:00:{target:02x}"


class Path:
    """Two workers there, and one back.

    out => in -> spread over 4 -> there<k> => back<k> -> mark k, spread over 4 -> home => end

    The kernel redirects at arrows with a double line. The way there is from 4 queues to 4 devices,
    the last of which is often full; the way back is from 8 queues to 4.
    """

    def __init__(
        self, stack: ExitStack, ns: NetNS, engine: str, on_full: str, spread: Any = None
    ) -> None:
        def device(name: str, queues: int = 1, **options: Any) -> EthDev:
            return stack.enter_context(
                rtap.open(name, netns=ns, engine=engine, queues=queues, txqueuelen=ROOM, **options)
            )

        self.out, self.source = device("out"), device("in", 4)
        self.there = [
            device(f"there{k}", 2, sndbuf=SNDBUF if k == TARGETS - 1 else None)
            for k in range(TARGETS)
        ]
        self.back = [device(f"back{k}", 2) for k in range(TARGETS)]
        self.home, self.end = device("home", 4), device("end")
        redirect(ns, "out", "in")
        for k in range(TARGETS):
            rate = RATES[on_full] if k == TARGETS - 1 else ""
            redirect(ns, f"there{k}", f"back{k}", rate)
        redirect(ns, "home", "end")
        self.hop1 = [Worker(name=f"there-{w}") for w in range(2)]
        self.hop2 = Worker(name="back")
        for w, worker in enumerate(self.hop1):
            for q in (2 * w, 2 * w + 1):
                worker.forward(
                    (self.source, q),
                    [(dev, w) for dev in self.there],
                    stages=[spread or stages.Spread()],
                    on_full=on_full,
                )
        for k, dev in enumerate(self.back):
            for q in range(2):
                self.hop2.forward(
                    (dev, q),
                    [(self.home, n) for n in range(4)],
                    stages=[
                        stages.ChecksumVerify(),
                        stages.FiveTupleSwap(),
                        stages.MacRewrite(source=mark(k)),
                        stages.Spread(seed=1),
                    ],
                    on_full="retry",
                )
        self.workers = [*self.hop1, self.hop2]
        for worker in self.workers:
            stack.enter_context(worker)

    def losses(self) -> dict[str, int]:
        """Lost frames by counter."""
        found: dict[str, int] = {}
        for worker in self.workers:
            for route in worker.stats().routes:
                assert not route.error
                for target in route.targets:
                    found[f"drops of {target.target}"] = (
                        found.get(f"drops of {target.target}", 0) + target.drops
                    )
                for stage in route.stages:
                    found[f"drops of {stage.stage} of {route.source}"] = stage.drops
        for dev in (self.source, *self.there, *self.back, self.home, self.end):
            stats = dev.stats()
            for name in ("imissed", "ierrors", "oerrors"):
                found[f"{name} of {dev.ifname}"] = getattr(stats, name)
        return {name: n for name, n in found.items() if n}

    def carry(self, streams: Streams) -> Arrivals:
        """Sends all frames, at most WINDOW ahead of those that arrived or were lost."""
        arrived, sent, lost = Arrivals(), 0, 0
        moved = time.monotonic()
        while (gone := arrived.n + lost) < streams.total:
            if sent < streams.total and sent + CHUNK - gone <= WINDOW:
                end = min(sent + CHUNK, streams.total)
                burst = streams.burst(self.out.pool, sent, end)
                while len(burst):
                    self.out.tx_burst(0, burst)
                sent, moved = end, time.monotonic()
                timeout = 0.0
            else:
                timeout = 0.01
            burst = self.end.rx_burst(0, 1024, timeout)
            if len(burst):
                arrived.take(burst)
                moved = time.monotonic()
            elif timeout:
                lost = sum(self.losses().values())
                if time.monotonic() > moved + 20:
                    break
        return arrived


def run(path: Path, streams: Streams) -> tuple[Arrivals, list[str]]:
    """The frames that arrived, and what is wrong with them."""
    arrived = path.carry(streams)
    losses = path.losses()
    assert arrived.n + sum(losses.values()) == streams.total, losses
    for worker in path.workers:
        for route in worker.stats().routes:
            assert route.rx_packets, f"nothing came by {route.source}"
            assert all(target.packets for target in route.targets)
    for dev in (path.out, path.source, *path.there, *path.back, path.home, path.end):
        assert settle(dev.pool) == 0
    return arrived, faults(streams, *arrived.arrays())


def slow_ones(path: Path) -> list[rtap.TargetStats]:
    """The figures of the slow target, one for each route to it."""
    return [route.targets[-1] for worker in path.hop1 for route in worker.stats().routes]


def test_nothing_is_lost_or_overtaken(netns: NetNS, engine: str) -> None:
    streams = Streams(FLOWS, TOTAL[engine])
    with ExitStack() as stack:
        path = Path(stack, netns, engine, "retry")
        arrived, wrong = run(path, streams)
        assert wrong == []
        assert path.losses() == {}
        assert arrived.n == streams.total
        assert sum(target.retries for target in slow_ones(path)) > 0


def test_drops_are_counted_and_reorder_nothing(netns: NetNS, engine: str) -> None:
    streams = Streams(FLOWS, 500_000)
    with ExitStack() as stack:
        path = Path(stack, netns, engine, "drop")
        arrived, wrong = run(path, streams)
        assert wrong == []
        slow = path.there[-1].ifname
        dropped = sum(target.drops for target in slow_ones(path))
        assert dropped > 0
        assert set(path.losses()) <= {f"drops of tx queue {q} of {slow}" for q in range(2)}
        # Frames are missing only from streams on the slow target, exactly as many as it dropped.
        stream, _, via = arrived.arrays()
        holes = streams.counts - np.bincount(stream, minlength=streams.n)
        assert holes.sum() == dropped
        elsewhere = np.unique(stream[via != TARGETS - 1])
        assert not holes[elsewhere].any()


# ---- tests of the check itself


def test_frames_dealt_out_in_turn_are_noticed(netns: NetNS) -> None:
    """A round-robin over the same path breaks the order, so it is Spread that keeps it."""

    def in_turn(burst: Burst) -> list[int]:
        return [n % TARGETS for n in range(len(burst))]

    with ExitStack() as stack:
        _, wrong = run(Path(stack, netns, "syscall", "retry", in_turn), Streams(FLOWS, 30_000))
    assert [text.partition(":")[0] for text in wrong] == ["overtaken", "on another target"]


def arrays_of(streams: Streams) -> tuple[Numbers, Numbers, Numbers]:
    """All frames in sending order, each flow by one target."""
    stream, number = streams.stream.astype(np.int64), streams.number.astype(np.int64)
    return stream, number, stream // 2 % TARGETS


def test_the_check_notices() -> None:
    streams = Streams(20, 5000)
    stream, number, via = arrays_of(streams)
    assert faults(streams, stream, number, via) == []
    some = np.random.default_rng(3).random(5000) < 0.9
    assert faults(streams, stream[some], number[some], via[some]) == []
    first, second = np.nonzero(stream == stream[1000])[0][[30, 31]]
    swapped = np.arange(5000)
    swapped[[first, second]] = second, first
    assert faults(streams, stream[swapped], number[swapped], via[swapped]) == ["overtaken: 1"]
    double = np.insert(np.arange(5000), second, first)
    assert faults(streams, stream[double], number[double], via[double]) == ["twice: 1"]
    last = np.nonzero(stream == 15)[0][-1]
    elsewhere = np.where(np.arange(5000) == last, via + 1, via)
    assert faults(streams, stream, number, elsewhere) == ["on another target: 1"]
    beyond = np.where(np.arange(5000) == last, 5000, number)
    assert faults(streams, stream, beyond, via) == ["never sent: 1"]


def test_streams_are_what_they_say() -> None:
    """Frames are valid, whatever their number, in both directions of each flow."""
    streams = Streams(40, 2000)
    pool = rtap.Mempool(2048)
    burst = streams.burst(pool, 0, 2000)
    assert sorted(set(burst.lengths)) == sorted(SIZES)
    assert {offload.verify(bytes(m)) for m in burst} == {offload.ChecksumStatus.GOOD}
    arrived = Arrivals()
    arrived.take(burst)
    stream, number, _ = arrived.arrays()
    assert faults(streams, stream, number, stream * 0) == []
    assert arrived.n == 2000
    targets = np.array(stages.Spread()(burst, 64))
    for flow in range(40):
        assert len(set(targets[stream // 2 == flow])) == 1
    assert len(set(targets)) > 20
