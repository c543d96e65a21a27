# SPDX-License-Identifier: BSD-3-Clause
"""Measures one worker with many lightly busy routes: what it costs to spread frames over routes.

Each route is a closed loop of its own, as in bench.closed_loop: a few frames go round a pair of
devices for ever, and each burst finds just these. It is compared with a single route that carries
the frames of all of them. The kernel counts the frames; the time is the worker thread's.

``--against`` names another built checkout whose worker does the same, to show what a change gained.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.closed_loop import thread_cpu_ns
from bench.measure import Rounds, Subject, alternate, bench_cpu, pinned, write_report
from bench.rig import Counters, CProgram, frame, namespace, redirect
from rtap import NetNS

HERE = Path(__file__).resolve().parent.parent


def serve(routes: int, frames: int, engine: str) -> None:
    """Run slices on command, in the subject's own process; see bench.rig.CProgram."""
    import rtap

    with ExitStack() as stack:
        ns = stack.enter_context(NetNS.current())
        counters = stack.enter_context(Counters(ns))
        worker: Any = rtap.Worker(wait="poll")
        pairs: list[tuple[Any, Any]] = []
        for i in range(routes):
            a: Any = stack.enter_context(rtap.open(f"A{i}", engine=engine, nb_mbufs=1024))
            b: Any = stack.enter_context(rtap.open(f"B{i}", engine=engine, nb_mbufs=1024))
            redirect(ns, f"B{i}", f"A{i}")
            worker.forward((a, 0), (b, 0), on_full="retry")
            pairs.append((a, b))
        for _, b in pairs:
            burst = b.pool.alloc_burst(frames, data=[frame(i) for i in range(frames)])
            if b.tx_burst(0, burst) != frames:
                raise RuntimeError("not all frames were preloaded")

        def passed() -> int:
            return counters.total([f"A{i}" for i in range(routes)], "tx_packets")

        print("ready", flush=True)
        for line in sys.stdin:
            threads = set(os.listdir("/proc/self/task"))
            with worker:
                time.sleep(0.01)
                before, begun = passed(), time.perf_counter_ns()
                mine = set(os.listdir("/proc/self/task")) - threads
                cpu_before = thread_cpu_ns(mine)
                time.sleep(float(line.split()[1]))
                cpu = thread_cpu_ns(mine) - cpu_before
                moved, took = passed() - before, time.perf_counter_ns() - begun
            print(moved, cpu, took, sum(r.drops for r in worker.stats().routes), flush=True)
        for a, _ in pairs:
            if len(a.rx_burst(0, 512, timeout=0.1)) != frames:
                raise RuntimeError("frames were lost")


def subject(stack: ExitStack, root: Path, engine: str, routes: int, frames: int) -> Subject:
    """A checkout's worker with ``routes`` routes of ``frames`` frames each."""
    ns = stack.enter_context(namespace())
    code = (
        f"import sys, bench; sys.path.insert(0, {str(root)!r}); "  # this bench, that rtap
        f"from bench.worker_routes import serve; serve({routes}, {frames}, {engine!r})"
    )
    argv = ["env", f"PYTHONPATH={HERE}", sys.executable, "-c", code]
    return stack.enter_context(CProgram(ns, argv)).slice


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 when the figures are valid, 1 when a control voids them."""
    parser = argparse.ArgumentParser(
        prog="bench.worker_routes", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per slice (default 0.1)")
    parser.add_argument("--routes", type=int, nargs="*", default=[8, 32], help="default 8 32")
    parser.add_argument(
        "--frames", type=int, nargs="*", default=[1, 4], help="of each: default 1 4"
    )
    parser.add_argument("--engine", default="auto", help="rtap's engine: auto, uring or syscall")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, built")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)
    results: dict[str, Rounds] = {}
    lines: list[str] = []
    for routes in args.routes:
        for frames in args.frames:
            name = f"{routes} routes of {frames}"
            with ExitStack() as stack:
                stack.enter_context(pinned(bench_cpu()))
                subjects = {
                    name: subject(stack, HERE, args.engine, routes, frames),
                    "one route": subject(stack, HERE, args.engine, 1, routes * frames),
                }
                if args.against:
                    subjects["other checkout"] = subject(
                        stack, args.against, args.engine, routes, frames
                    )
                results[name] = alternate(
                    subjects,
                    slices=args.slices,
                    seconds=args.seconds,
                    progress=lambda line: print(line, file=sys.stderr),
                )
            lines += [results[name].table("one route"), ""]
            if args.against:
                ratio = results[name].ratio(name, "other checkout")
                lines += [f"{name} / other checkout: {ratio:.3f}", ""]
    body: dict[str, Any] = {
        "benchmark": "worker_routes",
        **{name: rounds.to_json("one route") for name, rounds in results.items()},
        "targets": {
            f"{name} / one route": rounds.ratio(name, "one route").to_json()
            for name, rounds in results.items()
        },
    }
    write_report(args.json, body, "\n".join(lines))
    return 1 if any(rounds.void for rounds in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
