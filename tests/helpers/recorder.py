# SPDX-License-Identifier: BSD-3-Clause
"""Records the events of a device in order."""

from __future__ import annotations

import queue
import threading
from typing import Any

from patience import patient
from support import ip

from rtap import EthDev, EthEvent, Link, NetNS

UP, DOWN = Link(link_status=True), Link(link_status=False)
OTHER_MAC = "02:00:00:00:00:77"


class Recorder:
    """Registers callbacks for a device's events and records them."""

    def __init__(self, dev: EthDev, *events: EthEvent) -> None:
        self.dev = dev
        self.told: queue.SimpleQueue[tuple[EthEvent, Any]] = queue.SimpleQueue()
        self.handles = [dev.callback_register(event, self) for event in events or EthEvent]

    def __call__(self, dev: EthDev, event: EthEvent, data: Any) -> None:
        assert dev is self.dev
        assert threading.current_thread().name == "rtap-events"
        self.told.put((event, data))

    def next(self, timeout: float = 10) -> tuple[EthEvent, Any]:
        return self.told.get(timeout=patient(timeout))

    def expect(self, *wanted: tuple[EthEvent, Any]) -> None:
        """Fails unless these are the next events, in that order."""
        assert [self.next() for _ in wanted] == list(wanted)

    def nothing_more(self) -> None:
        """Fails unless the next event is that of a change made now: nothing came before it."""
        mtu = self.dev.mtu - 1
        ip(self.ns, "link", "set", self.dev.ifname, "mtu", str(mtu))
        self.expect((EthEvent.MTU, mtu))

    @property
    def ns(self) -> NetNS:
        return self.dev._ops._control.netns  # type: ignore[attr-defined]
