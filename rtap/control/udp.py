# SPDX-License-Identifier: BSD-3-Clause
"""All that rtap sets and asks of UDP sockets (``udp(7)``, ``linux/udp.h``), and their addresses."""

from __future__ import annotations

import _socket  # not the module socket, which gevent and eventlet replace
import contextlib
import errno
import ipaddress
import struct
from dataclasses import dataclass
from typing import TypeAlias

from rtap.control.packet import set_buffers

__all__ = ["PMTU", "Address", "UdpOptions", "borrow_socket", "get_drops", "open_socket", "parse"]

#: A host, as text, and a port.
Address = tuple[str, int]

_SOL_UDP = 17
_UDP_SEGMENT = 103
_UDP_GRO = 104
_IP_MTU_DISCOVER = 10
_IPV6_MTU_DISCOVER = 23
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=9I")
_DROPS = 8

#: ``IP_PMTUDISC_*`` by name.
PMTU = {"dont": 0, "want": 1, "do": 2, "probe": 3, "interface": 4, "omit": 5}


@dataclass(frozen=True)
class UdpOptions:
    """Options of the sockets.

    ``rcvbuf`` and ``sndbuf`` are bytes that may wait in each. ``pmtu`` says what happens to
    datagrams above the path's MTU: with "do" and "probe" they are refused, with "dont", "want" and
    "omit" the kernel makes fragments; None leaves the system's setting.
    """

    rcvbuf: int = 8 << 20
    sndbuf: int = 4 << 20
    pmtu: str | None = None


def parse(text: str, what: str = "an address") -> Address:
    """``10.0.0.1:4789`` or ``[fd00::1]:4789`` as host and port; ``:4789`` for any host."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not (port.isascii() and port.isdigit()):
        raise ValueError(f"{what} is HOST:PORT or [HOST]:PORT, got {text!r}")
    return host or "::", int(port)


_IP: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
_Native: TypeAlias = "tuple[str, int] | tuple[str, int, int, int]"


def check(address: Address, what: str, *, least: int) -> _IP:
    """The host, if both are right; TypeError or ValueError names `what`."""
    if (
        not isinstance(address, tuple)
        or len(address) < 2
        or not isinstance(address[0], str)
        or not isinstance(address[1], int)
        or isinstance(address[1], bool)
    ):
        raise TypeError(f"{what} is a tuple of host and port, got {address!r}")
    if not least <= address[1] <= 65535:
        raise ValueError(f"{what}: a port is a number from {least} to 65535, got {address[1]}")
    try:
        return ipaddress.ip_address(address[0])
    except ValueError:
        raise ValueError(f"{what}: {address[0]!r} is no IPv4 or IPv6 address") from None


def _native(ip: _IP, port: int, family: int) -> _Native:
    if family == _socket.AF_INET:
        return str(ip), port
    if ip.version == 4:
        return f"::ffff:{ip}", port, 0, 0
    zone = ip.scope_id
    scope = 0
    if zone is not None:
        scope = int(zone) if zone.isdecimal() else _socket.if_nametoindex(zone)
    return str(ip).partition("%")[0], port, 0, scope


def family_of(local: Address | None, remote: Address | None) -> int:
    """AF_INET or AF_INET6; ValueError when the two do not go together."""
    versions = {
        check(address, what, least=least).version: what
        for address, what, least in ((local, "local", 0), (remote, "remote", 1))
        if address is not None
    }
    if versions.get(4) == "local" and 6 in versions:
        raise ValueError("local is of IPv4 and remote of IPv6")
    if remote is not None and (local is None or local[0] in ("::", "")):
        return _socket.AF_INET if 4 in versions else _socket.AF_INET6
    return _socket.AF_INET6 if 6 in versions or not versions else _socket.AF_INET


def open_socket(
    family: int,
    local: Address | None,
    remote: Address | None,
    options: UdpOptions,
    *,
    shared: bool,
) -> _socket.socket:
    """A bound socket in the thread's network namespace, connected to `remote` if there is one.
    With `shared`, others may have the same address (SO_REUSEPORT)."""
    sock = _socket.socket(family, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC, 0)
    try:
        if shared:
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEPORT, 1)
        if family == _socket.AF_INET6:
            sock.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 0)
        set_options(sock, options)
        if local is not None:
            host, port = local[:2]
            if family == _socket.AF_INET and host == "::":
                host = "0.0.0.0"
            sock.bind(_native(ipaddress.ip_address(host), port, family))
        if remote is not None:
            sock.connect(_native(ipaddress.ip_address(remote[0]), remote[1], family))
    except BaseException:
        sock.close()
        raise
    return sock


def set_options(sock: _socket.socket, options: UdpOptions) -> None:
    """Buffers, path MTU discovery, and UDP_GRO where the kernel has it (Linux 5.0)."""
    set_buffers(sock, options.rcvbuf, options.sndbuf)
    if options.pmtu is not None:
        value = PMTU[options.pmtu]
        sock.setsockopt(_socket.IPPROTO_IP, _IP_MTU_DISCOVER, value)
        if sock.family == _socket.AF_INET6:
            sock.setsockopt(_socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, value)
    with contextlib.suppress(OSError):
        sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)


def borrow_socket(sock: object) -> tuple[_socket.socket, bool]:
    """A duplicate of the caller's socket, and whether it is connected; ValueError unless it is a
    UDP socket."""
    fileno = getattr(sock, "fileno", None)
    if fileno is None:
        raise TypeError(f"sock is a socket, got {type(sock).__name__}")
    mine = _socket.socket(fileno=_socket.dup(fileno()))
    try:
        kind = mine.getsockopt(_socket.SOL_SOCKET, _socket.SO_TYPE)
        proto = mine.getsockopt(_socket.SOL_SOCKET, _socket.SO_PROTOCOL)
        if (
            mine.family not in (_socket.AF_INET, _socket.AF_INET6)
            or kind != _socket.SOCK_DGRAM
            or proto != _socket.IPPROTO_UDP
        ):
            raise ValueError("sock must be a UDP socket of IPv4 or IPv6")
        with contextlib.suppress(OSError):
            mine.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        try:
            mine.getpeername()
        except OSError as exc:
            if exc.errno != errno.ENOTCONN:
                raise
            return mine, False
    except BaseException:
        mine.close()
        raise
    return mine, True


def get_drops(sock: _socket.socket) -> int:
    """How many datagrams the kernel has dropped because the socket's buffer was full (SO_MEMINFO),
    modulo 2**32."""
    try:
        found = sock.getsockopt(_socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
    except OSError:
        return 0
    return int(_MEMINFO.unpack(found)[_DROPS]) if len(found) == _MEMINFO.size else 0
