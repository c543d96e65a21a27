# SPDX-License-Identifier: BSD-3-Clause
"""veth pairs in a test's own namespaces, and net_af_packet devices on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
from support import eventually, ip, link
from this_kernel import kernel

import rtap
from rtap import EthConf, EthDev, Mempool, NetNS

_numbers = itertools.count()


def veth(ns: NetNS, name: str, peer: str, to: NetNS | None = None, **options: Any) -> None:
    """A pair with both ends up, the peer in namespace `to` if given; both get `options`."""
    extra = [word for key, value in options.items() for word in (key, str(value))]
    there = ["netns", to.path] if to is not None else []
    ip(ns, "link", "add", name, *extra, "type", "veth", "peer", "name", peer, *extra, *there)
    for where, end in ((ns, name), (to or ns, peer)):
        ip(where, "link", "set", end, "multicast", "off", "up")
    await_link((ns, name), (to or ns, peer))


def await_link(*ends: tuple[NetNS, str]) -> None:
    """Waits until the kernel has handled carrier changes; until then it drops sent frames."""

    def ready(ns: NetNS, name: str) -> bool:
        state = link(ns, name)
        return state["operstate"] == "UP" and state["qdisc"] != "noop"

    for ns, name in ends:
        eventually(partial(ready, ns, name), f"{name} is up", 20)


def device(ns: NetNS, iface: str, *args: str) -> EthDev:
    """An unconfigured device on an interface of a namespace."""
    return ns.call(
        rtap.probe, ",".join((f"net_af_packet{next(_numbers)}", f"iface={iface}", *args))
    )


def start(
    dev: EthDev,
    *,
    queues: int = 1,
    nb_mbufs: int = 4096,
    data_room: int = 2048,
    nb_desc: int = 64,
    **conf: Any,
) -> EthDev:
    """Configures the device, sets up its queues with a pool for them, and starts it."""
    dev.configure(queues, queues, EthConf(**conf))
    pool = Mempool(nb_mbufs, data_room)
    for q in range(queues):
        dev.rx_queue_setup(q, nb_desc, pool)
        dev.tx_queue_setup(q, nb_desc)
    dev.start()
    return dev


@contextmanager
def started(ns: NetNS, iface: str, *args: str, **options: Any) -> Iterator[EthDev]:
    """A started device on an interface; options as for :func:`start`."""
    with device(ns, iface, *args) as dev:
        yield start(dev, **options)


@contextmanager
def pair(ns: NetNS, *args: str, **options: Any) -> Iterator[tuple[EthDev, EthDev]]:
    """Devices on both ends of a veth pair, v0 and v1."""
    veth(ns, "v0", "v1")
    with ExitStack() as stack:
        a, b = (stack.enter_context(started(ns, name, *args, **options)) for name in ("v0", "v1"))
        yield a, b


def promiscuity(ns: NetNS, iface: str) -> int:
    """How many users hold an interface promiscuous."""
    number: int = link(ns, iface)["promiscuity"]
    return number


def modes(ns: NetNS, iface: str) -> tuple[int, int]:
    """How many users hold an interface promiscuous, and in allmulticast mode."""
    state = link(ns, iface)
    if "allmulti" not in state and kernel() < (6, 0):
        pytest.skip("needs Linux 6.0: before it the kernel does not tell of allmulticast mode")
    return state["promiscuity"], state["allmulti"]
