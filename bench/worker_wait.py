# SPDX-License-Identifier: BSD-3-Clause
"""Measures what an idle worker costs and how soon it wakes, for each way to wait.

For comparison, it measures how long the kernel takes to wake a thread that waits for an eventfd
(bench/c/wake.c), and all of it again with processors kept from halting
(``Worker(resume_latency=0)``) where that is allowed.

The worker has one route between two devices. First nothing is sent, and the processor time of its
thread is read. Then frames are sent one at a time, some milliseconds apart, so that it sleeps again
before each. The latency is from before the packet socket's send to the kernel's timestamp of the
frame at the other end (SO_TIMESTAMPNS). It includes the sender's system call, but not the
receiver's own wake-up.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import struct
import subprocess
import time
from contextlib import ExitStack
from typing import Any

from bench.closed_loop import thread_cpu_ns
from bench.measure import bench_cpu, write_report
from bench.rig import namespace, programs
from bench.worker_idle import packet_socket, udp
from rtap import NetNS

SO_TIMESTAMPNS = 35


def arrival(far: socket.socket, data: bytes) -> int:
    """CLOCK_REALTIME nanoseconds at which the frame reached the socket."""
    got, ancillary, _, _ = far.recvmsg(2048, 64)
    if got != data:
        raise RuntimeError("another frame came")
    for level, kind, value in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            seconds, nanoseconds = struct.unpack("qq", value)
            return int(seconds) * 1_000_000_000 + int(nanoseconds)
    raise RuntimeError("the frame has no timestamp")


def spread(took: list[int]) -> dict[str, float]:
    """Microseconds within which 50, 99 and 100 % of frames arrived."""
    took.sort()
    return {
        f"p{p}_us": took[min(len(took) - 1, int(len(took) * p / 100))] / 1000 for p in (50, 99, 100)
    }


def kernel_alone(cpu: int, frames: int) -> dict[str, float]:
    """How long a thread on the worker's core takes to wake, woken from another core."""
    others = os.sched_getaffinity(0) - {cpu} or {cpu}
    program = str(programs(["wake"])["wake"])
    done = subprocess.run(
        [program, str(frames), str(cpu), str(min(others))],
        capture_output=True,
        text=True,
        check=True,
        timeout=60 + frames // 50,
    )
    return spread([int(line) for line in done.stdout.split()])


def measure(
    ns: NetNS, wait: str, cpu: int, args: argparse.Namespace, resume_latency: int | None = None
) -> dict[str, float]:
    """Share of a core while idle, and microseconds until 50, 99 and 100 % of frames arrive."""
    import rtap

    chance = random.Random(1)
    others = os.sched_getaffinity(0) - {cpu} or {cpu}
    with ExitStack() as stack:
        a: Any = stack.enter_context(ns.call(rtap.open, "A", engine=args.engine))
        b: Any = stack.enter_context(ns.call(rtap.open, "B", engine=args.engine))
        near = stack.enter_context(packet_socket(ns, "A"))
        far = stack.enter_context(packet_socket(ns, "B"))
        far.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        worker = rtap.Worker(cpu=cpu, wait=wait, resume_latency=resume_latency)
        worker.forward((a, 0), (b, 0))
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, others)
        stack.callback(os.sched_setaffinity, 0, before)
        threads = set(os.listdir("/proc/self/task"))
        stack.enter_context(worker)
        new = set(os.listdir("/proc/self/task")) - threads
        time.sleep(0.1)
        spent, began = thread_cpu_ns(new), time.perf_counter_ns()
        time.sleep(args.seconds)
        idle = (thread_cpu_ns(new) - spent) / (time.perf_counter_ns() - began)
        took = []
        for number in range(args.frames):
            time.sleep(chance.uniform(0.002, 0.006))
            data = udp(number % 4096, number)
            start = time.time_ns()
            near.send(data)
            took.append(arrival(far, data) - start)
        if worker.stats().routes[0].tx_packets != args.frames:
            raise RuntimeError("the worker counted other frames than were sent")
    return {"idle": idle, **spread(took)}


def awake() -> contextlib.AbstractContextManager[Any]:
    """Keep processors from halting."""
    from rtap._work.power import limit_resume_latency

    return open(limit_resume_latency(0), "wb")


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="bench.worker_wait", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--frames", type=int, default=2000, help="for the latency (default 2000)")
    parser.add_argument("--seconds", type=float, default=3, help="without a frame (default 3)")
    parser.add_argument("--engine", default="auto", help="rtap's engine: auto, uring or syscall")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)
    cpu = bench_cpu()
    found: dict[str, dict[str, float]] = {"the kernel alone": kernel_alone(cpu, args.frames)}
    for wait in ("poll", "adaptive", "sleep"):
        with namespace() as ns:
            found[wait] = measure(ns, wait, cpu, args)
    if os.access("/dev/cpu_dma_latency", os.W_OK):
        with awake():
            found["the kernel alone, awake"] = kernel_alone(cpu, args.frames)
        for wait in ("adaptive", "sleep"):
            with namespace() as ns:
                found[f"{wait}, awake"] = measure(ns, wait, cpu, args, 0)
    lines = ["a worker with nothing to do, and a frame for it; to the other device's kernel side"]
    for wait, row in found.items():
        idle = f"idle {100 * row['idle']:6.2f} % of a core; " if "idle" in row else ""
        lines.append(
            f"{wait:24} {idle:29} there after {row['p50_us']:.0f} us in the median, 99 % within "
            f"{row['p99_us']:.0f} us, the slowest {row['p100_us']:.0f} us"
        )
    write_report(args.json, {"benchmark": "worker_wait", "waits": found}, "\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
