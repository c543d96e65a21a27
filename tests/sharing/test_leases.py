# SPDX-License-Identifier: BSD-3-Clause
"""Processes that are killed at random moments, under traffic: their pairs are free again,
and nobody else notices. make soak does it five hundred times."""

from __future__ import annotations

import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from flows import flow
from patience import patient
from sharing import MakeProcess, Process, no_leases, sockets_left
from support import (
    PacketSocket,
    eventually,
    frame,
    links,
    netdev,
    none_left,
    open_fds,
    running_threads,
    threads_end,
)

import rtap
from rtap import DeviceGone, EthDev, NetNS
from rtap.sharing import server

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("runtime_dir")]

#: Seconds within which a pair is free, on a machine with nothing else to do.
FREE_S = 0.1

#: In a process that is to take a pair from one that is killed: when it has it.
TAKE = """
import time
def take(name, queues, seconds):
    until = time.monotonic() + seconds
    while True:
        try:
            dev = rtap.attach(name, queues)
            return dev, time.monotonic()
        except rtap.DeviceStateError:
            if time.monotonic() > until:
                raise
            time.sleep(0.0005)
"""

#: What processes do on the pair `queue` while they are killed.
WORK = {
    "worker": "worker = rtap.Worker(); worker.forward((dev, queue), (dev, queue)); worker.start()",
    "bursts": """
import threading
def work():
    while True:
        burst = dev.rx_burst(queue, 64, 0.002)
        dev.tx_burst(queue, burst)
        burst.free()
threading.Thread(target=work, daemon=True).start()
""",
    "requests": """
import threading
def work():
    while True:
        dev.stats()
        dev.mtu = 1400
        dev.mtu = 1500
threading.Thread(target=work, daemon=True).start()
""",
    "waits": """
import threading
threading.Thread(target=lambda: dev.rx_burst(queue, 64, None), daemon=True).start()
""",
}

#: In a process that must not notice: a thread that sends, and the longest time between two frames.
SENDS = """
import threading, time
sent, longest, running = 0, 0.0, True
def send():
    global sent, longest
    last = time.monotonic()
    while running:
        if dev.send(data, queue=queue):
            sent += 1
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        time.sleep(0.001)
sender = threading.Thread(target=send, daemon=True)
sender.start()
"""


@contextmanager
def noise(packets: PacketSocket) -> Iterator[None]:
    """The kernel sends frames of many flows, a few hundred thousand a second at most."""
    stop = threading.Event()
    data = [flow(n) for n in range(64)]

    def send() -> None:
        while not stop.wait(0.002):
            for one in data:
                packets.send(one)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def moves(read: Callable[[], int], what: str) -> None:
    before = read()
    eventually(lambda: read() > before, f"{what} goes on", 20)


def killed(
    dev: EthDev, share: rtap.Share, process: MakeProcess, kills: int, chance: random.Random
) -> list[float]:
    """The seconds until another process had the pair of each of so many that were killed."""
    took = []
    victims: dict[int, Process] = {}
    for _ in range(kills):
        queue = chance.choice((2, 3))
        rival = process()
        rival(TAKE)
        if queue in victims:
            victim = victims.pop(queue)
            time.sleep(chance.random() * 0.02)
            began = time.monotonic()
            victim.kill()
        else:
            began = time.monotonic()
        rival.begin(
            "dev, when = take(name, queues, seconds)\nwhen",
            name=dev.name,
            queues=[queue],
            seconds=patient(20),
        )
        took.append(rival.result() - began)
        assert share.leases[queue].pid == rival.pid
        rival(chance.choice(list(WORK.values())), queue=queue)
        victims[queue] = rival
    for victim in victims.values():
        victim.kill()
    return took


@pytest.mark.parametrize("kills", [30, pytest.param(500, marks=pytest.mark.soak)])
def test_killed_borrowers(
    netns: NetNS, process: MakeProcess, kills: int, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(kills)
    with (
        rtap.open("tap0", netns=netns, queues=4) as dev,
        PacketSocket(netns, "tap0", 0x0800) as packets,
    ):
        before = open_fds()
        worker = rtap.Worker()
        with rtap.share(dev, [1, 2, 3]) as share:
            threads = running_threads()
            stable = process().attach(dev.name, [1])
            stable(SENDS, queue=1, data=frame(1))
            worker.forward((dev, 0), (dev, 0))
            worker.start()
            with noise(packets):
                took = killed(dev, share, process, kills, chance)
                moves(lambda: int(stable("sent")), "the process that was left alone")
                moves(lambda: worker.stats().routes[0].rx_packets, "the first process")
            eventually(lambda: sorted(share.leases) == [1], "the pairs are free")
            stable("running = False; sender.join()")
            assert stable("longest") < patient(5)
            worker.stop()
            packets.drain()
            kernel, stats = netdev(netns, "tap0"), dev.stats()
            xstats = dev.xstats()
            purged = sum(n for name, n in xstats.items() if name.endswith("purged_packets"))
            # A process that is killed in a burst has not counted it.
            unknown = kernel["tx_packets"] - stats.ipackets - purged
            assert 0 <= unknown <= 64 * (kills + 1)
            assert 0 <= kernel["rx_packets"] - stats.opackets <= 64 * (kills + 1)
            stable.kill()
            no_leases(share)
            threads_end(threads)
        none_left(before, but=1)  # the worker's ring waits for the next thread
        assert sockets_left() == []
        for n in range(4):
            dev.rx_burst(n)
    assert links(netns) == ["lo"]
    record_property("median_ms", round(1000 * statistics.median(took), 1))
    record_property("longest_ms", round(1000 * max(took), 1))
    print(
        f"{kills} kills: free and attached again after {1000 * statistics.median(took):.1f} ms "
        f"(median), {1000 * max(took):.1f} ms (longest)"
    )
    if kills >= 500:
        assert statistics.median(took) < patient(FREE_S)


@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.soak)])
def test_killed_as_they_attach(netns: NetNS, process: MakeProcess, kills: int) -> None:
    """At any moment of attach(), lease or close()."""
    chance = random.Random(kills)
    with rtap.open("tap0", netns=netns, queues=2) as dev, rtap.share(dev) as share:
        process().attach(dev.name).kill()
        no_leases(share)
        before = open_fds()
        for _ in range(kills):
            other = process()
            other.begin(
                "while True:\n"
                "    with rtap.attach(name) as dev:\n"
                "        dev.send(b'x' * 60, queue=0)\n"
                "        dev.rx_burst(1)",
                name=dev.name,
            )
            time.sleep(chance.random() * 0.05)
            other.kill()
        no_leases(share)
        none_left(before)
        last = process().attach(dev.name, [0, 1])
        last("dev.rx_burst(0)")


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.soak)])
def test_killed_owners(netns: NetNS, process: MakeProcess, kills: int) -> None:
    """The next process shares under the same name at once, and the interface goes."""
    chance = random.Random(kills)
    other = process()
    for n in range(kills):
        owner, present = process(), f"tap{n}"
        # The interface of the one before goes as soon as its borrower has noticed.
        owner(
            "dev = rtap.open(ifname, netns=path, queues=2)\n"
            "share = rtap.share(dev, [0, 1], name='uplink')",
            path=netns.path,
            ifname=present,
        )
        if n:
            with pytest.raises(DeviceGone):
                other.result()
            eventually(lambda: len(links(netns)) == 2, "the interface before it is gone")
            other("dev.close()")
        other.attach("uplink", [0, 1])
        other.begin("while True: dev.tx_burst(1, dev.rx_burst(0, 64, 0.01))")
        time.sleep(chance.random() * 0.02)
        owner.kill()
    with pytest.raises(DeviceGone):
        other.result()
    eventually(lambda: links(netns) == ["lo"], "the interfaces are gone")
    # The last one left its socket; whoever looks for it removes it.
    assert sockets_left() == ["uplink"]
    with pytest.raises(FileNotFoundError):
        process().attach("uplink")
    assert sockets_left() == []


def test_stopped_borrower_keeps_its_pair(netns: NetNS, process: MakeProcess) -> None:
    """SIGSTOP is no end; others are not held up by it, and its connection stays."""
    with rtap.open("tap0", netns=netns, queues=3) as dev, rtap.share(dev, [1, 2]) as share:
        still = process().attach(dev.name, [1])
        still.signal(signal.SIGSTOP)
        other = process().attach(dev.name, [2])
        for mtu in range(1300, 1320):
            dev.mtu = mtu
            assert other("dev.mtu") == mtu
        assert sorted(share.leases) == [1, 2]
        still.signal(signal.SIGCONT)
        eventually(lambda: bool(still("dev._ops.terms.mtu") == 1319), "it has heard the news")
        still("dev.rx_burst(1)")


def test_slow_borrower_gets_the_last_news(netns: NetNS, process: MakeProcess) -> None:
    """However many there were: another process that changes settings all the time costs it
    nothing."""
    with rtap.open("tap0", netns=netns, queues=3) as dev, rtap.share(dev, [1, 2]) as share:
        still = process().attach(dev.name, [1])
        still(
            "heard = []\n"
            "handle = dev.callback_register(rtap.EthEvent.MTU,"
            " lambda dev, event, data: heard.append(data))"
        )
        still.signal(signal.SIGSTOP)
        (client,) = share._server.clients()
        changes = 0
        while not client.behind or changes % 100:
            dev.mtu = 1300 + changes % 100
            changes += 1
            assert changes < 20_000
        assert len(client._kept) <= 2
        still.signal(signal.SIGCONT)
        eventually(lambda: bool(still("dev._ops.terms.mtu") == 1399), "it knows the last state")
        eventually(lambda: bool(still("heard[-1:] == [1399]")), "it hears the last event")
        assert sorted(share.leases) == [1]
        still("dev.rx_burst(1)")


def test_borrower_that_never_reads_loses_its_pair(
    netns: NetNS, process: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process does not wait for it, and keeps its connection for some seconds only."""
    monkeypatch.setattr(server, "BEHIND_S", 0.5)
    with rtap.open("tap0", netns=netns, queues=3) as dev, rtap.share(dev, [1, 2]) as share:
        still = process().attach(dev.name, [1])
        still.signal(signal.SIGSTOP)

        def told() -> bool:
            dev.mtu = 1301 if dev.mtu == 1300 else 1300
            return not share.leases

        eventually(told, "its connection is full", 60)
        process().attach(dev.name, [1])
        still.signal(signal.SIGCONT)
        eventually(lambda: bool(still("dev._ops._connection.lost")), "it knows")
        with pytest.raises(DeviceGone):
            still("dev.rx_burst(1)")
