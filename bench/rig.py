# SPDX-License-Identifier: BSD-3-Clause
"""What benchmarks run in: namespaces, counters, the closed loop, and the C programs.

Frames move only in anonymous namespaces, which vanish with the process, even if it is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

from bench.measure import Sample
from rtap import NetNS

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "bench"

ETHERTYPE = 0x88B5
"""IEEE 802 local experimental ethertype 1: nothing in the kernel takes these frames."""
FRAME = 64
SEQ_OFFSET = 16
"""Offset of the 64-bit sequence number in a benchmark frame; host byte order."""
HEADER = bytes.fromhex("020000000002020000000001") + ETHERTYPE.to_bytes(2, "big")
"""A destination that no interface has, a source, and the ethertype."""

# The columns of /proc/net/dev.
_RX = ("bytes", "packets", "errors", "dropped", "fifo", "frame", "compressed", "multicast")
_TX = ("bytes", "packets", "errors", "dropped", "fifo", "collisions", "carrier", "compressed")
_COUNTERS = [f"rx_{name}" for name in _RX] + [f"tx_{name}" for name in _TX]


def frame(seq: int, length: int = FRAME) -> bytes:
    """A benchmark frame of ``length`` bytes with the sequence number ``seq``."""
    head = HEADER.ljust(SEQ_OFFSET, b"\0") + seq.to_bytes(8, sys.byteorder)
    return head.ljust(length, b"\0")


def programs(names: Sequence[str] = ("write64", "forward")) -> dict[str, Path]:
    """Build the C programs to compare with into ``build/bench``, and return their paths.

    Raises RuntimeError with the compiler's output when they do not build.
    """
    done = subprocess.run(
        ["make", "-s", "-C", str(HERE / "c"), f"OUT={BUILD}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the C programs do not build:\n{done.stdout}{done.stderr}")
    return {name: BUILD / name for name in names}


@contextlib.contextmanager
def namespace() -> Iterator[NetNS]:
    """A namespace in which new interfaces have no IPv6, so that only our frames move."""
    with NetNS() as ns:
        ns.call(_no_ipv6)
        yield ns


def _no_ipv6() -> None:
    for scope in ("all", "default"):
        with contextlib.suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")


def run(ns: NetNS, command: str) -> None:
    """Run a command line, split at blanks, in ``ns``; RuntimeError with its output if it fails."""
    done = ns.run(command.split(), capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}".strip())


@final
class Counters:
    """The kernel's interface counters of one namespace, readable from any thread in ~20 us.

    A descriptor of ``/proc/net/dev`` always shows the namespace in which it was opened.
    """

    def __init__(self, ns: NetNS) -> None:
        self._fd: int = ns.call(os.open, "/proc/thread-self/net/dev", os.O_RDONLY | os.O_CLOEXEC)

    def read(self, ifname: str) -> dict[str, int]:
        """All counters of one interface. KeyError when it does not exist."""
        return self._parse(self._table()[ifname.encode()])

    def total(self, ifnames: Sequence[str], counter: str) -> int:
        """One counter summed over interfaces, from one look at all; KeyError as above."""
        table = self._table()
        return sum(self._parse(table[name.encode()])[counter] for name in ifnames)

    def _table(self) -> dict[bytes, bytes]:
        text = b""
        while more := os.pread(self._fd, 65536, len(text)):  # the kernel returns a page at a time
            text += more
        lines = [line.partition(b":") for line in text.splitlines()]
        return {name.strip(): rest for name, colon, rest in lines if colon}

    @staticmethod
    def _parse(rest: bytes) -> dict[str, int]:
        return dict(zip(_COUNTERS, map(int, rest.split()), strict=True))

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Counters:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def process_cpu_ns(pid: int) -> int:
    """CPU time of another process, in nanoseconds; exact to a scheduler tick (1-4 ms)."""
    return time.clock_gettime_ns(~pid << 3 | 2)  # CPUCLOCK_SCHED of a pid, see clock_getcpuclockid


@final
class CProgram:
    """A program in a namespace that runs slices on command, over its stdin and stdout.

    With ``count`` (interface name, counter), :meth:`slice` takes the frames from the kernel, which
    must agree with the program. The program must be ready within ``patience`` seconds.
    """

    def __init__(
        self,
        ns: NetNS,
        argv: Sequence[str],
        count: tuple[str, str] | None = None,
        patience: float = 10.0,
    ) -> None:
        self._count = count
        self._counters = Counters(ns)
        self.process: subprocess.Popen[str] = ns.popen(
            list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        try:
            self.interfaces = self._reply("ready", patience)
        except BaseException:
            self.close()
            raise

    def _reply(self, word: str = "", timeout: float = 10.0) -> list[str]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"{self.process.args!r} does not answer")
        fields = self.process.stdout.readline().split()
        if not fields or (word and fields[0] != word):
            raise RuntimeError(f"{self.process.args!r} answered {' '.join(fields)!r}")
        return fields[1:] if word else fields

    def command(self, line: str, answer: str) -> list[str]:
        """Send a command line, and return the fields of the reply after the word ``answer``."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        return self._reply(answer)

    def slice(self, seconds: float) -> Sample:
        """Run one slice; RuntimeError when a frame failed, or kernel and program counts differ.

        The kernel's counters are read outside the time that the program measures.
        """
        assert self.process.stdin is not None
        before = self._kernel()
        self.process.stdin.write(f"go {seconds:.6f}\n")
        frames, cpu, wall, errors = map(int, self._reply(timeout=seconds + 10))
        moved = self._kernel() - before if self._count else frames
        if errors or moved != frames:
            raise RuntimeError(
                f"{self.process.args!r}: {frames} frames, {errors} errors, kernel counted {moved}"
            )
        return Sample(moved, wall / 1e9, cpu)

    def _kernel(self) -> int:
        if self._count is None:
            return 0
        return self._counters.read(self._count[0])[self._count[1]]

    def close(self) -> None:
        """End the program, which removes its interfaces; idempotent."""
        self._counters.close()
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.communicate(timeout=2)
        end(self.process)

    def __enter__(self) -> CProgram:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def end(process: subprocess.Popen[Any], grace: float = 2.0) -> None:
    """Terminate a process that we started, and kill it if it still runs ``grace`` seconds later."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def redirect(ns: NetNS, source: str, target: str) -> None:
    """Redirect every frame that comes in on ``source`` to ``target`` (tc ingress, mirred).

    u32 with an empty match takes all frames; some kernels have no matchall.
    """
    run(ns, f"tc qdisc add dev {source} ingress")
    run(
        ns,
        f"tc filter add dev {source} parent ffff: protocol all u32 match u32 0 0 "
        f"action mirred egress redirect dev {target}",
    )


LOOP_FRAMES = 512
"""Frames in a closed loop: enough for full bursts, and few enough for any queue."""


def c_sender(ns: NetNS, mode: str, ifname: str, *options: str) -> CProgram:
    """The C sender in ``mode`` write or uring, counted by the kernel's rx_packets."""
    program = programs()["write64"]
    argv = [str(program), "--mode", mode, "--ifname", ifname, *options]
    return CProgram(ns, argv, (ifname, "rx_packets"))


def c_forwarder(ns: NetNS, mode: str, a: str = "A", b: str = "B") -> CProgram:
    """The C closed loop in ``mode`` read, uring or uring1: built, redirected and preloaded.

    The namespace must not have interfaces A and B yet. A's tx_packets count the frames.
    """
    program = programs()["forward"]
    loop = CProgram(ns, [str(program), "--mode", mode, "--in", a, "--out", b], (a, "tx_packets"))
    try:
        redirect(ns, b, a)
        loop.command(f"preload {LOOP_FRAMES}", "preloaded")
    except BaseException:
        loop.close()
        raise
    return loop


@final
class BusyThread:
    """A pure-Python thread that never waits, to measure code that shares the GIL with it.

    It runs on CPUs other than its creator's, so that they share nothing but the GIL.
    """

    def __init__(self) -> None:
        self._stop = False
        self.laps = 0
        every = set(range(os.cpu_count() or 1))
        self._cpus = every - os.sched_getaffinity(0) or every
        self._thread = threading.Thread(target=self._spin, name="busy", daemon=True)

    def _spin(self) -> None:
        os.sched_setaffinity(0, self._cpus)
        while not self._stop:
            for _ in range(1000):
                pass
            self.laps += 1

    def __enter__(self) -> BusyThread:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self._thread.join()
