# SPDX-License-Identifier: BSD-3-Clause
"""One TCP stream between two namespaces, timed: by iperf3 if it is installed, else by our own code.

Both ends are separate processes in their namespaces, and in sessions of their own: Ctrl-C is
for the command, which then ends them. They die with the command, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from rtap.cli.errors import CommandError
from rtap.control.netns import NetNS

__all__ = ["CLIENTS", "Builtin", "Client", "Ends", "Iperf3", "find_client"]

PORT = 5201
CLIENTS = ("auto", "iperf3", "builtin")

# In addition to the slice itself: to start, to drain frames on their way, to end.
_START_S = 5.0
_GRACE_S = 10.0
_TICK_S = 0.05

_CHILD = str(Path(__file__).with_name("tcp_child.py"))
_LISTEN = b"0A"  # TCP_LISTEN, net/tcp_states.h


class Ends(Protocol):
    """The two namespaces of a path, and the address that the client connects to."""

    name: str
    client: NetNS
    server: NetNS
    address: str


class _Process:
    """A child in a namespace; its output goes to a file, so that it never waits for us to read."""

    def __init__(self, what: str, ns: NetNS, action: str, argv: Sequence[str]) -> None:
        self.what = what
        self._out: IO[bytes] = os.fdopen(os.memfd_create("rtap-out"), "w+b")
        self._err: IO[bytes] = os.fdopen(os.memfd_create("rtap-err"), "w+b")
        # Not started through ns.popen(): the child has to die with the thread that starts it, and
        # the thread of ns.popen() ends at once.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _CHILD, str(ns.fd), str(os.getpid()), action, *argv],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            pass_fds=(ns.fd,),
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def failed(self) -> bool:
        return bool(self._process.returncode)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended; waits up to `seconds` for that."""
        # Popen.wait() would check a hundred times a second, on cores that are busy with the slice.
        if not self.ended:
            time.sleep(seconds)
        return self.ended

    def output(self) -> str:
        self._out.seek(0)
        return self._out.read().decode(errors="replace")

    def complaint(self) -> str:
        """The last line of its standard error, or its exit status."""
        self._err.seek(0)
        lines = self._err.read().decode(errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
        status = self._process.returncode
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"

    def json(self) -> Any:
        """Its output. CommandError when that is not JSON."""
        try:
            return json.loads(self.output())
        except ValueError:
            raise CommandError(f"{self.what} failed: {self.complaint()}") from None

    def close(self) -> None:
        """Kill it, if need be, and reap it."""
        if not self.ended:
            self._process.kill()
        self._process.wait()
        self._out.close()
        self._err.close()


class Client(ABC):
    """A way to push TCP through a path."""

    name: str

    def run(self, ends: Ends, seconds: int, tick: Callable[[], None]) -> float:
        """Send for `seconds` and return the rate at the receiver, in Gb/s of TCP payload.

        `tick` is called some 20 times a second; an exception in it ends the run. Takes at most 15
        seconds more than the slice. CommandError when the transfer fails, or nothing arrives.
        """
        with contextlib.ExitStack() as stack:
            server = self._start(stack, "server", ends.server, self.server_command(ends))
            self._await_listening(ends, server, tick)
            client = self._start(stack, "client", ends.client, self.client_command(ends, seconds))
            deadline = time.monotonic() + seconds + _GRACE_S
            for process in (client, server):
                while not process.wait(_TICK_S):
                    tick()
                    if time.monotonic() > deadline:
                        raise CommandError(
                            f"{process.what} over {ends.name} did not end in {_GRACE_S:g} s more "
                            f"than the {seconds} s of its slice"
                        )
                if process.failed:
                    raise CommandError(f"{process.what} failed: {self.error(process)}")
            tick()
            gbps = self.received(client, server) / 1e9
        if gbps <= 0:
            raise CommandError(f"nothing arrived from {client.what} over {ends.name}")
        return gbps

    def _start(
        self, stack: contextlib.ExitStack, role: str, ns: NetNS, command: tuple[str, list[str]]
    ) -> _Process:
        process = _Process(f"the {self.name} {role}", ns, *command)
        stack.callback(process.close)
        return process

    def _await_listening(self, ends: Ends, server: _Process, tick: Callable[[], None]) -> None:
        # The file shows the sockets of the namespace it was opened in.
        fd = ends.server.call(os.open, "/proc/thread-self/net/tcp", os.O_RDONLY | os.O_CLOEXEC)
        try:
            deadline = time.monotonic() + _START_S
            while not any(_listening(os.pread(fd, 65536, 0))):
                tick()
                if server.wait(0.005):
                    raise CommandError(f"{server.what} did not start: {self.error(server)}")
                if time.monotonic() > deadline:
                    raise CommandError(
                        f"{server.what} does not listen on port {PORT} after {_START_S:g} s"
                    )
        finally:
            os.close(fd)

    @abstractmethod
    def server_command(self, ends: Ends) -> tuple[str, list[str]]:
        """Action and arguments of tcp_child.py for the end that receives once."""

    @abstractmethod
    def client_command(self, ends: Ends, seconds: int) -> tuple[str, list[str]]:
        """The same for the end that sends."""

    @abstractmethod
    def received(self, client: _Process, server: _Process) -> float:
        """The rate at the receiver in bit/s, once both have ended. CommandError if one failed."""

    def error(self, process: _Process) -> str:
        """Why `process` failed."""
        return process.complaint()


def _listening(table: bytes) -> Iterator[bool]:
    for line in table.splitlines()[1:]:
        fields = line.split()
        yield fields[3] == _LISTEN and int(fields[1].rpartition(b":")[2], 16) == PORT


class Iperf3(Client):
    """``iperf3``, one stream, with its defaults."""

    name = "iperf3"

    def __init__(self, program: str = "iperf3") -> None:
        self._program = program

    def _exec(self, *argv: str) -> tuple[str, list[str]]:
        # -i 0: no intermediate reports, for which both ends would stop.
        return "exec", [self._program, "-4", "-J", "-i", "0", "-p", str(PORT), *argv]

    def server_command(self, ends: Ends) -> tuple[str, list[str]]:
        return self._exec("-s", "-1", "-B", ends.address)

    def client_command(self, ends: Ends, seconds: int) -> tuple[str, list[str]]:
        return self._exec("-c", ends.address, "-t", str(seconds))

    def error(self, process: _Process) -> str:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(json.loads(process.output())["error"])
        return process.complaint()

    def received(self, client: _Process, server: _Process) -> float:
        report = client.json()
        try:
            return float(report["end"]["sum_received"]["bits_per_second"])
        except (KeyError, TypeError):
            raise CommandError(f"{client.what} failed: {self.error(client)}") from None


class Builtin(Client):
    """Two Python processes that send and receive 128 KiB at a time, as iperf3 does."""

    name = "builtin"

    def server_command(self, ends: Ends) -> tuple[str, list[str]]:
        return "serve", [ends.address, str(PORT)]

    def client_command(self, ends: Ends, seconds: int) -> tuple[str, list[str]]:
        return "send", [ends.address, str(PORT), str(seconds)]

    def received(self, client: _Process, server: _Process) -> float:
        report = server.json()
        return float(report["bytes"] * 8 / report["seconds"]) if report["seconds"] else 0.0


def find_client(which: str) -> Client:
    """The client for ``--client``: "iperf3", "builtin", or "auto" for iperf3 if it is installed.

    CommandError for "iperf3" if it is not installed.
    """
    program = None if which == "builtin" else shutil.which("iperf3")
    if program is not None:
        return Iperf3(program)
    if which == "iperf3":
        raise CommandError("iperf3 is not installed; --client builtin needs nothing")
    return Builtin()
