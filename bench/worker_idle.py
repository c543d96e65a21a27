# SPDX-License-Identifier: BSD-3-Clause
"""Measures one worker with one busy and many idle queues: their cost, and how soon it serves them.

The busy queue goes round a closed loop as in bench.closed_loop. Two loops alternate. In one the
device has a single queue. In the other it has 128, and the kernel gives the only flow to one of
them. In both, the worker serves all queues on one core. The ratio is the share of the rate that
remains with 127 idle queues.

Then, while that loop runs, the idle queues of another device with 127 queues get frames of other
flows, one at a time and some milliseconds apart, so that each queue has left the worker's pass
before its next frame. The worker forwards them. The latency is from before the packet socket's send
to after the receive at the other end. Both are in this program on the other core, so the latency
includes its own wake-ups.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import struct
import sys
import time
from contextlib import ExitStack
from typing import Any

from bench.closed_loop import Loop, worker_subject
from bench.measure import alternate, bench_cpu, pinned, write_report
from bench.rig import namespace
from rtap import NetNS

SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
IPV4 = 0x0800


def udp(flow: int, number: int) -> bytes:
    """A UDP frame of one flow, to an address that no interface has."""
    payload = struct.pack("!Q", number).ljust(22, b"\0")
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(payload), flow, 0, 64, 17, 0)
    addresses = bytes((10, 0, flow >> 8, flow & 255, 10, 1, 0, 1))
    ports = struct.pack("!HHHH", 1024 + flow, 7, 8 + len(payload), 0)
    ether = bytes.fromhex("020000000002020000000001") + struct.pack("!H", IPV4)
    return ether + head + addresses + ports + payload


def packet_socket(ns: NetNS, ifname: str) -> socket.socket:
    def make() -> socket.socket:
        s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        s.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        s.bind((ifname, IPV4))
        s.settimeout(2)
        return s

    return ns.call(make)


def latencies(loop: Loop, ns: NetNS, cpu: int, wait: str, queues: int, n: int) -> list[int]:
    """Sorted nanoseconds that `n` frames took over queues that had left the worker's pass."""
    import rtap

    chance = random.Random(1)
    others = os.sched_getaffinity(0) - {cpu} or {cpu}
    with ExitStack() as stack:
        many: Any = stack.enter_context(ns.call(rtap.open, "C", queues=queues))
        out: Any = stack.enter_context(ns.call(rtap.open, "D"))
        near = stack.enter_context(packet_socket(ns, "C"))
        far = stack.enter_context(packet_socket(ns, "D"))
        worker = rtap.Worker(cpu=cpu, wait=wait)
        worker.forward((loop.a, 0), (loop.b, 0), on_full="retry")
        for q in range(queues):
            worker.forward((many, q), (out, 0))
        stack.enter_context(worker)
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, others)
        stack.callback(os.sched_setaffinity, 0, before)
        took: list[int] = []
        for number in range(n):
            time.sleep(chance.uniform(0.003, 0.008))
            deadline = time.monotonic() + 2
            while not all(r.idle for r in worker.stats().routes[1:]):
                if time.monotonic() > deadline:
                    raise RuntimeError("the idle queues do not leave the pass")
                time.sleep(0.001)
            data = udp(chance.randrange(4096), number)
            start = time.perf_counter_ns()
            near.send(data)
            if far.recv(2048) != data:
                raise RuntimeError("another frame came")
            took.append(time.perf_counter_ns() - start)
        routes = worker.stats().routes
        if not routes[0].rx_packets or sum(r.rx_packets for r in routes[1:]) != n:
            raise RuntimeError("the worker counted other frames than were sent")
    return sorted(took)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 when the figures are valid, 1 when a control voids them."""
    parser = argparse.ArgumentParser(
        prog="bench.worker_idle", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per slice (default 0.1)")
    parser.add_argument("--queues", type=int, default=128, help="of the device (default 128)")
    parser.add_argument("--frames", type=int, default=2000, help="for the latency (default 2000)")
    parser.add_argument("--engine", default="auto", help="rtap's engine: auto, uring or syscall")
    parser.add_argument("--wait", default="adaptive", help="the worker's: poll, sleep or adaptive")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)
    cpu = bench_cpu()
    with ExitStack() as stack:
        stack.enter_context(pinned(cpu))
        spaces = [stack.enter_context(namespace()) for _ in range(2)]
        one = Loop(stack, spaces[0], args.engine)
        many = Loop(stack, spaces[1], args.engine, args.queues)
        rounds = alternate(
            {
                "1 queue": stack.enter_context(worker_subject(one, cpu, args.wait)),
                f"{args.queues} queues": stack.enter_context(
                    worker_subject(many, cpu, args.wait, args.queues)
                ),
            },
            slices=args.slices,
            seconds=args.seconds,
            progress=lambda line: print(line, file=sys.stderr),
        )
        one.check()
        many.check(args.queues)
        name = f"{args.queues} queues / 1 queue"
        ratio = rounds.ratio(f"{args.queues} queues", "1 queue")
    with ExitStack() as stack:
        ns = stack.enter_context(namespace())
        loop = Loop(stack, ns, args.engine)
        took = latencies(loop, ns, cpu, args.wait, args.queues - 1, args.frames)
    at = {p: took[min(len(took) - 1, int(len(took) * p / 100))] / 1000 for p in (50, 99, 100)}
    lines = [
        f"one busy queue of {args.queues}, one worker, 64-byte frames",
        rounds.table("1 queue"),
        "",
        f"{name}: {ratio:.3f}",
        f"a frame on an idle queue beside it, {len(took)} frames: "
        f"median {at[50]:.0f} us, 99 % within {at[99]:.0f} us, the slowest {at[100]:.0f} us",
    ]
    result: dict[str, Any] = {
        "benchmark": "worker_idle",
        "rate": rounds.to_json("1 queue"),
        "targets": {name: ratio.to_json()},
        "latency_us": {str(p): value for p, value in at.items()},
    }
    write_report(args.json, result, "\n".join(lines))
    return 1 if rounds.void else 0


if __name__ == "__main__":
    raise SystemExit(main())
