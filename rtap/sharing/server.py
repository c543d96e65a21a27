# SPDX-License-Identifier: BSD-3-Clause
"""The socket of something shared, and the thread ("rtap-share") that serves it.

The thread never waits for a peer. Messages for one that does not read them are kept: of its news
only the last of each kind, so that they take little room however many there were. After ten seconds
it loses its connection.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Protocol

from rtap._core.descriptor import Descriptor
from rtap._core.forks import forget_in_child
from rtap._core.threads import start_thread
from rtap.sharing import places
from rtap.sharing.places import Allowed, Peer
from rtap.sharing.wire import Message, MessageError, encode_error, receive, send

__all__ = ["Client", "Handler", "Server"]

log = logging.getLogger("rtap")

#: Most connections at a time. More are closed at once.
MAX_CLIENTS = 256
#: Seconds in which a new connection has to attach.
ATTACH_S = 5.0
#: Seconds without new connections, when this process has no descriptors left for them.
FULL_S = 0.1
#: Most messages that are kept for a connection, and seconds in which it has to read one of them.
BEHIND, BEHIND_S = 512, 10.0


class Client:
    """A connection."""

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self.sock = sock
        self.peer = peer
        #: Whether the handler lets it stay.
        self.attached = False
        self.since = time.monotonic()
        #: What it has, by number.
        self.queues: set[int] = set()
        # Messages that it had no room for: what kind of news, the message, descriptors beside it.
        self._kept: list[tuple[object, bytes, list[Descriptor]]] = []
        self.polled = select.EPOLLIN

    def tell(self, data: bytes, fds: Iterable[int] = (), *, news: object = None) -> None:
        """Send an encoded message, as soon as the other end has room. Of a kind of news only the
        last is kept until then. OSError when the connection is to end."""
        if not self._kept:
            try:
                send(self.sock, data, fds)
                return
            except BlockingIOError:
                self.since = time.monotonic()
        if news is not None:
            self._kept = [entry for entry in self._kept if entry[0] != news]
        if len(self._kept) >= BEHIND:
            raise BlockingIOError(errno.EAGAIN, "it does not read its messages")
        self._kept.append((news, data, [Descriptor.of(os.dup, fd) for fd in fds]))

    @property
    def behind(self) -> bool:
        """Whether messages are kept for it."""
        return bool(self._kept)

    def catch_up(self) -> None:
        """Send what was kept, as far as there is room."""
        while self._kept:
            _, data, files = self._kept[0]
            try:
                send(self.sock, data, [file.fileno() for file in files])
            except BlockingIOError:
                return
            self.since = time.monotonic()
            self._forget_first()

    def _forget_first(self) -> None:
        for file in self._kept.pop(0)[2]:
            file.close()

    def close(self) -> None:
        """End it."""
        self.sock.close()
        while self._kept:
            self._forget_first()

    def is_late(self, now: float) -> bool:
        """Whether it had its time to attach, or to read."""
        if self._kept:
            return now - self.since > BEHIND_S
        return not self.attached and now - self.since > ATTACH_S


class Handler(Protocol):
    """What is shared; its methods are called in the thread."""

    def answer(self, client: Client, message: Message) -> bytes | None:
        """The answer to a message; None when it was given. OSError, ValueError, TypeError and
        RuntimeError go to the client; a MessageError ends its connection."""

    def dropped(self, client: Client) -> None:
        """The connection has ended."""

    def tell_news(self) -> None:
        """Called after an alarm, and before a message is answered."""


class Server:
    """Listens under a name until :meth:`end`."""

    def __init__(self, name: str, allowed: Allowed, handler: Handler) -> None:
        self._allowed = allowed
        self._handler = handler
        self._lock = threading.Lock()  # of _clients, which the thread changes
        self._clients: dict[int, Client] = {}
        self.ended = False
        self._full_until = 0.0
        self._wake = Descriptor.of(os.eventfd, 0)
        os.set_blocking(self._wake.fileno(), False)
        self._poller = select.epoll()
        self._listening = places.listen(name, allowed)
        self._sock, self.path, _ = self._listening
        _servers.add(self)

    def start(self) -> None:
        """Let others in."""
        self._thread = start_thread(self._run, name="rtap-share")

    def clients(self) -> list[Client]:
        """Those that are attached now."""
        with self._lock:
            return [client for client in self._clients.values() if client.attached]

    # -- called by any thread; they do not wait, but for join()

    def alarm(self) -> None:
        """Have the thread tell the news."""
        with contextlib.suppress(OSError, ValueError):
            os.eventfd_write(self._wake.fileno(), 1)

    def end(self) -> None:
        """Let nobody in, and end all connections: the others notice at once. Idempotent."""
        if self.ended:
            return
        self.ended = True
        places.unlisten(self._listening)
        with self._lock:
            for client in self._clients.values():
                with contextlib.suppress(OSError):
                    client.sock.shutdown(socket.SHUT_RDWR)
        self.alarm()

    def join(self) -> None:
        """Wait, after :meth:`end`, until the thread has ended."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def forget(self) -> None:
        """In a forked child: close its copies."""
        self.ended = True
        for client in self._clients.values():
            client.close()
        self._sock.close()
        self._poller.close()
        self._wake.close()

    # -- the thread

    def _run(self) -> None:
        listening = self._sock.fileno()
        try:
            self._poller.register(self._wake.fileno(), select.EPOLLIN)
            self._poller.register(listening, select.EPOLLIN)
            while not self.ended:
                self._pass(listening)
        except (OSError, ValueError):
            if not self.ended:
                raise
        finally:
            self.end()
            for client in list(self._clients.values()):
                self.drop(client)
            self._poller.close()
            self._wake.close()

    def _pass(self, listening: int) -> None:
        busy = self._full_until or any(c.behind or not c.attached for c in self._clients.values())
        for fd, events in self._poller.poll(FULL_S if busy else None):
            if fd == listening:
                self._accept(listening)
            elif fd in self._clients:
                self._serve(self._clients[fd], events)
            else:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake.fileno())
        self._handler.tell_news()
        now = time.monotonic()
        for client in list(self._clients.values()):
            if client.is_late(now):
                self.drop(client)
            elif client.polled != (polled := select.EPOLLIN | select.EPOLLOUT * client.behind):
                self._poller.modify(client.sock.fileno(), polled)
                client.polled = polled
        if self._full_until and now > self._full_until:
            self._full_until = 0.0
            self._poller.register(listening, select.EPOLLIN)

    def _accept(self, listening: int) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):
            return
        except OSError:
            if self.ended:
                return
            # No descriptor is left: those that wait are served when there is one again.
            self._poller.unregister(listening)
            self._full_until = time.monotonic() + FULL_S
            return
        try:
            sock.setblocking(False)
            client = Client(sock, places.peer_of(sock))
            if not self._allowed.lets_in(client.peer):
                client.tell(
                    encode_error(0, PermissionError(errno.EPERM, "this user may not attach"))
                )
                raise PermissionError
            if len(self._clients) >= MAX_CLIENTS:
                raise ConnectionAbortedError
        except OSError:
            sock.close()
            return
        with self._lock:
            self._clients[sock.fileno()] = client
        self._poller.register(sock.fileno(), select.EPOLLIN)
        if self.ended:  # it may have been missed
            self.drop(client)

    def drop(self, client: Client) -> None:
        """End a connection, in the thread."""
        with self._lock:
            self._clients.pop(client.sock.fileno(), None)
        client.close()
        self._handler.dropped(client)

    def _serve(self, client: Client, events: int) -> None:
        try:
            client.catch_up()
        except OSError:
            self.drop(client)
            return
        if events & ~select.EPOLLOUT:
            self._hear(client)

    def _hear(self, client: Client) -> None:
        try:
            message = receive(client.sock)
            if message is None:
                self.drop(client)
                return
            message.close()  # nobody has to send descriptors here
            self._answer(client, message)
        except (BlockingIOError, InterruptedError):
            pass
        except MessageError as exc:
            with contextlib.suppress(OSError):
                client.tell(encode_error(0, ValueError(f"no message of rtap: {exc}")))
            self.drop(client)
        except OSError:
            self.drop(client)
        except Exception:
            log.exception("a request of process %d to %s", client.peer.pid, self.path)
            self.drop(client)

    def _answer(self, client: Client, message: Message) -> None:
        try:
            answer = self._handler.answer(client, message)
        except MessageError:
            raise
        except (OSError, ValueError, TypeError, RuntimeError) as exc:
            answer = encode_error(message.fields.get("id", 0), exc)
        self._handler.tell_news()  # what the request changed is known before it is answered
        if answer is not None:
            client.tell(answer)


#: All of this process.
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _forget_all() -> None:
    for server in list(_servers):
        server.forget()
    _servers.clear()


forget_in_child(_forget_all)
