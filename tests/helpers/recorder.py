# SPDX-License-Identifier: BSD-3-Clause
"""What a device tells, kept in order."""

from __future__ import annotations

import queue
import threading
from typing import Any

from support import ip

from rtap import EthDev, EthEvent, Link, NetNS

UP, DOWN = Link(link_status=True), Link(link_status=False)
OTHER_MAC = "02:00:00:00:00:77"


class Recorder:
    """Registers for events of a device and keeps what it is told."""

    def __init__(self, dev: EthDev, *events: EthEvent) -> None:
        self.dev = dev
        self.told: queue.SimpleQueue[tuple[EthEvent, Any]] = queue.SimpleQueue()
        self.handles = [dev.callback_register(event, self) for event in events or EthEvent]

    def __call__(self, dev: EthDev, event: EthEvent, data: Any) -> None:
        assert dev is self.dev
        assert threading.current_thread().name == "rtap-events"
        self.told.put((event, data))

    def next(self, timeout: float = 10) -> tuple[EthEvent, Any]:
        return self.told.get(timeout=timeout)

    def expect(self, *wanted: tuple[EthEvent, Any]) -> None:
        """These are the next ones, in that order."""
        assert [self.next() for _ in wanted] == list(wanted)

    def nothing_more(self) -> None:
        """All that has happened is told; a change that is seen comes after it."""
        mtu = self.dev.mtu - 1
        ip(self.ns, "link", "set", self.dev.ifname, "mtu", str(mtu))
        self.expect((EthEvent.MTU, mtu))

    @property
    def ns(self) -> NetNS:
        return self.dev._ops._control.netns  # type: ignore[attr-defined]
