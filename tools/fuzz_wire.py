# SPDX-License-Identifier: BSD-3-Clause
"""Sends hostile and odd frames through real TAP and TUN devices, and accounts for every frame.

Each run has a seed, from which everything is drawn: the devices (engine, mode, offloads, MTU,
pools, queues), what moves frames between them (a worker with stages, or bursts from Python), an
event in the middle (carrier, stop, close), and the frames from the kernel's side and from rtap's.
Each child process makes a few runs. A fault is death by a signal or a sanitizer, a hang, a frame
that no counter has, wrong bytes or checksums in a frame that was not damaged, or a lost slot.

    python tools/fuzz_wire.py                        a million frames, on the release build
    python tools/fuzz_wire.py --seconds 60           as many frames as fit
    python tools/fuzz_wire.py --seed 7 --runs 1      run 7 again
    tools/sanitize --run .venv/bin/python tools/fuzz_wire.py
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from wire_plan import Plan
from wire_run import Run

from rtap import NetNS

#: Runs in one child process, and the seconds one run may take.
BATCH, LIMIT = 12, 120


def one(seed: int, ns: NetNS) -> int:
    """Make one run and return how many frames moved."""
    plan = Plan(seed)
    run = Run(plan, ns)
    try:
        run.go()
        return run.check()
    except BaseException as exc:
        exc.add_note(f"plan: {plan}") if hasattr(exc, "add_note") else print(plan, file=sys.stderr)
        raise
    finally:
        run.close()


def quiet() -> NetNS:
    """A namespace in which the kernel sends no frames of its own."""
    ns = NetNS()

    def still() -> None:
        for conf in ("all", "default"):
            path = f"/proc/sys/net/ipv6/conf/{conf}/disable_ipv6"
            if os.path.exists(path):
                with open(path, "w") as f:
                    f.write("1")

    ns.call(still)
    return ns


def child(seed: int, runs: int) -> None:
    """Make some runs; a fault ends the process with a traceback and a nonzero status."""
    faulthandler.enable()
    logging.disable()
    with quiet() as ns:
        for number in range(seed, seed + runs):
            print(f"{number} ", end="", flush=True)
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            print(one(number, ns), flush=True)
            faulthandler.cancel_dump_traceback_later()


def batch(seed: int, runs: int) -> tuple[int, int, str]:
    """Make runs in a child process; return runs, frames, and what went wrong ("" if nothing)."""
    command = [sys.executable, __file__, "--child", "--seed", str(seed), "--runs", str(runs)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=(LIMIT + 10) * runs)
            how = f"exit {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            how = "hangs, and its own time-out did not end it"
    lines = [line.split() for line in out.splitlines()]
    frames = sum(int(line[1]) for line in lines if len(line) == 2)
    done = sum(len(line) == 2 for line in lines)
    if process.returncode == 0 and done == runs:
        return done, frames, ""
    again = f"python tools/fuzz_wire.py --seed {seed + done} --runs 1"
    return done, frames, f"seed {seed + done}: {how}\n{err[-6000:]}\nagain: {again}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz_wire", description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=float, default=1e6, help="in all (default 1e6)")
    parser.add_argument("--seconds", type=float, default=3600, help="start none later (3600)")
    parser.add_argument("--runs", type=int, help="number of runs, instead of --frames")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first run")
    parser.add_argument("--jobs", type=int, default=2 * len(os.sched_getaffinity(0)))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.seed, args.runs)
        return 0
    if os.geteuid() != 0:
        print("fuzz_wire: needs root, for namespaces and devices", file=sys.stderr)
        return 1
    begun = time.monotonic()
    totals = {"runs": 0, "frames": 0, "bad": 0}
    lock = threading.Lock()

    def todo() -> Iterator[tuple[int, int]]:
        """The first seed and the number of runs of each batch, until the limit is reached."""
        for seed in itertools.count(args.seed, BATCH):
            left = BATCH if args.runs is None else min(BATCH, args.seed + args.runs - seed)
            enough = args.runs is None and totals["frames"] >= args.frames
            if left <= 0 or enough or time.monotonic() - begun >= args.seconds:
                return
            yield seed, left

    batches = todo()

    def work() -> None:
        while True:
            with lock:
                which = next(batches, None)
            if which is None:
                return
            runs, frames, text = batch(*which)
            with lock:
                totals["runs"] += runs
                totals["frames"] += frames
                if text:
                    print(text, flush=True)
                    totals["bad"] += 1

    with ThreadPoolExecutor(args.jobs) as pool:
        for done in [pool.submit(work) for _ in range(args.jobs)]:
            done.result()
    took = time.monotonic() - begun
    print(
        f"fuzz_wire: {totals['frames']} frames in {totals['runs']} runs, {totals['bad']} found "
        f"something, {took:.0f} s, {totals['frames'] / took:.0f} frames/s"
    )
    return 1 if totals["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
