# SPDX-License-Identifier: BSD-3-Clause
"""Exceptions of rtap, and the one place where an errno becomes one of them.

The native kernels return a count or ``-errno``; their shells, and every ioctl of the control
plane, raise through :func:`raise_errno`. It raises :class:`DeviceGone` for a dead device, and
otherwise an :class:`OSError`, of the subclass that Python itself would choose (``PermissionError``
for EPERM and so on).
"""

from __future__ import annotations

import errno
import os
from typing import NoReturn

__all__ = ["DeviceGone", "DeviceStateError", "PoolEmpty", "raise_errno"]

# tun.c answers EBADFD on a descriptor whose interface was deleted. EBADF means that the descriptor
# was closed under us. Netlink and ioctls by index answer ENODEV for an interface that went away.
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
    """The present state of a device or a queue does not allow the call."""


class PoolEmpty(MemoryError):
    """A mempool has too few free mbufs for a requested allocation."""


def raise_errno(
    code: int, operation: str, ifname: str = "", sent: int = 0, *, hint: str = ""
) -> NoReturn:
    """Raise the exception for the errno `code` (positive, or negative as kernels return it).

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
