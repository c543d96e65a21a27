# SPDX-License-Identifier: BSD-3-Clause
"""How to get an interface: make it, take it over, wait for a dying one to go, or adopt a
descriptor that somebody else attached to one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from rtap.control import tun
from rtap.control.netlink import LinkState, find_link
from rtap.control.netns import NetNS, call_in
from rtap.control.tun import QueueFile, QueueFlag, TunIface
from rtap.errors import DeviceGone

__all__ = ["DYING_S", "POLL_S", "Attached", "adopt", "attach_first", "claimed", "netns_of"]

#: How long to wait for a disappearing interface: a ring releases a descriptor 20 to 40 ms late,
#: even the ring of a killed process.
DYING_S = 1.0
POLL_S = 0.002


@contextlib.contextmanager
def claimed(netns: int, index: int, deadline: float = 0.0) -> Iterator[None]:
    """Keep other devices, in this process or another, from taking over interface `index` meanwhile.

    The claim is the name of an abstract Unix socket in the interface's network namespace. The
    kernel gives it to one process, and takes it back when that process dies. It is held from the
    check that the interface is free until it is attached; after that its queues show that it is in
    use. EBUSY when another process still has it at the deadline (``time.monotonic()``).
    """
    with call_in(netns, socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
        while True:
            try:
                claim.bind(f"\0rtap/take-over/{index}")
                break
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, f"another device is taking over interface {index}")
            time.sleep(POLL_S)
        yield


@dataclass
class Attached:
    """The result of :func:`attach_first`; `taken_over` if a persistent interface was used."""

    iface: TunIface
    taken_over: bool


def attach_first(
    ns: NetNS, file: QueueFile, name: str, mode: str, *, vnet_hdr: bool, multi_queue: bool | None
) -> Attached:
    """Put `file`, opened in `ns`, on interface `name`, which is made, or taken over if it persists.

    `multi_queue` is the kind it has to have; None makes a multi-queue one and takes any.

    Never joins an interface that another process's descriptor keeps alive: the kernel would let us,
    and we would get half of that process's frames. Waits for such an interface, as it may be dying.
    """
    deadline = time.monotonic() + DYING_S
    join = partial(tun.join, file.fileno(), name, mode, vnet_hdr=vnet_hdr)
    while True:
        try:
            iface = join(exclusive=True, multi_queue=multi_queue is not False)
            return Attached(iface, taken_over=False)
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise
        link = find_link(ns.fd, name)
        if link is not None and _is_free(link, mode, multi_queue):
            try:
                with claimed(ns.fd, link.index):
                    now = find_link(ns.fd, name)
                    same = now is not None and now.index == link.index
                    if now is not None and same and _is_free(now, mode, multi_queue):
                        iface = _take_over(join, now, mode, file.fileno())
                        return Attached(iface, taken_over=True)
            except OSError as exc:
                if exc.errno != errno.EBUSY:
                    raise
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, f"{name} is in use by another process or device")
        time.sleep(POLL_S)


def _is_free(link: LinkState, mode: str, multi_queue: bool | None) -> bool:
    """Whether nobody uses that interface. FileExistsError if it does not suit us."""
    if link.kind != "tun":
        raise FileExistsError(
            errno.EEXIST, f"{link.name} is there already and is not a TAP or TUN interface"
        )
    if not link.tun:  # kernels before 4.20 do not report it
        return True
    kind = {1: "tun", 2: "tap"}.get(link.tun.get("IFLA_TUN_TYPE", 0), mode)
    if kind != mode:
        raise FileExistsError(
            errno.EEXIST, f"{link.name} is there already in mode {kind}, mode {mode} was asked for"
        )
    if not link.persist or link.queues:
        return False
    if multi_queue not in (None, link.multi_queue):
        raise FileExistsError(
            errno.EEXIST, f"{link.name} was made anew by somebody else, of another kind"
        )
    return True


def _take_over(join: partial[TunIface], link: LinkState, mode: str, fd: int) -> TunIface:
    if link.tun:
        iface = join(multi_queue=link.multi_queue)
    else:
        try:
            iface = join()
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            iface = join(multi_queue=False)
    tun.reset_filters(fd, mode, link.name)
    return iface


# -- descriptors from somebody else


def _iface_of(fd: int) -> TunIface:
    try:
        return tun.get_iface(fd)
    except DeviceGone as exc:
        what = "is not open" if exc.errno == errno.EBADF else "is not attached to an interface"
        raise ValueError(f"fd: descriptor {fd} {what}") from None
    except OSError as exc:
        if exc.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        raise ValueError(f"fd: descriptor {fd} is not one of {tun.DEV_PATH}") from None


def netns_of(fd: int) -> NetNS:
    """The namespace of descriptor `fd`'s interface if we may ask, else the caller's.

    ValueError for a descriptor that no interface is attached to.
    """
    iface = _iface_of(fd)
    try:
        there = tun.device_netns(fd, iface.name)
    except OSError as exc:
        # Asking needs CAP_NET_ADMIN and Linux 5.2.
        if exc.errno not in (errno.EPERM, errno.EINVAL):
            raise
        return NetNS.current()
    with there:
        return NetNS.from_fd(there.fileno())


def adopt(ns: NetNS, fd: int, mode: str) -> tuple[QueueFile, TunIface]:
    """A duplicate of `fd`, which is attached to an interface in `ns`, and that interface's state.

    The two share one open file, which is made non-blocking; everything else stays as its maker
    chose, since it cannot be changed any more. ValueError if rtap cannot work with it.
    """
    iface = _iface_of(fd)
    there = "tun" if iface.flags & QueueFlag.TUN else "tap"
    if there != mode:
        raise ValueError(
            f"fd: descriptor {fd} is that of a {there.upper()} interface ({iface.name}), mode "
            f"{mode} was asked for"
        )
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise ValueError(f"fd: descriptor {fd} ({iface.name}) is not open for reading and writing")
    link = find_link(ns.fd, iface.name)
    if link is None or (mode == "tap" and link.mac != tun.get_mac(fd, iface.name)):
        raise OSError(
            errno.EPERM,
            f"fd: interface {iface.name} of descriptor {fd} is in another network namespace, "
            "which only CAP_NET_ADMIN may ask for",
        )
    if link.kind != "tun":
        raise ValueError(f"fd: {iface.name} of descriptor {fd} is not a TAP or TUN interface")
    if link.tun.get("IFLA_TUN_PI"):
        raise ValueError(
            f"fd: frames of descriptor {fd} ({iface.name}) have a protocol prefix, it has to be "
            "attached with IFF_NO_PI"
        )
    own = QueueFile.of(os.dup, fd)
    try:
        os.set_blocking(own.fileno(), False)
        if iface.flags & QueueFlag.VNET_HDR:
            tun.set_header(own.fileno(), iface.name)
        if iface.flags & QueueFlag.DETACH_QUEUE:
            tun.set_queue_attached(own.fileno(), True, iface.name)
    except BaseException:
        own.close()
        raise
    return own, iface
