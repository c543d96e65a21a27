# SPDX-License-Identifier: BSD-3-Clause
"""Listens for changes of interfaces by anybody (``rtnetlink(7)``, RTNLGRP_LINK).

One thread, "rtap-netlink", listens for all devices of the process, with one socket for each of
their network namespaces; thread and sockets exist while something is watched. It passes on only a
hint that an interface may have changed. A device that gets one asks the kernel for the present
state. So lost, late, merged and repeated notifications all have the same effect, and an overrun
(ENOBUFS) is a hint for every device.
"""

from __future__ import annotations

import _socket  # not the module socket, which gevent and eventlet replace
import contextlib
import errno
import logging
import os
import select
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from rtap._core.descriptor import Descriptor
from rtap._core.forks import forget_in_child, renew_in_child
from rtap._core.threads import require_native, start_thread
from rtap.control.netns import call_in

__all__ = ["Watch", "watch"]

log = logging.getLogger("rtap")

_RTMGRP_LINK = 1  # linux/rtnetlink.h
_RCVBUF = 1 << 20
_RECV_MAX = 1 << 16
# struct nlmsghdr: length, type, flags, sequence, port; the start of struct ifinfomsg: index.
_NLMSGHDR = struct.Struct("=IHHII")
_IFINDEX = struct.Struct("=i")
_IFINDEX_AT = _NLMSGHDR.size + 4
_LINK_MESSAGES = frozenset((16, 17))  # RTM_NEWLINK, RTM_DELLINK

_NetnsId = tuple[int, int]


@dataclass(eq=False)
class Watch:
    """Hints about one interface, given as ``fn(watch)`` on the netlink thread until cancelled."""

    fn: Callable[[Watch], object]
    index: int
    netns_id: _NetnsId
    cancelled: bool = False

    def covers(self, netns: int, index: int) -> bool:
        """Whether it is that interface in the namespace of descriptor `netns`."""
        return (self.netns_id, self.index) == (_netns_id(netns), index)

    def cancel(self) -> None:
        """No further hint begins. Idempotent; the last one ends the thread."""
        self.cancelled = True
        if not sys.is_finalizing():  # else the thread has stopped for ever, at any place
            _monitor.cancel(self)


@dataclass
class _Socket:
    """A netlink socket and the interfaces of its namespace that are watched."""

    sock: _socket.socket
    watches: set[Watch] = field(default_factory=set)


class _Loop:
    """The descriptors that the thread sleeps on."""

    def __init__(self, monitor: _Monitor) -> None:
        require_native()
        self.epoll = select.epoll()
        self._wake = Descriptor.of(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.epoll.register(self.wake, select.EPOLLIN)
            self.thread = start_thread(monitor.run, self, name="rtap-netlink")
        except BaseException:
            # A signal handler raised: the thread may already run, and then owns the descriptors.
            # Without a thread they are closed with this object.
            os.eventfd_write(self.wake, 1)
            raise

    @property
    def wake(self) -> int:
        return self._wake.fileno()

    def close(self) -> None:
        """Called by the thread. Without one they are closed with this object."""
        self.epoll.close()
        self._wake.close()


def _netns_id(netns: int) -> _NetnsId:
    there = os.fstat(netns)
    return there.st_dev, there.st_ino


def _open_socket() -> _socket.socket:
    sock = _socket.socket(
        _socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, _socket.NETLINK_ROUTE
    )
    try:
        sock.setblocking(False)
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVBUF, _RCVBUF)
        sock.bind((0, _RTMGRP_LINK))
    except BaseException:
        sock.close()
        raise
    return sock


class _Monitor:
    def __init__(self) -> None:
        self._in_child()
        self._sockets: dict[_NetnsId, _Socket] = {}
        self._loop: _Loop | None = None

    def _in_child(self) -> None:
        # Reentrant: the garbage collector may close a forgotten device at any moment.
        self._lock = threading.RLock()

    def add(self, watch: Watch, netns: int) -> None:
        with self._lock:
            there = self._sockets.get(watch.netns_id)
            if there is None:
                there = _Socket(call_in(netns, _open_socket))
                try:
                    loop = self._loop or self._start()
                    loop.epoll.register(there.sock, select.EPOLLIN)
                except BaseException:
                    there.sock.close()
                    if not self._sockets:
                        self._end()
                    raise
                self._sockets[watch.netns_id] = there
            there.watches.add(watch)

    def _start(self) -> _Loop:
        self._loop = _Loop(self)
        return self._loop

    def _end(self) -> threading.Thread | None:
        loop, self._loop = self._loop, None
        if loop is None:
            return None
        os.eventfd_write(loop.wake, 1)
        return loop.thread

    def cancel(self, watch: Watch) -> None:
        thread = None
        with self._lock:
            there = self._sockets.get(watch.netns_id)
            if there is None or watch not in there.watches:
                return
            there.watches.remove(watch)
            if not there.watches:
                del self._sockets[watch.netns_id]
                if self._loop is not None:
                    self._loop.epoll.unregister(there.sock)
                there.sock.close()
            if not self._sockets:
                thread = self._end()
        if thread is not None and thread is not threading.current_thread():
            # The thread ends soon: it waits for no lock on behalf of a cancelled watch. But do not
            # wait for ever: the collector may have come here while this very thread is in add(),
            # with that lock.
            thread.join(1)

    def run(self, loop: _Loop) -> None:
        try:
            while True:
                ready = [fd for fd, _ in loop.epoll.poll()]
                if loop.wake in ready:
                    os.eventfd_read(loop.wake)  # after the write, so that it can be closed
                    return
                for watch in self._hints(ready):
                    if not watch.cancelled:
                        try:
                            watch.fn(watch)
                        except Exception:
                            log.exception("looking at interface %d", watch.index)
        finally:
            loop.close()

    def _hints(self, ready: list[int]) -> list[Watch]:
        """Read the sockets empty; return the watches of the interfaces they report."""
        hints: list[Watch] = []
        with self._lock:
            for there in list(self._sockets.values()):
                if there.sock.fileno() in ready:
                    changed = _read_indexes(there.sock)
                    hints += [
                        w for w in list(there.watches) if changed is None or w.index in changed
                    ]
        return hints

    def forget(self) -> None:
        """Drop everything in a forked child, which has copies of the descriptors and no thread."""
        sockets, self._sockets = self._sockets, {}
        loop, self._loop = self._loop, None
        for there in sockets.values():
            there.sock.close()
        if loop is not None:
            with contextlib.suppress(OSError):
                loop.close()


def _read_indexes(sock: _socket.socket) -> set[int] | None:
    """Which interfaces the waiting notifications are about; None when some were lost."""
    changed: set[int] = set()
    lost = False
    while True:
        try:
            data = sock.recv(_RECV_MAX)
        except BlockingIOError:
            return None if lost else changed
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                return None
            lost = True
            continue
        at = 0
        while at + _IFINDEX_AT + _IFINDEX.size <= len(data):
            length, kind, _, _, _ = _NLMSGHDR.unpack_from(data, at)
            if kind in _LINK_MESSAGES:
                changed.add(_IFINDEX.unpack_from(data, at + _IFINDEX_AT)[0])
            if length < _NLMSGHDR.size:
                break
            at += length + 3 & ~3


_monitor = _Monitor()
renew_in_child(_monitor)
forget_in_child(_monitor.forget)


def watch(netns: int, index: int, fn: Callable[[Watch], object]) -> Watch:
    """Have ``fn(watch)`` called whenever interface `index` in a namespace may have changed.

    `netns` is a descriptor of the namespace, which the caller keeps. Changes from before this
    returns are not reported: query the interface once afterwards.
    """
    made = Watch(fn, index, _netns_id(netns))
    _monitor.add(made, netns)
    return made
