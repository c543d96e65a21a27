# SPDX-License-Identifier: BSD-3-Clause
"""The kernel's side of the wire fuzzer's devices: packet sockets and interface counters."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Iterator, Sequence

from wire_frames import Template

from rtap import NetNS

ETH_P_ALL = 3
SOL_PACKET, PACKET_STATISTICS, PACKET_VNET_HDR = 263, 6, 15  # linux/if_packet.h
PACKET_IGNORE_OUTGOING = 23
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
BUFFER = 512 << 20
#: struct mmsghdr: name, its length, iovec, how many, control, its length, flags; bytes moved.
MMSGHDR = struct.Struct("QI4xQQQQi4xI4x")
IOVEC = struct.Struct("QQ")
SOCKADDR_LL = struct.Struct("HHiHBB8s")
DEPTH, LONGEST = 64, 70_000

_libc = ctypes.CDLL(None, use_errno=True)


def packet_socket(ns: NetNS, ifname: str, protocol: int, vnet: bool) -> socket.socket:
    def made() -> socket.socket:
        s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        s.setsockopt(SOL_PACKET, PACKET_VNET_HDR, int(vnet))
        s.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        s.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER)
        s.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        s.bind((ifname, protocol))
        s.setblocking(False)
        return s

    return ns.call(made)


class Volley:
    """Frames that a packet socket sends in one or a few system calls."""

    def __init__(self, templates: Sequence[Template], index: int, vnet: bool, l2: bool) -> None:
        self.frames = [t.data for t in templates]
        heads = [t.header.pack() if vnet else b"" for t in templates]
        bytes_ = b"".join(h + f for h, f in zip(heads, self.frames, strict=True))
        self._bytes = ctypes.create_string_buffer(bytes_, len(bytes_) + 1)
        self.n = len(templates)
        names, iovecs, headers = b"", b"", b""
        for frame in self.frames:
            kind = {4: 0x0800, 6: 0x86DD}.get(frame[0] >> 4, 0x88B5)
            names += SOCKADDR_LL.pack(
                socket.AF_PACKET, socket.htons(kind), index, 0, 0, 0, bytes(8)
            )
        self._names = ctypes.create_string_buffer(names)
        at = ctypes.addressof(self._bytes)
        for head, frame in zip(heads, self.frames, strict=True):
            iovecs += IOVEC.pack(at, len(head) + len(frame))
            at += len(head) + len(frame)
        self._iovecs = ctypes.create_string_buffer(iovecs)
        for n in range(self.n):
            name = 0 if l2 else ctypes.addressof(self._names) + n * SOCKADDR_LL.size
            iovec = ctypes.addressof(self._iovecs) + n * IOVEC.size
            headers += MMSGHDR.pack(name, 20 if name else 0, iovec, 1, 0, 0, 0, 0)
        self._headers = ctypes.create_string_buffer(headers)

    def fire(self, s: socket.socket) -> int:
        """Send all frames; return how many the kernel accepted, including those it then dropped."""
        took = at = 0
        while at < self.n:
            where = ctypes.addressof(self._headers) + at * MMSGHDR.size
            done = _libc.sendmmsg(s.fileno(), ctypes.c_void_p(where), self.n - at, 0x40)
            if done > 0:
                took += done
                at += done
                continue
            code = ctypes.get_errno()
            if code == errno.ENOBUFS:  # the device's queue is full
                took += 1
            elif code not in (errno.EINVAL, errno.EMSGSIZE, errno.EAGAIN, errno.ENETDOWN,
                              errno.ENXIO, errno.ENODEV):  # fmt: skip
                raise OSError(code, "sendmmsg")
            at += 1
        return took


class Sink:
    """Reads what an interface received from its device, with virtio-net headers."""

    def __init__(self, ns: NetNS, ifname: str) -> None:
        self.socket = packet_socket(ns, ifname, ETH_P_ALL, vnet=True)
        self._room = ctypes.create_string_buffer(DEPTH * LONGEST)
        base = ctypes.addressof(self._room)
        iovecs = b"".join(IOVEC.pack(base + n * LONGEST, LONGEST) for n in range(DEPTH))
        self._iovecs = ctypes.create_string_buffer(iovecs)
        first = ctypes.addressof(self._iovecs)
        fresh = [MMSGHDR.pack(0, 0, first + n * IOVEC.size, 1, 0, 0, 0, 0) for n in range(DEPTH)]
        self._fresh = b"".join(fresh)
        self._headers = ctypes.create_string_buffer(self._fresh)
        self._view = memoryview(self._room).cast("B")
        #: Frames that reached the socket and that :meth:`frames` could not return.
        self.lost = 0

    def frames(self) -> Iterator[bytes]:
        """The frames that wait now, each behind its header."""
        while True:
            ctypes.memmove(self._headers, self._fresh, len(self._fresh))
            n = _libc.recvmmsg(self.socket.fileno(), self._headers, DEPTH, 0x40, None)
            if n < 0:
                code = ctypes.get_errno()
                if code == errno.EINVAL:  # a super-frame that no header describes
                    self.lost += 1
                    continue
                if code == errno.ENETDOWN:
                    continue
                break
            for i in range(n):
                size = MMSGHDR.unpack_from(self._headers, i * MMSGHDR.size)[-1]
                yield bytes(self._view[i * LONGEST : i * LONGEST + size])
        raw = self.socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        self.lost += struct.unpack("II", raw)[1]

    def close(self) -> None:
        self.socket.close()


def counters(ns: NetNS, ifname: str) -> dict[str, int]:
    """The kernel's counters of an interface; frames that rtap sends count as ``rx_packets``."""

    def read() -> str:
        with open("/proc/thread-self/net/dev") as f:
            return f.read()

    for line in ns.call(read).splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == ifname:
            n = [int(value) for value in rest.split()]
            return {"rx_packets": n[1], "rx_dropped": n[3], "tx_packets": n[9], "tx_dropped": n[11]}
    raise OSError(errno.ENODEV, f"no interface {ifname}")
