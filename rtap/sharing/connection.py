# SPDX-License-Identifier: BSD-3-Clause
"""The connection of an attached device to the process that lends it queue pairs.

A thread ("rtap-attach") reads all messages: answers go to the thread that waits for them, and news
to the device, once nobody has its lock. It keeps no device alive.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import select
import socket
import struct
import threading
from typing import Any, NamedTuple, Protocol

from rtap._core.descriptor import Descriptor
from rtap._core.threads import FairRLock, start_thread
from rtap.errors import DeviceGone
from rtap.sharing.places import Peer, peer_of
from rtap.sharing.wire import (
    VERSION,
    Message,
    MessageError,
    encode,
    raise_error,
    receive,
    send,
)

__all__ = ["Borrowed", "Connection", "Listener"]

log = logging.getLogger("rtap")

#: Seconds to wait for an answer.
ANSWER_S = 10.0
#: Seconds for an attempt to get the device's lock for news, and between two.
NEWS_S = 0.01

_TIMEVAL = struct.Struct("ll")


class Borrowed(NamedTuple):
    """The descriptors of a queue pair, as :class:`rtap.ethdev.ops.Loan` has them."""

    rx: Descriptor
    tx: Descriptor
    rx_state: Descriptor
    tx_state: Descriptor

    def close(self) -> None:
        """Close all four. Idempotent."""
        for descriptor in self:
            descriptor.close()


class Listener(Protocol):
    """The part of an attached device that its connection calls, in its thread."""

    @property
    def lock(self) -> FairRLock: ...

    def hear(self, message: Message) -> None:
        """News, with the lock held."""

    def lost(self) -> None:
        """The other process is gone; without the lock."""


def greeted(sock: socket.socket, name: str, owner: Peer, key: str = "") -> Message:
    """What the process that has something says to one that attaches; its errors are raised.

    The caller closes the answer.
    """
    sock.settimeout(ANSWER_S)
    try:
        # Who refuses this user says so, and does not wait for our message.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send(sock, encode("attach", version=VERSION, key=key))
        try:
            message = receive(sock)
        except ConnectionResetError:  # the kernel says that first
            message = receive(sock)
    except TimeoutError:
        raise TimeoutError(
            errno.ETIMEDOUT, f"process {owner.pid} does not answer for {name}"
        ) from None
    except ConnectionError:
        message = None
    sock.settimeout(None)
    if message is None:
        raise ConnectionRefusedError(
            errno.ECONNREFUSED, f"process {owner.pid} refuses more connections"
        )
    if message.kind == "error":
        message.close()
        raise_error(message, name)
    return message


class Connection:
    """Requests, one at a time, and their answers.

    `owner` is the process at the other end. After the connection is lost every request raises
    DeviceGone.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._sock = sock
        self.name = name
        self.owner: Peer = peer_of(sock)
        self._asking = threading.Lock()
        self._answered = threading.Condition(threading.Lock())
        self._number = 0
        self._answer: Message | None = None
        self._borrowed: dict[int, Borrowed] = {}
        # What the device has not been told yet; the thread takes them out.
        self._news: collections.deque[Message] = collections.deque()
        self._started = self._closed = False
        self.lost = False
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(ANSWER_S), 0))

    def welcome(self, key: str) -> Message:
        """Attach, before the thread runs; the caller closes the answer."""
        message = greeted(self._sock, self.name, self.owner, key)
        if message.kind != "welcome":
            message.close()
        if message.kind == "ring":
            raise ValueError(f"{self.name} is a ring (rtap.ShmRing), not a device")
        if message.kind != "welcome":
            raise MessageError(f"{message.kind} is no welcome")
        return message

    def start(self, listener: Listener) -> None:
        """Begin to listen."""
        self._started = True
        start_thread(_read_all, self, listener, name="rtap-attach")

    # -- requests

    def _gone(self) -> DeviceGone:
        return DeviceGone(
            errno.ENODEV, f"process {self.owner.pid}, which has device {self.name}, is gone"
        )

    def _ask(self, kind: str, **fields: Any) -> Any:
        with self._asking:
            with self._answered:
                self._number += 1
                number, self._answer = self._number, None
            try:
                if self.lost:
                    raise self._gone()
                send(self._sock, encode(kind, id=number, **fields))
                with self._answered:
                    if not self._answered.wait_for(
                        lambda: self._answer is not None or self.lost, ANSWER_S
                    ):
                        raise TimeoutError(
                            errno.ETIMEDOUT, f"process {self.owner.pid} does not answer"
                        )
                    answer = self._answer
            except (ConnectionError, BlockingIOError):
                raise self._gone() from None
            finally:
                with self._answered:
                    self._number += 1  # a late answer is nobody's
            if answer is None:
                raise self._gone()
            if answer.kind == "error":
                raise_error(answer, self.name)
            return answer.value

    def call(self, name: str, *args: Any) -> Any:
        """Have the other process do one of :data:`rtap.sharing.share.CALLS`; its exceptions pass
        through."""
        return self._ask("call", name=name, args=list(args))

    def latest_state(self) -> Message | None:
        """The last state of the device among the news that it has not been told yet."""
        with self._answered:
            return next((news for news in reversed(self._news) if news.kind == "state"), None)

    def lease(self, queues: list[int], count: int = 0) -> dict[int, Borrowed]:
        """Borrow those queue pairs, or `count` free ones."""
        try:
            self._ask("lease", queues=queues, count=count)
        except BaseException:
            self._forget_borrowed()
            raise
        with self._answered:
            borrowed, self._borrowed = self._borrowed, {}
        return borrowed

    def _forget_borrowed(self) -> None:
        """Close what nobody took."""
        with self._answered:
            borrowed, self._borrowed = self._borrowed, {}
        for files in borrowed.values():
            files.close()

    def give_back(self, queues: list[int]) -> None:
        """The descriptors are closed, and nobody here uses the pairs any more."""
        self._ask("give_back", queues=queues)

    def close(self) -> None:
        """End the connection, and with it what was borrowed. Does not wait for the thread."""
        self._closed = True
        if not self._started:
            self._sock.close()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        """In a forked child: close its copy, and leave the parent's connection alone."""
        self.lost = self._closed = True
        self._sock.close()

    # -- the thread

    def _take(self, message: Message) -> bool:
        """Keep an answer; False for news."""
        if message.kind not in ("result", "error", "leased"):
            return False
        with self._answered:
            current = message.id == self._number
            if message.kind == "leased" and len(message.fds) == len(Borrowed._fields):
                files = [Descriptor(fd) for fd in message.fds]
                message.fds.clear()
                borrowed = Borrowed(*files)
                if current and message.queue not in self._borrowed:
                    self._borrowed[message.queue] = borrowed
                else:  # whoever asked for it was interrupted
                    borrowed.close()
                    send(self._sock, encode("give_back", id=0, queues=[message.queue]))
            elif current and message.kind != "leased":
                self._answer = message
                self._answered.notify_all()
        message.close()
        return True

    def _end(self) -> None:
        with self._answered:
            self.lost = True
            self._answered.notify_all()


def _read_all(connection: Connection, listener: Listener) -> None:
    """The thread."""
    try:
        _read_on(connection, listener)
    except (OSError, ValueError):  # what came is no message of rtap either
        pass
    except Exception:
        log.exception("news of device %s", connection.name)
    connection._end()
    connection._forget_borrowed()
    if not connection._closed:
        listener.lost()
    connection._sock.close()


def _read_on(connection: Connection, listener: Listener) -> None:
    """Until the other process is gone, or says something strange."""
    news = connection._news
    poller = select.poll()
    poller.register(connection._sock, select.POLLIN)
    while True:
        if poller.poll(NEWS_S * 1000 if news else None):
            message = receive(connection._sock)
            if message is None:
                return
            if not connection._take(message):
                message.close()
                with connection._answered:
                    news.append(message)
        # Whoever has just got an answer holds the lock for a moment. This thread comes next: else a
        # program that asks again and again would never hear news.
        if news and listener.lock.acquire(timeout=NEWS_S):
            try:
                while news:
                    listener.hear(news[0])
                    with connection._answered:
                        news.popleft()
            finally:
                listener.lock.release()
