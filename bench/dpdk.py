# SPDX-License-Identifier: BSD-3-Clause
"""Runs DPDK's net_tap in Debian's ``dpdk-testpmd``, the C driver that rtap is compared with.

One interactive testpmd serves many slices: ``start`` and ``stop`` on its stdin begin and end a
slice, and the kernel's interface counters say what moved. It runs without huge pages, PCI,
telemetry and shared configuration, in a temporary run-time directory, and so leaves nothing
behind. It exits at the end of its input, so it cannot outlive its parent, and a limit on its CPU
time bounds its life.

No thread of the benchmark watches it: with a second thread in the process, every system call on a
descriptor gets slower by some 40 ns in 600, because the kernel then counts references to the file.

net_tap needs a multiq qdisc for its flow rules; where the kernel has none it runs without them.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import final

from bench.measure import Sample, bench_cpu
from bench.rig import Counters, end, namespace, process_cpu_ns, run
from rtap import NetNS

_PROMPT = "testpmd>"


def available() -> str | None:
    """None when dpdk-testpmd can run, otherwise what is missing."""
    if shutil.which("dpdk-testpmd") is None:
        return "dpdk-testpmd is not installed (Debian: apt-get install dpdk-dev)"
    return None


def common(options: Sequence[str]) -> list[str]:
    """testpmd's own options for every benchmark; ``rtap testpmd`` takes the same."""
    return [
        *("--interactive", "--total-num-mbufs=16384", "--nb-cores=1"),
        *("--rxd=512", "--txd=512", "--burst=64", *options),
    ]


def dpdk_argv(ifnames: Sequence[str], options: Sequence[str], cpu: int) -> list[str]:
    """Debian's dpdk-testpmd with net_tap ports of those names, forwarding on ``cpu``."""
    if (missing := available()) is not None:
        raise RuntimeError(missing)
    vdevs = [f"--vdev=net_tap{i},iface={name}" for i, name in enumerate(ifnames)]
    return [
        *("dpdk-testpmd", "--lcores", f"0@0,1@{cpu}", "--no-huge", "-m", "256", "--no-pci"),
        *("--no-telemetry", "--no-shconf", *vdevs, "--", *common(options)),
    ]


@final
class TestPmd:
    """An interactive testpmd in a namespace, with ports of the given names.

    ``options`` are testpmd's own, after ``--``. ``argv`` makes the command line of either testpmd.
    The core ``cpu`` forwards (default: the one that benchmarks are pinned to), and the main thread
    only reads stdin. The kernel kills it after ``limit`` seconds of CPU time. Raises RuntimeError
    with testpmd's last output when it is not ready within ``patience`` seconds.
    """

    __test__ = False  # the name is not meant for pytest

    def __init__(
        self,
        ns: NetNS,
        ifnames: Sequence[str],
        options: Sequence[str] = (),
        *,
        argv: Callable[[Sequence[str], Sequence[str], int], list[str]] = dpdk_argv,
        cpu: int | None = None,
        limit: int = 900,
        patience: float = 20.0,
    ) -> None:
        command = argv(ifnames, options, bench_cpu() if cpu is None else cpu)
        self.ifnames = list(ifnames)
        self._counters = Counters(ns)
        self._runtime = tempfile.TemporaryDirectory(prefix="rtap-bench-")
        self.output = ""
        self.process: subprocess.Popen[bytes] = ns.popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env={**os.environ, "RUNTIME_DIRECTORY": self._runtime.name},
        )
        try:
            resource.prlimit(self.process.pid, resource.RLIMIT_CPU, (limit, limit))
            self._wait_prompt(patience)
        except BaseException:
            self.close()
            raise

    def _wait_prompt(self, patience: float) -> None:
        """Read its output up to the next prompt; RuntimeError when none comes."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + patience
        fresh = ""
        while not fresh.rstrip().endswith(_PROMPT):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise RuntimeError(f"testpmd hangs:\n{self.output[-2000:]}")
            chunk = self.process.stdout.read(65536)
            if not chunk:
                raise RuntimeError(f"testpmd ended:\n{self.output[-2000:]}")
            fresh += chunk.decode(errors="replace")
            self.output = (self.output + chunk.decode(errors="replace"))[-65536:]

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self._wait_prompt(10)

    def start(self) -> None:
        """Start forwarding."""
        self._say("start")

    def stop(self) -> None:
        """Stop forwarding."""
        self._say("stop")

    def slice(self, seconds: float, counter: str = "rx_packets") -> Sample:
        """Forward for ``seconds``; the frames are ``counter``, summed over the ports' interfaces.

        Clock and counters are read after the start and before the stop, which take a while.
        """
        self.start()
        try:
            time.sleep(0.01)
            cpu, begun = process_cpu_ns(self.process.pid), time.perf_counter()
            before = self._count(counter)
            time.sleep(seconds)
            after = self._count(counter)
            ended, cpu = time.perf_counter(), process_cpu_ns(self.process.pid) - cpu
        finally:
            self.stop()
        return Sample(after - before, ended - begun, cpu)

    def _count(self, counter: str) -> int:
        return sum(self._counters.read(name)[counter] for name in self.ifnames)

    def close(self) -> None:
        """End testpmd; idempotent."""
        if self.process.poll() is None and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.write(b"quit\n")
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        end(self.process)
        self._counters.close()
        self._runtime.cleanup()

    def __enter__(self) -> TestPmd:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextlib.contextmanager
def txonly(ns: NetNS, ifname: str = "dtap0") -> Iterator[TestPmd]:
    """A testpmd that sends 64-byte frames (all alike, UDP over IPv4) in bursts of 64."""
    with TestPmd(ns, [ifname], ["--forward-mode=txonly", "--txpkts=64"]) as pmd:
        yield pmd


ADDRESSES = ("10.64.0.1", "10.64.0.2")


@contextlib.contextmanager
def tcp_path() -> Iterator[tuple[NetNS, NetNS, TestPmd]]:
    """Two namespaces that reach each other at ADDRESSES once testpmd, io forwarding, is started.

    testpmd makes both TAPs in a namespace of its own, then each is moved to one end. Its
    descriptors keep working.
    """
    with (
        namespace() as middle,
        namespace() as left,
        namespace() as right,
        TestPmd(middle, ["dtap0", "dtap1"], ["--forward-mode=io"]) as pmd,
    ):
        for ifname, there, address in zip(pmd.ifnames, (left, right), ADDRESSES, strict=True):
            run(middle, f"ip link set {ifname} netns {there.path}")
            run(there, f"ip addr add {address}/24 dev {ifname}")
            run(there, f"ip link set {ifname} up")
        yield left, right, pmd


def iperf3(client: NetNS, server: NetNS, address: str, seconds: float) -> float:
    """Bits per second that the server received in one iperf3 TCP stream."""
    listener = server.popen(
        ["iperf3", "-s", "-1", "--forceflush"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert listener.stdout is not None
        while "listening" not in (line := listener.stdout.readline()):
            if not line:
                raise RuntimeError("the iperf3 server ended before it listened")
        done = client.run(
            ["iperf3", "-c", address, "-t", f"{max(1, round(seconds))}", "-J"],
            capture_output=True,
            text=True,
            timeout=seconds + 20,
        )
    finally:
        end(listener)
    report = json.loads(done.stdout or "{}")
    if "error" in report or done.returncode:
        raise RuntimeError(f"iperf3: {report.get('error', done.stderr)}")
    return float(report["end"]["sum_received"]["bits_per_second"])


def tcp_forward_net_tap(seconds: float = 3.0) -> float:
    """TCP throughput through net_tap between two namespaces, in Gb/s (MTU 1500, no offload)."""
    with tcp_path() as (left, right, pmd):
        pmd.start()
        return iperf3(left, right, ADDRESSES[1], seconds) / 1e9


def main() -> None:
    """Print net_tap's own figures."""
    with namespace() as ns, txonly(ns) as pmd:
        for _ in range(3):
            sample = pmd.slice(0.5)
            print(
                f"txonly {sample.rate / 1e6:.3f} M frames/s, "
                f"{sample.cpu_ns_per_frame:.0f} cpu ns/frame"
            )
    print(f"TCP forward {tcp_forward_net_tap(3):.2f} Gb/s")


if __name__ == "__main__":
    main()
