# SPDX-License-Identifier: BSD-3-Clause
"""The figures of a device are the sum over all processes that use it, as the kernel's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from flows import flow, flow_of
from sharing import MakeProcess, Process, no_leases
from support import PacketSocket, eventually, frame, netdev

import rtap
from rtap import EthDev, NetNS

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("runtime_dir")]

FLOWS = 256
ROUNDS = 20


@contextmanager
def device(ns: NetNS, queues: int) -> Iterator[EthDev]:
    with rtap.open("tap0", netns=ns, queues=queues, txqueuelen=20_000) as dev:
        yield dev


def echoes(other: Process) -> None:
    """A worker sends back what it receives on each pair of the process."""
    other(
        "worker = rtap.Worker()\n"
        "for queue in dev.queues:\n"
        "    worker.forward((dev, queue), (dev, queue))\n"
        "worker.start()"
    )


def purged(dev: EthDev) -> int:
    return sum(n for name, n in dev.xstats().items() if name.endswith("purged_packets"))


def agrees(ns: NetNS, dev: EthDev, lost: int = 0) -> bool:
    """Whether the device's figures are the kernel's; up to `lost` frames may have been read by
    processes that were killed before they counted them."""
    kernel, stats = netdev(ns, "tap0"), dev.stats()
    read = stats.ipackets + stats.ierrors + purged(dev)
    return (
        0 <= kernel["tx_packets"] - read <= lost
        and 0 <= kernel["rx_packets"] - stats.opackets <= lost
        and stats.imissed == kernel["tx_dropped"]
    )


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_flows_over_many_processes(netns: NetNS, process: MakeProcess, processes: int) -> None:
    with (
        device(netns, processes) as dev,
        rtap.share(dev) as share,
        PacketSocket(netns, "tap0", 0x0800, rcvbuf=1 << 24) as packets,
    ):
        others = [process().attach(dev.name, [q]) for q in range(processes)]
        for other in others:
            echoes(other)
        back: list[int] = []
        for _ in range(ROUNDS):
            for n in range(FLOWS):
                packets.send(flow(n))
            back += map(flow_of, packets.frames(FLOWS))
        assert sorted(back) == sorted(list(range(FLOWS)) * ROUNDS)
        # Each flow stays with one process, and each process has some.
        own = [other("dev.rx_queue(dev.queues[0]).counters()['packets']") for other in others]
        assert sum(own) == FLOWS * ROUNDS
        assert all(own)
        eventually(lambda: agrees(netns, dev), "the device's figures are the kernel's")
        stats = dev.stats()
        assert stats.ipackets == stats.opackets == FLOWS * ROUNDS
        assert stats.q_ipackets == stats.q_opackets == own
        assert (stats.ierrors, stats.oerrors, stats.imissed, stats.rx_nombuf) == (0, 0, 0, 0)
        assert stats.ibytes == stats.obytes == FLOWS * ROUNDS * len(flow(0))
        # Everybody is told the same, and it stays when they are killed.
        assert others[0]("vars(dev.stats())") == vars(stats)
        for other in others:
            other.kill()
        no_leases(share)
        assert dev.stats() == stats
        assert agrees(netns, dev)


def test_counts_of_killed_processes_stay(netns: NetNS, process: MakeProcess) -> None:
    with (
        device(netns, 2) as dev,
        rtap.share(dev, [1]) as share,
        PacketSocket(netns, "tap0") as packets,
    ):
        for n in range(1, 6):
            other = process().attach(dev.name, [1])
            for _ in range(10):
                assert other("dev.send(data, queue=1)", data=frame(n))
            assert dev.stats().q_opackets == [0, 10 * n]
            # While the process lives, and afterwards.
            assert dev.xstats()["tx_q1_size_64_packets"] == 10 * n
            other.kill()
            no_leases(share)
            assert dev.stats().q_opackets == [0, 10 * n]
            # A new one begins at nothing, in its own eyes.
            assert len(packets.frames(10)) == 10
        late = process().attach(dev.name, [1])
        assert late("dev.tx_queue(1).counters()['packets'], dev.stats().q_opackets") == [
            *(0, [0, 50])
        ]


def test_reset(netns: NetNS, process: MakeProcess) -> None:
    with device(netns, 2) as dev, rtap.share(dev, [1]) as share:
        other = process().attach(dev.name, [1])
        send = "[dev.send(data, queue=1) for _ in range(5)] and None"
        other(send, data=frame(1))
        dev.stats_reset()
        assert dev.stats().opackets == other("dev.stats().opackets") == 0
        other(send, data=frame(1))
        assert dev.stats().opackets == other("dev.stats().opackets") == 5
        other("dev.stats_reset()")
        assert dev.stats().opackets == 0
        other("dev.xstats_reset()")
        assert not any(dev.xstats().values())
        other(send, data=frame(1))
        assert dev.stats().opackets == 5
        assert dev.xstats()["tx_q1_size_64_packets"] == 5
        other.kill()
        no_leases(share)
        assert dev.stats().opackets == 5
        dev.stats_reset()
        assert dev.stats().opackets == 0


def test_waiting_frames_of_a_killed_process_are_counted(netns: NetNS, process: MakeProcess) -> None:
    with (
        device(netns, 1) as dev,
        rtap.share(dev) as share,
        PacketSocket(netns, "tap0") as packets,
    ):
        for n in range(1, 4):
            other = process().attach(dev.name, [0])
            for _ in range(30):
                packets.send(frame(1))
            other.kill()
            no_leases(share)
            assert purged(dev) == 30 * n
            assert dev.stats().ipackets == 0
        assert agrees(netns, dev)


def test_drops_have_names(netns: NetNS, process: MakeProcess) -> None:
    """Frames that nobody reads in time are missed; those without buffers wait."""
    with (
        rtap.open("tap0", netns=netns, queues=1, txqueuelen=50) as dev,
        rtap.share(dev),
        PacketSocket(netns, "tap0") as packets,
    ):
        other = process()
        other("pool = rtap.Mempool(20)")
        other("dev = rtap.attach(name, [0], pool=pool)", name=dev.name)
        for _ in range(80):
            packets.send(frame(1))
        eventually(lambda: dev.stats().imissed == 30, "30 are missed")
        assert other("held = dev.rx_burst(0, 64); len(held)") == 20
        assert other("len(dev.rx_burst(0, 64))") == 0
        eventually(lambda: dev.stats().rx_nombuf > 0, "there were no buffers")
        assert other("held.free(); n = 0\nwhile n < 30: n += len(dev.rx_burst(0, 64))\nn") == 30
        stats = dev.stats()
        assert (stats.ipackets, stats.imissed) == (50, 30)
        assert agrees(netns, dev)
