# SPDX-License-Identifier: BSD-3-Clause
"""Options of a TAP or TUN interface besides its name, as keywords and device arguments."""

from __future__ import annotations

import grp
import pwd
from dataclasses import dataclass
from typing import TypeAlias

from rtap.ethdev.devargs import DevArgs

__all__ = ["MAX_TXQUEUELEN", "NO_OPTIONS", "Account", "IfaceOptions", "account_number"]

#: A user or group: its number or its name.
Account: TypeAlias = "int | str"

INT_MAX = (1 << 31) - 1
# The number after it means "leave it alone" to the kernel.
MAX_ID = (1 << 32) - 2
#: More pointers than fit into one piece of kernel memory (KMALLOC_MAX_SIZE) are refused.
MAX_TXQUEUELEN = 1 << 19


def _number(value: int | None, what: str, low: int, high: int, unit: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{what} must be None or {unit}, {low} to {high}, got {value!r}")
    return value


def _uid_of(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _gid_of(name: str) -> int:
    return grp.getgrnam(name).gr_gid


def account_number(value: Account | None, what: str) -> int | None:
    """The number of a user, if `what` is "owner", or of a group; ValueError if there is none."""
    if isinstance(value, str):
        user = what == "owner"
        try:
            return (_uid_of if user else _gid_of)(value)
        except (KeyError, ValueError):  # ValueError: a null character in it
            kind = "user" if user else "group"
            raise ValueError(f"{what}: there is no {kind} {value!r}") from None
    return _number(value, what, 0, MAX_ID, "a name or a number")


@dataclass(frozen=True)
class IfaceOptions:
    """Checked options of one interface; None leaves a setting unchanged.

    ``owner`` and ``group`` may attach to the interface without CAP_NET_ADMIN (numbers here; names
    are looked up). ``txqueuelen`` is how many frames may wait in each queue to be read,
    ``sndbuf`` how many bytes may wait in the kernel's stack before sends fall short. ``fd`` is a
    descriptor that somebody else attached to an interface, used instead of making one.
    """

    owner: Account | None = None
    group: Account | None = None
    txqueuelen: int | None = None
    sndbuf: int | None = None
    fd: int | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "owner", account_number(self.owner, "owner"))
        set_(self, "group", account_number(self.group, "group"))
        _number(self.txqueuelen, "txqueuelen", 1, MAX_TXQUEUELEN, "a number of frames")
        _number(self.sndbuf, "sndbuf", 1, INT_MAX, "a number of bytes")
        _number(self.fd, "fd", 0, INT_MAX, "a descriptor")

    #: Their device arguments, for a message.
    KEYS = ("owner=USER", "group=GROUP", "txqueuelen=N", "sndbuf=BYTES", "fd=N")

    @classmethod
    def take(cls, args: DevArgs) -> IfaceOptions:
        """Take the options out of device arguments. A ValueError names a wrong one."""

        def account(key: str) -> Account | None:
            text = args.take_str(key, "") if key in args.args else None
            return int(text) if text and text.isascii() and text.isdigit() else text

        def number(key: str, low: int, high: int) -> int | None:
            return args.take_int(key, low, low, high) if key in args.args else None

        taken = (
            account("owner"),
            account("group"),
            number("txqueuelen", 1, MAX_TXQUEUELEN),
            number("sndbuf", 1, INT_MAX),
            number("fd", 0, INT_MAX),
        )
        try:
            return cls(*taken)
        except ValueError as exc:
            raise ValueError(f"{args.name}: {exc}") from None


#: No setting changed, on an interface of ours.
NO_OPTIONS = IfaceOptions()
