# SPDX-License-Identifier: BSD-3-Clause
"""Everything rtap asks of rtnetlink, through pyroute2 (``rtnetlink(7)``).

Each group of requests has a netlink socket of its own, made and closed around it: 0.3 ms more
than a kept one, and in return there is nothing that threads could mix up, a fork could share, a
late reply could be taken from, or an overrun could leave broken, and no descriptor is held.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from rtap.errors import DeviceGone, raise_errno
from rtap.ether import MacAddr
from rtap.netns import NetNS, call_in

__all__ = [
    "IFF_ALLMULTI",
    "IFF_PROMISC",
    "IFF_RUNNING",
    "IFF_UP",
    "MAX_MTU",
    "MIN_MTU",
    "Control",
    "LinkState",
    "find_link",
    "loopback_up",
]

# net/if.h
IFF_UP = 0x1
IFF_RUNNING = 0x40
IFF_PROMISC = 0x100
IFF_ALLMULTI = 0x200

#: The kernel's bounds for a TAP device (ETH_MIN_MTU; 65535 less an Ethernet header).
MIN_MTU = 68
MAX_MTU = 65521

_ATTEMPTS = 3

#: How often a request follows an interface that is moved again before it gets there.
MOVES = 5

_T = TypeVar("_T")


@dataclass(frozen=True)
class LinkState:
    """One link, as RTM_GETLINK describes it.

    ``kind`` is "tun" for TUN and TAP devices, which then have ``tun``: pyroute2's dict of the
    IFLA_TUN_* attributes. ``stats`` is the IFLA_STATS64 dict, counted from the kernel's side.
    """

    index: int
    name: str
    mtu: int
    mac: MacAddr
    flags: int
    carrier: bool
    carrier_changes: int
    operstate: str
    kind: str
    tun: dict[str, int]
    stats: dict[str, int]

    @property
    def up(self) -> bool:
        """IFF_UP: administratively up."""
        return bool(self.flags & IFF_UP)

    @property
    def dropped(self) -> int:
        """Frames the kernel had for whoever reads and dropped: sending, from its side."""
        return self.stats.get("tx_dropped", 0)

    @property
    def persist(self) -> bool:
        """A TUN or TAP device that stays when its last descriptor is closed."""
        return bool(self.tun.get("IFLA_TUN_PERSIST", 0))

    @property
    def queues(self) -> int | None:
        """Descriptors attached to a TUN or TAP device, detached ones too; None before 4.20."""
        if "IFLA_TUN_NUM_QUEUES" in self.tun:
            detached = self.tun.get("IFLA_TUN_NUM_DISABLED_QUEUES", 0)
            return self.tun["IFLA_TUN_NUM_QUEUES"] + detached
        # The kernel leaves both counts out on a single-queue device.
        return None


def _link_state(msg: Any) -> LinkState:
    info = msg.get_attr("IFLA_LINKINFO")
    kind = (info and info.get_attr("IFLA_INFO_KIND")) or ""
    data = info.get_attr("IFLA_INFO_DATA") if kind == "tun" else None
    mac = msg.get_attr("IFLA_ADDRESS")
    return LinkState(
        index=msg["index"],
        name=msg.get_attr("IFLA_IFNAME"),
        mtu=msg.get_attr("IFLA_MTU"),
        mac=MacAddr(mac if isinstance(mac, str) and len(mac) == 17 else bytes(6)),
        flags=msg["flags"],
        carrier=bool(msg.get_attr("IFLA_CARRIER")),
        carrier_changes=msg.get_attr("IFLA_CARRIER_CHANGES") or 0,
        operstate=msg.get_attr("IFLA_OPERSTATE") or "UNKNOWN",
        kind=kind,
        tun=dict(data["attrs"]) if data else {},
        stats=dict(msg.get_attr("IFLA_STATS64") or {}),
    )


def _request(operation: str, ifname: str, fn: Callable[[Any], _T]) -> _T:
    """``fn(iproute)`` with a fresh socket in the calling thread's namespace.

    An overrun or an interrupted dump is answered with a new socket, as both ask for.
    """
    # Not at the top: it takes a tenth of a second, which nobody should pay for the import alone.
    pyroute2 = importlib.import_module("pyroute2")
    for attempt in range(_ATTEMPTS):
        last = attempt + 1 == _ATTEMPTS
        try:
            ipr = pyroute2.IPRoute()
            try:
                return fn(ipr)
            finally:
                ipr.close()
        except pyroute2.NetlinkError as exc:
            code = exc.code
            if last or code not in (errno.ENOBUFS, errno.EINTR):
                raise_errno(code, operation, ifname)
        except OSError as exc:
            code = exc.errno or errno.EIO
            if last or code not in (errno.ENOBUFS, errno.EINTR):
                raise_errno(code, operation, ifname)
    raise AssertionError("unreachable")


def _get(ipr: Any, **which: Any) -> LinkState:
    return _link_state(ipr.link("get", **which)[0])


def loopback_up() -> None:
    """Set ``lo`` of the calling thread's network namespace up."""
    _request("set lo up", "lo", lambda ipr: ipr.link("set", index=1, state="up"))


def find_link(netns: int, name: str) -> LinkState | None:
    """The link called `name` in the namespace of descriptor `netns`, or None."""
    try:
        return call_in(netns, lambda: _request("look up", name, lambda ipr: _get(ipr, ifname=name)))
    except DeviceGone:
        return None


class Control:
    """One interface, addressed by its index, so that renames do not matter.

    `netns` says where it is; it belongs to the Control from here on, which :meth:`close`\\ s it.
    `relocate` is asked when the index is unknown there: it returns where the interface lives now
    (a NetNS to own, and the index), or None when it is gone, and the request is tried there.
    `strayed` is asked first, if given: whether the interface has left a namespace.

    Safe from any thread, and inside a running asyncio loop. Failures are OSErrors that say what
    was tried; DeviceGone when there is no such interface any more.
    """

    def __init__(
        self,
        netns: NetNS,
        index: int,
        name: str,
        relocate: Callable[[], tuple[NetNS, int] | None] | None = None,
        strayed: Callable[[NetNS], bool] | None = None,
    ) -> None:
        self.netns = netns
        self.index = index
        self.name = name
        self._relocate = relocate
        self._strayed = strayed

    def _here(self, operation: str, fn: Callable[[Any], _T]) -> _T:
        return call_in(self.netns.fd, lambda: _request(operation, self.name, fn))

    def _do(self, operation: str, fn: Callable[[Any], _T]) -> _T:
        for _ in range(MOVES):
            # Where it no longer is, its index may be somebody else's.
            if self._strayed is not None and self._strayed(self.netns):
                self.follow()
            try:
                return self._here(operation, fn)
            except DeviceGone:
                if not self.follow():
                    raise
        return self._here(operation, fn)

    def follow(self) -> bool:
        """Turn to where the interface is now; False when it is gone."""
        moved = self._relocate() if self._relocate is not None else None
        if moved is None:
            return False
        old, (self.netns, self.index) = self.netns, moved
        old.close()
        return True

    def get(self) -> LinkState:
        """The link as it is now. Follows renames: `name` is up to date afterwards."""
        state = self._do("look up", lambda ipr: _get(ipr, index=self.index))
        self.name = state.name
        return state

    def peek(self) -> LinkState | None:
        """The link where it was last seen, or None; does not look for it elsewhere."""
        try:
            return self._here("look up", lambda ipr: _get(ipr, index=self.index))
        except DeviceGone:
            return None

    def _set(self, operation: str, **what: Any) -> None:
        self._do(operation, lambda ipr: ipr.link("set", index=self.index, **what))

    def set_mtu(self, mtu: int) -> None:
        """Bytes of an IP packet; the kernel takes 68 to 65521 on a TAP, to 65535 on a TUN."""
        self._set(f"set the MTU to {mtu}", mtu=mtu)

    def set_mac(self, mac: MacAddr) -> None:
        self._set(f"set the Ethernet address to {mac}", address=str(mac))

    def set_txqueuelen(self, n: int) -> None:
        """Frames per queue that wait to be read. Shrinking throws frames away uncounted."""
        self._set(f"set txqueuelen to {n}", txqlen=n)

    def set_up(self, on: bool) -> None:
        """IFF_UP. Clearing it drops every route and all IPv6 addresses."""
        self._set(f"set the interface {'up' if on else 'down'}", state="up" if on else "down")

    def set_carrier(self, on: bool) -> None:
        """The carrier; pyroute2 ignores ``carrier=``, hence the attribute spelled out."""
        self._set(f"set the carrier {'on' if on else 'off'}", attrs=[("IFLA_CARRIER", int(on))])

    def set_flags(self, flags: int, mask: int) -> None:
        """Those interface flags (IFF_PROMISC, IFF_ALLMULTI, ...) that `mask` selects."""
        self._set(f"set flags {flags:#x}/{mask:#x}", flags=flags, change=mask)

    def delete(self) -> None:
        """Delete the interface, whoever has it open."""
        self._do("delete", lambda ipr: ipr.link("del", index=self.index))

    def close(self) -> None:
        """Release the namespace descriptor. Idempotent."""
        self._relocate = self._strayed = None
        self.netns.close()
