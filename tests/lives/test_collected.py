# SPDX-License-Identifier: BSD-3-Clause
"""Devices that the garbage collector finds in a cycle, with all their objects."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
from typing import Any

import pytest
from rigs import iproute
from support import PacketSocket, eventually, frame, links

import rtap
from rtap import Burst, EthDev, Mempool, NetNS, Worker

pytestmark = [
    pytest.mark.root,
    pytest.mark.filterwarnings("ignore:unclosed device:ResourceWarning"),
]


#: A name is free once its device is closed, and another thread may still be closing it.
numbers = itertools.count(500)


@pytest.fixture
def complaints(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """Exceptions from finalizers and from threads that they start."""
    raised: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: raised.append(about.exc_value))
    monkeypatch.setattr(threading, "excepthook", lambda about: raised.append(about.exc_value))
    return raised


def cycle(*devices: EthDev) -> list[Any]:
    loop: list[Any] = list(devices)
    loop.append(loop)
    return [loop]


def packet_device(ns: NetNS, name: str, engine: str) -> EthDev:
    iproute(ns, f"link add {name} type veth peer name {name}p")
    for end in (name, name + "p"):
        iproute(ns, f"link set {end} up")
    number = next(numbers)
    dev = rtap.probe(f"net_af_packet{number},iface={name}p,netns={ns.path}")
    dev.configure(1, 1, rtap.EthConf(engine=engine))
    dev.rx_queue_setup(0, 64, Mempool(256))
    dev.tx_queue_setup(0, 64)
    dev.start()
    return dev


@pytest.mark.parametrize("kind", ["tap", "packet"])
def test_a_burst_in_progress_keeps_its_descriptors(
    netns: NetNS, engine: str, complaints: list[BaseException | None], kind: str
) -> None:
    """Otherwise their numbers could be those of other files when the burst writes."""
    if kind == "tap":
        held = cycle(*(rtap.open(name, netns=netns, engine=engine) for name in ("t0", "t1")))
    else:
        held = cycle(*(packet_device(netns, name, engine) for name in ("t0", "t1")))
    fds = [dev.rx_queue(0).fd for dev in held[0][:2]]
    paths = [f"/proc/self/fd/{fd}" for fd in fds]
    files: list[str] = []
    before = [os.readlink(path) for path in paths]

    def stage(burst: Burst) -> None:
        if held:
            held.clear()
            gc.collect()
            files.extend(os.readlink(path) for path in paths)

    worker = Worker()
    worker.forward((held[0][0], 0), (held[0][1], 0), stages=[stage])
    worker.start()
    with PacketSocket(netns, "t0") as peer:
        peer.send(frame())
        eventually(lambda: not any(map(os.path.lexists, paths)), "the devices are closed")
    eventually(lambda: rtap.devices() == [], "and gone")
    worker.stop()
    assert files == before
    assert complaints == []


@pytest.mark.parametrize("state", ["unconfigured", "configured", "started", "stopped"])
def test_in_any_state(
    netns: NetNS, engine: str, complaints: list[BaseException | None], state: str
) -> None:
    if state in ("started", "stopped"):
        dev = rtap.open("t0", netns=netns, engine=engine, queues=2)
        if state == "stopped":
            dev.stop()
    else:
        dev = netns.call(rtap.probe, f"net_rtap{next(numbers)},iface=t0")
        if state == "configured":
            dev.configure(2, 2, rtap.EthConf(engine=engine))
    held = cycle(dev)
    del dev
    held.clear()
    gc.collect()
    eventually(lambda: links(netns) == ["lo"], "the device is closed")
    eventually(lambda: rtap.devices() == [], "and gone")
    assert complaints == []
