# SPDX-License-Identifier: BSD-3-Clause
"""Device arguments: ``net_rtap0,iface=foo0,persist``, as DPDK's ``--vdev`` takes them.

A name, then comma-separated ``key`` or ``key=value`` (``rte_kvargs.h``). This module splits them.
A driver then takes the arguments it knows with :class:`DevArgs`; remaining ones are an
error. Every refusal is a ValueError that names the wrong piece.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["DevArgs", "check_name", "parse_devargs"]

NAME_MAX = 63  # RTE_DEV_NAME_MAX_LEN less the terminator
_NAME = re.compile(r"[A-Za-z0-9_.:-]+")


@dataclass
class DevArgs:
    """A device name and its arguments; a value is None where there was no ``=``.

    The ``take_`` methods remove the arguments that they return; :meth:`finish` refuses the others.
    """

    name: str
    args: dict[str, str | None] = field(default_factory=dict)

    def take_flag(self, key: str) -> bool:
        """True if `key` is given. It must have no value."""
        if key not in self.args:
            return False
        value = self.args.pop(key)
        if value is not None:
            raise ValueError(f"{self.name}: {key} takes no value, got {key + '=' + value!r}")
        return True

    def take_str(self, key: str, default: str) -> str:
        """The value of `key`; a given one must not be empty."""
        if key not in self.args:
            return default
        value = self.args.pop(key)
        if not value:
            given = key if value is None else f"{key}="
            raise ValueError(f"{self.name}: {key} needs a value ({key}=...), got {given!r}")
        return value

    def take_int(self, key: str, default: int, low: int, high: int) -> int:
        """The value of `key` as a decimal number of `low` to `high`."""
        value = self.take_str(key, str(default))
        if not (value.isascii() and value.isdigit() and low <= int(value) <= high):
            raise ValueError(f"{self.name}: {key} must be {low} to {high}, got {value!r}")
        return int(value)

    def take_ifname(self, key: str, default: str) -> str:
        """The value of `key` as an interface name of 1 to 15 bytes, ``%d`` allowed."""
        from rtap.control.tun import check_ifname

        value = self.take_str(key, default)
        try:
            return check_ifname(value)
        except ValueError as exc:
            raise ValueError(f"{self.name}: {key + '=' + value!r}: {exc}") from None

    def finish(self, known: tuple[str, ...]) -> None:
        """Refuse arguments that were not taken; `known` are the driver's keys, for the message."""
        for key, value in self.args.items():
            given = key if value is None else f"{key}={value}"
            raise ValueError(
                f"{self.name}: unknown device argument {given!r}, expected {', '.join(known)}"
            )


def check_name(name: str, inside: str | None = None) -> None:
    """ValueError unless `name` is a device name or its beginning; `inside` is the text it is
    from."""
    if _NAME.fullmatch(name) is None or len(name) > NAME_MAX:
        raise ValueError(
            f"a device name has 1 to {NAME_MAX} letters, digits and _ . : -, got {name!r}"
            + (f" in {inside!r}" if inside is not None else "")
        )


def parse_devargs(text: str) -> DevArgs:
    """Split ``name[,key[=value]]...``. A key may appear once; empty pieces are refused."""
    if not isinstance(text, str):
        raise TypeError(f"device arguments are a str, got {type(text).__name__}")
    name, *pieces = text.split(",")
    check_name(name, text)
    parsed = DevArgs(name)
    for piece in pieces:
        key, equals, value = piece.partition("=")
        if not key:
            raise ValueError(f"{name}: a device argument is key or key=value, got {piece!r}")
        if key in parsed.args:
            raise ValueError(f"{name}: device argument {piece!r} given more than once")
        parsed.args[key] = value if equals else None
    return parsed
