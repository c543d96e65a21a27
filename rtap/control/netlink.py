# SPDX-License-Identifier: BSD-3-Clause
"""All requests of rtap to rtnetlink (``rtnetlink(7)``).

pyroute2 encodes requests that change a link. Queries of a link are made thousands of times: their
answers are decoded here, only the needed part, in a tenth of the time. ``stats()`` asks for
counters only.
Requests go through the namespace's :class:`~rtap.control.channel.Channel`; pyroute2's own sockets
are not used, since they run an asyncio event loop in the calling thread.
"""

from __future__ import annotations

import errno
import importlib
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rtap.control.channel import NLMSGHDR, Channel, NetNSKey, hold
from rtap.control.netns import NetNS
from rtap.errors import DeviceGone
from rtap.ether import MacAddr

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

#: How often a request follows an interface that moves again before the request gets there.
MOVES = 5


@dataclass(frozen=True)
class LinkState:
    """One link, as RTM_GETLINK describes it.

    ``kind`` is "tun" for TUN and TAP devices, which then have ``tun``: the IFLA_TUN_* attributes
    by name. ``dropped`` counts the frames that the kernel had for the reader and dropped; for the
    kernel that is sending. ``ethernet`` is whether frames begin with an Ethernet header.
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
    dropped: int
    txqueuelen: int = 0
    min_mtu: int = 68
    max_mtu: int = 65535
    ethernet: bool = True

    @property
    def up(self) -> bool:
        """IFF_UP: administratively up."""
        return bool(self.flags & IFF_UP)

    @property
    def persist(self) -> bool:
        """A TUN or TAP device that stays when its last descriptor is closed."""
        return bool(self.tun.get("IFLA_TUN_PERSIST", 0))

    @property
    def multi_queue(self) -> bool:
        return bool(self.tun.get("IFLA_TUN_MULTI_QUEUE", 0))

    @property
    def queues(self) -> int | None:
        """Descriptors attached to a TUN or TAP device, detached ones too; None before 4.20."""
        if "IFLA_TUN_NUM_QUEUES" in self.tun:
            detached = self.tun.get("IFLA_TUN_NUM_DISABLED_QUEUES", 0)
            return self.tun["IFLA_TUN_NUM_QUEUES"] + detached
        # The kernel leaves both counts out on a single-queue device.
        return None


# linux/rtnetlink.h, linux/netlink.h
_RTM_DELLINK = 17
_RTM_GETLINK = 18
_RTM_SETLINK = 19
_RTM_GETSTATS = 94
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
# struct ifinfomsg: family, type, index, flags, change.
_IFINFOMSG = struct.Struct("=BxHiII")
# struct if_stats_msg: family, index, mask of what is asked for (linux/if_link.h).
_IF_STATS_MSG = struct.Struct("=BxxxII")
_IFLA_STATS_LINK_64 = 1
# linux/if_arp.h; the loopback interface's frames have an Ethernet header too.
_ARPHRD_ETHER = 1
_ARPHRD_LOOPBACK = 772
_NLATTR = struct.Struct("=HH")
_NLA_TYPE_MASK = 0x3FFF

# linux/if_link.h
_IFLA_ADDRESS = 1
_IFLA_IFNAME = 3
_IFLA_MTU = 4
_IFLA_TXQLEN = 13
_IFLA_OPERSTATE = 16
_IFLA_LINKINFO = 18
_IFLA_STATS64 = 23
_IFLA_CARRIER = 33
_IFLA_CARRIER_CHANGES = 35
_IFLA_MIN_MTU = 50
_IFLA_MAX_MTU = 51
_IFLA_INFO_KIND = 1
_IFLA_INFO_DATA = 2
_TX_DROPPED = struct.Struct("=56xQ")  # the eighth of struct rtnl_link_stats64
_TUN = {
    1: "IFLA_TUN_OWNER",
    2: "IFLA_TUN_GROUP",
    3: "IFLA_TUN_TYPE",
    4: "IFLA_TUN_PI",
    5: "IFLA_TUN_VNET_HDR",
    6: "IFLA_TUN_PERSIST",
    7: "IFLA_TUN_MULTI_QUEUE",
    8: "IFLA_TUN_NUM_QUEUES",
    9: "IFLA_TUN_NUM_DISABLED_QUEUES",
}
_OPERSTATES = ("UNKNOWN", "NOTPRESENT", "DOWN", "LOWERLAYERDOWN", "TESTING", "DORMANT", "UP")


def _attributes(data: bytes, at: int = 0) -> dict[int, bytes]:
    found = {}
    unpack, size, end = _NLATTR.unpack_from, _NLATTR.size, len(data)
    while at + size <= end:
        length, kind = unpack(data, at)
        if length < size or at + length > end:
            break
        found[kind & _NLA_TYPE_MASK] = data[at + size : at + length]
        at += length + 3 & ~3
    return found


def _number(data: bytes | None) -> int:
    return int.from_bytes(data or b"", sys.byteorder)


def _text(data: bytes | None) -> str:
    return os.fsdecode((data or b"").rstrip(b"\0"))


def _dropped(stats: bytes) -> int:
    return int(_TX_DROPPED.unpack_from(stats)[0]) if len(stats) >= _TX_DROPPED.size else 0


def _link_state(answer: bytes) -> LinkState:
    _, hardware, index, flags, _ = _IFINFOMSG.unpack_from(answer)
    attrs = _attributes(answer, _IFINFOMSG.size)
    info = _attributes(attrs.get(_IFLA_LINKINFO, b""))
    kind = _text(info.get(_IFLA_INFO_KIND))
    tun = {}
    if kind == "tun":
        data = _attributes(info.get(_IFLA_INFO_DATA, b""))
        tun = {_TUN[at]: _number(value) for at, value in data.items() if at in _TUN}
    mac = attrs.get(_IFLA_ADDRESS, b"")
    operstate = _number(attrs.get(_IFLA_OPERSTATE))
    return LinkState(
        index=index,
        name=_text(attrs.get(_IFLA_IFNAME)),
        mtu=_number(attrs.get(_IFLA_MTU)),
        mac=MacAddr(mac if len(mac) == 6 else bytes(6)),
        flags=flags,
        carrier=bool(_number(attrs.get(_IFLA_CARRIER))),
        carrier_changes=_number(attrs.get(_IFLA_CARRIER_CHANGES)),
        operstate=_OPERSTATES[operstate] if operstate < len(_OPERSTATES) else "UNKNOWN",
        kind=kind,
        tun=tun,
        dropped=_dropped(attrs.get(_IFLA_STATS64, b"")),
        txqueuelen=_number(attrs.get(_IFLA_TXQLEN)),
        min_mtu=max(_number(attrs.get(_IFLA_MIN_MTU)), 68),
        # 0 is no limit.
        max_mtu=min(_number(attrs.get(_IFLA_MAX_MTU)) or 65535, 65535),
        ethernet=hardware in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK),
    )


def _get_message(index: int = 0, name: str = "") -> bytearray:
    """RTM_GETLINK of one link, by its index or its name."""
    attr = b""
    if name:
        value = os.fsencode(name) + b"\0"
        attr = _NLATTR.pack(_NLATTR.size + len(value), _IFLA_IFNAME) + value
        attr += bytes(-len(attr) % 4)
    length = NLMSGHDR.size + _IFINFOMSG.size + len(attr)
    return bytearray(
        NLMSGHDR.pack(length, _RTM_GETLINK, _NLM_F_REQUEST, 0, 0)
        + _IFINFOMSG.pack(0, 0, index, 0, 0)
        + attr
    )


def _get_counters_message(index: int) -> bytearray:
    """RTM_GETSTATS of one link: struct rtnl_link_stats64 and nothing else."""
    length = NLMSGHDR.size + _IF_STATS_MSG.size
    mask = 1 << (_IFLA_STATS_LINK_64 - 1)
    return bytearray(
        NLMSGHDR.pack(length, _RTM_GETSTATS, _NLM_F_REQUEST, 0, 0)
        + _IF_STATS_MSG.pack(0, index, mask)
    )


def _ifinfmsg() -> Any:
    # Not at the top: it takes a tenth of a second, too much for an import of rtap.
    return importlib.import_module("pyroute2.netlink.rtnl.ifinfmsg").ifinfmsg


def _message(kind: int, index: int, flags: int = 0, change: int = 0, **attrs: Any) -> bytearray:
    """A request that changes a link; `attrs` are IFLA_* attributes."""
    msg = _ifinfmsg()()
    msg["index"], msg["flags"], msg["change"] = index, flags, change
    msg["attrs"] = list(attrs.items())
    msg["header"]["type"] = kind
    msg["header"]["flags"] = _NLM_F_REQUEST | _NLM_F_ACK
    msg.encode()
    return bytearray(msg.data)


def loopback_up() -> None:
    """Set ``lo`` of the calling thread's network namespace up."""
    channel = Channel()
    try:
        channel.request(_message(_RTM_SETLINK, 1, IFF_UP, IFF_UP), "set lo up", "lo")
    finally:
        channel.close()


def find_link(netns: int, name: str) -> LinkState | None:
    """The link called `name` in the namespace of descriptor `netns`, or None."""
    with hold(netns) as channel:
        try:
            return _link_state(channel.request(_get_message(name=name), "look up", name, netns))
        except DeviceGone:
            return None


class Control:
    """One interface, addressed by its index, so that renames do not matter.

    `netns` says where it is; from here on it belongs to the Control, which :meth:`close`\\ s it.
    `relocate` is called when the index is unknown there: it returns the interface's present place
    (a NetNS to own, and the index), where the request is tried again, or None when it is gone.
    `strayed`, if given, is called first: whether the interface has left the namespace of a key.

    Safe from any thread, and inside a running asyncio loop. Failures are OSErrors that say what
    was tried; DeviceGone when the interface no longer exists.
    """

    def __init__(
        self,
        netns: NetNS,
        index: int,
        name: str,
        relocate: Callable[[], tuple[NetNS, int] | None] | None = None,
        strayed: Callable[[NetNSKey | None], bool] | None = None,
    ) -> None:
        self.netns = netns
        self.index = index
        self.name = name
        self._relocate = relocate
        self._strayed = strayed
        _ifinfmsg()  # while its files can be read, before a chroot
        self._channel = hold(netns.fd)
        self._closed = False

    def _here(self, operation: str, make: Callable[[int], bytearray]) -> bytes:
        return self._channel.request(make(self.index), operation, self.name, self.netns.fd)

    def _do(self, operation: str, make: Callable[[int], bytearray]) -> bytes:
        for _ in range(MOVES):
            # In its old namespace, another interface may have its index now.
            if self._strayed is not None and self._strayed(self._channel.key):
                self.follow()
            try:
                return self._here(operation, make)
            except DeviceGone:
                if not self.follow():
                    raise
        return self._here(operation, make)

    def follow(self) -> bool:
        """Change to the interface's present namespace; False when it is gone."""
        moved = self._relocate() if self._relocate is not None else None
        if moved is None:
            return False
        try:
            channel = hold(moved[0].fd)
        except BaseException:
            moved[0].close()
            raise
        old, (self.netns, self.index) = self.netns, moved
        channel, self._channel = self._channel, channel
        channel.release()
        old.close()
        return True

    def get(self) -> LinkState:
        """The link as it is now. Follows renames: `name` is up to date afterwards."""
        state = _link_state(self._do("look up", _get_message))
        self.name = state.name
        return state

    def get_dropped(self) -> int:
        """:attr:`LinkState.dropped` alone, as it is now, at a quarter of the cost."""
        try:
            answer = self._do("count drops", _get_counters_message)
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:  # Linux before 4.7
                raise
            return self.get().dropped
        return _dropped(_attributes(answer, _IF_STATS_MSG.size).get(_IFLA_STATS_LINK_64, b""))

    def peek(self) -> LinkState | None:
        """The link where it was last seen, or None; does not search elsewhere."""
        try:
            return _link_state(self._here("look up", _get_message))
        except DeviceGone:
            return None

    def _set(self, operation: str, flags: int = 0, change: int = 0, **attrs: Any) -> None:
        self._do(operation, lambda index: _message(_RTM_SETLINK, index, flags, change, **attrs))

    def set_mtu(self, mtu: int) -> None:
        """Set the bytes of an IP packet; the kernel takes 68 to 65521 on a TAP, up to 65535 on a
        TUN."""
        self._set(f"set the MTU to {mtu}", IFLA_MTU=mtu)

    def set_mac(self, mac: MacAddr) -> None:
        self._set(f"set the Ethernet address to {mac}", IFLA_ADDRESS=str(mac))

    def set_txqueuelen(self, n: int) -> None:
        """Set how many frames may wait in each queue. Shrinking throws frames away uncounted."""
        self._set(f"set txqueuelen to {n}", IFLA_TXQLEN=n)

    def set_up(self, on: bool) -> None:
        """Set or clear IFF_UP. Clearing it drops every route and all IPv6 addresses."""
        self._set(f"set the interface {'up' if on else 'down'}", IFF_UP if on else 0, IFF_UP)

    def delete(self) -> None:
        """Delete the interface, even if others have it open."""
        self._do("delete", lambda index: _message(_RTM_DELLINK, index))

    def close(self) -> None:
        """Release the namespace, its descriptor and its socket. Idempotent."""
        self._relocate = self._strayed = None
        if not self._closed:
            self._closed = True
            self._channel.release()
        self.netns.close()
