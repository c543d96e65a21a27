# SPDX-License-Identifier: BSD-3-Clause
"""``rtap serve`` as a process of its own, and ``rtap ps``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import patient
from support import child_place, skip_without_devices, with_open_tun

import rtap.cli
from rtap.control.netns import NetNS

NOBODY = 65534

#: Puts a Python program into the place of a user without rights. Python itself may be where that
#: user cannot read: so what the program needs is imported before.
WITHOUT_RIGHTS = f"""
import encodings.idna, os, sys
import rtap, rtap.cli
rtap.attach
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
"""


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of the sockets, which every user can reach; made by the first who shares."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)  # unlike tmp_path
    monkeypatch.setenv("RTAP_RUNTIME_DIR", str(directory / "run"))
    yield directory / "run"
    shutil.rmtree(directory)


def argv(*options: str) -> list[str]:
    return [sys.executable, "-W", "always", "-m", "rtap", *options]


class Served:
    """A running ``rtap serve``; `lines` is what it said when it was ready."""

    def __init__(self, ns: NetNS, command: list[str]) -> None:
        self.process: subprocess.Popen[bytes] = ns.popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **child_place()
        )
        self.lines: list[str] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    def await_lines(self, n: int) -> None:
        assert self.process.stdout is not None
        seen, deadline = b"", time.monotonic() + patient(20)
        while seen.count(b"\n") < n:
            left = max(0, deadline - time.monotonic())
            assert select.select([self.process.stdout], [], [], left)[0], seen
            piece = os.read(self.process.stdout.fileno(), 65536)
            assert piece, self.end(None)
            seen += piece
        self.lines = seen.decode().splitlines()

    def end(self, signum: int | None = signal.SIGTERM) -> tuple[int, str]:
        """Sends a signal, and returns the exit status and the rest of both outputs."""
        if signum is not None:
            self.process.send_signal(signum)
        out, err = self.process.communicate(timeout=patient(20))
        return self.process.returncode, (out + err).decode()

    def status(self) -> list[dict[str, str]]:
        """/proc/PID/status of each of its threads."""
        found = []
        for status in Path(f"/proc/{self.pid}/task").glob("*/status"):
            lines = [line.split(":", 1) for line in status.read_text().splitlines()]
            found.append({name: value.strip() for name, value in lines})
        return found


@contextlib.contextmanager
def serving(ns: NetNS, *options: str, open_tun: Path | None = None) -> Iterator[Served]:
    """A ``rtap serve`` that is ready; with `open_tun`, a directory, every user may open
    ``/dev/net/tun``."""
    skip_without_devices()
    command = argv("serve", *options)
    if open_tun is not None:
        command = with_open_tun(open_tun, *command)
    served = Served(ns, command)
    try:
        served.await_lines(sum(option.startswith("--vdev") for option in options))
        yield served
    finally:
        served.process.kill()
        served.process.communicate()


def refused(ns: NetNS, *options: str, **place: Any) -> tuple[int, str]:
    """The exit status of a ``rtap serve`` that fails, and its last line."""
    done = ns.run(
        argv("serve", *options),
        capture_output=True,
        text=True,
        timeout=patient(30),
        **(child_place() | place),
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()[-1]


def ps(*options: str) -> tuple[int, str, str]:
    """The exit status of ``rtap ps`` in this process, and both outputs."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = rtap.cli.main(["ps", *options])
    return status, out.getvalue(), err.getvalue()


def shared() -> list[dict[str, Any]]:
    """What ``rtap ps --json`` finds."""
    status, out, err = ps("--json")
    assert (status, err, out.count("\n")) == (0, "", 1)
    found: list[dict[str, Any]] = json.loads(out)["shared"]
    return found


@contextlib.contextmanager
def without_rights(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program of the user nobody, with pipes to it."""
    process = subprocess.Popen(
        [sys.executable, "-W", "always", "-c", WITHOUT_RIGHTS + code, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **child_place(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
