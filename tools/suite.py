# SPDX-License-Identifier: BSD-3-Clause
"""Runs the whole test suite (make test), its four parts side by side.

The parts are all tests on the release build, the lifetime tests on the checked build, the shortest
tests of native code under the sanitizers, and the tests of rings as on a kernel without RWF_NOWAIT
for TAP devices (before Linux 6.4). The first part writes to the terminal while it
runs; the output of the other two follows at the end. Arguments go to the first part.

Most tests wait for the kernel most of the time, so there are more workers than CPUs. RTAP_TEST_JOBS
sets their number; ``-n 0`` among the arguments makes the first part one process, for a debugger.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
# Not python -m pytest, which would import rtap from the tree instead of the build under test.
PYTEST = [str(Path(sys.executable).with_name("pytest"))]
CHECKED = "build/debug"
#: What rings do, and where they must lose, reorder or leave nothing.
RING_TESTS = (
    "tests/drivers/test_faults.py",
    "tests/lives/test_fork.py",
    "tests/lives/test_leaks.py",
    "tests/lives/test_lifetime.py",
    "tests/lives/test_shared_devices.py",
    "tests/tap/test_ring.py",
    "tests/tap/test_ring_cut.py",
    "tests/tap/test_ring_rx.py",
    "tests/tap/test_ring_threads.py",
    "tests/tap/test_ring_tx.py",
    "tests/tap/test_shared_descriptor.py",
    "tests/tap/test_tx_balance.py",
    "tests/tap/test_uring_refused.py",
    "tests/whole/test_flow_clients.py",
    "tests/whole/test_flow_order.py",
    "tests/whole/test_storm.py",
    "tests/work/test_worker_joint.py",
    "tests/work/test_worker_queues.py",
    "tests/work/test_worker_routes.py",
)


class Part:
    """A process that runs one part; a ``hidden`` one writes to a file, in its own session."""

    def __init__(
        self, title: str, command: Sequence[str], *, hidden: bool, env: Mapping[str, str]
    ) -> None:
        self.title = title
        # The system deletes this file when this process ends.
        self.output: IO[bytes] | None = tempfile.TemporaryFile() if hidden else None  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | env,
            stdin=subprocess.DEVNULL if hidden else None,
            stdout=self.output,
            stderr=subprocess.STDOUT if hidden else None,
            # The visible part stays in the terminal's session: Ctrl-C reaches it, and a debugger
            # can read the terminal.
            start_new_session=hidden,
        )

    def interrupt(self) -> None:
        """End the part and its workers as Ctrl-C does, so that they clean up."""
        if self.process.poll() is None:
            if self.output is None:
                self.process.send_signal(signal.SIGINT)
            else:
                os.killpg(self.process.pid, signal.SIGINT)

    def show(self) -> None:
        if self.output is not None:
            self.output.seek(0)
            print(f"\n== {self.title}", flush=True)
            sys.stdout.buffer.write(self.output.read())
            sys.stdout.flush()


def parts(args: Sequence[str]) -> list[Part]:
    cpus = len(os.sched_getaffinity(0))
    jobs = os.environ.get("RTAP_TEST_JOBS") or str(min(8, 3 * cpus))
    checked = {"PYTHONPATH": str(ROOT / CHECKED), "RTAP_TEST_BUILD": CHECKED}
    # Only the release build records which tests failed, for pytest --last-failed.
    lifetime = ["-q", "-n", str(min(4, cpus)), "-p", "no:cacheprovider", "-m", "lifetime"]
    spread = ["--dist", "worksteal"]
    # Short bursts read without the ring then, so that those of engine="uring" go on without it.
    which = ["-k", "not syscall and not uring-E and not takes_nothing"]
    rings = ["-q", "-n", str(min(4, cpus)), "-p", "no:cacheprovider", *which]
    return [
        Part(
            "shortest tests under the sanitizers",
            [str(ROOT / "tools/sanitize"), "--short"],
            hidden=True,
            env={},
        ),
        Part(
            "lifetime tests on the checked build",
            [*PYTEST, *spread, *lifetime],
            hidden=True,
            env=checked,
        ),
        Part(
            "tests of rings without RWF_NOWAIT",
            [*PYTEST, *spread, *rings, *RING_TESTS],
            hidden=True,
            env={"RTAP_TEST_RING": "cancel"},
        ),
        Part(
            "all tests on the release build",
            [*PYTEST, "-n", jobs, *spread, *args],
            hidden=False,
            env={},
        ),
    ]


def terminated(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main(args: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, terminated)
    running = parts(args)
    try:
        for part in reversed(running):  # wait for the visible part first
            part.process.wait()
    except BaseException as exc:
        for part in running:
            # The terminal has already sent Ctrl-C to the visible part.
            if part.output is not None or not isinstance(exc, KeyboardInterrupt):
                part.interrupt()
        for part in running:
            part.process.wait()
        if not isinstance(exc, KeyboardInterrupt):
            raise
        return 128 + signal.SIGINT
    for part in running:
        part.show()
    print()
    for part in running:
        status = part.process.returncode
        print(f"{'passed' if status == 0 else f'FAILED ({status})':12} {part.title}")
    return 1 if any(part.process.returncode for part in running) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
