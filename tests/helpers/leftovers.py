# SPDX-License-Identifier: BSD-3-Clause
"""Checks for leftovers (memory, descriptors, interfaces), and a short use of a device."""

from __future__ import annotations

import resource
import socket
from collections.abc import Mapping

from support import frame, none_left

from rtap import EthDev, NetNS
from rtap.ethdev import registry

MB = 1 << 20


def memory() -> tuple[int, int]:
    """Bytes of mapped and of resident memory in this process.

    Memory that is only reserved does not count: malloc reserves 64 MiB for a new thread now and
    then.
    """
    size = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, access, *_ = line.split()
            start, end = (int(address, 16) for address in span.split("-"))
            size += (end - start) * (access != "---p")
    with open("/proc/self/statm") as f:
        resident = int(f.read().split()[1]) * resource.getpagesize()
    return size, resident


def names(ns: NetNS) -> list[str]:
    """The names of all interfaces."""
    return [name for _, name in ns.call(socket.if_nameindex)]


def assert_nothing(ns: NetNS, descriptors: Mapping[int, str], *stays: str) -> None:
    """Fails if a device, a new descriptor, or an interface not named in ``stays`` is left."""
    assert names(ns) == ["lo", *stays]
    assert registry._devices == {}
    assert registry._ports == {}
    none_left(descriptors)


def use(dev: EthDev) -> None:
    """Sends and receives through each queue."""
    for q in range(dev.info().nb_rx_queues):
        assert dev.send(frame(), queue=q)
        dev.rx_burst(q)
