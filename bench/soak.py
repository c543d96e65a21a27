# SPDX-License-Identifier: BSD-3-Clause
"""Long runs that must lose nothing: no slots, descriptors, memory, or the ability to send.

sending     Sends 100 million 64-byte frames, no two alike, through a pool of 512 mbufs. A driver
            that never frees sent mbufs stops after 512 frames; one that loses a slot now and then
            stops later. Checked on the way and at the end: every slot is free, and the kernel and
            the device counted every frame.
open        Opens, sends, receives and closes 1000 times. The interface is gone after each close,
            and neither descriptors nor memory grow.
restart     Stops and starts one device 1000 times, and sends and receives frames in between.
kill        Kills a process with SIGKILL while it sends, and opens the same name again.

Ends with status 1 and one line for each check that failed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.measure import write_report
from bench.rig import ETHERTYPE, Counters, frame, namespace
from bench.send64 import BURST, numpy_step, plain_step
from rtap import NetNS

POOL = 512
LIMITS = {"python blocks": 0.2, "malloc bytes": 64.0, "resident bytes": 4096.0}
"""Growth per cycle that counts as a leak, see :func:`memory`. Resident memory also moves by a
megabyte either way with the allocator's arenas, so only a leak of a page per cycle shows there; it
is measured to see mappings that malloc does not make."""


class Checks:
    """What was checked and what failed."""

    def __init__(self) -> None:
        self.passed = 0
        self.failures: list[str] = []

    def equal(self, what: str, got: object, wanted: object) -> None:
        """Record a failure unless both are equal."""
        if got == wanted:
            self.passed += 1
        else:
            self.failures.append(f"{what}: {got!r}, expected {wanted!r}")

    def at_most(self, what: str, got: float, limit: float) -> None:
        """Record a failure when ``got`` is above ``limit``."""
        if got <= limit:
            self.passed += 1
        else:
            self.failures.append(f"{what}: {got}, expected at most {limit}")


def descriptors() -> int:
    """Open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def memory() -> dict[str, int]:
    """Memory in use: blocks of Python's allocator, bytes of malloc (glibc), resident bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "python blocks": sys.getallocatedblocks(),
        "malloc bytes": malloc_in_use(),
        "resident bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    }


class Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def malloc_in_use() -> int:
    """Bytes allocated by malloc, mappings included; 0 where the C library cannot say."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return int(info.uordblks) + int(info.hblkhd)


def progress(line: str) -> None:
    """Report progress on stderr; on a terminal, one line that is overwritten."""
    tty = sys.stderr.isatty()
    print(f"\r\x1b[K{line}" if tty else line, end="" if tty else "\n", file=sys.stderr, flush=True)


def exists(ns: NetNS, ifname: str) -> bool:
    """Whether the namespace has an interface of that name."""
    try:
        ns.call(socket.if_nametoindex, ifname)
    except OSError:
        return False
    return True


def send_step(dev: Any) -> Callable[[], int]:
    """One burst per call, stamped with NumPy if it is installed."""
    try:
        return numpy_step(dev)
    except ImportError:
        return plain_step(dev)


def sending(ns: NetNS, checks: Checks, frames: int, engine: str) -> dict[str, Any]:
    """Send ``frames`` frames through a pool of 512 mbufs."""
    import rtap

    with ExitStack() as stack:
        counters = stack.enter_context(Counters(ns))
        dev: Any = ns.call(rtap.open, "soak0", nb_mbufs=POOL, engine=engine)
        stack.enter_context(dev)
        pool = dev.pool
        checks.equal("slots in the pool", pool.available, POOL)
        step = send_step(dev)
        before = counters.read("soak0")["rx_packets"]
        begun = said = time.monotonic()
        sent = laps = 0
        stalled = begun
        while sent < frames:
            moved = step()
            sent += moved
            laps += 1
            if moved:
                stalled = 0.0
            elif not stalled:
                stalled = time.monotonic()
            elif time.monotonic() - stalled > 5:
                checks.equal("sending goes on", f"stopped after {sent} frames", "it goes on")
                break
            if laps % 4096 == 0 and (now := time.monotonic()) - said > 2:
                said = now
                checks.equal(f"slots free after {sent} frames", pool.available, POOL)
                progress(
                    f"sending: {sent / 1e6:.1f} of {frames / 1e6:.1f} M frames, "
                    f"{sent / (now - begun) / 1e6:.2f} M/s, {pool.available} slots free"
                )
        took = time.monotonic() - begun
        stats = dev.stats()
        checks.equal("frames that the kernel counted", counted(counters, "soak0", before), sent)
        checks.equal("frames that the device counted", stats.opackets, sent)
        checks.equal("send errors", stats.oerrors, 0)
        gc.collect()
        checks.equal("slots free in the end", pool.available, POOL)
        checks.equal("slots in use in the end", pool.in_use, 0)
    progress(f"sending: {sent} frames in {took:.0f} s, {sent / took / 1e6:.2f} M/s\n")
    return {"frames": sent, "seconds": took, "rate": sent / took}


def counted(counters: Counters, ifname: str, before: int) -> int:
    """Frames that the kernel took from us since the counter stood at ``before``."""
    return counters.read(ifname)["rx_packets"] - before


def exchange(ns: NetNS, dev: Any, ifname: str) -> tuple[int, int]:
    """Send a burst and have the kernel send a frame; return how many went out and came in."""
    sent = dev.tx_burst(0, dev.pool.alloc_burst(BURST, data=[frame(i) for i in range(BURST)]))
    with ns.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        ns.call(sock.bind, (ifname, ETHERTYPE))
        sock.send(frame(1))
    return int(sent), len(dev.rx_burst(0, BURST, timeout=1))


def cycle(checks: Checks, name: str, cycles: int, once: Callable[[int], None]) -> dict[str, Any]:
    """Repeat ``once``; descriptors must never grow, and memory not in the second half."""
    once(0)
    start, fds, begun = memory(), descriptors(), time.monotonic()
    half = start
    for i in range(cycles):
        once(i)
        if i + 1 == cycles // 2:
            half = memory()
        if i % 100 == 99:
            progress(f"{name}: {i + 1} of {cycles}, {descriptors()} descriptors")
    took = time.monotonic() - begun
    end = memory()
    late = {what: (end[what] - half[what]) / max(1, cycles - cycles // 2) for what in end}
    checks.equal(f"{name}: descriptors", descriptors(), fds)
    for what, limit in LIMITS.items():
        # Caches fill in the first half; with few cycles only their growth would show.
        if cycles >= 500:
            checks.at_most(f"{name}: growth of {what} a cycle", round(late[what], 2), limit)
    grown = {what: end[what] - start[what] for what in end}
    progress(
        f"{name}: {cycles} in {took:.0f} s; in all {grown['python blocks']} more Python blocks, "
        f"{grown['malloc bytes']} bytes of malloc, {grown['resident bytes'] >> 10} KiB resident\n"
    )
    return {"cycles": cycles, "seconds": took, "growth": grown, "late_growth_per_cycle": late}


def open_close(ns: NetNS, checks: Checks, cycles: int, engine: str) -> dict[str, Any]:
    """Open, exchange frames, close; the interface must be gone when close() returns."""
    import rtap

    def once(_: int) -> None:
        dev: Any = ns.call(rtap.open, "cycle0", nb_mbufs=POOL, engine=engine)
        pool = dev.pool
        with dev:
            checks.equal("open: frames sent and received", exchange(ns, dev, "cycle0"), (BURST, 1))
        checks.equal("open: interface after close()", exists(ns, "cycle0"), False)
        checks.equal("open: slots in use after close()", pool.in_use, 0)

    return cycle(checks, "open", cycles, once)


def stop_start(ns: NetNS, checks: Checks, cycles: int, engine: str) -> dict[str, Any]:
    """Stop and start one device; it must move frames after every start."""
    import rtap

    with ns.call(rtap.open, "cycle1", nb_mbufs=POOL, engine=engine) as dev:

        def once(_: int) -> None:
            dev.stop()
            dev.start()
            checks.equal(
                "restart: frames sent and received", exchange(ns, dev, "cycle1"), (BURST, 1)
            )
            checks.equal("restart: slots in use", dev.pool.in_use, 0)

        return cycle(checks, "restart", cycles, once)


_VICTIM = """
import rtap, sys
from bench.send64 import plain_step
dev = rtap.open("victim0", nb_mbufs=512, engine=sys.argv[1])
step = plain_step(dev)
for _ in range(1000): step()
print("sending", flush=True)
while True: step()
"""


def kill(ns: NetNS, checks: Checks, engine: str, times: int = 5) -> dict[str, Any]:
    """SIGKILL a sending process, then open its interface's name at once."""
    import rtap

    root = str(Path(__file__).resolve().parents[1])
    for _ in range(times):
        victim = ns.popen([sys.executable, "-c", _VICTIM, engine], stdout=subprocess.PIPE, cwd=root)
        assert victim.stdout is not None
        checks.equal("kill: the victim sends", victim.stdout.readline(), b"sending\n")
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        victim.stdout.close()
        with ns.call(rtap.open, "victim0", nb_mbufs=POOL, engine=engine) as dev:
            checks.equal("kill: reopened", exchange(ns, dev, "victim0"), (BURST, 1))
    progress(f"kill: {times} times killed and reopened\n")
    return {"times": times}


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 0 when every check passed."""
    parser = argparse.ArgumentParser(prog="bench.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=float, default=100e6, help="to send (default 100e6)")
    parser.add_argument("--cycles", type=int, default=1000, help="of each kind (default 1000)")
    parser.add_argument("--engine", default="auto", help="auto, uring or syscall")
    parser.add_argument(
        "--only", choices=("sending", "open", "restart", "kill"), help="run one part"
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)

    checks = Checks()
    results: dict[str, Any] = {}
    with namespace() as ns:
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "sending": lambda: sending(ns, checks, int(args.frames), args.engine),
            "open": lambda: open_close(ns, checks, args.cycles, args.engine),
            "restart": lambda: stop_start(ns, checks, args.cycles, args.engine),
            "kill": lambda: kill(ns, checks, args.engine),
        }
        for name, part in parts.items():
            if args.only in (None, name):
                results[name] = part()
    shown = [f"FAILED {line}" for line in checks.failures[:20]]
    if len(checks.failures) > 20:
        shown.append(f"... and {len(checks.failures) - 20} more")
    shown.append(f"{checks.passed} checks passed, {len(checks.failures)} failed")
    body = {
        "benchmark": "soak",
        "passed": checks.passed,
        "failures": checks.failures,
        "parts": results,
    }
    write_report(args.json, body, "\n".join(shown))
    return 1 if checks.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
