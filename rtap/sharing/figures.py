# SPDX-License-Identifier: BSD-3-Clause
"""The dataclasses of a device's answers, as JSON has them, and back."""

from __future__ import annotations

import dataclasses
from enum import IntFlag
from typing import Any, TypeVar, get_origin, get_type_hints

from rtap.ethdev.events import EthEvent
from rtap.ethdev.ops import DescLim, Link, PortConf
from rtap.ether import MacAddr
from rtap.sharing.wire import MessageError

__all__ = ["RELAYED", "event_data", "from_json", "to_json"]

_T = TypeVar("_T")
_PARTS = (DescLim, PortConf)

#: Events that reach the processes that attached, and what `data` of each is.
RELAYED: dict[EthEvent, Any] = {
    EthEvent.INTR_LSC: Link,
    EthEvent.INTR_RMV: None,
    EthEvent.RECOVERY_SUCCESS: None,
    EthEvent.RENAME: str,
    EthEvent.MTU: int,
    EthEvent.MAC: MacAddr,
    EthEvent.NETNS: None,
    EthEvent.ADMIN_STATE: bool,
}


def to_json(value: Any) -> Any:
    """A dataclass, an address, flags, or what JSON has already."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, MacAddr):
        return str(value)
    if isinstance(value, IntFlag):
        return int(value)
    return value


def _made(kind: Any, value: Any) -> Any:
    if kind is MacAddr or (isinstance(kind, type) and issubclass(kind, IntFlag)):
        return kind(value)
    if kind in _PARTS:
        return from_json(kind, value)
    if kind in (int, str, bool) and type(value) is not kind:
        raise MessageError(f"{value!r} is no {kind.__name__}")
    if get_origin(kind) in (dict, list) and not isinstance(value, get_origin(kind)):
        raise MessageError(f"{value!r} is no {get_origin(kind).__name__}")
    if kind == list[int] and not all(type(item) is int for item in value):
        raise MessageError("it is no list of numbers")
    return value


def from_json(kind: type[_T], value: Any) -> _T:
    """A dataclass of :mod:`rtap.ethdev.ops` from what :func:`to_json` made of it; MessageError when
    it is not of that kind."""
    hints = get_type_hints(kind)
    if not isinstance(value, dict) or value.keys() != hints.keys():
        raise MessageError(f"it is no {kind.__name__}")
    try:
        return kind(**{name: _made(hints[name], value[name]) for name in hints})
    except (TypeError, ValueError) as exc:
        raise MessageError(f"it is no {kind.__name__}: {exc}") from None


def event_data(event: EthEvent, data: Any) -> Any:
    """The data of an event that another process reported."""
    kind = RELAYED[event]
    if kind is None:
        return None
    return from_json(Link, data) if kind is Link else _made(kind, data)
