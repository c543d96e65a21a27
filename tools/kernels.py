# SPDX-License-Identifier: BSD-3-Clause
"""Tests on Debian's kernels, booted here under QEMU's software emulation (make kernels).

rtap asks the kernel for everything, kernels differ, and this machine has only one. For each kernel
this fetches Debian's package (kernel_packages.py), boots it with this machine's files and this
tree's build (kernel_guest.py), runs a selection of the tests there, and prints a table of test
files and kernels (kernel_results.py). It fails when a test fails, and when a kernel cannot be had
or does not boot. All it writes is below build/kernels. A kernel stays there until --newest asks
for a newer one.

Emulation is 10 to 20 times slower than the machine. So the selection is small, and the tests wait
longer (RTAP_TEST_SLOW).
"""

from __future__ import annotations

import argparse
import platform
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kernel_guest import CPUS, ROOT, SLOWER, Run, run
from kernel_packages import SUITES, Kernel, Unavailable, fetch, unpacked
from kernel_results import Outcome, read, report

PLACE = ROOT / "build/kernels"
TIMED_OUT = 124  # timeout(1)
#: Seconds of a kernel's limit in which it boots and pytest ends.
MARGIN = 120

#: At most five minutes on one kernel.
CORE = (
    "tests/drivers/test_open.py",
    "tests/drivers/test_pmd_control.py",
    "tests/drivers/test_pmd_events.py",
    "tests/drivers/test_pmd_packets.py",
    "tests/ethdev/test_intr.py",
    "tests/frames/test_gso_oracle.py",
    "tests/tap/test_ring_rx.py",
    "tests/tap/test_ring_tx.py",
    "tests/whole/test_kernel_features.py",
    "tests/work/test_worker.py",
)
#: At most ten together with these.
MORE = (
    "tests/control/test_netlink.py",
    "tests/control/test_netns.py",
    "tests/control/test_tun.py",
    "tests/drivers/test_af_packet.py",
    "tests/drivers/test_af_packet_traffic.py",
    "tests/drivers/test_moves.py",
    "tests/drivers/test_open_life.py",
    "tests/drivers/test_take_over.py",
    "tests/ethdev/test_changes.py",
    "tests/ethdev/test_ethdev_rtap.py",
    "tests/frames/test_gro_kernel.py",
    "tests/tap/test_offload_rx.py",
    "tests/tap/test_offload_tx.py",
    "tests/tap/test_ring.py",
    "tests/tap/test_ring_cut.py",
    "tests/tap/test_uring_refused.py",
    "tests/tap/test_vnet_hdr.py",
    "tests/tap/test_vnet_traffic.py",
    "tests/work/test_worker_events.py",
)


def say(text: str) -> None:
    print(f"kernels: {text}", flush=True)


def pytest_command(results: Path, tests: Sequence[str], seconds: float) -> list[str]:
    """The tests, interrupted when they take longer: pytest then writes what it knows."""
    return [
        *("timeout", "--foreground", "--signal=INT", "--kill-after=60", f"{seconds:.0f}"),
        *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"),
        *("-n", str(CPUS), "--dist", "worksteal", f"--timeout={120 * SLOWER}"),
        *("--durations=25", f"--junitxml={results}/junit.xml", *tests),
    ]


def environment() -> dict[str, str]:
    return {
        "RTAP_TEST_SLOW": str(SLOWER),
        "HYPOTHESIS_STORAGE_DIRECTORY": "/run/hypothesis",
        "HOME": "/run",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }


def outcome_of(name: str, done: Run, junit: Path) -> Outcome:
    outcome = Outcome(name, done.release)
    if junit.exists():
        outcome = read(name, done.release, junit.read_text())
    if done.status == TIMED_OUT:
        outcome.why = "the tests did not end in time (--limit)."
    elif done.status not in (0, 1):  # which are what the results say
        outcome.why = done.why or f"pytest ended with status {done.status}."
    return outcome


def kernel_named(name: str, newest: bool) -> Kernel:
    kernel = None if newest else unpacked(name, PLACE / name)
    if kernel is None:
        say(f"fetches the kernel of Debian {SUITES[name]}.")
        kernel = fetch(name, PLACE)
    return kernel


def tested(name: str, options: argparse.Namespace) -> Outcome:
    """Everything for one kernel."""
    try:
        kernel = kernel_named(name, options.newest)
        results = PLACE / "results" / name
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir(parents=True)
        say(f"boots {kernel.image.name}; {results.relative_to(ROOT)}/output is what pytest says.")
        limit = options.limit * 60
        command = pytest_command(results, options.tests, max(1, limit - MARGIN))
        start = time.monotonic()
        done = run(kernel, results, command, environment(), limit)
        say(f"{name} took {(time.monotonic() - start) / 60:.1f} minutes.")
    except Unavailable as exc:
        return Outcome(name, why=str(exc))
    return outcome_of(name, done, results / "junit.xml")


def lacking() -> str:
    """Why no kernel can be booted here, in one sentence; "" when one can."""
    if platform.machine() != "x86_64":
        return "the kernels are for x86-64, which this machine is not."
    programs = ("qemu-system-x86_64", "busybox", "depmod", "apt-get", "dpkg-deb")
    missing = [name for name in programs if shutil.which(name) is None]
    return f"this machine lacks {', '.join(missing)}." if missing else ""


def arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kernels.py", description="Tests on Debian's kernels.")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"{', '.join(SUITES)}; all")
    parser.add_argument("--core", action="store_true", help="the most important tests only")
    parser.add_argument("--tests", nargs="+", help="these instead of the selection")
    parser.add_argument("--newest", action="store_true", help="look for newer kernels")
    parser.add_argument("--limit", type=float, default=40, help="minutes for each kernel: 40")
    options = parser.parse_args(args)
    unknown = [name for name in options.kernels if name not in SUITES]
    if unknown:
        parser.error(f"there is no kernel {unknown[0]}: {', '.join(SUITES)}")
    options.kernels = options.kernels or list(SUITES)
    options.tests = options.tests or [*CORE, *(() if options.core else MORE)]
    return options


def terminated(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main(args: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, terminated)
    options = arguments(args)
    if why := lacking():
        say(why)
        return 1
    try:
        outcomes = [tested(name, options) for name in options.kernels]
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    say(report(outcomes))
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
