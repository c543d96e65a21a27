# SPDX-License-Identifier: BSD-3-Clause
"""Sockets of the kernel's in a test's namespace, and UDP devices beside them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from patience import patient
from support import ip

from rtap import Burst, EthDev, NetNS

#: A host's own address, and the first port of tests.
HERE, PORT = "127.0.0.1", 5000


def with_loopback(ns: NetNS) -> NetNS:
    """The namespace, whose loopback interface is up from now on."""
    ip(ns, "link", "set", "lo", "up")
    return ns


@contextmanager
def plain(ns: NetNS, address: Any = (HERE, 0), family: int = socket.AF_INET) -> Iterator[Any]:
    """A UDP socket of the kernel's."""

    def make() -> socket.socket:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
        sock.bind(address)
        sock.settimeout(patient(5))
        return sock

    with ns.call(make) as sock:
        yield sock


def take(dev: EthDev, n: int, queue: int = 0) -> Burst:
    """``n`` datagrams, as they come."""
    got = Burst()
    until = time.monotonic() + patient(5)
    while len(got) < n:
        if time.monotonic() > until:
            pytest.fail(f"{len(got)} of {n} datagrams have come, {counts(dev)}")
        got.extend(list(dev.rx_burst(queue, n - len(got), 0.05)))
    return got


def send_all(dev: EthDev, burst: Burst, queue: int = 0) -> None:
    """Sends until all frames are consumed."""
    until = time.monotonic() + patient(5)
    while len(burst):
        if time.monotonic() > until:
            pytest.fail(f"{len(burst)} datagrams are left, {counts(dev)}")
        dev.tx_burst(queue, burst)


def counts(dev: EthDev) -> dict[str, int]:
    """What the device has counted, without sizes."""
    return {name: n for name, n in dev.xstats().items() if n and "_size_" not in name}
