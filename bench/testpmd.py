# SPDX-License-Identifier: BSD-3-Clause
"""Compares ``rtap testpmd`` with Debian's ``dpdk-testpmd`` (net_tap): same options, same work.

io, macswap     Two ports in a namespace. tc redirects what is sent on one to the other, and 256
                preloaded frames go round each way, so that only the forwarder sets the pace.
txonly          One port sends as fast as it can.
rxonly          One port gets more frames than it can take. A generator on the other core sends
                into a third interface, and tc makes eight frames for the port of each one. A slice
                in which the kernel drops no frame is an error: the port was starved.

Each mode runs at 64 and 1500 bytes. Both programs run all the time, each in a namespace of its own,
and take turns to forward on the same core. The kernel counts the frames that are read from or
written to the ports' interfaces.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import rtap
from bench.dpdk import TestPmd, available, common, dpdk_argv
from bench.measure import Rounds, Sample, Subject, alternate, bench_cpu, write_report
from bench.rig import Counters, frame, namespace, redirect, run
from rtap import NetNS

if TYPE_CHECKING:
    from rtap._queues.generate import GenerateRxQueue

SIZES = (64, 1500)
ROUND = 256
"""Frames that go round each way."""
COPIES = 8
"""Frames that the port gets for each one that the generator sends."""

Argv = Callable[[Sequence[str], Sequence[str], int], list[str]]


def rtap_argv(engine: str) -> Argv:
    """``rtap testpmd`` with net_rtap ports of those names, forwarding on ``cpu``."""

    def argv(ifnames: Sequence[str], options: Sequence[str], cpu: int) -> list[str]:
        vdevs = [f"--vdev=net_rtap{i},iface={name}" for i, name in enumerate(ifnames)]
        own = (f"--coremask={1 << cpu:#x}", f"--engine={engine}")
        return [sys.executable, "-m", "rtap", "testpmd", *vdevs, *own, "--", *common(options)]

    return argv


class Circle:
    """Two ports whose frames go round, and a count of lost frames."""

    def __init__(self, ns: NetNS, counters: Counters, size: int) -> None:
        self._counters = counters
        self._size = size
        self._lost = dict.fromkeys(("A", "B"), 0)
        for source, target in (("A", "B"), ("B", "A")):
            redirect(ns, source, target)
        self._sockets = {name: ns.call(self._open, name) for name in ("A", "B")}
        for name in ("A", "B"):
            self._put(name, ROUND)

    @staticmethod
    def _open(name: str) -> socket.socket:
        out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        out.bind((name, 0))
        return out

    def _put(self, name: str, n: int) -> None:
        for seq in range(n):
            self._sockets[name].send(frame(seq, self._size))

    def replace_lost(self) -> int:
        """Replace the frames lost since the last call; return how many."""
        there = {name: self._counters.read(name) for name in ("A", "B")}
        replaced = 0
        for name, other in (("A", "B"), ("B", "A")):
            # Read from one and not written to the other, or dropped by the queue of the first.
            lost = there[name]["tx_packets"] - there[other]["rx_packets"]
            lost += there[name]["tx_dropped"]
            self._put(name, lost - self._lost[name])
            replaced += lost - self._lost[name]
            self._lost[name] = lost
        return replaced

    def close(self) -> None:
        for out in self._sockets.values():
            out.close()


class Flood:
    """Sends more frames to interface A than its reader can take, from another core."""

    def __init__(self, ns: NetNS, stack: ExitStack, size: int, cpu: int | None) -> None:
        dev = stack.enter_context(ns.call(rtap.open, "F"))
        run(ns, "tc qdisc add dev F ingress")
        copy = "action mirred egress mirror dev A pipe "
        run(
            ns,
            "tc filter add dev F parent ffff: protocol all u32 match u32 0 0 "
            + copy * (COPIES - 1)
            + "action mirred egress redirect dev A",
        )
        # Imported here: the rtap of another checkout (bench.beside) may keep it elsewhere.
        there = Path(rtap.__file__).with_name("_queues").is_dir()
        module = importlib.import_module("rtap._queues.generate" if there else "rtap._generate")
        pool = rtap.Mempool(256, 2048)
        self._queue: GenerateRxQueue = module.GenerateRxQueue(pool, frame(0), [size])
        self._queue.start()
        self._cpu = cpu
        self._dev = dev

    def rx_queue(self, _: int) -> GenerateRxQueue:
        """The method with which a worker asks a device for a queue."""
        return self._queue

    @contextmanager
    def running(self) -> Iterator[None]:
        """Flood while the context is open."""
        worker = rtap.Worker(cpu=self._cpu)
        worker.forward((cast(Any, self), 0), (self._dev, 0))
        with worker:
            yield


def circling(stack: ExitStack, argv: Argv, mode: str, size: int) -> Subject:
    """io or macswap forwarding in a closed loop."""
    ns = stack.enter_context(namespace())
    options = [f"--forward-mode={mode}", "--no-flush-rx"]
    pmd = stack.enter_context(TestPmd(ns, ["A", "B"], options, argv=argv))
    circle = Circle(ns, stack.enter_context(Counters(ns)), size)
    stack.callback(circle.close)

    def subject(seconds: float) -> Sample:
        circle.replace_lost()
        return pmd.slice(seconds, "tx_packets")

    return subject


def sending(stack: ExitStack, argv: Argv, mode: str, size: int) -> Subject:
    """txonly."""
    ns = stack.enter_context(namespace())
    options = [f"--forward-mode={mode}", f"--txpkts={size}"]
    return stack.enter_context(TestPmd(ns, ["A"], options, argv=argv)).slice


def receiving(stack: ExitStack, argv: Argv, mode: str, size: int) -> Subject:
    """rxonly under a flood."""
    ns = stack.enter_context(namespace())
    pmd = stack.enter_context(TestPmd(ns, ["A"], [f"--forward-mode={mode}"], argv=argv))
    counters = stack.enter_context(Counters(ns))
    flood = Flood(ns, stack, size, min(other_cpus()))

    def subject(seconds: float) -> Sample:
        with flood.running():
            dropped = counters.read("A")["tx_dropped"]
            sample = pmd.slice(seconds, "tx_packets")
            if counters.read("A")["tx_dropped"] == dropped:
                raise RuntimeError("the generator is slower than rxonly")
        return sample

    return subject


def other_cpus() -> set[int]:
    """CPUs for threads and processes that are not measured."""
    every = os.sched_getaffinity(0)
    return every - {bench_cpu()} or every


def moving(subject: Subject) -> Subject:
    """The subject, but it repeats a slice in which nothing moved because others had the core."""

    def again(seconds: float) -> Sample:
        for _ in range(10):
            sample = subject(seconds)
            if sample.frames:
                return sample
        raise RuntimeError("nothing is forwarded")

    return again


WORK: dict[str, Callable[[ExitStack, Argv, str, int], Subject]] = {
    "io": circling,
    "macswap": circling,
    "txonly": sending,
    "rxonly": receiving,
}


def measure(mode: str, size: int, args: argparse.Namespace) -> Rounds:
    """Measure one mode at one size: rtap against net_tap."""
    with ExitStack() as stack:
        subjects = {
            name: moving(WORK[mode](stack, argv, mode, size))
            for name, argv in (("rtap", rtap_argv(args.engine)), ("net_tap", dpdk_argv))
        }
        return alternate(
            subjects,
            slices=args.slices,
            seconds=args.seconds,
            attempts=args.attempts,
            progress=lambda line: print(line, file=sys.stderr),
        )


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 when the figures are valid, 1 when a control voids some."""
    parser = argparse.ArgumentParser(prog="bench.testpmd", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--modes", nargs="+", default=list(WORK), choices=list(WORK), metavar="MODE"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), metavar="BYTES")
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per slice (default 0.1)")
    parser.add_argument("--attempts", type=int, default=3, help="tries for a valid control")
    parser.add_argument("--engine", default="auto", help="rtap's engine: auto, uring or syscall")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)
    if (missing := available()) is not None:
        parser.error(missing)

    lines: list[str] = []
    result: dict[str, Any] = {"benchmark": "testpmd", "targets": {}}
    void = False
    for mode in args.modes:
        for size in args.sizes:
            rounds = measure(mode, size, args)
            name = f"{mode} {size}"
            lines += [f"{name} bytes", rounds.table("net_tap"), ""]
            result[name] = rounds.to_json("net_tap")
            result["targets"][f"{name}: rtap / net_tap"] = rounds.ratio("rtap", "net_tap").to_json()
            void |= rounds.void
    write_report(args.json, result, "\n".join(lines))
    return 1 if void else 0


if __name__ == "__main__":
    raise SystemExit(main())
