# SPDX-License-Identifier: BSD-3-Clause
"""Random sequences of calls of the public API on pools, mbufs, bursts, stages and devices.

Each sequence has a seed and runs in a process of its own, so that a crash or a hang does not end
the fuzzer. It calls from one thread, or from three that share all objects. As root, one sequence in
three uses a TAP device in a namespace of its own; the others use a net_null device. A fault is
death by a signal or a sanitizer, a hang, SystemError, AssertionError, or slots missing from a pool
at the end.

    python tools/fuzz_api.py                       half a million calls, on the release build
    python tools/fuzz_api.py --seconds 60          as many of them as fit
    python tools/fuzz_api.py --seed 7 --runs 1     sequence 7 again
    tools/sanitize --run .venv/bin/python tools/fuzz_api.py
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import rtap
from rtap import EthConf, offload, stages

#: Calls in one sequence, and the seconds it may take.
LENGTH, LIMIT = 2000, 120
#: Exceptions that a wrong or untimely call may raise.
REFUSALS = (ValueError, TypeError, RuntimeError, BufferError, OSError, IndexError, OverflowError)
ODD = (-1, 0, 1, 2, 13, 14, 60, 100, 2047, 2048, 65535, 1 << 16, 1 << 31, 1 << 63, None, "x", 1.5)
KEPT = 12


class World:
    """The objects that the calls use; all threads of a sequence share them."""

    def __init__(self, seed: int) -> None:
        r = random.Random(seed)
        tap = seed % 3 == 0 and os.geteuid() == 0
        # A TAP device's queue rejects a pool that can never hold a frame.
        slots = [64, 300] if tap else [4, 64, 300]
        shapes = [(r.choice(slots), r.choice([64, 256, 2048])) for _ in range(3)]
        self.pools = [rtap.Mempool(n, room, memfd=r.random() < 0.2) for n, room in shapes]
        self.mbufs: list[rtap.Mbuf] = []
        self.bursts: list[rtap.Burst] = []
        self.views: list[memoryview] = []
        self.gros = [offload.Gro(udp=True), offload.Gro(timeout=0.01)]
        self.wire: socket.socket | None = None  # the kernel's end of the device
        if tap:
            with rtap.NetNS() as ns:
                engine = r.choice(["uring", "syscall"])
                self.dev = rtap.open("fuzz0", queues=2, netns=ns, engine=engine)
                self.wire = ns.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
                self.wire.bind(("fuzz0", 0))
                self.wire.setblocking(False)
            self.dev.stop()
        else:
            self.dev = rtap.probe(f"net_null0,size={r.choice([14, 60, 64])}")
        scatter = rtap.RxOffload.SCATTER if self.wire else rtap.RxOffload(0)  # for any pool
        self.conf = EthConf(scatter)
        self.dev.configure(2, 2, self.conf)
        for q in range(2):
            self.dev.rx_queue_setup(q, 64, r.choice(self.pools))
            self.dev.tx_queue_setup(q, 64)
        self.dev.start()

    def end(self) -> None:
        self.dev.close()
        if self.wire:
            self.wire.close()
        for kept in (self.views, self.mbufs, self.bursts, self.gros):
            kept.clear()
        gc.collect()
        for pool in self.pools:
            if pool.in_use:
                raise AssertionError(f"{pool.in_use} slots are lost of {pool}")
            pool.close()


class Caller:
    """The calls of one thread."""

    def __init__(self, world: World, seed: int) -> None:
        self.w = world
        self.r = random.Random(seed)
        self.calls = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("call_")]

    def run(self, calls: int) -> None:
        for _ in range(calls):
            call: Callable[[], None] = self.r.choice(self.calls)
            try:
                call()
            except REFUSALS:
                pass
            except MemoryError as exc:  # includes PoolEmpty
                del exc

    # -- arguments

    def n(self) -> Any:
        return self.r.choice(ODD) if self.r.random() < 0.2 else self.r.randrange(200)

    def data(self) -> bytes:
        r = self.r
        if r.random() < 0.5:
            return r.randbytes(r.choice([0, 1, 14, 60, 300, 3000]))
        # IPv4 and TCP, with lengths that may be wrong.
        size = r.choice([0, 10, 100, 1400, 5000])
        length = 40 + size if r.random() < 0.8 else r.randrange(65536)
        ip = b"\x45\0" + length.to_bytes(2, "big") + bytes(4) + b"\x40\x06\0\0" + bytes(8)
        tcp = r.randbytes(12) + bytes([r.choice([0x50, 0x80, 0xF0]), 16]) + bytes(6)
        return bytes(12) + b"\x08\0" + ip + tcp + bytes(size)

    def pool(self) -> rtap.Mempool:
        return self.r.choice(self.w.pools)

    def mbuf(self) -> rtap.Mbuf:
        return self.r.choice(self.w.mbufs)

    def burst(self) -> rtap.Burst:
        return self.r.choice(self.w.bursts)

    def keep(self, where: list[Any], what: Any) -> None:
        if what is not None:
            where.append(what)
        if len(where) > KEPT:
            del where[: self.r.randrange(1, KEPT)]

    # -- calls

    def call_alloc(self) -> None:
        self.keep(self.w.mbufs, self.pool().alloc(self.data()))

    def call_alloc_burst(self) -> None:
        data = self.r.choice([None, self.data(), [self.data() for _ in range(5)]])
        self.keep(self.w.bursts, self.pool().alloc_burst(self.n(), data))

    def call_clone(self) -> None:
        self.keep(self.w.mbufs, self.mbuf().clone())

    def call_next(self) -> None:
        self.keep(self.w.mbufs, self.mbuf().next)

    def call_index(self) -> None:
        self.keep(self.w.mbufs, self.burst()[self.r.randrange(8)])

    def call_resize(self) -> None:
        how = self.r.choice(["prepend", "append", "adj", "trim"])
        self.keep(self.w.views, getattr(self.mbuf(), how)(self.n()))

    def call_write(self) -> None:
        mbuf, n = self.mbuf(), self.n()
        mbuf[n : n + 9] = self.r.randbytes(9)

    def call_read(self) -> None:
        mbuf = self.mbuf()
        if len(bytes(mbuf)) != len(mbuf) and threading.active_count() == 1:
            raise AssertionError("bytes of another length than the frame's")

    def call_view(self) -> None:
        view = self.mbuf().data
        view[:4] = b"view"[: len(view)]
        self.keep(self.w.views, view)

    def call_free(self) -> None:
        which: rtap.Mbuf | rtap.Burst = self.mbuf() if self.r.random() < 0.5 else self.burst()
        which.free()

    def call_forget(self) -> None:
        if self.r.random() < 0.2:
            where: list[list[Any]] = [self.w.mbufs, self.w.bursts, self.w.views]
            self.r.choice(where).clear()

    def call_flags(self) -> None:
        mbuf = self.mbuf()
        mbuf.ol_flags = int(self.r.choice(list(rtap.MbufFlag)) | self.r.choice(list(rtap.MbufFlag)))
        for name in ("l2_len", "l3_len", "l4_len", "tso_segsz", "vlan_tci", "outer_l3_len"):
            setattr(mbuf, name, self.n())

    def call_gather(self) -> None:
        burst, n = self.burst(), self.n()
        burst.scatter(self.n(), burst.gather(self.n(), n))
        self.keep(self.w.views, burst.array(n))

    def call_select(self) -> None:
        part = self.burst().select([self.r.randrange(-9, 9) for _ in range(3)])
        part.extend(self.r.choice([part, self.burst(), self.w.mbufs]))
        self.keep(self.w.bursts, part[self.n() :])

    def call_gso(self) -> None:
        mbuf = self.mbuf()
        mbuf.ol_flags, mbuf.tso_segsz = int(rtap.MbufFlag.TX_TCP_SEG), self.r.randrange(1, 999)
        pool = self.r.choice([None, self.pool()])
        self.keep(self.w.bursts, offload.gso(rtap.Burst([mbuf]), pool))

    def call_gro(self) -> None:
        gro = self.r.choice(self.w.gros)
        self.keep(self.w.bursts, gro.coalesce(self.burst()) if self.n() else gro.flush())

    def call_offload(self) -> None:
        names = ["parse_burst", "verify_burst", "fill_burst", "checksum_burst"]
        getattr(offload, self.r.choice(names))(self.burst())

    def call_stage(self) -> None:
        stage = self.r.choice(
            [
                stages.MacSwap(),
                stages.FiveTupleSwap(),
                stages.ChecksumFill(),
                stages.ChecksumVerify(),
                stages.Gro(udp=True),
                stages.Gso(self.r.choice([None, self.pool()])),
                stages.Spread(),
                stages.Match("tcp", action=0),
                stages.Echo("02:00:00:00:00:01"),
                stages.Call(lambda burst: [stages.DROP] * len(burst)),
            ]
        )
        stage(self.burst(), self.r.choice([1, 2, self.n()]))

    def call_device(self) -> None:
        dev, r = self.w.dev, self.r
        r.choice(
            [
                *[dev.start] * 6,
                dev.stop,
                lambda: dev.stop() if r.random() < 0.5 else dev.configure(2, 2, self.w.conf),
                lambda: dev.rx_queue_setup(r.randrange(2), 64, self.pool()),
                lambda: dev.tx_queue_setup(r.randrange(2), 64),
                lambda: dev.rx_queue_stop(r.randrange(2)),
                lambda: dev.rx_queue_start(r.randrange(2)),
                dev.stats,
                dev.xstats,
                dev.stats_reset,
                dev.info,
            ]
        )()

    def call_rx(self) -> None:
        self.keep(self.w.bursts, self.w.dev.rx_burst(self.r.randrange(2), self.n()))

    def call_wire(self) -> None:
        if self.w.wire:
            self.w.wire.send(self.data())

    def call_tx(self) -> None:
        self.w.dev.tx_burst(self.r.randrange(2), self.burst())

    def call_worker(self) -> None:
        if self.r.random() < 0.9:
            return
        worker = rtap.Worker(wait="sleep")
        dev = self.w.dev
        worker.forward((dev, 0), (dev, 0), stages=[stages.MacSwap(), stages.Gro()])
        with worker:
            worker.stats()


def child(seed: int, threads: int) -> None:
    """Run one sequence; a fault ends the process with a traceback and a nonzero status."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    world = World(seed)
    failed: list[BaseException] = []

    def body(n: int) -> None:
        try:
            Caller(world, seed * 3 + n).run(LENGTH // threads)
        except BaseException as exc:  # noqa: BLE001 - raised in the main thread
            failed.append(exc)

    if threads == 1:
        body(0)
    else:
        running = [threading.Thread(target=body, args=(n,)) for n in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    if failed:
        raise failed[0]
    world.end()


def run(seed: int, threads: int) -> str:
    """Run a sequence in a child process; return what went wrong, "" when nothing did."""
    command = [sys.executable, __file__, "--child", "--seed", str(seed), "--threads", str(threads)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=LIMIT + 10
        )
    except subprocess.TimeoutExpired:
        return f"seed {seed}, {threads} threads: hangs, and its own time-out did not end it"
    if done.returncode == 0:
        return ""
    return f"seed {seed}, {threads} threads: exit {done.returncode}\n{done.stderr[-3000:]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz_api", description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=float, default=5e5, help="in all (default 5e5)")
    parser.add_argument("--seconds", type=float, default=3600, help="start none later (3600)")
    parser.add_argument("--runs", type=int, help="number of sequences, instead of --calls")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first sequence")
    parser.add_argument("--threads", type=int, choices=(1, 3), help="default: both in turn")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.seed, args.threads)
        return 0
    runs = args.runs or max(1, int(args.calls) // LENGTH)
    todo = [(args.seed + n, args.threads or (1, 3)[n % 2]) for n in range(runs)]
    bad, begun = 0, time.monotonic()

    def turn(which: tuple[int, int]) -> str | None:
        return run(*which) if time.monotonic() - begun < args.seconds else None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for text in pool.map(turn, todo):
            if text is None:
                runs -= 1
            elif text:
                print(text, flush=True)
                bad += 1
    took = time.monotonic() - begun
    print(
        f"fuzz_api: {runs * LENGTH} calls in {runs} sequences, {bad} found something, {took:.0f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
