# SPDX-License-Identifier: BSD-3-Clause
"""The setup of the C driver's test suite: a port from device arguments, and its pool."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterator
from typing import Any

from flows import flow, flow_of
from support import PacketSocket, netdev

import rtap
from rtap import Burst, EthConf, EthDev, Mempool, NetNS

RING_SIZE = 256
IFNAME = "rtap_test0"


class Port:
    """A device, its pool and its namespace."""

    def __init__(self, ns: NetNS, dev: EthDev, pool: Mempool, engine: str) -> None:
        self.ns, self.dev, self.pool, self.engine = ns, dev, pool, engine

    def reconfigure(
        self,
        queues: int = 1,
        *,
        nb_desc: int = RING_SIZE,
        pool: Mempool | None = None,
        **conf: Any,
    ) -> None:
        """Stops the port if it runs, configures it again and starts it; `conf` goes to EthConf."""
        if self.dev.state == "started":
            self.dev.stop()
        self.dev.configure(queues, queues, EthConf(engine=self.engine, **conf))
        for q in range(queues):
            self.dev.tx_queue_setup(q, nb_desc)
            self.dev.rx_queue_setup(q, nb_desc, pool or self.pool)
        self.dev.start()

    @contextlib.contextmanager
    def kernel(self) -> Iterator[PacketSocket]:
        """A packet socket at the kernel's end of the port."""
        with PacketSocket(self.ns, self.dev.ifname, rcvbuf=1 << 22) as packets:
            yield packets

    def send(self, *frames: bytes, queue: int = 0) -> int:
        """Sends frames in one burst; returns how many were taken."""
        return self.dev.tx_burst(queue, self.pool.alloc_burst(len(frames), list(frames)))

    def receive(self, n: int, queue: int = 0) -> Burst:
        """The next `n` frames, fewer when five seconds pass without one."""
        got = Burst()
        while len(got) < n and (burst := self.dev.rx_burst(queue, n - len(got), 5)):
            got.extend(burst)
        return got

    def nothing_waits(self) -> bool:
        """Whether no queue has a frame."""
        return not any(self.dev.rx_burst(q) for q in range(self.dev.info().nb_rx_queues))

    def counters(self) -> dict[str, int]:
        """The kernel's counters."""
        return netdev(self.ns, self.dev.ifname)

    def flows_arrive(self, n: int = 64) -> None:
        """Checks that one frame of each of `n` flows is received exactly once, on any queue."""
        queues = self.dev.info().nb_rx_queues
        before = self.dev.stats()
        with PacketSocket(self.ns, self.dev.ifname, 0x0800) as packets:
            for number in range(n):
                packets.send(flow(number))
            got = [flow_of(bytes(m)) for q in range(queues) for m in self.dev.rx_burst(q, n)]
        assert sorted(got) == list(range(n))
        assert self.dev.stats().ipackets - before.ipackets == n


@contextlib.contextmanager
def port(ns: NetNS, engine: str, number: int = 0) -> Iterator[Port]:
    """``net_rtapN,iface=rtap_testN``, started with one queue pair."""
    with (
        Mempool(4096) as pool,
        ns.call(rtap.probe, f"net_rtap{number},iface=rtap_test{number}") as dev,
    ):
        made = Port(ns, dev, pool, engine)
        made.reconfigure()
        yield made


def readable(fd: int, timeout: float) -> bool:
    """Whether a descriptor becomes readable within the time-out."""
    return bool(select.select([fd], [], [], timeout)[0])
