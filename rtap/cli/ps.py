# SPDX-License-Identifier: BSD-3-Clause
"""Show the devices and rings that processes share, and who uses the devices' queue pairs.

It asks each of those processes. Without NAME it asks all whose sockets this user can see.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rtap.cli.errors import sentence
from rtap.sharing import places
from rtap.sharing.wire import MessageError, encode, receive, send

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "ps"
HELP = "show the devices that processes share, and who uses their queue pairs"

#: Seconds to wait for an answer.
ANSWER_S = 1.0


@dataclass(frozen=True)
class Lease:
    """A queue pair, and the process that has it: 0 for one that is not seen from here.

    `command` and `user` are "" if they cannot be found out.
    """

    queue: int
    pid: int
    command: str
    uid: int
    user: str


@dataclass(frozen=True)
class Shared:
    """What a process shares: a device, or a ring of so many frames; with `error`, why it does not
    say so itself."""

    name: str
    pid: int = 0
    command: str = ""
    ifname: str = ""
    queues: list[int] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    ring: int = 0
    error: str = ""


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="backslashreplace") as comm:
            return comm.read().rstrip("\n")
    except OSError:
        return ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return ""


def _numbers(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise MessageError("the numbers of a listing are none")
    return value


def _shared(device: dict[str, Any], peer: places.Peer) -> Shared:
    """What the process said; MessageError if it is no listing."""
    try:
        if device.keys() == {"name", "size"}:
            (size,) = _numbers([device["size"]])
            name = places.checked_name(device["name"])
            return Shared(name, peer.pid, _command(peer.pid), ring=size)
        name, ifname = device["name"], device["ifname"]
        queues, leases = _numbers(device["queues"]), device["leases"]
        if not (isinstance(ifname, str) and isinstance(leases, list)):
            raise MessageError("it is no listing")
        found = []
        for lease in leases:
            queue, pid, uid = _numbers(lease)
            found.append(Lease(queue, pid, _command(pid), uid, _user(uid)))
        name = places.checked_name(name)
    except (KeyError, TypeError, ValueError) as exc:
        raise MessageError(f"it is no listing: {exc}") from None
    return Shared(name, peer.pid, _command(peer.pid), ifname, queues, found)


def _ask(name: str) -> Shared:
    """What is shared under a name, or at the path of a socket. FileNotFoundError if nothing is."""
    short = os.path.basename(name).removesuffix(".sock")
    peer = places.Peer(0, 0, 0)
    try:
        with places.connect(name) as sock:
            peer = places.peer_of(sock)
            sock.settimeout(ANSWER_S)
            send(sock, encode("list"))
            message = receive(sock)
        if message is None:
            raise MessageError("it ends the connection")
        message.close()
        if message.kind == "error":
            raise MessageError(message.text)
        if message.kind != "listing":
            raise MessageError(f"{message.kind} is no listing")
        return _shared(message.device, peer)
    except FileNotFoundError:
        raise
    except TimeoutError:
        error = "does not answer"
    except (OSError, ValueError) as exc:
        error = sentence(exc)
    return Shared(short, peer.pid, _command(peer.pid), error=error)


def _unseen() -> Iterator[str]:
    """Directories that are there, and that this user may not list."""
    for directory in places.directories():
        if os.path.isdir(directory) and not os.access(directory, os.R_OK):
            yield directory


def _there(names: list[str]) -> Iterator[Shared]:
    for name in names or places.sockets():
        try:
            yield _ask(name)
        except FileNotFoundError:
            if names:
                raise


# ---- as text


def _plain(text: str) -> str:
    """Without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _process(pid: int, command: str) -> str:
    if pid <= 0:
        return "a process of another container"
    return f"process {pid}" + (f" ({_plain(command)})" if command else "")


def _ranges(numbers: list[int]) -> str:
    """``0-3, 6``."""
    out: list[list[int]] = []
    for number in sorted(numbers):
        if out and number == out[-1][1] + 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in out)


def _lines(shared: Shared) -> Iterator[str]:
    if shared.error:
        who = f"{_process(shared.pid, shared.command)}: " if shared.pid else ""
        yield f"{shared.name}: {who}{_plain(shared.error)}"
        return
    if shared.ring:
        yield f"{shared.name}: ring of {shared.ring}, {_process(shared.pid, shared.command)}"
        return
    what = "queue" if len(shared.queues) == 1 else "queues"
    yield (
        f"{shared.name}: interface {_plain(shared.ifname)}, "
        f"{_process(shared.pid, shared.command)}, {what} {_ranges(shared.queues)}"
    )
    for lease in shared.leases:
        user = lease.user or f"user {lease.uid}"
        yield f"  queue {lease.queue}: {_process(lease.pid, lease.command)} of {_plain(user)}"


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rtap ps``."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="what is shared under that name, or its socket"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(args: argparse.Namespace) -> int:
    """Run ``rtap ps`` with parsed arguments."""
    found = list(_there(args.names))
    unseen = [] if args.names else list(_unseen())
    for directory in unseen:
        print(
            f"rtap {NAME}: this user may not see what is in {directory}, give the name",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps({"shared": [asdict(shared) for shared in found]}))
    elif found:
        print("\n".join(line for shared in found for line in _lines(shared)))
    elif not unseen:
        print("nothing is shared")
    return 0
