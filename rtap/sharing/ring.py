# SPDX-License-Identifier: BSD-3-Clause
"""Rings of shared memory by name: :class:`ShmRing`."""

from __future__ import annotations

import weakref

from rtap._core.mempool import Mempool
from rtap._queues import shm_ring
from rtap.errors import DeviceStateError
from rtap.sharing import places, pools
from rtap.sharing.connection import greeted
from rtap.sharing.places import Allowed
from rtap.sharing.server import Client, Server
from rtap.sharing.wire import (
    VERSION,
    Message,
    MessageError,
    encode,
)

__all__ = ["ShmRing"]

#: Descriptors of a ring: its memory, its wake-up, its pool's memory.
PARTS = 3


class _Door:
    """Passes a ring's descriptors on to those who ask for it by name; keeps no ring alive."""

    def __init__(self, ring: ShmRing) -> None:
        self._ring = weakref.ref(ring)

    def answer(self, client: Client, message: Message) -> bytes | None:
        """See :class:`rtap.sharing.server.Handler`."""
        ring = self._ring()
        if ring is None or ring.closed or ring.event_fd is None or ring.pool.fd is None:
            raise DeviceStateError("the ring is closed")
        if message.kind == "list":
            return encode("listing", device={"name": ring.name, "size": ring.size})
        if message.kind != "attach" or message.version != VERSION:
            raise ValueError(f"this is a ring, of version {VERSION} of the messages")
        client.tell(
            encode("ring", name=ring.name, size=ring.size),
            (ring.fd, ring.event_fd, ring.pool.fd),
        )
        client.attached = True
        return None

    def dropped(self, client: Client) -> None:
        """See :class:`rtap.sharing.server.Handler`."""

    def tell_news(self) -> None:
        """See :class:`rtap.sharing.server.Handler`."""


def _asked(name: str) -> Message:
    """The descriptors of the ring of that name, from a process that has it."""
    with places.connect(name) as sock:
        message = greeted(sock, name, places.peer_of(sock))
    if message.kind == "ring" and len(message.fds) == PARTS:
        return message
    message.close()
    raise MessageError(f"{name!r} is no ring")


class ShmRing(shm_ring.ShmRing):
    """A ring of shared memory, by its name or a descriptor of it.

    ``ShmRing(name, size)`` opens the ring that a process of this user has under that name. If there
    is none, it makes one of `size` frames, a power of two, with the frames of `pool`, a shared
    :class:`rtap.Mempool`, or of a new one with four times as many buffers. The name is there as
    long as the process that made the ring has it open, the ring as long as any process has.

    ``ShmRing(fd, pool=pool)`` opens the ring of a descriptor (`fd` of another one), which carries
    frames of `pool`; with `event_fd`, that of the other one too, it wakes up at once.

    The methods are those of a queue: ``enqueue(burst)`` and ``dequeue(n, timeout)``; and a worker's
    route takes a ring as its source and as a target. ValueError when the ring that there is has
    another size or another pool, and for descriptors of something else.
    """

    def __init__(
        self,
        name_or_fd: str | int,
        size: int | None = None,
        *,
        pool: Mempool | None = None,
        event_fd: int | None = None,
    ) -> None:
        self._server: Server | None = None
        if not isinstance(name_or_fd, str):
            if pool is None:
                raise TypeError("a ring of a descriptor needs the pool that its frames are of")
            super().__init__(name_or_fd, size, pool=pool, event_fd=event_fd)
            return
        name = places.checked_name(name_or_fd)
        if event_fd is not None:
            raise TypeError("event_fd belongs to a descriptor, and here is a name")
        try:
            self._join(name, size, pool)
        except FileNotFoundError:
            try:
                self._make(name, size, pool)
            except FileExistsError:  # another process was faster
                self._join(name, size, pool)

    def _join(self, name: str, size: int | None, pool: Mempool | None) -> None:
        message = _asked(name)
        try:
            fd, event_fd, pool_fd = message.fds
            if pool is None:
                pool = pools.attached(pool_fd, name)
            super().__init__(fd, size, pool=pool, event_fd=event_fd, name=name)
        finally:
            message.close()

    def _make(self, name: str, size: int | None, pool: Mempool | None) -> None:
        if size is None:
            raise FileNotFoundError(
                2, f"no process of this user has a ring {name!r}; with a size, it is made"
            )
        if pool is None:
            pool = Mempool(4 * size, shared=True, name=name)
        pools.know(pool)
        with shm_ring.ShmRing.create(pool, size, name=name) as made:
            server = Server(name, Allowed(), _Door(self))  # those who come now wait for the start
            try:
                super().__init__(made.fd, size, pool=pool, event_fd=made.event_fd, name=name)
                server.start()
            except BaseException:
                server.end()
                raise
        self._server = server
        weakref.finalize(self, self._server.end)

    def close(self) -> None:
        """Leave the ring; frames in it stay there for others. Idempotent."""
        if self._server is not None:
            self._server.end()
        super().close()
