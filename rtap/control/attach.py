# SPDX-License-Identifier: BSD-3-Clause
"""Getting hold of an interface: make it, take it over, wait for a dying one to go, or adopt a
descriptor that somebody else attached to one."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from functools import partial

from rtap.control import tun
from rtap.control.netlink import LinkState, find_link
from rtap.control.tun import QueueFlag, TunIface
from rtap.errors import DeviceGone
from rtap.netns import NetNS, call_in

__all__ = ["DYING_S", "POLL_S", "adopt", "attach_first", "netns_of"]

#: How long an interface that is about to disappear is waited for: a ring lets go of a descriptor
#: 20 to 40 ms late, that of a killed process too.
DYING_S = 1.0
POLL_S = 0.002


def attach_first(
    ns: NetNS, name: str, mode: str, vnet_hdr: bool, fd: int | None = None
) -> tuple[int, TunIface]:
    """The first descriptor of interface `name`, which is made, or taken over if it persists.

    A new descriptor, or `fd`, whose own interface was deleted.

    Never joins an interface that lives by somebody else's descriptor: the kernel would let us,
    and half of that process's frames would be ours. It is waited for, as it may be dying.
    """
    deadline = time.monotonic() + DYING_S
    attach = partial(tun.open_queue, name, mode, vnet_hdr=vnet_hdr, fd=fd)
    while True:
        try:
            return call_in(ns.fd, partial(attach, exclusive=True))
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise
        link = find_link(ns.fd, name)
        if link is not None:
            if link.kind != "tun":
                raise FileExistsError(
                    errno.EEXIST, f"{name} is there already and is not a TAP or TUN interface"
                )
            free = link.persist and not link.queues
            if free or not link.tun:  # kernels before 4.20 do not tell
                try:
                    return _take_over(attach, ns, link, mode)
                except OSError as exc:
                    if exc.errno != errno.EBUSY:
                        raise
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, f"{name} is in use by another process or device")
        time.sleep(POLL_S)


def _take_over(
    attach: partial[tuple[int, TunIface]], ns: NetNS, link: LinkState, mode: str
) -> tuple[int, TunIface]:
    kind = {1: "tun", 2: "tap"}.get(link.tun.get("IFLA_TUN_TYPE", 0), mode)
    if kind != mode:
        raise FileExistsError(
            errno.EEXIST, f"{link.name} is there already in mode {kind}, mode {mode} was asked for"
        )
    if link.tun:
        multi = bool(link.tun.get("IFLA_TUN_MULTI_QUEUE", 0))
        return call_in(ns.fd, partial(attach, multi_queue=multi))
    try:
        return call_in(ns.fd, attach)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return call_in(ns.fd, partial(attach, multi_queue=False))


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
    """Where the interface of descriptor `fd` is, as far as we may ask: else where the caller is.

    ValueError for a descriptor that no interface is attached to.
    """
    iface = _iface_of(fd)
    try:
        there = tun.device_netns(fd, iface.name)
    except OSError as exc:
        # Asking takes CAP_NET_ADMIN and Linux 5.2.
        if exc.errno not in (errno.EPERM, errno.EINVAL):
            raise
        return NetNS.current()
    try:
        return NetNS.from_fd(there)
    finally:
        os.close(there)


def adopt(ns: NetNS, fd: int, mode: str) -> tuple[int, TunIface]:
    """A duplicate of `fd`, which is attached to an interface in `ns`, and what that is.

    The two share one open file, which is made non-blocking; everything else stays as its maker
    chose, since none of it can be changed any more. ValueError for what rtap cannot work with.
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
    own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    try:
        os.set_blocking(own, False)
        if iface.flags & QueueFlag.VNET_HDR:
            tun.set_header(own, iface.name)
        if iface.flags & QueueFlag.DETACH_QUEUE:
            tun.set_queue_attached(own, True, iface.name)
    except BaseException:
        os.close(own)
        raise
    return own, iface
