# SPDX-License-Identifier: BSD-3-Clause
"""The packet sockets of one interface: one for each queue, and one that is never read.

A receive queue's socket is bound while the queue runs. When it stops, another open file takes its
place under the same descriptor. The old one leaves the fan-out group, so the kernel gives its flows
to the other queues, and keeps no frame for the next start.
"""

from __future__ import annotations

import _socket  # not the module socket, which gevent and eventlet replace
import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

from rtap.control import packet
from rtap.control.netlink import Control
from rtap.control.netns import call_in
from rtap.control.packet import Membership
from rtap.errors import DeviceGone
from rtap.ethdev.devargs import DevArgs

__all__ = ["PacketOptions", "PacketSockets"]

INT_MAX = (1 << 31) - 1
#: The system's default holds three super-frames.
DEFAULT_RCVBUF = 8 << 20
DEFAULT_SNDBUF = 1 << 20


@dataclass(frozen=True)
class PacketOptions:
    """Options of the sockets: bytes that may wait in each, and whether to skip queueing."""

    rcvbuf: int = DEFAULT_RCVBUF
    sndbuf: int = DEFAULT_SNDBUF
    qdisc_bypass: bool = False

    #: Their device arguments, for a message.
    KEYS = ("rcvbuf=BYTES", "sndbuf=BYTES", "qdisc_bypass")

    @classmethod
    def take(cls, args: DevArgs) -> PacketOptions:
        """Take the options out of device arguments. A ValueError names a wrong one."""
        return cls(
            args.take_int("rcvbuf", DEFAULT_RCVBUF, 1, INT_MAX),
            args.take_int("sndbuf", DEFAULT_SNDBUF, 1, INT_MAX),
            args.take_flag("qdisc_bypass"),
        )


#: The sockets of devices with queues, as in :mod:`rtap.drivers.descriptors`.
_held: set[PacketSockets] = set()


class PacketSockets:
    """Sockets on the interface that `control` controls; descriptors keep their numbers until a
    resize."""

    def __init__(self, control: Control, options: PacketOptions) -> None:
        self._control = control
        self._options = options
        self._rx: list[_socket.socket] = []
        self._tx: list[_socket.socket] = []
        self._attached: set[int] = set()
        self._group: int | None = None
        # This socket has the memberships: they last as long as it does, and end with the interface.
        self._member = self._open(receive=False)
        self._joined: set[Membership] = set()

    def _open(self, *, receive: bool, vnet_hdr: bool = True) -> _socket.socket:
        options = self._options

        def make() -> _socket.socket:
            return packet.open_socket(
                vnet_hdr=vnet_hdr, qdisc_bypass=options.qdisc_bypass and not receive
            )

        sock = call_in(self._control.netns.fd, make)
        try:
            packet.set_buffers(
                sock, options.rcvbuf if receive else None, None if receive else options.sndbuf
            )
        except BaseException:
            sock.close()
            raise
        return sock

    def resize(self, nb_rx: int, nb_tx: int, *, tx_header: bool) -> None:
        """Replace all sockets by so many new ones, none bound; nothing may refer to the old
        ones."""
        _held.add(self)
        self.close_queues()
        try:
            for _ in range(nb_rx):
                self._rx.append(self._open(receive=True))
            for _ in range(nb_tx):
                self._tx.append(self._open(receive=False, vnet_hdr=tx_header))
        except BaseException:
            self.close_queues()
            raise

    def rx_fd(self, queue_id: int) -> int:
        return self._rx[queue_id].fileno()

    def tx_fd(self, queue_id: int) -> int:
        return self._tx[queue_id].fileno()

    def is_attached(self, queue_id: int) -> bool:
        """Whether the kernel gives frames to a receive queue."""
        return queue_id in self._attached

    def attach(self, queues: Iterable[int]) -> None:
        """Let the kernel give incoming frames to these queues too, each flow to one of them."""
        control = self._control
        added = [q for q in queues if q not in self._attached]
        try:
            for q in added:
                # Muted: after it is bound and before it is in the group, it would get all frames.
                packet.mute(self._rx[q])
                packet.bind(self._rx[q], control.index, control.name, receive=True)
                self._attached.add(q)
                if len(self._rx) > 1:
                    self._group = packet.join_fanout(self._rx[q], self._group, control.name)
            for q in added:
                packet.unmute(self._rx[q])
        except BaseException:
            for q in added:
                self.detach(q)
            raise

    def detach(self, queue_id: int) -> None:
        """Let the kernel give no more frames to a queue; waiting ones are lost."""
        self._attached.discard(queue_id)
        if not self._attached:
            self._group = None  # the kernel forgets it with its last socket
        fresh = self._open(receive=True)
        try:
            os.dup2(fresh.fileno(), self._rx[queue_id].fileno(), inheritable=False)
        finally:
            fresh.close()

    def mute(self, queue_id: int) -> None:
        """From now on, let the kernel throw away frames that come for a queue."""
        packet.mute(self._rx[queue_id])

    def bind_tx(self) -> None:
        """Let the transmit queues send to the present interface."""
        for sock in self._tx:
            packet.bind(sock, self._control.index, self._control.name, receive=False)

    def take_drops(self) -> dict[int, int]:
        """For each receive queue, the frames that found no room in it since the last call."""
        return {q: packet.get_drops(sock) for q, sock in enumerate(self._rx)}

    def join(self, wanted: set[Membership]) -> None:
        """Let the interface receive the `wanted` frames, and no others on our behalf."""
        control = self._control
        for membership in self._joined - wanted:
            with contextlib.suppress(DeviceGone):
                packet.drop_member(self._member, control.index, membership, control.name)
            self._joined.discard(membership)
        for membership in wanted - self._joined:
            packet.join_member(self._member, control.index, membership, control.name)
            self._joined.add(membership)

    def forget_members(self) -> None:
        """Forget the memberships: they went with the interface."""
        self._joined.clear()

    def close_queues(self) -> None:
        """Close all but the one that is never read. Idempotent."""
        for socks in (self._rx, self._tx):
            while socks:
                socks.pop().close()
        self._attached.clear()
        self._group = None

    def close(self) -> None:
        """Close all of them. Idempotent; in a forked child it closes the child's copies."""
        self.close_queues()
        self._member.close()
        _held.discard(self)
