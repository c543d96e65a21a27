# SPDX-License-Identifier: BSD-3-Clause
"""Observes an interface that others change too, and handles each change.

:class:`Observer` queries the interface when the kernel gives a hint, lets the driver follow the
changes, and reports the events. :class:`Drops` divides the frames that the kernel dropped by cause.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from rtap.control.monitor import Watch, watch
from rtap.control.netlink import Control, LinkState
from rtap.errors import DeviceGone
from rtap.ethdev.events import EthEvent, Port
from rtap.ethdev.ops import Link

__all__ = ["Drops", "Observer", "Observing", "differences", "link_of"]

LOCK_SLICE_S = 0.01


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
    # Unequal counts and the same state: the carrier went and came back, or the reverse.
    if link_of(now) != link_of(seen) or now.carrier_changes != seen.carrier_changes:
        yield EthEvent.INTR_LSC, link_of(now)


class Observing(Protocol):
    """The part of a driver that its observer calls, with the device's lock held."""

    def interface_changed(self, seen: LinkState, now: LinkState) -> None:
        """Follow the differences; the events are reported afterwards."""

    def interface_lost(self) -> None:
        """The interface can no longer be found; called once."""


class Observer:
    """A driver's knowledge of its interface: `seen` is the last state it saw.

    The kernel's notifications are hints to query it. A driver that changes something calls
    :meth:`look` itself, so that every change takes effect in one place, whoever made it.
    """

    def __init__(self, port: Port, control: Control, driver: Observing) -> None:
        self._port = port
        self._control = control
        # Weak in both directions: the monitor would keep an object that nobody else has, and its
        # interface with it.
        self._driver = weakref.ref(driver)
        self.removed = False
        self._watch = self._new_watch()
        try:
            self.seen = control.get()
        except BaseException:
            self._watch.cancel()
            raise

    def _new_watch(self) -> Watch:
        method = weakref.WeakMethod(self._hint)

        def hint(about: Watch) -> None:
            look = method()
            if look is None:
                about.cancel()
            else:
                look(about)

        return watch(self._control.netns.fd, self._control.index, hint)

    def _hint(self, hint: Watch) -> None:
        """Called on the netlink thread: something may have happened to the interface."""
        # A thread that cancels the watch may hold the lock, and waits for this thread.
        while not self._port.lock.acquire(timeout=LOCK_SLICE_S):
            if hint.cancelled:
                return
        try:
            if not hint.cancelled:
                self.look()
        finally:
            self._port.lock.release()

    def look(self) -> None:
        """Query the interface, follow the changes, and report them."""
        driver = self._driver()
        if driver is None:
            return
        try:
            now = self._control.get()
            if not self._watch.covers(self._control.netns.fd, self._control.index):
                self._watch.cancel()
                self._watch = self._new_watch()
                self._port.event(EthEvent.NETNS)
                now = self._control.get()
        except DeviceGone:
            if not self.removed:
                self.removed = True
                driver.interface_lost()
            return
        seen, self.seen = self.seen, now
        driver.interface_changed(seen, now)
        for event, data in differences(seen, now):
            self._port.event(event, data)

    def restart(self) -> None:
        """Begin again: there is another interface behind `control` now."""
        self._watch.cancel()
        self._watch = self._new_watch()
        self.removed = False
        self.seen = self._control.get()

    def cancel(self) -> None:
        """Follow no more hints. Idempotent."""
        self._watch.cancel()


class Drops:
    """Divides the kernel's count of frames that it had for us and dropped (the netdev's
    tx_dropped).

    `missed` counts frames that nobody read in time; `unplugged` those that found the carrier off.
    The rest, from times when nothing was started, counts nowhere.
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
        """As :meth:`count`; from here on the device is in that state."""
        self.count(dropped)
        self._started, self._plugged = started, plugged

    def restart(self, dropped: int) -> None:
        """Begin again: the kernel's counter now belongs to another interface."""
        self._counted = dropped
