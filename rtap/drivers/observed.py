# SPDX-License-Identifier: BSD-3-Clause
"""What a driver makes of an interface it looks at again: the events, and whose fault drops are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rtap.control.netlink import LinkState
from rtap.ethdev.events import EthEvent
from rtap.ethdev.ops import Link

__all__ = ["Drops", "differences", "link_of"]


def link_of(state: LinkState) -> Link:
    return Link(link_status=state.up and state.carrier)


def differences(seen: LinkState, now: LinkState) -> Iterator[tuple[EthEvent, Any]]:
    """The events that lead from one state of an interface to another, and their data."""
    if now.name != seen.name:
        yield EthEvent.RENAME, now.name
    if now.up != seen.up:
        yield EthEvent.ADMIN_STATE, now.up
    if now.mtu != seen.mtu:
        yield EthEvent.MTU, now.mtu
    if now.mac != seen.mac:
        yield EthEvent.MAC, now.mac
    # Unequal counts and the same state: the carrier was away and is back, or the reverse.
    if link_of(now) != link_of(seen) or now.carrier_changes != seen.carrier_changes:
        yield EthEvent.INTR_LSC, link_of(now)


class Drops:
    """Divides the kernel's count of frames it had for us and dropped (the netdev's tx_dropped).

    `missed` were there to be read and nobody did; `unplugged` found the carrier off. The rest,
    while nothing was started, is nobody's.
    """

    def __init__(self, dropped: int) -> None:
        self.missed = 0
        self.unplugged = 0
        self._started = False
        self._plugged = True
        self._counted = dropped

    def count(self, dropped: int) -> None:
        """The kernel's counter stands at `dropped`."""
        new = max(0, dropped - self._counted)
        if not self._plugged:
            self.unplugged += new
        elif self._started:
            self.missed += new
        self._counted = dropped

    def turn(self, dropped: int, *, started: bool, plugged: bool) -> None:
        """As :meth:`count`, and from here on that is so."""
        self.count(dropped)
        self._started, self._plugged = started, plugged

    def restart(self, dropped: int) -> None:
        """The kernel's counter is that of another interface now."""
        self._counted = dropped
