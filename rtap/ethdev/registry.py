# SPDX-License-Identifier: BSD-3-Clause
"""Drivers by name prefix, and the devices of this process by name.

Devices are referred to weakly: the registry never keeps one open. A name is free again once its
device is closed or collected.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from rtap._core.forks import forget_in_child, renew_in_child
from rtap.ethdev.devargs import DevArgs, check_name, parse_devargs

if TYPE_CHECKING:
    from rtap.ethdev.device import EthDev
    from rtap.ethdev.events import Port
    from rtap.ethdev.ops import EthDevOps

__all__ = ["device", "devices", "probe", "register_driver"]

#: Makes the ops table of a new device from its arguments, which it has to take completely
#: (:meth:`DevArgs.finish`), and the port by which it reports events.
ProbeFn = Callable[[DevArgs, "Port"], "EthDevOps"]

_drivers: dict[str, tuple[str, ProbeFn]] = {}
_devices: dict[str, weakref.ref[EthDev] | None] = {}
_ports: dict[int, str] = {}


class _Own:
    def __init__(self) -> None:
        self._in_child()

    def _in_child(self) -> None:
        self.lock = threading.RLock()


_own = _Own()


def register_driver(name: str, probe_fn: ProbeFn, aliases: tuple[str, ...] = ()) -> None:
    """Let devices whose name starts with `name`, or with an alias of it, be made by `probe_fn`.

    ``probe_fn(args, port)`` returns the ops table of a new device, an instance of a subclass of
    :class:`rtap.ethdev.ops.EthDevOps`. `args` are the device arguments, a
    :class:`rtap.ethdev.devargs.DevArgs`: it takes those it knows and refuses the rest with
    ``args.finish``. `port`, a :class:`rtap.ethdev.events.Port`, has the device's number and its
    lock; the driver reports events to it.
    An exception of `probe_fn` passes through :func:`probe`, and no device is made.

    The longest registered name that a device's name begins with counts. ValueError for a name that
    is empty, that no device name can begin with, or that is already registered; TypeError for a
    `probe_fn` that cannot be called. A refused call registers nothing.
    """
    if not callable(probe_fn):
        raise TypeError(f"probe_fn is called as probe_fn(args, port), got {probe_fn!r}")
    for prefix in (name, *aliases):
        if not isinstance(prefix, str):
            raise TypeError(f"a driver name is a str, got {type(prefix).__name__}")
        check_name(prefix)
    with _own.lock:
        for prefix in (name, *aliases):
            if prefix in _drivers:
                raise ValueError(f"there is a driver for {prefix!r} already")
        for prefix in (name, *aliases):
            _drivers[prefix] = (name, probe_fn)


def driver_names() -> list[str]:
    """Names of the registered drivers, without aliases."""
    with _own.lock:
        return sorted({name for name, _ in _drivers.values()})


def _driver_of(name: str) -> ProbeFn:
    with _own.lock:
        fitting = [prefix for prefix in _drivers if name.startswith(prefix)]
        if fitting:
            return _drivers[max(fitting, key=len)][1]
        raise ValueError(
            f"no driver for device {name!r}, its name must start with one of "
            f"{', '.join(sorted(_drivers)) or '(no driver is registered)'}"
        )


def reserve(name: str) -> int:
    """Take a device name and the lowest free port number; ValueError if the name is in use."""
    with _own.lock:
        if name in _devices:
            ref = _devices[name]
            held = ref() if ref is not None else None
            raise ValueError(
                f"there is a device {name!r} already" + (f": {held!r}" if held is not None else "")
            )
        port = next(n for n in itertools.count() if n not in _ports)
        _devices[name] = None
        _ports[port] = name
        return port


def reserve_numbered(prefix: str) -> tuple[str, int]:
    """As :func:`reserve`, with `prefix` and the lowest free number for a name."""
    with _own.lock:
        name = next(f"{prefix}{n}" for n in itertools.count() if f"{prefix}{n}" not in _devices)
        return name, reserve(name)


def publish(name: str, dev: EthDev) -> None:
    """Make the device of a reserved name visible."""
    with _own.lock:
        _devices[name] = weakref.ref(dev)


def release(name: str, port: int) -> None:
    """Free a name and its port number. Idempotent."""
    with _own.lock:
        if _ports.get(port) == name:
            del _ports[port]
            _devices.pop(name, None)


def devices() -> list[EthDev]:
    """The open devices of this process, in no particular order."""
    with _own.lock:
        refs = list(_devices.values())
    found = (ref() for ref in refs if ref is not None)
    return [dev for dev in found if dev is not None]


def device(name: str) -> EthDev:
    """The open device called `name`, such as "net_rtap0". KeyError if there is none."""
    with _own.lock:
        ref = _devices.get(name)
        dev = ref() if ref is not None else None
        if dev is None:
            there = ", ".join(sorted(d.name for d in devices())) or "none"
            raise KeyError(f"no device {name!r}; open devices: {there}")
        return dev


def probe(devargs: str) -> EthDev:
    """Make the device that `devargs` describes, for instance ``net_rtap0,iface=foo0,persist``.

    The part before the first comma is the device's name, whose beginning selects the driver.
    Returns it unconfigured: :meth:`EthDev.configure`, queue setup and :meth:`EthDev.start` follow.

    Raises ValueError, which names the wrong piece of `devargs` or a name in use, and OSError
    when the device cannot be made.
    """
    from rtap.ethdev.device import EthDev

    parsed = parse_devargs(devargs)
    probe_fn = _driver_of(parsed.name)
    return EthDev._create(parsed.name, lambda port: probe_fn(parsed, port))


def _forget() -> None:
    """In a forked child: the parent's devices are unusable, and their names are free."""
    inherited = devices()
    _devices.clear()
    _ports.clear()
    for dev in inherited:
        dev._forked()


renew_in_child(_own)
forget_in_child(_forget)
