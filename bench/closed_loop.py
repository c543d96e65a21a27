# SPDX-License-Identifier: BSD-3-Clause
"""Forwarding 64-byte frames round a closed loop: Python, the nogil worker, and C.

Two TAPs, A and B, are in one namespace. The forwarder reads A and writes B, tc redirects what comes
in on B to A, and 512 preloaded frames go round for ever. So the forwarder always has frames, the
whole loop runs on one core, and the benchmark measures the forwarder and the kernel under it, not
a generator. The subjects, each with a loop of its own, all on one core:

python          ``burst = a.rx_burst(0, 64)`` and ``b.tx_burst(0, burst)`` in a plain loop
python beside   the same beside one busy pure-Python thread, which always wants the GIL
worker          ``rtap.Worker`` forwarding the queue, no GIL
c read          read(2) and write(2) in C, a frame at a time
c uring         in C, 64 reads in one io_uring_enter and 64 writes in a second one
c uring1        in C, the writes of one batch and the reads of the next in the same enter

Last, a busy pure-Python thread on another core counts its laps, alone and while the worker
forwards. This shows that the worker does not take the GIL from it.

The kernel counts the frames (tx_packets of A: frames read from it). At the end every loop is
drained and must return its 512 frames, all different.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from bench.measure import (
    Rounds,
    Sample,
    Subject,
    alternate,
    bench_cpu,
    loop_until,
    pinned,
    write_report,
)
from bench.rig import (
    FRAME,
    LOOP_FRAMES,
    SEQ_OFFSET,
    BusyThread,
    Counters,
    c_forwarder,
    frame,
    namespace,
    redirect,
    run,
)
from rtap import NetNS

BURST = 64


class Loop:
    """A preloaded closed loop between two rtap devices; ``queues`` are those of the receiver.

    The kernel sees the frames as one flow, so they go round on one queue.
    """

    def __init__(
        self, stack: ExitStack, ns: NetNS, engine: str, queues: int = 1, receive: str | None = None
    ) -> None:
        import rtap

        self.a: Any = stack.enter_context(
            ns.call(rtap.open, "A", nb_mbufs=1024, engine=receive or engine, queues=queues)
        )
        self.b: Any = stack.enter_context(ns.call(rtap.open, "B", nb_mbufs=1024, engine=engine))
        self.counters = stack.enter_context(Counters(ns))
        run(ns, "ip link set A txqueuelen 4096")
        redirect(ns, "B", "A")
        frames = self.b.pool.alloc_burst(LOOP_FRAMES, data=[frame(i) for i in range(LOOP_FRAMES)])
        if (sent := self.b.tx_burst(0, frames)) != LOOP_FRAMES:
            raise RuntimeError(f"preloaded {sent} of {LOOP_FRAMES} frames")

    def step(self) -> Callable[[], int]:
        """A function that forwards one burst; it retries frames that the kernel does not take."""
        receive, send = self.a.rx_burst, self.b.tx_burst

        def step() -> int:
            burst = receive(0, BURST)
            n = len(burst)
            while send(0, burst) < n and len(burst):
                pass
            return n

        return step

    def python(self, seconds: float) -> Sample:
        """The plain loop; the kernel counts the frames."""
        before = self.passed()
        sample = loop_until(self.step(), seconds, 4)
        moved = self.passed() - before
        if moved != sample.frames:
            raise RuntimeError(f"{sample.frames} forwarded, the kernel counted {moved}")
        return Sample(moved, sample.seconds, sample.cpu_ns)

    def python_beside(self, seconds: float) -> Sample:
        """The plain loop beside one busy Python thread."""
        with BusyThread():
            return self.python(seconds)

    def passed(self) -> int:
        """Frames read from A so far."""
        return self.counters.read("A")["tx_packets"]

    def check(self, queues: int = 1) -> None:
        """Raise RuntimeError unless all 512 frames are still there, whole and different."""
        seqs: set[bytes] = set()
        n = 0
        for q in range(queues):
            while len(burst := self.a.rx_burst(q, BURST, timeout=0.05 if q == 0 else 0)):
                for mbuf in burst:
                    data = bytes(mbuf)
                    n += 1
                    if len(data) == FRAME:
                        seqs.add(data[SEQ_OFFSET : SEQ_OFFSET + 8])
        lost = self.counters.read("A")["tx_dropped"] + self.counters.read("B")["rx_dropped"]
        if n != LOOP_FRAMES or len(seqs) != LOOP_FRAMES or lost:
            raise RuntimeError(f"{n} frames came back, {len(seqs)} different, {lost} dropped")


@contextmanager
def worker_subject(loop: Loop, cpu: int | None, wait: str, queues: int = 1) -> Iterator[Subject]:
    """The nogil worker on one loop. It starts for each slice, before the measurement begins."""
    import rtap

    worker: Any = rtap.Worker(cpu=cpu, wait=wait)
    for q in range(queues):
        worker.forward((loop.a, q), (loop.b, 0), on_full="retry")

    def subject(seconds: float) -> Sample:
        threads = set(os.listdir("/proc/self/task"))
        worker.start()
        try:
            time.sleep(0.01)
            begun, before = time.perf_counter(), loop.passed()
            mine = set(os.listdir("/proc/self/task")) - threads
            cpu_before = thread_cpu_ns(mine)
            time.sleep(seconds)
            after, ended = loop.passed(), time.perf_counter()
            cpu = thread_cpu_ns(mine) - cpu_before
        finally:
            worker.stop()
        return Sample(after - before, ended - begun, cpu)

    yield subject


def thread_alone(seconds: float) -> Sample:
    """Thousands of laps of a pure-Python loop, on a core of its own."""
    with BusyThread() as busy:
        time.sleep(0.01)
        begun, before = time.perf_counter(), busy.laps
        time.sleep(seconds)
        laps, ended = busy.laps - before, time.perf_counter()
    return Sample(laps, ended - begun)


@contextmanager
def thread_beside(loop: Loop, cpu: int | None, wait: str) -> Iterator[Subject]:
    """The same loop while a worker forwards on the benchmark's core."""
    import rtap

    worker: Any = rtap.Worker(cpu=cpu, wait=wait)
    worker.forward((loop.a, 0), (loop.b, 0), on_full="retry")

    def subject(seconds: float) -> Sample:
        before = loop.passed()
        with worker:
            sample = thread_alone(seconds)
        if loop.passed() == before:
            raise RuntimeError("the worker forwarded nothing beside the Python thread")
        return sample

    yield subject


def thread_cpu_ns(tids: set[str]) -> int:
    """CPU time of threads of this process, in nanoseconds."""
    return sum(time.clock_gettime_ns(~int(tid) << 3 | 6) for tid in tids)  # CPUCLOCK_PERTHREAD


def measure(args: argparse.Namespace, stack: ExitStack) -> dict[str, Rounds]:
    """The two comparisons: everything alone, and Python alone against Python beside."""
    cpu = bench_cpu()
    stack.enter_context(pinned(cpu))
    subjects: dict[str, Subject] = {}
    loops: list[Loop] = []
    comparisons: dict[str, Rounds] = {}

    def rtap_loop() -> Loop:
        loop = Loop(stack, stack.enter_context(namespace()), args.engine)
        loops.append(loop)
        return loop

    options: dict[str, Any] = {
        "slices": args.slices,
        "seconds": args.seconds,
        "progress": lambda line: print(line, file=sys.stderr),
    }
    c_loops = {
        mode: stack.enter_context(c_forwarder(stack.enter_context(namespace()), mode))
        for mode in ("read", "uring", "uring1")
    }
    if not args.no_rtap:
        subjects["python"] = rtap_loop().python
        subjects["worker"] = stack.enter_context(worker_subject(rtap_loop(), cpu, args.wait))
    subjects.update({f"c {mode}": loop.slice for mode, loop in c_loops.items()})
    comparisons["alone"] = alternate(subjects, **options)
    if not args.no_rtap:
        loop = rtap_loop()
        pair: dict[str, Subject] = {"python": loop.python, "python beside": loop.python_beside}
        # Threads hold the GIL for 5 ms at a time, so a slice must be much longer than that.
        options["seconds"] *= 5
        comparisons["beside"] = alternate(pair, **options)
        beside = stack.enter_context(thread_beside(rtap_loop(), cpu, args.wait))
        pair = {"thread": thread_alone, "thread beside": beside}
        comparisons["thread"] = alternate(pair, **options)
    for loop in loops:
        loop.check()
    for c_loop in c_loops.values():
        drained = c_loop.command("drain", "drained")
        if drained != [str(LOOP_FRAMES)] * 2:
            raise RuntimeError(f"a C loop gave back {drained[0]} frames, {drained[1]} different")
    return comparisons


def endurance(seconds: float) -> str:
    """Run the C loop and report lost frames: a check of the rig itself."""
    with namespace() as ns, c_forwarder(ns, "uring") as loop, Counters(ns) as counters:
        sample = loop.slice(seconds)
        dropped = counters.read("A")["tx_dropped"] + counters.read("B")["rx_dropped"]
        back, different = loop.command("drain", "drained")
    return (
        f"{sample.frames} frames in {sample.seconds:.0f} s, {dropped} dropped, "
        f"{back} of {LOOP_FRAMES} came back, {different} different"
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 when the figures are valid, 1 when a control voids them."""
    parser = argparse.ArgumentParser(
        prog="bench.closed_loop", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per slice (default 0.1)")
    parser.add_argument("--engine", default="auto", help="rtap's engine: auto, uring or syscall")
    parser.add_argument("--wait", default="adaptive", help="the worker's: poll, sleep or adaptive")
    parser.add_argument("--no-rtap", action="store_true", help="only what rtap is compared with")
    parser.add_argument(
        "--endurance", type=float, metavar="S", help="only run the C loop S seconds, check losses"
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)
    if args.endurance:
        with pinned(bench_cpu()):
            print(endurance(args.endurance))
        return 0

    with ExitStack() as stack:
        comparisons = measure(args, stack)
    alone = comparisons["alone"]
    lines = ["closed loop, 64-byte frames", alone.table("c read")]
    result: dict[str, Any] = {"benchmark": "closed_loop", "alone": alone.to_json("c read")}
    if "beside" in comparisons:
        beside, thread = comparisons["beside"], comparisons["thread"]
        lines += ["", "beside one busy Python thread", beside.table("python")]
        lines += ["", "that thread, in laps of 1000 steps, beside the worker"]
        lines.append(thread.table("thread"))
        result["beside"] = beside.to_json("python")
        result["thread"] = thread.to_json("thread")
        targets = {
            "python / worker": alone.ratio("python", "worker"),
            "worker / c uring": alone.ratio("worker", "c uring"),
            "worker / c read": alone.ratio("worker", "c read"),
            "python beside / python": beside.ratio("python beside", "python"),
            "thread beside / thread": thread.ratio("thread beside", "thread"),
        }
        lines += ["", *(f"{name}: {ratio:.3f}" for name, ratio in targets.items())]
        result["targets"] = {name: ratio.to_json() for name, ratio in targets.items()}
    write_report(args.json, result, "\n".join(lines))
    return 1 if any(rounds.void for rounds in comparisons.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
