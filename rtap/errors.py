# SPDX-License-Identifier: BSD-3-Clause
"""Exceptions of rtap, and the one place where an errno becomes one of them.

The native kernels return a count or ``-errno``; their shells, and every ioctl of the control
plane, raise through :func:`raise_errno`. What that gives is always an :class:`OSError` (of the
subclass Python itself would choose, ``PermissionError`` for EPERM and so on) except for a dead
device, which is a :class:`DeviceGone`.
"""

from __future__ import annotations

import errno
import os
from typing import NoReturn

__all__ = ["DeviceGone", "DeviceStateError", "PoolEmpty", "raise_errno"]

# tun.c answers EBADFD on a descriptor whose interface was deleted; EBADF is a descriptor that was
# closed under us, ENODEV what netlink and ioctls by index say about an interface that went away.
_GONE = frozenset({errno.EBADFD, errno.EBADF, errno.ENODEV})


class DeviceGone(OSError):
    """The network interface behind a device was deleted, or its descriptor closed.

    `ifname` is the interface's last known name, `sent` the number of frames the failed burst had
    delivered before it noticed (0 for anything but a send).
    """

    ifname: str
    sent: int

    def __init__(self, code: int, message: str, ifname: str = "", sent: int = 0) -> None:
        super().__init__(code, message)
        self.ifname = ifname
        self.sent = sent

    def __reduce__(self) -> tuple[type[DeviceGone], tuple[int | None, str | None, str, int]]:
        return type(self), (self.errno, self.strerror, self.ifname, self.sent)


class DeviceStateError(RuntimeError):
    """A device or a queue was asked for something that its present state does not allow."""


class PoolEmpty(MemoryError):
    """A mempool has no free mbuf left for an allocation that a caller asked for by hand."""


def raise_errno(
    code: int, operation: str, ifname: str = "", sent: int = 0, *, hint: str = ""
) -> NoReturn:
    """Raise what the errno `code` (positive, or negative as kernels return it) stands for.

    `operation` says what was tried ("read", "TUNSETIFF", "set the MTU to 9000"), `ifname` on
    which interface, `hint` what to do about it. The errno stays available as ``.errno``.

    Raises
    ------
    DeviceGone
        for EBADFD, EBADF and ENODEV; carries `ifname` and `sent`.
    OSError
        for everything else, in the subclass that belongs to the errno.
    """
    number = abs(int(code))
    where = f" on {ifname}" if ifname else ""
    text = f"{operation}{where}: {os.strerror(number)}"
    if number in _GONE:
        raise DeviceGone(number, f"{text} (the interface is gone)", ifname, sent)
    raise OSError(number, f"{text} ({hint})" if hint else text)
