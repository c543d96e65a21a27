# SPDX-License-Identifier: BSD-3-Clause
"""The messages between the process that has a device and those that it lends queues to.

A message is a JSON object in one packet of a Unix socket (SOCK_SEQPACKET), with descriptors beside
it. The fields of each kind and their types are in :data:`FIELDS`; :func:`decode` lets nothing else
through, whoever sent it.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rtap.errors import DeviceGone, DeviceStateError

__all__ = [
    "LIMIT",
    "VERSION",
    "Message",
    "MessageError",
    "close_all",
    "decode",
    "encode",
    "encode_error",
    "raise_error",
    "receive",
    "send",
]

#: Of the messages: both ends have to have the same one.
VERSION = 1
#: Most bytes of a message.
LIMIT = 1 << 16
#: Most descriptors beside one.
MAX_FDS = 4

_ITEMS = 1024
_INT = 1 << 63

#: kind: {field: type}. A type is a class, a tuple of classes, or [class] for a list of these;
#: "any" is whatever JSON has.
FIELDS: dict[str, dict[str, Any]] = {
    # From those that attach. An `id` comes back with the answer.
    "attach": {"version": int, "key": str},
    "lease": {"id": int, "queues": [int], "count": int},
    "give_back": {"id": int, "queues": [int]},
    "call": {"id": int, "name": str, "args": list},
    "list": {},
    # From the process that has the device.
    "welcome": {"name": str, "device": dict},
    "leased": {"id": int, "queue": int},
    "result": {"id": int, "value": "any"},
    "error": {"id": int, "type": str, "errno": int, "text": str},
    "state": {"device": dict},
    "event": {"event": int, "data": "any"},
    "listing": {"device": dict},
    "ring": {"name": str, "size": int},
}

#: Exceptions that pass from one process to the other, by name. Others arrive as OSError.
ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, DeviceStateError, DeviceGone, PermissionError, OSError)
}
_TEXT_LIMIT = 2000


class MessageError(ValueError):
    """What the other end sent is no message; the text says why."""


class Message:
    """A checked one: its `kind`, its fields as attributes, and the descriptors beside it.

    The receiver closes `fds`, or takes them out.
    """

    def __init__(self, kind: str, fields: dict[str, Any], fds: Sequence[int] = ()) -> None:
        self.kind = kind
        self.fields = fields
        self.fds = list(fds)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(name) from None

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        close_all(self.fds)

    def __repr__(self) -> str:
        return f"<Message {self.kind} {self.fields} {len(self.fds)} descriptors>"


def close_all(fds: list[int]) -> None:
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())


def _refuse_constant(text: str) -> Any:
    raise MessageError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise MessageError("a number is too large")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MessageError("a field is there twice")
    return found


def _fits(value: Any, kind: Any) -> bool:
    if kind == "any":
        return True
    if isinstance(kind, list):
        return (
            isinstance(value, list)
            and len(value) <= _ITEMS
            and all(_fits(item, kind[0]) for item in value)
        )
    if isinstance(value, bool) and kind is int:
        return False
    if isinstance(value, int) and not -_INT <= value < _INT:
        return False
    return isinstance(value, kind)


def decode(data: bytes) -> Message:
    """The message in `data`; MessageError for anything that is none."""
    if len(data) > LIMIT:
        raise MessageError(f"{len(data)} bytes are more than a message has")
    try:
        fields = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_once,
        )
    except MessageError:
        raise
    except (ValueError, RecursionError):
        raise MessageError("it is no JSON") from None
    if not isinstance(fields, dict):
        raise MessageError("it is no JSON object")
    kind = fields.pop("kind", None)
    expected = FIELDS.get(kind) if isinstance(kind, str) else None
    if expected is None:
        raise MessageError("it is of no known kind")
    if fields.keys() != expected.keys():
        raise MessageError(f"{kind} has other fields: {', '.join(expected) or 'none'}")
    for name, value in fields.items():
        if not _fits(value, expected[name]):
            raise MessageError(f"{name} of {kind} is of another type")
    return Message(kind, fields)


def encode(kind: str, /, **fields: Any) -> bytes:
    """A message, of a kind and with fields that FIELDS has. ValueError when it is one that
    :func:`decode` refuses."""
    if fields.keys() != FIELDS[kind].keys():
        raise TypeError(f"{kind} has the fields {', '.join(FIELDS[kind])}")
    for name, value in fields.items():
        if not _fits(value, FIELDS[kind][name]):
            raise ValueError(f"{name} is out of range")
    data = json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode()
    if len(data) > LIMIT:
        raise ValueError(f"{len(data)} bytes are more than a message has")
    return data


def encode_error(number: int, exc: Exception) -> bytes:
    """The answer to a request that failed."""
    kind = next(name for name, known in ERRORS.items() if type(exc) is known or name == "OSError")
    code, text = 0, str(exc)
    if isinstance(exc, OSError):
        code, text = exc.errno or errno.EIO, exc.strerror or text
    elif kind == "OSError":
        code, text = errno.EPROTO, f"{type(exc).__name__}: {text}"
    return encode("error", id=number, type=kind, errno=code, text=text[:_TEXT_LIMIT])


def raise_error(message: Message, ifname: str = "") -> NoReturn:
    """Raise what :func:`encode_error` was given."""
    kind = ERRORS.get(message.type, OSError)
    if kind is DeviceGone:
        raise DeviceGone(message.errno, message.text, ifname)
    if issubclass(kind, OSError):
        raise OSError(message.errno, message.text)
    raise kind(message.text)


def send(sock: socket.socket, data: bytes, fds: Iterable[int] = ()) -> None:
    """Send an encoded message. BlockingIOError when the other end does not read."""
    rights = array.array("i", fds)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def receive(sock: socket.socket) -> Message | None:
    """The next message; None when the other end is gone. MessageError for what is none: its
    descriptors are closed."""
    room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(LIMIT + 1, room, socket.MSG_CMSG_CLOEXEC)
    fds = _descriptors(ancillary)
    try:
        if not data and not fds:
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise MessageError("it is too long, or has too many descriptors")
        message = decode(data)
    except BaseException:
        close_all(fds)
        raise
    message.fds = fds
    return message
