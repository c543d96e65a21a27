# SPDX-License-Identifier: BSD-3-Clause
"""One device served by several processes: the closed loop, by one process and by two.

Two TAPs, A and B, as in bench.closed_loop. This process has them, and lends their queue pairs: the
first child gets a pair of each, the second one another. Each runs a worker on a core of its own,
round which go those of 1024 frames whose flows the kernel gives to its pair. In a slice one of
them works, or both do. The kernel counts the frames (tx_packets of A); at the end the children
drain their pairs, and all frames must be there.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import IO, Any

from bench.measure import Rounds, Sample, Subject, alternate, pinned, write_report
from bench.rig import FRAME, Counters, namespace, redirect, run

FRAMES = 1024
PAIRS = 2
BURST = 64
#: Each pair gets about half of the flows.
FLOWS = 64
#: Behind the UDP header.
SEQ_OFFSET = 42


def flow_frame(seq: int) -> bytes:
    """A UDP frame of 64 bytes, of one of FLOWS flows, with a sequence number."""
    ethernet = b"\x02\0\0\0\0\x0b\x02\0\0\0\0\x0a\x08\0"
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, FRAME - 14, 0, 0, 64, 17, 0, b"\x0a\0\0\x01", b"\x0a\0\0\x02"
    )
    udp = struct.pack("!HHHH", 1024 + seq % FLOWS, 9, FRAME - 34, 0)
    head = ethernet + ip + udp + seq.to_bytes(8, sys.byteorder)
    return head.ljust(FRAME, b"\0")


class Child:
    """A process that attaches to a pair of A and one of B, and does what it is told."""

    def __init__(self, stack: ExitStack, number: int, cpu: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.processes", "--child", str(number), str(cpu)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(self._end)
        self.tell("ready")

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def tell(self, word: str) -> Any:
        """Its answer to one word."""
        stdin = self._pipe(self._process.stdin)
        stdin.write(word + "\n")
        stdin.flush()
        return json.loads(self._pipe(self._process.stdout).readline() or "null")


def child(number: int, cpu: int) -> None:
    """What a child does, until its standard input ends."""
    import rtap

    with rtap.attach("bench-A", [number]) as a, rtap.attach("bench-B", [number + 1]) as b:
        worker = rtap.Worker(cpu=cpu)
        worker.forward((a, number), (b, number + 1), on_full="retry")
        for line in sys.stdin:
            answer: Any = None
            if line == "go\n":
                worker.start()
            elif line == "stop\n":
                worker.stop()
            elif line == "drain\n":
                answer = []
                while burst := a.rx_burst(number, BURST, timeout=0.05):
                    seqs = (bytes(m)[SEQ_OFFSET : SEQ_OFFSET + 8] for m in burst)
                    answer += [int.from_bytes(seq, sys.byteorder) for seq in seqs]
            print(json.dumps(answer), flush=True)


def subject(children: list[Child], counters: Counters) -> Subject:
    """The loop, forwarded by these children."""

    def slice_of(seconds: float) -> Sample:
        for one in children:
            one.tell("go")
        try:
            time.sleep(0.01)
            begun, before = time.perf_counter(), counters.read("A")["tx_packets"]
            time.sleep(seconds)
            after, ended = counters.read("A")["tx_packets"], time.perf_counter()
        finally:
            for one in children:
                one.tell("stop")
        return Sample(after - before, ended - begun)

    return slice_of


def measure(args: argparse.Namespace, stack: ExitStack) -> Rounds:
    """One process, and two."""
    import rtap

    cpus = sorted(os.sched_getaffinity(0))[-PAIRS:]
    if len(cpus) < PAIRS:
        raise RuntimeError(f"this needs {PAIRS} cores")
    os.environ["RTAP_RUNTIME_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
    ns = stack.enter_context(namespace())
    a = stack.enter_context(ns.call(rtap.open, "A", queues=PAIRS))
    b = stack.enter_context(ns.call(rtap.open, "B", queues=PAIRS + 1))
    counters = stack.enter_context(Counters(ns))
    run(ns, "ip link set A txqueuelen 4096")
    redirect(ns, "B", "A")
    stack.enter_context(rtap.share(a, name="bench-A"))
    stack.enter_context(rtap.share(b, range(1, PAIRS + 1), name="bench-B"))
    children = [Child(stack, n, cpu) for n, cpu in enumerate(cpus)]
    frames = b.pool.alloc_burst(FRAMES, data=[flow_frame(n) for n in range(FRAMES)])
    while frames:
        b.tx_burst(0, frames)
    with pinned(cpus[0]):
        rounds = alternate(
            {"one process": subject(children[:1], counters), "two": subject(children, counters)},
            slices=args.slices,
            seconds=args.seconds,
            progress=lambda line: print(line, file=sys.stderr),
        )
    found = sorted(seq for one in children for seq in one.tell("drain"))
    if found != list(range(FRAMES)):
        raise RuntimeError(f"{len(found)} of {FRAMES} frames came back")
    return rounds


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 when the figures are valid, 1 when the control voids them."""
    parser = argparse.ArgumentParser(prog="bench.processes", description=__doc__.partition("\n")[0])
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per slice (default 0.1)")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(*args.child)
        return 0
    with ExitStack() as stack:
        rounds = measure(args, stack)
    result = {"benchmark": "processes", "loop": rounds.to_json("one process")}
    write_report(args.json, result, "closed loop, 64-byte frames\n" + rounds.table("one process"))
    return 1 if rounds.void else 0


if __name__ == "__main__":
    raise SystemExit(main())
