# SPDX-License-Identifier: BSD-3-Clause
"""One rtnetlink socket for each network namespace, shared by the process (``rtnetlink(7)``).

The socket exists while somebody holds the namespace's :class:`Channel`. So requests need no thread,
no ``/proc`` and no right to enter the namespace, which a process may have given up meanwhile.

The kernel handles a request inside ``send(2)``: its answer is there when that returns, and no
call waits. Sequence numbers tell answers apart. If an exception, say of a signal handler, leaves an
answer behind, the next request skips it. If a signal handler or a finalizer makes a request in the
middle of another one, it keeps the other one's answer for it.
"""

from __future__ import annotations

import _socket  # not the module socket, which gevent and eventlet replace
import errno
import itertools
import os
import struct
import threading
import weakref
from types import TracebackType
from typing import TypeAlias

from rtap._core.forks import forget_in_child, renew_in_child
from rtap.control.netns import call_in
from rtap.errors import raise_errno

__all__ = ["NLMSGHDR", "Channel", "NetNSKey", "hold"]

#: struct nlmsghdr: length, type, flags, sequence, port.
NLMSGHDR = struct.Struct("=IHHII")
_SEQUENCE = struct.Struct("=I")
_SEQUENCE_AT = 8
_ERROR = struct.Struct("=i")
_NLMSG_ERROR = 2  # linux/netlink.h
_RECV_MAX = 1 << 16

_ATTEMPTS = 3
# Overrun or interrupted: the kernel asks for the request once more.
_AGAIN = frozenset((errno.ENOBUFS, errno.EINTR))

_Answer: TypeAlias = tuple[int, bytes]

#: st_dev and st_ino, which tell existing namespaces apart.
NetNSKey: TypeAlias = tuple[int, int]


class _Socket(_socket.socket):
    # If a signal handler's exception leaves a socket without an owner, it is closed without a
    # warning.
    __del__ = _socket.socket.close


def _open() -> _socket.socket:
    sock = _Socket(
        _socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, _socket.NETLINK_ROUTE
    )
    try:
        sock.setblocking(False)
        sock.bind((0, 0))
    except BaseException:
        sock.close()
        raise
    return sock


class Channel:
    """Requests to the kernel in one network namespace, from any thread.

    The socket is made by the first request, and anew after a fork.
    """

    def __init__(self, key: NetNSKey | None = None) -> None:
        self.key = key
        self.users = 0
        self._sequences = itertools.count(1)
        self._in_child()
        self._reset()
        renew_in_child(self)

    def _in_child(self) -> None:
        # Reentrant: signal handlers and finalizers make requests in the middle of another one.
        self._lock = threading.RLock()

    def _reset(self) -> None:
        self._sock: _socket.socket | None = None
        self._waiting: set[int] = set()
        self._answers: dict[int, _Answer] = {}

    def request(
        self, message: bytearray, operation: str, ifname: str, netns: int | None = None
    ) -> bytes:
        """The payload of the answer to `message`, empty for an acknowledgement.

        `netns` is a descriptor of the namespace, in case a socket has to be made; None stands for
        the calling thread's. If the kernel refuses, raises as :func:`raise_errno` does.
        """
        attempts = 0
        while True:
            attempts += 1
            try:
                with self._lock:
                    kind, payload = self._ask(message, netns)
            except OSError as exc:
                if exc.errno in _AGAIN and attempts < _ATTEMPTS:
                    continue
                raise_errno(exc.errno or errno.EIO, operation, ifname)
            if kind != _NLMSG_ERROR:
                return payload
            code = -_ERROR.unpack_from(payload)[0]
            if code == 0:
                return b""
            if code in _AGAIN and attempts < _ATTEMPTS:
                continue
            # The kernel also checks who made the socket. Our credentials may have changed since.
            if code == errno.EPERM and attempts == 1 and self._renew(netns):
                continue
            raise_errno(code, operation, ifname)

    def _make(self, netns: int | None) -> _socket.socket:
        return _open() if netns is None else call_in(netns, _open)

    def _renew(self, netns: int | None) -> bool:
        """Replace the socket; False, and the old one stays, if no new one can be made."""
        try:
            new = self._make(netns)
        except (OSError, RuntimeError):
            return False
        with self._lock:
            old, self._sock = self._sock, new
            if old is not None:
                old.close()
        return True

    def _ask(self, message: bytearray, netns: int | None) -> _Answer:
        if self._sock is None:
            self._sock = self._make(netns)
        sequence = next(self._sequences) & 0xFFFFFFFF
        _SEQUENCE.pack_into(message, _SEQUENCE_AT, sequence)
        self._waiting.add(sequence)
        try:
            self._sock.send(message)
            while sequence not in self._answers:
                self._read()
            return self._answers[sequence]
        finally:
            self._waiting.discard(sequence)
            self._answers.pop(sequence, None)

    def _read(self) -> None:
        """Keep those answers of one datagram that a request waits for."""
        assert self._sock is not None
        try:
            data, (port, _) = self._sock.recvfrom(_RECV_MAX)
        except BlockingIOError:
            raise OSError(errno.ENOBUFS, "the kernel's answer was lost") from None
        if port != 0:
            return  # not from the kernel
        at = 0
        while at + NLMSGHDR.size <= len(data):
            length, kind, _, sequence, _ = NLMSGHDR.unpack_from(data, at)
            if length < NLMSGHDR.size:
                return
            if sequence in self._waiting:
                self._answers[sequence] = kind, data[at + NLMSGHDR.size : at + length]
            at += length + 3 & ~3

    def close(self) -> None:
        with self._lock:
            sock, self._sock = self._sock, None
            if sock is not None:
                sock.close()

    def release(self) -> None:
        """Undo one :func:`hold`; the last one closes the socket."""
        with _channels.lock:
            self.users -= 1
            if self.users > 0:
                return
            if self.key is not None and _channels.by_netns.get(self.key) is self:
                del _channels.by_netns[self.key]
        self.close()

    def forked(self) -> None:
        """Drop the socket in a forked child: it belongs to the parent."""
        sock = self._sock
        self._reset()
        if sock is not None:
            sock.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class _Channels:
    def __init__(self) -> None:
        self._in_child()
        # Weak: a signal handler's exception may cost a holder its reference, but a count would
        # stay.
        self.by_netns: weakref.WeakValueDictionary[NetNSKey, Channel] = (
            weakref.WeakValueDictionary()
        )

    def _in_child(self) -> None:
        # Reentrant: the garbage collector may close a forgotten device at any moment.
        self.lock = threading.RLock()

    def forget(self) -> None:
        for channel in list(self.by_netns.values()):
            channel.forked()


_channels = _Channels()
renew_in_child(_channels)
forget_in_child(_channels.forget)


def hold(netns: int) -> Channel:
    """The channel of the namespace of descriptor `netns`, to be :meth:`~Channel.release`\\ d."""
    there = os.fstat(netns)
    key = there.st_dev, there.st_ino
    with _channels.lock:
        channel = _channels.by_netns.get(key)
        if channel is None:
            channel = _channels.by_netns[key] = Channel(key)
        channel.users += 1
    return channel
