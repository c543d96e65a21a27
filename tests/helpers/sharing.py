# SPDX-License-Identifier: BSD-3-Clause
"""Processes that attach to devices of this one, or share some, and do what a test tells them.

conftest.py loads this as a plugin, so its fixtures need no import.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from borrower import dumps, loads
from patience import patient
from support import PacketSocket, child_place, eventually, frame

import rtap
from rtap.sharing import places

ERRORS: dict[str, type[BaseException]] = {
    kind.__name__: kind
    for kind in (
        *(rtap.DeviceGone, rtap.DeviceStateError, rtap.PoolEmpty),
        *(OSError, PermissionError, FileNotFoundError, FileExistsError, TimeoutError),
        *(ConnectionRefusedError, ValueError, TypeError, RuntimeError, MemoryError),
    )
}


#: The fixture :func:`process`: makes a process.
MakeProcess: TypeAlias = "Callable[[], Process]"


class Failed(Exception):
    """An exception in another process that tests do not expect."""


class Process:
    """A process that runs code for a test; :meth:`kill` and :meth:`leave` end it."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._lines = sock.makefile("rw")
        self._sock = sock
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def begin(self, code: str, **names: Any) -> None:
        """Let it run code; :meth:`result` waits for it."""
        self._lines.write(dumps({"run": code, "with": names}) + "\n")
        self._lines.flush()

    def result(self, timeout: float = 30) -> Any:
        """What the code returned, or the exception that it raised."""
        self._sock.settimeout(patient(timeout))
        line = self._lines.readline()
        if not line:
            pytest.fail(f"process {self.pid} has ended")
        answer = loads(line)
        if "error" not in answer:
            return answer["value"]
        kind, text = answer["error"], answer["text"]
        known = ERRORS.get(kind)
        if known is None:
            raise Failed(f"{kind}: {text}")
        if issubclass(known, OSError) and answer["errno"] is not None:
            text = text.removeprefix(f"[Errno {answer['errno']}] ")
            raise known(answer["errno"], text)
        raise known(text)

    def __call__(self, code: str, **names: Any) -> Any:
        self.begin(code, **names)
        return self.result()

    def attach(self, name: str, queues: Any = None, **options: Any) -> Process:
        """Its ``dev`` is what :func:`rtap.attach` returns."""
        code = "dev = rtap.attach(name, queues, **options)"
        self(code, name=name, queues=queues, options=options)
        return self

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def ended(self, timeout: float = 20) -> bool:
        """Waits until it has ended; False if it does not."""
        return bool(select.select([self._pidfd], [], [], patient(timeout))[0])

    def kill(self) -> None:
        """SIGKILL. It is gone afterwards. Idempotent."""
        if self._pidfd >= 0:
            self.signal(signal.SIGKILL)
            assert self.ended(), f"process {self.pid} does not die"
            os.close(self._pidfd)
            self._pidfd = -1
            with contextlib.suppress(OSError):
                self._lines.close()
            self._sock.close()

    def leave(self) -> None:
        """Let it end as an interpreter does."""
        self._sock.shutdown(socket.SHUT_RDWR)
        assert self.ended(), f"process {self.pid} does not end"
        self.kill()


@pytest.fixture(scope="module")
def _maker() -> Iterator[socket.socket]:
    """The process that makes the others (see borrower)."""
    here, there = socket.socketpair()
    program = Path(__file__).with_name("borrower.py")
    with here:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(program)],
            stdin=there.fileno(),
            **child_place(),
        )
        there.close()
        try:
            here.settimeout(patient(60))
            yield here
        finally:
            here.close()
            process.wait(patient(20))


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sockets are; a path that is longer than a socket's address may be."""
    path = tmp_path / ("d" * 100)
    path.mkdir(mode=0o700)
    monkeypatch.setenv("RTAP_RUNTIME_DIR", str(path))
    return path


@pytest.fixture
def process(runtime_dir: Path, _maker: socket.socket) -> Iterator[Callable[[], Process]]:
    """Makes processes, which are killed after the test."""
    made: list[Process] = []

    def make() -> Process:
        here, there = socket.socketpair()
        with there:
            rights = array.array("i", [there.fileno()])
            environ = json.dumps({"RTAP_RUNTIME_DIR": str(runtime_dir)}).encode()
            _maker.sendmsg([environ], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        pid = int(_maker.recv(64))
        made.append(Process(here, pid))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.kill()


def no_leases(share: rtap.Share) -> None:
    """Waits until all pairs are free."""
    eventually(lambda: not share.leases, f"all pairs are free: {share!r}")


def sockets_left() -> list[str]:
    return [Path(path).stem for path in places.sockets()]


def to_and_fro(packets: PacketSocket, other: Process, queue: int = 0, seq: int = 1) -> None:
    """Fails unless a frame goes from the kernel to the only queue that takes some, and back."""
    packets.send(frame(seq))
    got = other(f"[bytes(m) for m in dev.rx_burst({queue}, 8, {patient(5)})]")
    assert got == [frame(seq)]
    back = frame(seq + 1)
    assert other(f"dev.send(data, queue={queue})", data=back)
    assert packets.frames(1) == [back]
