# SPDX-License-Identifier: BSD-3-Clause
"""Frames that wait in the kernel at a stop are counted at the next start, configure or close."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flows import flow
from support import BROADCAST, PacketSocket, Tap, frame, netdev

import rtap
from rtap import EthConf, EthDev, Mempool, NetNS, RxOffload
from rtap.control import tun

pytestmark = pytest.mark.root

PLAIN = EthConf()
HEADERS = EthConf(rx_offloads=RxOffload.CHECKSUM)
#: Frames of different flows.
FRAMES = 40


def purged(dev: EthDev) -> int:
    """The purged packets of the queues and of the device."""
    return sum(n for name, n in dev.xstats().items() if name.endswith("purged_packets"))


def begin(dev: EthDev, queues: int, conf: EthConf, pool: Mempool) -> None:
    dev.configure(queues, queues, conf)
    for q in range(queues):
        dev.rx_queue_setup(q, 64, pool)
        dev.tx_queue_setup(q, 64)
    dev.start()


@pytest.fixture
def pool() -> Mempool:
    return Mempool(256, 70_000)


@pytest.fixture
def dev(netns: NetNS, engine: str) -> Iterator[EthDev]:
    with rtap.open("t0", netns=netns, engine=engine, queues=4) as device:
        yield device


@pytest.fixture
def fill(netns: NetNS, dev: EthDev) -> Iterator[Callable[[], None]]:
    """Sends frames that stay unread."""
    with PacketSocket(netns, "t0", 0x0800) as packets:

        def send() -> None:
            for port in range(FRAMES):
                packets.send(flow(port, dst=BROADCAST))

        yield send


def test_frames_wait_in_several_queues(dev: EthDev, fill: Callable[[], None]) -> None:
    """The other tests rely on this."""
    fill()
    assert sum(len(dev.rx_burst(q, 64)) > 0 for q in range(4)) > 1


@pytest.mark.parametrize("then", [PLAIN, HEADERS], ids=["plain", "headers"])
@pytest.mark.parametrize("conf", [PLAIN, HEADERS], ids=["from plain", "from headers"])
@pytest.mark.parametrize("queues", [(4, 4), (4, 1), (1, 4), (3, 2), (1, 1)], ids=str)
def test_configured_anew(
    dev: EthDev,
    fill: Callable[[], None],
    netns: NetNS,
    pool: Mempool,
    queues: tuple[int, int],
    conf: EthConf,
    then: EthConf,
) -> None:
    """Other offloads reopen all descriptors; fewer queues close some."""
    dev.stop()
    begin(dev, queues[0], conf, pool)
    before = netdev(netns, "t0")["tx_packets"]
    fill()
    received = sum(len(dev.rx_burst(q, 3)) for q in range(queues[0]))
    dev.stop()
    assert dev.stats().ipackets == received > 0
    assert purged(dev) == 0
    begin(dev, queues[1], then, pool)
    assert purged(dev) == FRAMES - received
    assert netdev(netns, "t0")["tx_packets"] - before == FRAMES
    if conf is not then:
        assert dev.xstats()["purged_packets"] == FRAMES - received
    dev.xstats_reset()
    assert purged(dev) == 0


def test_a_queue_released_before(dev: EthDev, fill: Callable[[], None]) -> None:
    fill()
    dev.stop()
    for q in range(4):
        dev.rx_queue_release(q)
    dev.configure(1, 1, HEADERS)
    assert dev.xstats()["purged_packets"] == FRAMES


def test_a_queue_set_up_anew(dev: EthDev, fill: Callable[[], None], pool: Mempool) -> None:
    fill()
    dev.stop()
    for q in range(4):
        dev.rx_queue_setup(q, 64, pool)
    dev.start()
    assert purged(dev) == FRAMES


def test_configuring_that_fails_halfway(
    dev: EthDev, fill: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames in descriptors closed before the failure are counted."""
    fill()
    dev.stop()

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(tun, "set_sndbuf", refuse)
        patch.setattr(tun, "set_carrier", refuse)
        with pytest.raises(OSError, match="refused"):
            dev.configure(1, 1, HEADERS)
    dev.configure(1, 1, PLAIN)
    assert dev.xstats()["purged_packets"] == FRAMES


def test_closed(dev: EthDev, fill: Callable[[], None]) -> None:
    """The queue objects keep the count."""
    fill()
    received = sum(len(dev.rx_burst(q, 2)) for q in range(4))
    queues: list[Any] = [dev.rx_queue(q) for q in range(4)]
    dev.close()
    assert sum(q.xcounters()["purged_packets"] for q in queues) == FRAMES - received


def test_closed_on_a_descriptor_of_somebody_elses(netns: NetNS, engine: str) -> None:
    """Frames that wait there stay for the other owner."""
    with Tap(netns, "t0") as tap:
        dev = rtap.open(fd=tap.fd, engine=engine)
        queue: Any = dev.rx_queue(0)
        tap.packets().send(frame(1))
        dev.close()
        assert queue.xcounters()["purged_packets"] == 0
        assert os.read(tap.fd, 2048)[-64:] == frame(1)
