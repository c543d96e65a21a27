# SPDX-License-Identifier: BSD-3-Clause
"""Rights that a process gives up for good (``capabilities(7)``).

Capabilities are a thread's. So this is done before there is a second thread: later ones inherit it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from rtap.cli.errors import CommandError

__all__ = ["CAP_NET_ADMIN", "CAP_NET_RAW", "User", "keep_only"]

# linux/capability.h
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
_CAP_SETPCAP = 8
# _LINUX_CAPABILITY_VERSION_3, this thread.
_HEADER = struct.pack("Ii", 0x20080522, 0)
# Effective, permitted, inheritable: the lower 32 of each, then the upper ones.
_SETS = struct.Struct("6I")

# linux/prctl.h
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class User:
    """A user to become: numbers, and the name, whose groups it gets."""

    name: str
    uid: int
    gid: int

    @classmethod
    def named(cls, name: str) -> User:
        """The user of that name or number; ValueError if there is none."""
        try:
            found = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        except (KeyError, ValueError, OverflowError):  # ValueError: a null character in it
            raise ValueError(f"there is no user {name!r}") from None
        return cls(found.pw_name, found.pw_uid, found.pw_gid)


def _failed(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


def _prctl(option: int, *args: int) -> int:
    """As prctl(2), which returns -1 when it fails."""
    words = [ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:4]]
    return int(_libc.prctl(ctypes.c_int(option), *words))


def _capabilities() -> tuple[int, int, int]:
    """The bits of the effective, permitted and inheritable ones."""
    sets = ctypes.create_string_buffer(_SETS.size)
    if _libc.capget(ctypes.create_string_buffer(_HEADER), sets):
        raise _failed("capget")
    low = _SETS.unpack(sets.raw)
    return low[0] | low[3] << 32, low[1] | low[4] << 32, low[2] | low[5] << 32


def _set_capabilities(held: int) -> None:
    """Have these, effective and permitted, and let no program that is started inherit them."""
    wanted = (held, held, 0)
    if _capabilities() == wanted:
        return
    words = [word & 0xFFFFFFFF for word in wanted] + [word >> 32 for word in wanted]
    if _libc.capset(ctypes.create_string_buffer(_HEADER), _SETS.pack(*words)):
        raise _failed("capset")


def _bound(keep: frozenset[int]) -> None:
    """No program that is started can gain others than `keep`.

    Takes CAP_SETPCAP. Whoever lacks it never had most of them, and PR_SET_NO_NEW_PRIVS does the
    same.
    """
    if not _capabilities()[0] >> _CAP_SETPCAP & 1:
        return
    number = 0
    while (there := _prctl(_PR_CAPBSET_READ, number)) >= 0:
        if there and number not in keep and _prctl(_PR_CAPBSET_DROP, number):
            raise _failed("the bounding set of capabilities")
        number += 1


def _alone() -> bool:
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except FileNotFoundError:  # no /proc
        return True


def _become(user: User) -> None:
    if user.uid != 0 and os.getresuid() == (user.uid,) * 3:
        return
    try:
        os.initgroups(user.name, user.gid)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as exc:
        raise CommandError(f"this user may not become {user.name}: {exc.strerror}") from None


def keep_only(capabilities: Iterable[int], user: User | None = None) -> None:
    """Give up all capabilities but these, and everything that could bring others back; become
    `user`.

    Those of `capabilities` that the process does not have it does not get.
    """
    if not _alone():
        raise OSError(errno.EBUSY, "rights can be given up only before there is a second thread")
    keep = frozenset(capabilities)
    held = _capabilities()[1] & sum(1 << number for number in keep)
    if _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        raise _failed("PR_SET_NO_NEW_PRIVS")
    _bound(keep)
    if user is not None:
        if _prctl(_PR_SET_KEEPCAPS, 1):
            raise _failed("PR_SET_KEEPCAPS")
        _become(user)
    _set_capabilities(held)
    if user is not None and _prctl(_PR_SET_KEEPCAPS, 0):
        raise _failed("PR_SET_KEEPCAPS")
    if _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL) and ctypes.get_errno() != errno.EINVAL:
        raise _failed("the ambient set of capabilities")  # EINVAL: Linux before 4.3 has none
    os.umask(0o077)
