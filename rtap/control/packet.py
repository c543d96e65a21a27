# SPDX-License-Identifier: BSD-3-Clause
"""All that rtap does with raw packet sockets (``packet(7)``, ``linux/if_packet.h``).

The functions take a socket and raise OSError through :func:`rtap.errors.raise_errno`; an interface
that is gone is a DeviceGone. They know nothing of devices and queues.
"""

from __future__ import annotations

import _socket  # not the module socket, which gevent and eventlet replace
import ctypes
import errno
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn

from rtap.errors import raise_errno

__all__ = [
    "MAX_FANOUT",
    "Member",
    "Membership",
    "bind",
    "drop_member",
    "get_drops",
    "join_fanout",
    "join_member",
    "mute",
    "open_socket",
    "set_buffers",
    "unmute",
]

_ETH_P_ALL = 0x0003

# linux/if_packet.h
_SOL_PACKET = 263
_ADD_MEMBERSHIP = 1
_DROP_MEMBERSHIP = 2
_STATISTICS = 6
_AUXDATA = 8
_VNET_HDR = 15
_FANOUT = 18
_QDISC_BYPASS = 20
_IGNORE_OUTGOING = 23
_FANOUT_HASH = 0
_FANOUT_FLAG_UNIQUEID = 0x2000
#: Sockets of one fan-out group, as the kernel limits them (PACKET_FANOUT_MAX before Linux 5.6).
MAX_FANOUT = 256

# asm-generic/socket.h
_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

_INT = struct.Struct("=i")
# struct packet_mreq: index, type, length of the address, address.
_MREQ = struct.Struct("=iHH8s")
# struct tpacket_stats: packets, drops.
_STATS = struct.Struct("=II")
# struct sockaddr_ll: family, protocol (network order), index, type of link, of packet, address.
_SOCKADDR_LL = struct.Struct("=H2siHBB8s")
# struct sock_filter: BPF_RET | BPF_K, 0, 0, 0: keep nothing of a frame.
_KEEP_NOTHING = struct.pack("=HBBI", 0x06, 0, 0, 0)

_libc = ctypes.CDLL(None, use_errno=True)


class Member(IntEnum):
    """``PACKET_MR_*``: frames that an interface receives besides those to its own address."""

    MULTICAST = 0
    PROMISC = 1
    ALLMULTI = 2
    UNICAST = 3


@dataclass(frozen=True)
class Membership:
    """One membership; `address` is empty if the kind needs none."""

    kind: Member
    address: bytes = b""


def _fail(exc: OSError, operation: str, ifname: str = "") -> NoReturn:
    raise_errno(exc.errno or errno.EIO, operation, ifname)


def _option(sock: _socket.socket, option: int, value: int, operation: str) -> None:
    try:
        sock.setsockopt(_SOL_PACKET, option, value)
    except OSError as exc:
        _fail(exc, operation)


def open_socket(*, vnet_hdr: bool = True, qdisc_bypass: bool = False) -> _socket.socket:
    """A raw packet socket that receives nothing before it is bound, close-on-exec and non-blocking.

    With `vnet_hdr` frames have a virtio-net header, and control data of received frames has the
    VLAN tag that was taken out. With `qdisc_bypass` frames go to the interface's driver at once.
    PermissionError without CAP_NET_RAW.
    """
    try:
        sock = _socket.socket(
            _socket.AF_PACKET,
            _socket.SOCK_RAW | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK,
            0,
        )
    except PermissionError as exc:
        raise PermissionError(
            exc.errno, "opening a raw packet socket takes CAP_NET_RAW, which this process lacks"
        ) from None
    try:
        _option(sock, _VNET_HDR, int(vnet_hdr), "PACKET_VNET_HDR")
        _option(sock, _AUXDATA, 1, "PACKET_AUXDATA")
        _option(sock, _IGNORE_OUTGOING, 1, "PACKET_IGNORE_OUTGOING (Linux 4.20)")
        if qdisc_bypass:
            _option(sock, _QDISC_BYPASS, 1, "PACKET_QDISC_BYPASS")
    except BaseException:
        sock.close()
        raise
    return sock


def set_buffers(sock: _socket.socket, rcvbuf: int | None, sndbuf: int | None) -> None:
    """Set the bytes that may wait in the socket; more than the system's limits needs
    CAP_NET_ADMIN."""
    for size, force, option in (
        (rcvbuf, _SO_RCVBUFFORCE, _socket.SO_RCVBUF),
        (sndbuf, _SO_SNDBUFFORCE, _socket.SO_SNDBUF),
    ):
        if size is None:
            continue
        try:
            sock.setsockopt(_socket.SOL_SOCKET, force, size)
        except PermissionError:
            sock.setsockopt(_socket.SOL_SOCKET, option, size)


def bind(sock: _socket.socket, index: int, ifname: str, *, receive: bool) -> None:
    """Let a socket send to interface `index`, and with `receive` get all frames that come in
    there."""
    protocol = struct.pack("!H", _ETH_P_ALL if receive else 0)
    address = _SOCKADDR_LL.pack(_socket.AF_PACKET, protocol, index, 0, 0, 0, b"")
    if _libc.bind(sock.fileno(), address, len(address)) < 0:
        raise_errno(ctypes.get_errno(), "bind a packet socket", ifname)


def join_fanout(sock: _socket.socket, group: int | None, ifname: str) -> int:
    """Share incoming frames, by flow, with the sockets of `group`; None makes one. Returns its
    number."""
    flags = _FANOUT_HASH | (_FANOUT_FLAG_UNIQUEID if group is None else 0)
    try:
        sock.setsockopt(_SOL_PACKET, _FANOUT, (group or 0) | flags << 16)
        return sock.getsockopt(_SOL_PACKET, _FANOUT) & 0xFFFF
    except OSError as exc:
        _fail(exc, "PACKET_FANOUT", ifname)


def mute(sock: _socket.socket) -> None:
    """Let the kernel throw away incoming frames, uncounted."""
    program = ctypes.create_string_buffer(_KEEP_NOTHING, len(_KEEP_NOTHING))
    sock.setsockopt(
        _socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program))
    )


def unmute(sock: _socket.socket) -> None:
    """Undo :func:`mute`."""
    sock.setsockopt(_socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _member(sock: _socket.socket, option: int, index: int, what: Membership, ifname: str) -> None:
    request = _MREQ.pack(index, what.kind, len(what.address), what.address)
    try:
        sock.setsockopt(_SOL_PACKET, option, request)
    except OSError as exc:
        _fail(exc, f"change which frames are received ({what.kind.name.lower()})", ifname)


def join_member(sock: _socket.socket, index: int, what: Membership, ifname: str) -> None:
    """Let interface `index` receive these frames too, until the socket drops that or is closed."""
    _member(sock, _ADD_MEMBERSHIP, index, what, ifname)


def drop_member(sock: _socket.socket, index: int, what: Membership, ifname: str) -> None:
    """Undo :func:`join_member`."""
    _member(sock, _DROP_MEMBERSHIP, index, what, ifname)


def get_drops(sock: _socket.socket) -> int:
    """Frames that found the socket's buffer full since the last call."""
    drops: int = _STATS.unpack(sock.getsockopt(_SOL_PACKET, _STATISTICS, _STATS.size))[1]
    return drops
