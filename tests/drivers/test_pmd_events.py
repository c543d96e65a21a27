# SPDX-License-Identifier: BSD-3-Clause
"""The case of the C driver's own suite about link state changes, under the same name.

When no event comes, the C suite reads the link state instead and goes on. Here the event must come.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pmd
import pytest
from pmd import Port
from support import frame, ip

import rtap
from rtap import EthDev, NetNS

pytestmark = pytest.mark.root

#: The kernel reports at most one lost carrier a second.
SOON = 10


@pytest.fixture
def port(netns: NetNS, engine: str) -> Iterator[Port]:
    with pmd.port(netns, engine) as made:
        yield made


def test_lsc_interrupt(port: Port) -> None:
    seen: queue.Queue[tuple[EthDev, rtap.EthEvent, bool, str]] = queue.Queue()

    def changed(dev: EthDev, event: rtap.EthEvent, data: object) -> None:
        # Like the C test's callback, read the link in the callback.
        seen.put((dev, event, dev.link().link_status, threading.current_thread().name))

    handle = port.dev.callback_register(rtap.EthEvent.INTR_LSC, changed)
    threads = set()
    assert port.dev.link().link_status
    for up in (False, True, False, True):
        (port.dev.set_link_up if up else port.dev.set_link_down)()
        dev, event, status, thread = seen.get(timeout=SOON)
        assert (dev, event, status) == (port.dev, rtap.EthEvent.INTR_LSC, up)
        assert port.dev.link().link_status is up
        threads.add(thread)
    # All callbacks run on one thread, which is not this one.
    assert len(threads) == 1
    assert threading.current_thread().name not in threads

    # Changes made by others count as well.
    for state, up in (("down", False), ("up", True)):
        ip(port.ns, "link", "set", port.dev.ifname, state)
        while seen.get(timeout=SOON)[2] is not up:
            pass

    handle.unregister()
    other: queue.Queue[bool] = queue.Queue()
    second = port.dev.callback_register(
        rtap.EthEvent.INTR_LSC, lambda dev, event, data: other.put(dev.link().link_status)
    )
    port.dev.set_link_down()
    while other.get(timeout=SOON):  # the event for the interface coming up may still arrive
        pass
    # An event for the first one would have come before.
    while not seen.empty():
        assert seen.get()[2]
    second.unregister()
    port.dev.set_link_up()
    with port.kernel() as kernel:
        kernel.send(frame(1))
        assert [bytes(m) for m in port.receive(1)] == [frame(1)]


def test_lsc_together_with_rxq_interrupt(port: Port) -> None:
    """The C driver supports only one of them at a time."""
    seen: queue.Queue[bool] = queue.Queue()
    handle = port.dev.callback_register(
        rtap.EthEvent.INTR_LSC, lambda dev, event, data: seen.put(dev.link().link_status)
    )
    port.dev.rx_queue_intr_enable(0)
    fd = port.dev.rx_queue_intr_fd(0)
    for _ in range(2):
        port.dev.set_link_down()
        assert seen.get(timeout=SOON) is False
        port.dev.set_link_up()
        assert seen.get(timeout=SOON) is True
        with port.kernel() as kernel:
            kernel.send(frame(1))
            assert pmd.readable(fd, 5)
            assert [bytes(m) for m in port.receive(1)] == [frame(1)]
            assert not pmd.readable(fd, 0)
    handle.unregister()
