# SPDX-License-Identifier: BSD-3-Clause
"""Workers between two devices of one namespace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support import PacketSocket, frame

import rtap
from rtap import DeviceStateError, EthDev, NetNS, Worker


def both_ways(a: EthDev, b: EthDev, **options: Any) -> Worker:
    worker = Worker(**options)
    worker.forward((a, 0), (b, 0))
    worker.forward((b, 0), (a, 0))
    return worker


def thread_id(worker: Worker) -> int:
    (thread,) = (t for t in threading.enumerate() if t.name == worker.name)
    assert thread.native_id is not None
    return thread.native_id


def cpu_ticks(tid: int) -> int:
    with open(f"/proc/self/task/{tid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def can_send(dev: EthDev) -> bool:
    try:
        return dev.send(frame())
    except DeviceStateError:
        return False


class Line:
    """Devices ``a`` and ``b`` in one namespace, each with a packet socket at the kernel's end."""

    def __init__(self, stack: ExitStack, ns: NetNS, **options: Any) -> None:
        self.ns = ns
        self.a = stack.enter_context(rtap.open("a0", netns=ns, **options))
        self.b = stack.enter_context(rtap.open("b0", netns=ns, **options))
        self.at_a = stack.enter_context(PacketSocket(ns, "a0", rcvbuf=1 << 22))
        self.at_b = stack.enter_context(PacketSocket(ns, "b0", rcvbuf=1 << 22))

    def passes(self, seq: int = 1) -> None:
        """Fails unless a frame goes from a to b."""
        self.at_a.send(frame(seq))
        assert self.at_b.frames(1) == [frame(seq)]


@pytest.fixture
def line(netns: NetNS) -> Iterator[Line]:
    with ExitStack() as stack:
        yield Line(stack, netns)
