# SPDX-License-Identifier: BSD-3-Clause
"""Forwarding: streams between queues, spread over workers that never take the GIL."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import rtap
from rtap._core.rx_queue import RxQueueBase
from rtap._core.tx_queue import TxQueueBase
from rtap._queues.generate import GenerateRxQueue
from rtap._queues.noisy import NoisyRxQueue
from rtap._queues.null import NullTxQueue
from rtap._work.figures import RouteStats
from rtap.cli.errors import CommandError
from rtap.cli.testpmd import frames
from rtap.cli.testpmd.modes import MODES, Mode
from rtap.cli.testpmd.options import Options
from rtap.cli.testpmd.ports import Port, forwards_to, started
from rtap.ethdev.ops import Stats
from rtap.stages import ChecksumVerify

__all__ = ["Forwarding", "PortForward", "difference"]

#: A generator's own pool holds this many bursts: just those in hand, so that the pool stays in the
#: processor's cache.
GENERATOR_BURSTS = 2
MULTI_FLOWS = 256
MIN_DATA_ROOM = 64


class _Queue:
    """A queue without a device, in the shape that a worker expects."""

    def __init__(self, queue: RxQueueBase | TxQueueBase) -> None:
        self._queue = queue

    def rx_queue(self, _: int) -> RxQueueBase:
        return cast(RxQueueBase, self._queue)

    def tx_queue(self, _: int) -> TxQueueBase:
        return cast(TxQueueBase, self._queue)


@dataclass(frozen=True)
class Stream:
    """Queue `queue` of port `rx`, forwarded to the same queue of port `tx`."""

    rx: Port
    tx: Port
    queue: int


@dataclass(frozen=True)
class _Route:
    """A worker's route in the statistics: the ports whose queues it reads and fills."""

    rx: Port | None
    tx: Port | None
    queue: int
    checks: ChecksumVerify | None


@dataclass(frozen=True)
class PortForward:
    """Forwarding's counts for one port since it started. `rx_dropped` are frames that nobody took
    in time, `tx_dropped` frames for this port that did not leave, `bad_*` frames received with that
    checksum wrong, which only mode csum checks."""

    rx_packets: int
    rx_dropped: int
    rx_errors: int
    rx_nombuf: int
    tx_packets: int
    tx_dropped: int
    bad_ipcsum: int = 0
    bad_l4csum: int = 0
    bad_outer_ipcsum: int = 0
    bad_outer_l4csum: int = 0

    @property
    def rx_total(self) -> int:
        return self.rx_packets + self.rx_dropped

    @property
    def tx_total(self) -> int:
        return self.tx_packets + self.tx_dropped


def difference(now: Stats, before: Stats) -> Stats:
    """The counts between the two."""
    out: dict[str, Any] = {}
    for field in fields(Stats):
        a, b = getattr(now, field.name), getattr(before, field.name)
        if isinstance(a, list):
            out[field.name] = [x - y for x, y in zip(a, b or [0] * len(a), strict=True)]
        else:
            out[field.name] = a - b
    return Stats(**out)


class Forwarding:
    """Starts and stops forwarding between ports, and has its figures."""

    def __init__(self, ports: Sequence[Port], options: Options) -> None:
        self.ports = list(ports)
        self.options = options
        self.mode: Mode = MODES[options.forward_mode]
        self.seconds = 0.0
        self._workers: list[tuple[rtap.Worker, list[_Route]]] = []
        self._pieces: contextlib.ExitStack | None = None
        self._noisy: list[NoisyRxQueue] = []
        self._began: list[Stats] = [Stats() for _ in self.ports]
        self._ended: list[Stats] = [Stats() for _ in self.ports]
        self._routes: list[tuple[_Route, RouteStats]] = []
        self._held = 0
        self._since = 0.0

    # -- streams

    def streams(self) -> list[Stream]:
        """All streams, by port and then by queue."""
        mode = MODES[self.options.forward_mode]
        topology = "loop" if mode.returns else self.options.port_topology
        queues = min(self.options.rxq, self.options.txq)
        return [
            Stream(port, self.ports[forwards_to(port.number, len(self.ports), topology)], queue)
            for port in self.ports
            for queue in range(queues)
        ]

    def shares(self) -> list[list[Stream]]:
        """The streams of each worker: neighbours together, and every worker has some."""
        streams = self.streams()
        n = min(self.options.nb_cores, len(streams))
        cuts = [len(streams) * i // n for i in range(n + 1)]
        return [streams[cuts[i] : cuts[i + 1]] for i in range(n)]

    # -- start and stop

    @property
    def running(self) -> bool:
        """Whether forwarding was started and not stopped; its routes may have ended."""
        return self._pieces is not None

    def start(self, tx_first: int = 0) -> None:
        """Start forwarding, after `tx_first` bursts out of every port.

        CommandError when it runs already or a port is stopped.
        """
        if self.running:
            raise CommandError("packet forwarding is started already")
        started(self.ports)
        self.mode = MODES[self.options.forward_mode]
        self._workers, self._noisy, self._held = [], [], 0
        with contextlib.ExitStack() as pieces:
            for number, share in enumerate(self.shares()):
                self._workers.append(self._worker(number, share, pieces))
            self._began = [port.dev.stats() for port in self.ports]
            self._since = time.monotonic()
            for _ in range(tx_first):
                self._send_burst()
            for worker, _ in self._workers:
                pieces.callback(worker.stop)
                worker.start()
            self._pieces = pieces.pop_all()

    def stop(self) -> None:
        """Stop forwarding; CommandError when it does not run."""
        if self._pieces is None:
            raise CommandError("packet forwarding is not started")
        with self._pieces:
            try:
                for worker, _ in self._workers:
                    worker.stop()
                self.seconds = time.monotonic() - self._since
                self._routes = self.routes()
                self._held = sum(noisy.buffered for noisy in self._noisy)
                self._ended = [port.dev.stats() for port in self.ports]
            finally:
                self._pieces = None

    def close(self) -> None:
        """Stop if it runs. Idempotent."""
        if self.running:
            self.stop()

    # -- workers and their routes

    def _worker(
        self, number: int, share: list[Stream], pieces: contextlib.ExitStack
    ) -> tuple[rtap.Worker, list[_Route]]:
        options, mode = self.options, self.mode
        # A sleeping worker would empty a buffer only when the next frame woke it.
        flushes = mode.name == "noisy" and options.noisy.tx_sw_buffer_flushtime
        cpus = options.cpus
        worker = rtap.Worker(
            cpu=cpus[number % len(cpus)] if cpus else None,
            wait="poll" if flushes else options.wait,
            burst=options.burst,
            name=f"testpmd-{number}",
        )
        routes: list[_Route] = []

        changes = MODES[options.noisy.forward_mode] if mode.name == "noisy" else mode

        def route(
            stream: Stream, rx: Port | None, source: Any, tx: Port | None, target: Any
        ) -> None:
            stages = changes.stages(stream.tx.ends()) if rx and tx else []
            worker.forward((source, stream.queue), (target, stream.queue), stages=stages)
            checks = next((s for s in stages if isinstance(s, ChecksumVerify)), None)
            routes.append(_Route(rx, tx, stream.queue, checks))

        for stream in share:
            if mode.receives:
                source = self._source(stream, pieces)
                if mode.forwards:
                    route(stream, stream.rx, source, stream.tx, stream.tx.dev)
                else:
                    route(stream, stream.rx, source, None, self._sink(pieces))
            if mode.generates:
                generator = self._generator(stream, pieces)
                route(stream, None, generator, stream.tx, stream.tx.dev)
        return worker, routes

    def _source(self, stream: Stream, pieces: contextlib.ExitStack) -> Any:
        """The queue that hands out a port's received frames."""
        if self.mode.name != "noisy":
            return stream.rx.dev
        noisy = self.options.noisy
        queue = NoisyRxQueue(
            cast(RxQueueBase, stream.rx.dev.rx_queue(stream.queue)),
            buffer_size=noisy.tx_sw_buffer_size,
            flush_ms=noisy.tx_sw_buffer_flushtime,
            memory_mb=noisy.lkup_memory,
            reads=noisy.lkup_num_reads,
            writes=noisy.lkup_num_writes,
            reads_writes=noisy.lkup_num_reads_writes,
        )
        pieces.callback(queue.close)
        queue.start()
        self._noisy.append(queue)
        return _Queue(queue)

    @staticmethod
    def _sink(pieces: contextlib.ExitStack) -> _Queue:
        queue = NullTxQueue("testpmd-sink")
        pieces.callback(queue.close)
        queue.start()
        return _Queue(queue)

    def _generator(self, stream: Stream, pieces: contextlib.ExitStack) -> _Queue:
        lengths = self.options.txpkts
        flow, flows, vary = frames.TXONLY, 1, "source"
        if self.mode.name == "flowgen":
            flow, flows, vary = frames.FLOWGEN, self.options.flowgen_flows, "destination"
        elif self.options.txonly_multi_flow:
            flows = MULTI_FLOWS
        pool = rtap.Mempool(
            max(64, GENERATOR_BURSTS * self.options.burst * len(lengths)),
            max(MIN_DATA_ROOM, *lengths),
            name="testpmd-generator",
        )
        queue = GenerateRxQueue(
            pool,
            frames.header(stream.tx.ends(), flow, sum(lengths)),
            lengths,
            flows=flows,
            vary=vary,
        )
        pieces.callback(queue.close)
        queue.start()
        return _Queue(queue)

    def _send_burst(self) -> None:
        length = sum(self.options.txpkts)
        for port in self.ports:
            frame = frames.header(port.ends(), frames.TXONLY, length).ljust(length, b"\0")
            burst = port.dev.pool.alloc_burst(self.options.burst, data=[frame] * self.options.burst)
            port.dev.tx_burst(0, burst)

    # -- figures

    def routes(self) -> list[tuple[_Route, RouteStats]]:
        """The routes with their figures; the last routes when forwarding has stopped."""
        if not self.running:
            return self._routes
        return [
            pair
            for worker, routes in self._workers
            for pair in zip(routes, worker.stats().routes, strict=True)
        ]

    def tx_dropped(self) -> dict[tuple[Port, int], int]:
        """Frames that should have left by a queue of a port but did not."""
        out: dict[tuple[Port, int], int] = {}
        for route, stats in self.routes():
            if route.tx is not None:
                key = (route.tx, route.queue)
                out[key] = out.get(key, 0) + stats.drops
        return out

    def ended(self) -> list[str]:
        """Why routes ended before they were stopped, one sentence each."""
        return [
            f"forwarding from {stats.source} to {stats.target} ended: {stats.error}"
            for _, stats in self.routes()
            if stats.error
        ]

    @property
    def alive(self) -> bool:
        """Whether any worker still forwards."""
        return any(worker.running for worker, _ in self._workers)

    @property
    def held(self) -> int:
        """Frames that mode noisy's buffers still held when forwarding stopped."""
        return self._held

    def statistics(self) -> list[PortForward]:
        """Forwarding's counts for each port since its last start."""
        now = [port.dev.stats() for port in self.ports] if self.running else self._ended
        lost = self.tx_dropped()
        out = []
        for port, end, begin in zip(self.ports, now, self._began, strict=True):
            stats = difference(end, begin)
            checks = [r.checks for r, _ in self.routes() if r.rx is port and r.checks is not None]
            out.append(
                PortForward(
                    rx_packets=stats.ipackets,
                    rx_dropped=stats.imissed,
                    rx_errors=stats.ierrors,
                    rx_nombuf=stats.rx_nombuf,
                    tx_packets=stats.opackets,
                    tx_dropped=sum(n for (to, _), n in lost.items() if to is port),
                    bad_ipcsum=sum(c.bad_ip for c in checks),
                    bad_l4csum=sum(c.bad_l4 for c in checks),
                    bad_outer_ipcsum=sum(c.bad_outer_ip for c in checks),
                    bad_outer_l4csum=sum(c.bad_outer_l4 for c in checks),
                )
            )
        return out
