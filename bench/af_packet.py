# SPDX-License-Identifier: BSD-3-Clause
"""Compares net_af_packet on a veth pair with TAP devices: one worker forwards, in one process.

512 frames of 64 bytes go round for ever. With TAP devices, a redirect in the kernel takes them from
the device that sends to the one that receives. With a veth pair, one end receives what the other
sends. The kernel's counters say how many frames passed; the time is the worker thread's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

import rtap
from bench.closed_loop import thread_cpu_ns
from bench.measure import Sample, Subject, alternate, bench_cpu, pinned, write_report
from bench.rig import LOOP_FRAMES, Counters, frame, namespace, redirect, run


def taps(stack: ExitStack, engine: str) -> Subject:
    """Frames that go round a pair of TAP devices."""
    ns = stack.enter_context(namespace())
    a: Any = stack.enter_context(rtap.open("A", netns=ns, engine=engine, nb_mbufs=2048))
    b: Any = stack.enter_context(rtap.open("B", netns=ns, engine=engine, nb_mbufs=2048))
    redirect(ns, "B", "A")
    counters = stack.enter_context(Counters(ns))
    return circle(a, b, lambda: counters.total(["A"], "tx_packets"))


def veths(stack: ExitStack, engine: str) -> Subject:
    """Frames that go round a veth pair with a net_af_packet device on each end."""
    ns = stack.enter_context(namespace())
    run(ns, "ip link add A type veth peer name B")
    pool: Any = stack.enter_context(rtap.Mempool(4096))
    ends = []
    for name in "AB":
        device = f"net_af_packet_{name}_{engine},iface={name}"
        dev: Any = stack.enter_context(ns.call(rtap.probe, device))
        dev.configure(1, 1, rtap.EthConf(engine=engine))
        dev.rx_queue_setup(0, 1024, pool)
        dev.tx_queue_setup(0, 1024)
        ends.append(dev)
    for dev in ends:
        dev.start()
    counters = stack.enter_context(Counters(ns))
    deadline = time.monotonic() + 10
    # The queueing discipline drops frames that are sent before the link is up.
    while not ends[1].send(frame(0)) or not ends[0].rx_burst(0, timeout=0.1):
        if time.monotonic() > deadline:
            raise RuntimeError("the veth pair does not come up")
    return circle(ends[0], ends[1], lambda: counters.total(["A"], "rx_packets"))


def circle(a: Any, b: Any, passed: Any) -> Subject:
    """A worker that receives from `a` and sends to `b`, from where the frames come back to `a`."""
    burst = a.pool.alloc_burst(LOOP_FRAMES, data=[frame(i) for i in range(LOOP_FRAMES)])
    while len(burst):
        b.tx_burst(0, burst)
    worker: Any = rtap.Worker(wait="poll")
    worker.forward((a, 0), (b, 0), on_full="retry")

    def subject(seconds: float) -> Sample:
        threads = set(os.listdir("/proc/self/task"))
        with worker:
            time.sleep(0.01)
            before, begun = passed(), time.perf_counter()
            mine = set(os.listdir("/proc/self/task")) - threads
            cpu = thread_cpu_ns(mine)
            time.sleep(seconds)
            moved = passed() - before
            return Sample(moved, time.perf_counter() - begun, thread_cpu_ns(mine) - cpu)

    return subject


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 when the figures are valid, 1 when a control voids them."""
    parser = argparse.ArgumentParser(prog="bench.af_packet", description=__doc__.partition("\n")[0])
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per slice (default 0.1)")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)
    with ExitStack() as stack:
        stack.enter_context(pinned(bench_cpu()))
        subjects = {
            f"{name} {engine}": make(stack, engine)
            for name, make in (("tap", taps), ("veth", veths))
            for engine in ("syscall", "uring")
        }
        rounds = alternate(
            subjects,
            slices=args.slices,
            seconds=args.seconds,
            progress=lambda line: print(line, file=sys.stderr),
        )
    base = "tap syscall"
    body = {"benchmark": "af_packet", **rounds.to_json(base)}
    write_report(args.json, body, rounds.table(base))
    return 1 if rounds.void else 0


if __name__ == "__main__":
    raise SystemExit(main())
