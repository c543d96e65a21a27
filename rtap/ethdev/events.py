# SPDX-License-Identifier: BSD-3-Clause
"""Reports events of devices to callbacks (``rte_eth_dev_callback_register``).

All callbacks of a process run one after the other on one thread, "rtap-events", which exists
while any callback is registered. It holds no lock of rtap, so a callback may call any method of any
device, close it, and register and unregister callbacks, including itself.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from rtap._core.forks import forget_in_child, renew_in_child
from rtap._core.threads import FairRLock, start_thread

if TYPE_CHECKING:
    from rtap.ethdev.device import EthDev

__all__ = ["EthEvent", "EventFn", "EventHandle", "Port", "callback_register"]

log = logging.getLogger("rtap")


class EthEvent(IntEnum):
    """``enum rte_eth_event_type`` with its values; then, from 64 on, rtap's own events.

    `data` is the third argument of the callback.
    """

    #: The link went up or down, for any reason; `data` is the new :class:`rtap.Link`. A flap too
    #: short to be seen is reported by its outcome.
    INTR_LSC = 1
    #: A receive queue was started or stopped; `data` is ("rx" or "tx", number, running).
    QUEUE_STATE = 2
    #: The interface is gone; `data` is None. ``stop`` and ``start`` make it anew.
    INTR_RMV = 6
    #: The device exists; only callbacks for all devices get this event. `data` is None.
    NEW = 7
    #: The device was closed; `data` is None. The last event of a device.
    DESTROY = 8
    #: ``start`` made the interface anew; `data` is None.
    RECOVERY_SUCCESS = 13

    #: The interface has another name; `data` is that.
    RENAME = 64
    #: The interface has another MTU; `data` is that.
    MTU = 65
    #: The interface has another Ethernet address; `data` is that.
    MAC = 66
    #: The interface is in another network namespace; `data` is None.
    NETNS = 67
    #: Somebody set the interface up or down (IFF_UP); `data` is True for up.
    ADMIN_STATE = 68
    #: A worker's route from this device ended before the worker was stopped: a queue was stopped,
    #: an interface is gone, or a stage failed; `data` is its last :class:`rtap.RouteStats`.
    ROUTE_END = 69


#: ``fn(dev, event, data)``.
EventFn = Callable[["EthDev", EthEvent, Any], object]


class EventHandle:
    """One registration, made by ``callback_register``; :meth:`unregister` ends it.

    `event` is the :class:`EthEvent` that it is for, `fn` the callback.
    """

    __slots__ = ("_owner", "event", "fn")

    def __init__(self, owner: list[EventHandle], event: EthEvent, fn: EventFn) -> None:
        self.event = event
        self.fn = fn
        self._owner = owner

    def unregister(self) -> None:
        """No further call begins after this returns. Idempotent, and right inside the callback.

        Does not wait for a call in progress on the events thread.
        """
        _dispatcher.unregister(self)

    def __repr__(self) -> str:
        return f"<EventHandle {self.event.name} {self.fn!r}>"


_Item = tuple[EventHandle, "EthDev", Any]


class _Dispatcher:
    """The events thread, and the handles it serves."""

    def __init__(self) -> None:
        self._in_child()
        self.forget()

    def _in_child(self) -> None:
        # Reentrant: the garbage collector may close a forgotten device at any moment.
        self._lock = threading.RLock()

    def forget(self) -> None:
        self._handles: set[EventHandle] = set()
        # The present thread's queue; None in it ends the thread.
        self._queue: queue.SimpleQueue[_Item | None] | None = None
        #: Callbacks for all present and future devices.
        self.everywhere: list[EventHandle] = []

    def register(self, owner: list[EventHandle], event: EthEvent, fn: EventFn) -> EventHandle:
        handle = EventHandle(owner, EthEvent(event), fn)
        if not callable(fn):
            raise TypeError(f"a callback is called as fn(dev, event, data), got {fn!r}")
        with self._lock:
            if self._queue is None:
                items: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
                try:
                    start_thread(self._run, items, name="rtap-events")
                except BaseException:
                    items.put(None)  # a signal handler raised, and the thread may already run
                    raise
                self._queue = items
            self._handles.add(handle)
            owner.append(handle)
        return handle

    def unregister(self, *handles: EventHandle) -> None:
        with self._lock:
            for handle in handles:
                if handle in self._handles:
                    self._handles.remove(handle)
                    handle._owner.remove(handle)
            if not self._handles and self._queue is not None:
                self._queue.put(None)
                self._queue = None

    def emit(self, dev: EthDev, own: list[EventHandle], event: EthEvent, data: Any) -> None:
        with self._lock:
            if self._queue is not None:
                for handle in (*own, *self.everywhere):
                    if handle.event == event:
                        self._queue.put((handle, dev, data))

    def end(self, dev: EthDev, own: list[EventHandle]) -> None:
        """A device's last event, after which its callbacks are unregistered."""
        self.emit(dev, own, EthEvent.DESTROY, None)
        last = EventHandle(own, EthEvent.DESTROY, lambda *_: self.unregister(*own))
        with self._lock:
            if self._queue is not None and own:
                self._handles.add(last)
                own.append(last)
                self._queue.put((last, dev, None))

    def _run(self, items: queue.SimpleQueue[_Item | None]) -> None:
        while True:
            item = items.get()
            if item is None:
                return
            handle, dev, data = item
            if handle in self._handles:
                try:
                    handle.fn(dev, handle.event, data)
                except BaseException:  # even sys.exit(): all devices share the thread
                    log.exception("callback for %s of %s", handle.event.name, dev.name)
            del item, handle, dev, data  # the thread keeps no device alive while it waits


_dispatcher = _Dispatcher()

# A forked child has no thread; devices and their callbacks belong to the parent.
renew_in_child(_dispatcher)
forget_in_child(_dispatcher.forget)


def callback_register(event: EthEvent, fn: EventFn) -> EventHandle:
    """Call ``fn(dev, event, data)`` when `event` happens to any device, also to later ones.

    For one device there is :meth:`EthDev.callback_register`. Callbacks run on the events thread;
    their exceptions are logged (logger "rtap").
    """
    return _dispatcher.register(_dispatcher.everywhere, event, fn)


class Port:
    """A driver's view of its port: the number, the lock, and the way to report events.

    Entries of the ops table are called with `lock` held. A driver that acts on its own, because
    of a message from the kernel, takes the lock itself.
    """

    __slots__ = ("_dev", "handles", "id", "listeners", "lock")

    def __init__(self, dev: EthDev) -> None:
        self._dev = weakref.ref(dev)
        self.id = -1
        self.lock = FairRLock()
        self.handles: list[EventHandle] = []
        #: Called at once, under the lock, with every event and its data, and with None when
        #: a setting has changed. They do not block.
        self.listeners: list[Callable[[EthEvent | None, Any], object]] = []

    def register(self, event: EthEvent, fn: EventFn) -> EventHandle:
        return _dispatcher.register(self.handles, event, fn)

    def event(self, event: EthEvent, data: Any = None) -> None:
        """Report to the callbacks, soon and in order, on the events thread."""
        dev = self._dev()
        if dev is not None:
            dev._event(event)
            _dispatcher.emit(dev, self.handles, event, data)
        self._tell(event, data)

    def changed(self) -> None:
        """A setting that is no event has changed."""
        self._tell(None, None)

    def _tell(self, event: EthEvent | None, data: Any) -> None:
        for listener in tuple(self.listeners):
            listener(event, data)

    def route_ended(self, stats: object) -> None:
        """Called by a receive queue: a worker's route from it failed, with these figures."""
        self.event(EthEvent.ROUTE_END, stats)

    def end(self) -> None:
        """The device is closed: DESTROY, and no event after it."""
        if sys.is_finalizing():
            return  # the events thread has stopped for ever, at any place
        dev = self._dev()
        if dev is not None:
            _dispatcher.end(dev, self.handles)
        else:
            _dispatcher.unregister(*self.handles)
