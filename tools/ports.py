# SPDX-License-Identifier: BSD-3-Clause
"""Tests on other architectures: word sizes, byte orders, memory orders (make ports).

For each architecture this makes a Debian tree (port_tree.py), compiles this tree's C files for it
(port_build.py), runs tests in that tree (port_run.py), and prints a table of test files and
architectures (kernel_results.py). A program of another architecture runs under QEMU's user
emulation (port_emulation.py), which has neither io_uring nor all of what TAP devices need: tests of
these skip there, and say so. Where the processor itself runs the programs, as x86-64 does those of
i386, they do not. All it writes is below build/ports. The trees stay there until --newest asks for
new ones.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kernel_guest import Run
from kernel_packages import Unavailable
from kernel_results import Outcome, report
from kernels import outcome_of, terminated
from port_boot import boot
from port_build import build
from port_emulation import running
from port_run import RESULTS, asked, run
from port_tree import ARCHITECTURES, SUITES, Architecture, Tree, make, ready, remove

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build/ports"
#: So much slower are tests under emulation: for their time-outs.
SLOWER = 15
#: Seconds of an architecture's limit in which pytest ends.
MARGIN = 60

#: What needs no device: words, bytes and their order.
CORE = (
    "tests/core/test_burst.py",
    "tests/core/test_mbuf.py",
    "tests/core/test_mempool.py",
    "tests/drivers/test_net_null.py",
    "tests/ethdev/test_devargs.py",
    "tests/frames/test_checksum.py",
    "tests/frames/test_checksum_places.py",
    "tests/frames/test_gro.py",
    "tests/frames/test_gso.py",
    "tests/frames/test_parse.py",
    "tests/frames/test_segment.py",
    "tests/stages/test_stages.py",
)
#: More that needs none.
MORE = (
    "tests/core/test_borrowed.py",
    "tests/core/test_burst_arrays.py",
    "tests/core/test_gil.py",
    "tests/core/test_mbuf_parts.py",
    "tests/core/test_mbuf_sharing.py",
    "tests/core/test_mempool_arena.py",
    "tests/core/test_threads.py",
    "tests/ethdev/test_ethdev.py",
    "tests/ethdev/test_queues.py",
    "tests/frames/test_gro_burst.py",
    "tests/frames/test_verdicts.py",
    "tests/queues/test_generate.py",
    "tests/stages/test_borrowed_routes.py",
    "tests/stages/test_frame_model.py",
    "tests/stages/test_match_rules.py",
    "tests/stages/test_nat_offload.py",
    "tests/stages/test_reshape_stages.py",
    "tests/stages/test_rewrite.py",
    "tests/stages/test_rewritten.py",
    "tests/stages/test_stage_failures.py",
    "tests/stages/test_stage_routes.py",
    "tests/values/test_ether.py",
    "tests/values/test_flags.py",
)
#: What does, for where programs are not emulated.
DEVICES = (
    "tests/drivers/test_open.py",
    "tests/drivers/test_options.py",
    "tests/drivers/test_pmd_packets.py",
    "tests/frames/test_gro_kernel.py",
    "tests/frames/test_gso_oracle.py",
    "tests/tap/test_ring.py",
    "tests/tap/test_ring_rx.py",
    "tests/tap/test_ring_tx.py",
    "tests/tap/test_vnet_hdr.py",
)


def say(text: str) -> None:
    print(f"ports: {text}", flush=True)


def pytest_command(options: argparse.Namespace, slower: int, seconds: float) -> list[str]:
    """The tests, interrupted when they take longer: pytest then writes what it knows."""
    return [
        *("timeout", "--foreground", "--signal=INT", "--kill-after=30", f"{seconds:.0f}"),
        # Not python3 -m pytest, which would import rtap from the source tree. A worker, because a
        # test that ends its process ends only that.
        *("pytest-3", "-q", "-p", "no:cacheprovider", "-n", str(options.jobs)),
        *("--dist", "worksteal", f"--timeout={120 * slower}", "--durations=25"),
        *(f"--junitxml={RESULTS}/junit.xml", *options.tests),
    ]


def environment(package: str, slower: int) -> dict[str, str]:
    return {
        "RTAP_TEST_BUILD": package,
        "PYTHONPATH": package,
        "PYTHONPYCACHEPREFIX": "/var/cache/python",
        "RTAP_TEST_SLOW": str(slower),
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
        "HOME": "/run",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }


def tree_of(arch: Architecture, newest: bool) -> Tree:
    """The one that is there, or a new one of the first release that can be had."""
    place = PLACE / arch.name
    tree = None if newest else ready(arch, place / "tree")
    if tree is not None:
        return tree
    log = place / "tree.log"
    place.mkdir(parents=True, exist_ok=True)
    for suite in SUITES:
        say(f"makes a tree of Debian {suite} for {arch.name}; {log.relative_to(ROOT)} tells how.")
        try:
            return make(arch, suite, place / "tree", log)
        except Unavailable as exc:
            say(str(exc))
    raise Unavailable(f"there is no tree for {arch.name}, see above.")


def run_tests(
    tree: Tree, package: Path, results: Path, emulated: bool, options: argparse.Namespace
) -> Run:
    """The tests on that package in the tree."""
    remove(results)
    results.mkdir()
    python = asked(tree, "python3", "-c", "import platform; print(platform.python_version())")
    by = "a kernel in QEMU" if options.boot else "QEMU" if emulated else "this processor"
    say(
        f"{tree.arch.name} ({tree.arch.stands_for}): Debian {tree.release}, Python {python}, run "
        f"by {by}; {results.relative_to(ROOT)}/output is what pytest says."
    )
    slower, limit = SLOWER if emulated else 1, options.limit * 60
    command = pytest_command(options, slower, max(1, limit - MARGIN))
    variables = environment(str(package.relative_to(ROOT)), slower)
    start = time.monotonic()
    if options.boot:
        done = boot(tree, results, command, variables, limit)
    else:
        if tree.arch.model:
            variables["QEMU_CPU"] = tree.arch.model
        status = run(tree, results, command, variables, () if emulated else ("net/tun",), limit)
        late = f"the tests did not end within {options.limit:g} minutes."
        done = Run("", status, late if status is None else "")
    say(f"{tree.arch.name} took {(time.monotonic() - start) / 60:.1f} minutes.")
    return done


def tested(arch: Architecture, options: argparse.Namespace) -> Outcome:
    """Everything for one architecture."""
    package = PLACE / arch.name / "package"
    results = package.with_name("results-boot" if options.boot else "results")
    try:
        with running(arch.name, arch.cpu) as emulated:
            tree = tree_of(arch, options.newest)
            build(tree, package)
            done = run_tests(tree, package, results, emulated, options)
    except Unavailable as exc:
        return Outcome(arch.name, why=str(exc))
    return outcome_of(arch.name, done, results / "junit.xml")


def lacking() -> str:
    """Why there are no other architectures here, in one sentence; "" when there are."""
    if os.geteuid() != 0:
        return "trees of other architectures take root to make."
    programs = ("mmdebstrap", "arch-test", "apt-get", "unshare", "findmnt", "pkg-config")
    missing = [name for name in programs if shutil.which(name) is None]
    return f"this machine lacks {', '.join(missing)}." if missing else ""


def arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ports.py", description="Tests on other architectures.")
    parser.add_argument("archs", nargs="*", metavar="ARCH", help=", ".join(ARCHITECTURES))
    parser.add_argument("--core", action="store_true", help="the most important tests only")
    parser.add_argument("--tests", nargs="+", help="these instead of the selection")
    parser.add_argument(
        "--boot", action="store_true", help="tests with devices on a booted kernel (arm64 only)"
    )
    parser.add_argument("--newest", action="store_true", help="make the trees anew")
    parser.add_argument("--jobs", type=int, default=2, help="tests side by side: 2")
    parser.add_argument("--limit", type=float, default=60, help="minutes for each: 60")
    options = parser.parse_args(args)
    unknown = [name for name in options.archs if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"there is no architecture {unknown[0]}: {', '.join(ARCHITECTURES)}")
    options.archs = options.archs or list(ARCHITECTURES)
    if options.boot and options.archs != ["arm64"]:
        parser.error("--boot is for arm64 alone")
    chosen = DEVICES if options.boot else CORE if options.core else (*CORE, *MORE, *DEVICES)
    options.tests = options.tests or list(chosen)
    return options


def main(args: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, terminated)
    options = arguments(args)
    if why := lacking():
        say(why)
        return 1
    try:
        outcomes = [tested(ARCHITECTURES[name], options) for name in options.archs]
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    say(report(outcomes))
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
