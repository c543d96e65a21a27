# SPDX-License-Identifier: BSD-3-Clause
"""Getting hold of an interface by name: make it, take it over, or wait for a dying one to go."""

from __future__ import annotations

import errno
import time
from functools import partial

from rtap.control import tun
from rtap.control.netlink import LinkState, find_link
from rtap.control.tun import TunIface
from rtap.netns import NetNS, call_in

__all__ = ["DYING_S", "POLL_S", "attach_first"]

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
