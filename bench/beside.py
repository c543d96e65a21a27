# SPDX-License-Identifier: BSD-3-Clause
"""Compares this checkout with another one: has any figure of docs/performance.md got worse?

Each row runs in two processes, one for each checkout. Both run this checkout's benchmarks, each
with its own checkout's rtap. Slices alternate as in every benchmark, with an A/A control. A row is
slower when the median of its ratio is below 0.97.

    python -m bench.beside ../other                 # a built checkout
    python -m bench.beside ../other "stage match"   # some rows
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench import native
from bench.measure import (
    Rounds,
    Sample,
    Subject,
    alternate,
    bench_cpu,
    columns,
    pinned,
    write_report,
)
from bench.rig import Counters, CProgram, namespace, redirect

HERE = Path(__file__).resolve().parent.parent
SLOWER = 0.97
#: Seconds until a process is ready: some rows compile what they measure.
PATIENCE_S = 120.0

Make = Callable[[ExitStack], Subject]


class Row(NamedTuple):
    """A subject, the seconds of its slices, and whether all of it runs on one core."""

    make: Make
    seconds: float = 0.1
    one_core: bool = True


def sending(step: str) -> Make:
    """One of the loops of bench.send64."""

    def make(stack: ExitStack) -> Subject:
        import rtap
        from bench import send64

        ns = stack.enter_context(namespace())
        dev: Any = stack.enter_context(ns.call(rtap.open, "S", nb_mbufs=512))
        counters = stack.enter_context(Counters(ns))
        return send64.counted(getattr(send64, step)(dev), counters, "S")

    return make


def looping(how: str, queues: int = 1) -> Make:
    """One of the forwarders of bench.closed_loop."""

    def make(stack: ExitStack) -> Subject:
        from bench.closed_loop import Loop, worker_subject

        loop = Loop(stack, stack.enter_context(namespace()), "auto", queues)
        if how == "worker":
            return stack.enter_context(worker_subject(loop, bench_cpu(), "adaptive", queues))
        subject: Subject = getattr(loop, how)
        return subject

    return make


def routing(routes: int, frames: int) -> Make:
    """The routes of one worker, as in bench.worker_routes."""

    def make(stack: ExitStack) -> Subject:
        import rtap
        from bench.closed_loop import thread_cpu_ns
        from bench.rig import frame

        ns = stack.enter_context(namespace())
        counters = stack.enter_context(Counters(ns))
        worker: Any = rtap.Worker(wait="poll")
        for i in range(routes):
            a, b = (
                stack.enter_context(ns.call(rtap.open, f"{end}{i}", nb_mbufs=1024)) for end in "AB"
            )
            redirect(ns, f"B{i}", f"A{i}")
            worker.forward((a, 0), (b, 0), on_full="retry")
            b.tx_burst(0, b.pool.alloc_burst(frames, data=[frame(n) for n in range(frames)]))
        names = [f"A{i}" for i in range(routes)]

        def subject(seconds: float) -> Sample:
            threads = set(os.listdir("/proc/self/task"))
            with worker:
                time.sleep(0.01)
                before, begun = counters.total(names, "tx_packets"), time.perf_counter()
                mine = set(os.listdir("/proc/self/task")) - threads
                cpu = thread_cpu_ns(mine)
                time.sleep(seconds)
                moved = counters.total(names, "tx_packets") - before
                return Sample(moved, time.perf_counter() - begun, thread_cpu_ns(mine) - cpu)

        return subject

    return make


def staging(name: str) -> Make:
    """A stage of bench.stages."""

    def make(stack: ExitStack) -> Subject:
        from bench import stages

        directory = stack.enter_context(tempfile.TemporaryDirectory())
        chain = stages.all_chains(directory)[name]
        return stack.enter_context(stages.subject(0, chain, bench_cpu()))

    return make


def coalescing(how: str) -> Make:
    """Coalescing of trains, as in bench.gro."""

    def make(stack: ExitStack) -> Subject:
        from bench import gro

        loops: Any = native.load("gro_loops")
        train = loops.Train(gro.tcp_frames())
        return gro.timed(lambda n: train.rounds(how, n), 1000)

    return make


def offloading(name: str) -> Make:
    """The checksum and the split of bench.offload."""

    def make(stack: ExitStack) -> Subject:
        from bench import offload

        module = native.load("offload_loops", "sum16.c", level="-O2")
        if name == "checksum":
            return offload.checksums(module)[name]
        return offload.splits(module, offload.MSS, 2048)[name]

    return make


def streaming(offload: bool, **options: Any) -> Make:
    """A TCP stream, as in bench.tcp."""

    def make(stack: ExitStack) -> Subject:
        from bench import tcp

        return tcp.forwarded(stack, "auto", offload, options)

    return make


def testing(mode: str, size: int) -> Make:
    """``rtap testpmd``, as in bench.testpmd."""

    def make(stack: ExitStack) -> Subject:
        from bench import testpmd

        return testpmd.moving(testpmd.WORK[mode](stack, testpmd.rtap_argv("auto"), mode, size))

    return make


@contextmanager
def waiting_worker(wait: str) -> Iterator[tuple[Any, Any, set[str]]]:
    """A worker between two devices: the packet sockets at both ends, and the worker's threads."""
    import rtap
    from bench.worker_idle import packet_socket
    from bench.worker_wait import SO_TIMESTAMPNS

    with ExitStack() as stack:
        ns = stack.enter_context(namespace())
        a: Any = stack.enter_context(ns.call(rtap.open, "A"))
        b: Any = stack.enter_context(ns.call(rtap.open, "B"))
        near = stack.enter_context(packet_socket(ns, "A"))
        far = stack.enter_context(packet_socket(ns, "B"))
        far.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        worker = rtap.Worker(cpu=bench_cpu(), wait=wait)
        worker.forward((a, 0), (b, 0))
        threads = set(os.listdir("/proc/self/task"))
        stack.enter_context(worker)
        yield near, far, set(os.listdir("/proc/self/task")) - threads


def waking(wait: str) -> Make:
    """Single frames that wake a sleeping worker; the seconds are how long they take to arrive."""

    def make(stack: ExitStack) -> Subject:
        from bench.worker_idle import udp
        from bench.worker_wait import arrival

        near, far, _ = stack.enter_context(waiting_worker(wait))
        chance = random.Random(1)

        def subject(seconds: float) -> Sample:
            frames = took = 0
            until = time.perf_counter() + seconds
            while frames == 0 or time.perf_counter() < until:
                time.sleep(chance.uniform(0.002, 0.004))
                data = udp(frames % 4096, frames)
                start = time.time_ns()
                near.send(data)
                took += arrival(far, data) - start
                frames += 1
            return Sample(frames, took / 1e9)

        return subject

    return make


def idling(wait: str) -> Make:
    """An idle worker: nanoseconds that pass for each second of its CPU time."""

    def make(stack: ExitStack) -> Subject:
        from bench.closed_loop import thread_cpu_ns

        *_, threads = stack.enter_context(waiting_worker(wait))

        def subject(seconds: float) -> Sample:
            spent, began = thread_cpu_ns(threads), time.perf_counter_ns()
            time.sleep(seconds)
            passed = time.perf_counter_ns() - began
            return Sample(passed, max(1, thread_cpu_ns(threads) - spent) / 1e9)

        return subject

    return make


STAGES = (
    *("macswap", "none", "mac rewrite", "5tuple swap", "checksum fill", "match", "spread"),
    *("counter", "native C", "native Cython", "Python", "native numba"),
)
ROWS: dict[str, Row] = {
    "send: NumPy loop": Row(sending("numpy_step")),
    "send: plain loop": Row(sending("plain_step")),
    "send: one by one": Row(sending("single_step")),
    "loop: Python": Row(looping("python")),
    "loop: Python beside a busy thread": Row(looping("python_beside"), 0.5),
    "loop: worker": Row(looping("worker")),
    "loop: worker, 128 queues": Row(looping("worker", 128)),
    **{f"routes: {n} of {k}": Row(routing(n, k)) for n in (8, 32) for k in (1, 4)},
    **{f"stage {name}": Row(staging(name)) for name in STAGES},
    **{f"gro: {how}": Row(coalescing(how)) for how in ("chain", "copy")},
    **{f"offload: {name}": Row(offloading(name)) for name in ("checksum", "segment")},
    "tcp: offloads": Row(streaming(True), 1.0, False),
    "tcp: rx_gso, tx_gro": Row(streaming(False, rx_gso=True, tx_gro=True), 1.0, False),
    "tcp: no offloads": Row(streaming(False), 1.0, False),
    **{
        f"testpmd: {mode} {size}": Row(testing(mode, size), 0.1, False)
        for mode in ("io", "macswap", "txonly", "rxonly")
        for size in (64, 1500)
    },
    **{f"wait {how}: wake-up": Row(waking(how), 0.2, False) for how in ("adaptive", "sleep")},
    **{f"wait {how}: idle": Row(idling(how), 0.2, False) for how in ("adaptive", "sleep")},
}


def serve(name: str, root: str) -> None:
    """Run slices of one row on command, in the process of one checkout; see bench.rig.CProgram."""
    import rtap

    if Path(rtap.__file__).resolve().parent.parent != Path(root):
        raise RuntimeError(f"expected rtap from {root}, imported {rtap.__file__}")
    native.HERE, native.BUILT = Path(root, "bench/native"), Path(root, "build/bench/native")
    with ExitStack() as stack:
        subject = ROWS[name].make(stack)
        print("ready", flush=True)
        for line in sys.stdin:
            sample = subject(float(line.split()[1]))
            print(sample.frames, sample.cpu_ns, round(sample.seconds * 1e9), 0, flush=True)


def subject(stack: ExitStack, name: str, root: Path) -> Subject:
    """A row's subject, in a process that imports a checkout's rtap."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import bench; sys.path.pop(0); "
        f"from bench.beside import serve; serve({name!r}, {str(root)!r})"
    )
    argv = ["env", f"PYTHONPATH={root}", sys.executable, "-P", "-c", code]
    if sys.version_info < (3, 11):
        argv.remove("-P")
    ns = stack.enter_context(namespace())
    return stack.enter_context(CProgram(ns, argv, patience=PATIENCE_S)).slice


def measure(name: str, other: Path, slices: int, attempts: int) -> Rounds:
    """Measure one row in this checkout and in the other."""
    row = ROWS[name]
    with ExitStack() as stack:
        stack.enter_context(pinned(bench_cpu() if row.one_core else None))
        return alternate(
            {"this": subject(stack, name, HERE), "other": subject(stack, name, other)},
            slices=slices,
            seconds=row.seconds,
            attempts=attempts,
            progress=lambda line: print(f"{name}: {line}", file=sys.stderr),
        )


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 when a row is slower here, or void."""
    parser = argparse.ArgumentParser(prog="bench.beside", description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="the other checkout, built")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="prefix of row names; default all")
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--attempts", type=int, default=3, help="tries for a valid control")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)
    names = [n for n in ROWS if not args.rows or n.startswith(tuple(args.rows))]
    if not names:
        parser.error(f"no such rows; there are {', '.join(ROWS)}")
    table: list[tuple[str, ...]] = [("row", "this / other", "95 % interval", "A/A", "")]
    result: dict[str, Any] = {"benchmark": "beside", "rows": {}}
    bad = False
    for name in names:
        rounds = measure(name, args.other.resolve(), args.slices, args.attempts)
        ratio = rounds.ratio("this", "other")
        verdict = "void" if rounds.void else "slower" if ratio.median < SLOWER else ""
        bad |= verdict != ""
        interval = f"{ratio.low:.3f}-{ratio.high:.3f}"
        table.append(
            (name, f"{ratio.median:.3f}", interval, f"{rounds.control.median:.3f}", verdict)
        )
        result["rows"][name] = rounds.to_json("other")
        print(f"{name}: {ratio:.3f} {verdict}", file=sys.stderr, flush=True)
    write_report(args.json, result, "\n".join(columns(table)))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
