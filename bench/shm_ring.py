# SPDX-License-Identifier: BSD-3-Clause
"""Hands 64-byte frames from one process to another, through a ring of shared memory.

Each process has a core of its own. The subjects:

workers         in one process a worker makes frames (net_null's queue) and puts them into the ring;
                in the other one a worker takes them out and frees them
python          the same in two plain Python loops, 64 frames a call
one process     a Python loop that allocates, sends, receives and frees: no other core takes part
unix socket     64-byte messages through a SOCK_SEQPACKET socket, from Python to Python: send(2) and
                recv(2), one frame each

The receiving process counts. Frames are of one pool of 16,384 buffers, the ring has room for 8192.

Apart from these, two processes take turns: one allocates and sends 2048 frames, then the other one
receives and frees them, each on its core. That tells the processor time of a frame on either side,
with all cache misses of a frame that comes from another core, also on a machine that is busy.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from bench.closed_loop import thread_cpu_ns
from bench.measure import Sample, Spread, Subject, alternate, loop_until, pinned, write_report
from rtap import Mempool, PoolEmpty, Worker
from rtap._queues.null import NullRxQueue, NullTxQueue
from rtap._queues.shm_ring import ShmRing

BUFFERS = 16384
ROOM = 8192
FRAME = 64
BURST = 64
TURN = 2048
GO, STOP = b"g", b"s"


class Ends:
    """Queues of net_null, where a worker's route begins or ends."""

    def __init__(self, pool: Mempool) -> None:
        self.rx = NullRxQueue(pool, name="null", size=FRAME)
        self.tx = NullTxQueue("null")
        for queue in (self.rx, self.tx):
            queue.start()

    def rx_queue(self, number: int) -> NullRxQueue:
        return self.rx

    def tx_queue(self, number: int) -> NullTxQueue:
        return self.tx


# ---- the sending process


def until_told(step: Callable[[], object]) -> None:
    """Runs the step again and again until the other process says stop."""
    while not select.select([0], [], [], 0)[0]:
        for _ in range(50):
            step()


def send_by_worker(pool: Mempool, ring: ShmRing) -> Callable[[], None]:
    def run() -> None:
        worker = Worker(wait="poll")
        worker.forward((ends, 0), ring, on_full="retry")
        with worker:
            select.select([0], [], [])

    ends = Ends(pool)
    return run


def send_by_python(pool: Mempool, ring: ShmRing) -> Callable[[], None]:
    data = bytes(FRAME)

    def step() -> None:
        with suppress(PoolEmpty):
            ring.enqueue(pool.alloc_burst(BURST, data))

    return lambda: until_told(step)


def send_by_socket(line: socket.socket) -> Callable[[], None]:
    data = bytes(FRAME)

    def step() -> None:
        with suppress(BlockingIOError):
            for _ in range(BURST):
                line.send(data, socket.MSG_DONTWAIT)

    return lambda: until_told(step)


def take_turns(pool: Mempool, ring: ShmRing) -> None:
    """Sends 2048 frames for each byte on standard input, and answers with the nanoseconds."""
    os.write(1, STOP)
    while os.read(0, 1) == GO:
        began = time.thread_time_ns()
        for _ in range(TURN // BURST):
            ring.enqueue(pool.alloc_burst(BURST))
        os.write(1, (time.thread_time_ns() - began).to_bytes(8, "little"))


def sender(kind: str, fds: list[int]) -> None:
    """The life of a sending process: a byte on its standard input starts it, and another stops it,
    which it answers."""
    run: Callable[[], None]
    if kind == "socket":
        run = send_by_socket(socket.socket(fileno=fds[0]))
    else:
        pool = Mempool.attach(fds[0])
        ring = ShmRing(fds[1], pool=pool, event_fd=fds[2])
        if kind == "turns":
            take_turns(pool, ring)
            return
        run = (send_by_worker if kind == "worker" else send_by_python)(pool, ring)
    os.write(1, STOP)
    while os.read(0, 1) == GO:
        run()
        os.read(0, 1)
        os.write(1, STOP)


class Sender:
    """A process that sends while it is told to."""

    def __init__(self, stack: ExitStack, kind: str, cpu: int, *fds: int) -> None:
        with pinned(cpu):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.shm_ring", "--sender", kind, *map(str, fds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=fds,
                bufsize=0,
            )
        stack.callback(self._end)
        self.answer(1)

    def _end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()

    def answer(self, n: int) -> bytes:
        assert self._process.stdout is not None
        answer: bytes = self._process.stdout.read(n)
        if len(answer) != n:
            raise RuntimeError("the sending process has ended")
        return answer

    def tell(self, what: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(what)
        if what == STOP:
            self.answer(1)


# ---- the receiving process


def shared(stack: ExitStack) -> tuple[Mempool, ShmRing, tuple[int, int, int]]:
    pool = Mempool(BUFFERS, shared=True)
    ring = stack.enter_context(ShmRing.create(pool, ROOM))
    assert pool.fd is not None
    assert ring.event_fd is not None
    return pool, ring, (pool.fd, ring.fd, ring.event_fd)


def drain(ring: ShmRing) -> None:
    while len(ring.dequeue(BURST)):
        pass


def workers(stack: ExitStack, mine: int, other: int) -> Subject:
    pool, ring, fds = shared(stack)
    partner = Sender(stack, "worker", other, *fds)
    ends = Ends(pool)

    def run(seconds: float) -> Sample:
        worker = Worker(wait="poll", cpu=mine, name="bench-ring")
        worker.forward(ring, (ends, 0))
        with worker:
            partner.tell(GO)
            while worker.stats().routes[0].rx_packets == 0:
                time.sleep(0.0005)
            ident = next(t.native_id for t in threading.enumerate() if t.name == "bench-ring")
            assert ident is not None
            frames, cpu = worker.stats().routes[0].rx_packets, thread_cpu_ns({str(ident)})
            began = time.perf_counter()
            time.sleep(seconds)
            frames = worker.stats().routes[0].rx_packets - frames
            sample = Sample(frames, time.perf_counter() - began, thread_cpu_ns({str(ident)}) - cpu)
            partner.tell(STOP)
        drain(ring)
        return sample

    return run


def received(partner: Sender, step: Callable[[], int]) -> Subject:
    def run(seconds: float) -> Sample:
        partner.tell(GO)
        while step() == 0:
            pass
        sample = loop_until(step, seconds, 20)
        partner.tell(STOP)
        while step():
            pass
        return sample

    return run


def python(stack: ExitStack, mine: int, other: int) -> Subject:
    _pool, ring, fds = shared(stack)
    return received(Sender(stack, "python", other, *fds), lambda: len(ring.dequeue(BURST)))


def one_process(stack: ExitStack, mine: int, other: int) -> Subject:
    pool, ring, _fds = shared(stack)
    data = bytes(FRAME)

    def step() -> int:
        ring.enqueue(pool.alloc_burst(BURST, data))
        return len(ring.dequeue(BURST))

    return lambda seconds: loop_until(step, seconds, 20)


def unix_socket(stack: ExitStack, mine: int, other: int) -> Subject:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.enter_context(near)
    with far:
        partner = Sender(stack, "socket", other, far.fileno())

    def step() -> int:
        frames = 0
        with suppress(BlockingIOError):
            while frames < BURST:
                near.recv(FRAME, socket.MSG_DONTWAIT)
                frames += 1
        return frames

    return received(partner, step)


def turns(mine: int, other: int, n: int) -> dict[str, Spread]:
    """Processor nanoseconds of a frame on either side."""
    sent, received = [], []
    with ExitStack() as stack:
        _pool, ring, fds = shared(stack)
        partner = Sender(stack, "turns", other, *fds)
        for _ in range(n):
            partner.tell(GO)
            sent.append(int.from_bytes(partner.answer(8), "little") / TURN)
            began = time.thread_time_ns()
            for _ in range(TURN // BURST):
                ring.dequeue(BURST)
            received.append((time.thread_time_ns() - began) / TURN)
    return {"sent": Spread.of(sent), "received": Spread.of(received)}


SUBJECTS: dict[str, Callable[[ExitStack, int, int], Subject]] = {
    "workers": workers,
    "python": python,
    "one process": one_process,
    "unix socket": unix_socket,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.shm_ring", description=__doc__.partition("\n")[0])
    parser.add_argument("--sender", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--slices", type=int, default=31, help="rounds of one slice each")
    parser.add_argument("--seconds", type=float, default=0.1, help="seconds of a slice")
    parser.add_argument("--turns", type=int, default=1000, help="of 2048 frames each")
    parser.add_argument("--attempts", type=int, default=3, help="tries before a run stays void")
    parser.add_argument("--engine", help="ignored: nothing here goes through a device")
    parser.add_argument("--json", help="write the raw figures to this file, - for the terminal")
    args = parser.parse_args(argv)
    if args.sender:
        sender(args.sender[0], [int(fd) for fd in args.sender[1:]])
        return
    cpus = sorted(os.sched_getaffinity(0))
    mine, other = cpus[-1], cpus[0]
    with ExitStack() as stack, pinned(mine):
        subjects: dict[str, Any] = {
            name: make(stack, mine, other) for name, make in SUBJECTS.items()
        }
        rounds = alternate(
            subjects,
            slices=args.slices,
            seconds=args.seconds,
            attempts=args.attempts,
            progress=lambda text: print(text, file=sys.stderr),
        )
        sides = turns(mine, other, args.turns)
    body = {
        "benchmark": "shm_ring",
        "cpus": [mine, other],
        "turns": {name: side.to_json() for name, side in sides.items()},
        **rounds.to_json("unix socket"),
    }
    text = rounds.table("unix socket")
    for name, side in sides.items():
        text += f"\nin turns, {name}: {side:.1f} cpu ns/frame"
    write_report(args.json, body, text)


if __name__ == "__main__":
    main()
