# SPDX-License-Identifier: BSD-3-Clause
"""The ring without RWF_NOWAIT, as before Linux 6.4, beside the ring with it.

RTAP_TEST_RING=cancel makes a newer kernel's ring end each batch of reads with a cancel, as on an
older kernel. Three comparisons:

loop    64-byte frames round a closed loop, as in bench.closed_loop, through a worker and through a
        Python loop. "read" reads by system calls and writes through the ring.
send    bench.send64's NumPy loop
beside  a C program sends to a TAP as fast as it can, on another core than a worker that receives
        its frames and drops them; these are the sender's frames. "alone": nobody receives.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import rtap
from bench.closed_loop import Loop, worker_subject
from bench.measure import Rounds, Sample, Subject, alternate, bench_cpu, pinned, write_report
from bench.rig import Counters, c_sender, namespace, redirect, run
from bench.send64 import counted, numpy_step

SWITCH = "RTAP_TEST_RING"


@contextmanager
def way(name: str) -> Iterator[None]:
    """Queues made meanwhile use the ring in that way: "nowait" or "cancel"."""
    if name == "cancel":
        os.environ[SWITCH] = name
    try:
        yield
    finally:
        os.environ.pop(SWITCH, None)


def closed_loop(stack: ExitStack, name: str, receive: str = "uring") -> Loop:
    """A loop whose receiving device has that engine."""
    with way(name):
        return Loop(stack, stack.enter_context(namespace()), "uring", receive=receive)


def loops(stack: ExitStack, cpu: int | None) -> tuple[dict[str, Subject], list[Loop]]:
    """The subjects of the first comparison."""
    made: list[Loop] = []
    subjects: dict[str, Subject] = {}
    for name, receive in (("nowait", "uring"), ("cancel", "uring"), ("cancel", "syscall")):
        title = "read" if receive == "syscall" else name
        made += [closed_loop(stack, name, receive), closed_loop(stack, name, receive)]
        subjects[f"worker {title}"] = stack.enter_context(worker_subject(made[-2], cpu, "poll"))
        subjects[f"python {title}"] = made[-1].python
    return subjects, made


def sends(stack: ExitStack) -> dict[str, Subject]:
    """The subjects of the second comparison."""
    subjects: dict[str, Subject] = {}
    for name in ("nowait", "cancel"):
        with way(name):
            ns = stack.enter_context(namespace())
            dev: Any = stack.enter_context(ns.call(rtap.open, "S", nb_mbufs=512, engine="uring"))
        counters = stack.enter_context(Counters(ns))
        subjects[name] = counted(numpy_step(dev), counters, "S")
    return subjects


def sender(stack: ExitStack, cpu: int | None, other: int | None, name: str) -> Subject:
    """A C program that sends beside a worker on the bench's core."""
    ns = stack.enter_context(namespace())
    with way(name):
        a: Any = stack.enter_context(ns.call(rtap.open, "A", nb_mbufs=2048, engine="uring"))
    null: Any = stack.enter_context(rtap.probe(f"net_null_{name}"))
    null.configure(1, 1)
    null.rx_queue_setup(0, 64, a.pool)
    null.tx_queue_setup(0, 64)
    null.start()
    with pinned(other):
        program = stack.enter_context(c_sender(ns, "write", "S"))
    redirect(ns, "S", "A")
    run(ns, "ip link set A txqueuelen 4096")
    worker: Any = rtap.Worker(cpu=cpu, wait="poll")
    worker.forward((a, 0), (null, 0))

    def subject(seconds: float) -> Sample:
        before = a.stats().ipackets
        if name == "alone":
            return program.slice(seconds)
        with worker:
            time.sleep(0.01)
            sample = program.slice(seconds)
        if a.stats().ipackets == before:
            raise RuntimeError("the worker received nothing")
        return sample

    return subject


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 when the figures are valid, 1 when a control voids them."""
    parser = argparse.ArgumentParser(prog="bench.ring_ways", description=__doc__.partition("\n")[0])
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per slice (default 0.1)")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)
    comparisons: dict[str, Rounds] = {}
    cpu = bench_cpu()
    other = min(os.sched_getaffinity(0) - {cpu}, default=None)

    def compare(title: str, subjects: dict[str, Subject]) -> None:
        comparisons[title] = alternate(
            subjects,
            slices=args.slices,
            seconds=args.seconds,
            progress=lambda line: print(line, file=sys.stderr),
        )

    with ExitStack() as stack:
        stack.enter_context(pinned(cpu))
        subjects, made = loops(stack, cpu)
        compare("loop", subjects)
        for loop in made:
            loop.check()
        compare("send", sends(stack))
    with ExitStack() as stack:
        names = ("nowait", "cancel", "alone")
        compare("beside", {name: sender(stack, cpu, other, name) for name in names})
    bases = {"loop": "worker nowait", "send": "nowait", "beside": "nowait"}
    lines: list[str] = []
    body: dict[str, Any] = {"benchmark": "ring_ways"}
    for title, rounds in comparisons.items():
        lines += [title, rounds.table(bases[title]), ""]
        body[title] = rounds.to_json(bases[title])
    write_report(args.json, body, "\n".join(lines))
    return 1 if any(rounds.void for rounds in comparisons.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
