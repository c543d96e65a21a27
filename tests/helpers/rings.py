# SPDX-License-Identifier: BSD-3-Clause
"""Helpers for tests of single queues."""

from __future__ import annotations

import contextlib
import socket
import struct

from patience import patient

from rtap import Burst
from rtap._ring import RxQueue, TxQueue

#: Receive buffer of a packet socket that must not lose frames.
BIG = 64 << 20
#: Fields of a virtio-net header: the checksum flag, and the kind of super-frame.
NEEDS_CSUM, GSO_TCPV4 = 1, 1


class Ends:
    """Queues without a device."""

    def __init__(self, rx: RxQueue, tx: TxQueue) -> None:
        self.rx, self.tx = rx, tx

    def rx_queue(self, _number: int) -> RxQueue:
        return self.rx

    def tx_queue(self, _number: int) -> TxQueue:
        return self.tx


def header(flags: int, gso: int, size: int, start: int = 34, offset: int = 16) -> bytes:
    """A virtio-net header with any contents."""
    return struct.pack("<BBHHHH", flags, gso, 0, size, start, offset)


def send_all(tx: TxQueue, burst: Burst) -> None:
    while len(burst):
        assert tx.tx_burst(burst) > 0


def receive(rx: RxQueue, n: int, at_once: int = 64, timeout: float | None = None) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < n:
        burst = rx.rx_burst(at_once, patient(5) if timeout is None else timeout)
        if not len(burst):
            break
        got += [bytes(m) for m in burst]
    return got


def drained(peer: socket.socket) -> list[bytes]:
    """All frames that wait now in a non-blocking socket."""
    got = []
    with contextlib.suppress(BlockingIOError):
        while True:
            got.append(peer.recv(1 << 16))
    return got
