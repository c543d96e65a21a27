# SPDX-License-Identifier: BSD-3-Clause
"""A process inside a network namespace: one end of a TCP transfer, or any other program.

    python tcp_child.py NETNS PARENT serve ADDRESS PORT
    python tcp_child.py NETNS PARENT send ADDRESS PORT SECONDS
    python tcp_child.py NETNS PARENT exec PROGRAM [ARGUMENT...]

NETNS is an inherited descriptor, PARENT the process id of the starting process; this process dies
with it. Both ends of a transfer print a JSON object with ``bytes`` and ``seconds``;
they wait without a limit, since the parent sets one.

It is run by path and in isolated mode, and imports nothing of rtap, so that it starts as fast as
the bare interpreter.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time

#: Bytes of one read or write: iperf3's default for TCP.
BLOCK = 128 * 1024

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it ends."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise SystemExit("the parent process has ended")


def enter(netns: int) -> None:
    """Move into the network namespace of descriptor `netns`, and close that."""
    if _libc.setns(netns, _CLONE_NEWNET) < 0:
        raise OSError(ctypes.get_errno(), "setns into the network namespace failed")
    os.close(netns)


def _report(n: int, started: float) -> None:
    print(json.dumps({"bytes": n, "seconds": time.monotonic() - started}))


def serve(address: str, port: int) -> None:
    """Take one connection and read it to its end; the time runs from its first bytes."""
    with socket.create_server((address, port)) as listener:
        conn, _ = listener.accept()
    buf = bytearray(BLOCK)
    with conn:
        total = conn.recv_into(buf)
        started = time.monotonic()
        while n := conn.recv_into(buf):
            total += n
        _report(total, started)


def send(address: str, port: int, seconds: float) -> None:
    """Write for `seconds`, then wait until the other end has read it all and closed."""
    block = bytes(BLOCK)
    with socket.create_connection((address, port)) as conn:
        total = 0
        started = time.monotonic()
        end = started + seconds
        while time.monotonic() < end:
            total += conn.send(block)
        conn.shutdown(socket.SHUT_WR)
        conn.recv(1)
        _report(total, started)


def main(argv: list[str]) -> None:
    """Run the command line described at the top of this file."""
    netns, parent, action, *rest = argv
    die_with(int(parent))
    enter(int(netns))
    if action == "exec":
        os.execvp(rest[0], rest)
    elif action == "serve":
        serve(rest[0], int(rest[1]))
    elif action == "send":
        send(rest[0], int(rest[1]), float(rest[2]))
    else:
        raise SystemExit(f"unknown action {action!r}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as exc:
        raise SystemExit(exc.strerror or str(exc)) from None
