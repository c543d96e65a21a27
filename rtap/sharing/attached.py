# SPDX-License-Identifier: BSD-3-Clause
"""The ops table of a device that another process has.

The queues are this process's own, on descriptors that the other one passed on; what concerns the
interface, the other one is asked to do.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from rtap._core.mempool import Mempool
from rtap._core.queue import occupied
from rtap._ring import STATE_SIZE, RxQueue, TxQueue
from rtap.control import tun
from rtap.control.netlink import LinkState
from rtap.drivers.filter import RxFilter
from rtap.drivers.interface import InterfaceDriver
from rtap.ethdev.events import Port
from rtap.ethdev.ops import DevInfo, EthConf, Link, Stats
from rtap.ether import MacAddr
from rtap.flags import RxOffload, TxOffload
from rtap.sharing.connection import Borrowed, Connection
from rtap.sharing.figures import from_json
from rtap.sharing.share import XSTATS_MANY
from rtap.sharing.wire import MessageError

__all__ = ["Attached", "Terms", "checked_terms"]


@dataclass(frozen=True)
class Terms:
    """What the process that has the device says of it."""

    driver: str
    ifname: str
    mode: str
    mtu: int
    nb_queues: int
    rx_offloads: RxOffload
    tx_offloads: TxOffload
    tx_gro: bool
    rx_gso: bool
    asked: RxOffload
    plugged: bool
    state_size: int
    app_mac: MacAddr
    promiscuous: bool
    allmulticast: bool
    #: Arguments of the queues.
    rx: dict[str, Any]
    tx: dict[str, Any]
    mac_addrs: dict[str, Any]
    mc_addr_list: list[Any]

    @property
    def filter(self) -> RxFilter:
        return RxFilter(
            self.promiscuous,
            self.allmulticast,
            {int(index): MacAddr(mac) for index, mac in self.mac_addrs.items()},
            tuple(MacAddr(mac) for mac in self.mc_addr_list),
        )


_QUEUE_ARGUMENTS: dict[str, type] = {
    "split": bool,
    "vnet_hdr": bool,
    "packet": bool,
    "ordered": bool,
    "offloads": int,
}


def _fits_queue(name: str, value: Any) -> bool:
    kind: Any = _QUEUE_ARGUMENTS.get(name)
    return type(value) is kind and int(value) >= 0


def checked_terms(device: dict[str, Any]) -> Terms:
    """MessageError when they cannot be those of a device."""
    terms = from_json(Terms, device)
    if not all(_fits_queue(*item) for item in (*terms.rx.items(), *terms.tx.items())):
        raise MessageError("the arguments of queues are others")
    if terms.mode not in ("tap", "tun") or not 1 <= terms.nb_queues <= 128:
        raise MessageError("it is no device")
    try:
        _ = terms.filter
    except (TypeError, ValueError, AttributeError) as exc:
        raise MessageError(f"the addresses are none: {exc}") from None
    if terms.state_size != STATE_SIZE:
        raise MessageError("the other process has another version of rtap")
    return terms


class Attached(InterfaceDriver):
    """The ops table of a device that another process has."""

    def __init__(self, port: Port, connection: Connection, terms: Terms) -> None:
        super().__init__(port)
        self._connection = connection
        self._files: dict[int, Borrowed] = {}
        self._closed = False
        self.take(terms)

    def take(self, terms: Terms) -> None:
        """Follow a change of the device."""
        self.terms = terms
        self._mode = terms.mode
        self._filter = terms.filter
        self._take_name(terms.ifname)
        for rxq in self._rxq.values():
            self._filter.apply(rxq)
        for txq in self._txq.values():
            txq.set_plugged(terms.plugged)
        self._fit(terms.mtu)

    def _ask(self, name: str, *args: Any) -> Any:
        return self._connection.call(name, *args)

    def _change(self, name: str, *args: Any) -> None:
        """Ask for a change of the device; our queues follow before this returns."""
        self._ask(name, *args)
        state = self._connection.latest_state()
        if state is not None:
            self.take(checked_terms(state.device))

    # -- for the base class

    @property
    def ifname(self) -> str:
        return self.terms.ifname

    @property
    def _shown(self) -> str:
        return self.terms.ifname

    def _asked(self) -> RxOffload:
        return self.terms.asked

    def _takes(self, now: LinkState) -> bool:
        return self.terms.plugged

    def _is_live(self, queue_id: int) -> bool:
        return queue_id in self._rxq

    def _fds_of(self, queue_id: int) -> tuple[int, int]:
        files = self._files[queue_id]
        return files.rx.fileno(), files.tx.fileno()

    def _rx_terms(self) -> dict[str, Any]:
        return {"split": False, **self.terms.rx, "shared": True}

    def _tx_terms(self) -> dict[str, Any]:
        return {**self.terms.tx, "shared": True}

    def _steer(self, queue_id: int, on: bool) -> None:
        """The process that has the device does that."""

    def loan_terms(self) -> NoReturn:
        self._refuse("is attached: the process that has it shares it")

    # -- queues

    def lend_to_us(self, borrowed: dict[int, Borrowed]) -> None:
        """Queues on these descriptors can be set up."""
        self._files.update(borrowed)
        for files in borrowed.values():
            self._check_files(files)

    def _check_files(self, files: Borrowed) -> None:
        if self.terms.driver == "net_rtap":
            for descriptor in (files.rx, files.tx):
                tun.get_iface(descriptor.fileno(), self.terms.ifname)
            return
        for descriptor in (files.rx, files.tx):
            with socket.socket(fileno=os.dup(descriptor.fileno())) as sock:
                if sock.family != socket.AF_PACKET:
                    raise MessageError("the descriptors are no packet sockets")

    def give_up(self, queue_id: int) -> None:
        """Close the descriptors of a pair that is not set up."""
        files = self._files.pop(queue_id, None)
        if files is not None:
            files.close()

    def _make_rx(self, queue_id: int, nb_desc: int, pool: Mempool) -> RxQueue:
        files = self._files[queue_id]
        return self._rx_queue(
            files.rx.fileno(),
            queue_id,
            nb_desc,
            pool,
            state_fd=files.rx_state.fileno(),
            **self._rx_terms(),
        )

    def _make_tx(self, queue_id: int, nb_desc: int) -> TxQueue:
        files = self._files[queue_id]
        txq = self._tx_queue(
            files.tx.fileno(),
            queue_id,
            nb_desc,
            state_fd=files.tx_state.fileno(),
            **self._tx_terms(),
        )
        txq.set_plugged(self.terms.plugged)
        return txq

    # -- device

    def dev_infos_get(self) -> DevInfo:
        info = from_json(DevInfo, self._ask("info"))
        return replace(info, rx_gso=self.terms.rx_gso, tx_gro=self.terms.tx_gro)

    def dev_configure(self, nb_rx_queues: int, nb_tx_queues: int, conf: EthConf) -> None:
        self._conf = conf
        self._nb_queues = (nb_rx_queues, nb_tx_queues)

    def dev_start(self) -> None:
        self._start_queues()
        self._started = True
        for intr in self._intr.values():
            intr.set_live(True)

    def dev_stop(self) -> None:
        self._stop_queues()
        self._started = False

    def dev_close(self) -> None:
        self._started = False
        self._closed = True
        with contextlib.ExitStack() as stack:
            # The last entry runs first; if one fails, the rest is still done.
            stack.callback(self._connection.close)
            for files in self._files.values():
                stack.callback(files.close)
            for queue in self._queues():
                stack.callback(queue.close)
            for intr in self._intr.values():
                stack.callback(intr.close)
            self._files.clear()
            self._intr.clear()
            self._rxq.clear()
            self._txq.clear()

    def dev_forked(self) -> None:
        for intr in self._intr.values():
            intr.close()
        for files in self._files.values():
            files.close()
        self._connection.forget()

    def cut_off(self) -> None:
        """The other process is gone: bursts raise, and the descriptors are closed when the last is
        over, so that the interface can go."""
        for queue in self._queues():
            queue.cut_off()
        for intr in self._intr.values():
            intr.end()

    def let_go(self) -> bool:
        """Close the descriptors if no burst is in progress any more; whether that is done."""
        if self._closed:
            return True
        if occupied(self._queues()):
            return False
        for queue in self._queues():
            queue.renew()
        for files in self._files.values():
            files.close()
        return True

    # -- control

    def link_update(self) -> Link:
        return from_json(Link, self._ask("link"))

    def dev_set_link_up(self) -> None:
        self._change("set_link_up")

    def dev_set_link_down(self) -> None:
        self._change("set_link_down")

    def mac_addr_get(self) -> MacAddr:
        return self._ask_mac("mac")

    def mac_addr_set(self, mac: MacAddr) -> None:
        self._change("set_mac", str(mac))

    def app_mac_get(self) -> MacAddr:
        return self._ask_mac("app_mac")

    def _ask_mac(self, name: str) -> MacAddr:
        try:
            return MacAddr(self._ask(name))
        except TypeError as exc:
            raise MessageError(f"{name}: {exc}") from None

    def mtu_get(self) -> int:
        mtu = self._ask("mtu")
        if type(mtu) is not int:
            raise MessageError("the MTU is no number")
        return mtu

    def mtu_set(self, mtu: int) -> None:
        self._make_room_for(mtu)
        self._change("set_mtu", mtu)

    # -- the receive filter: it is the device's, and comes back as news

    def app_mac_set(self, mac: MacAddr) -> None:
        self._change("set_app_mac", str(mac))

    def promiscuous_enable(self) -> None:
        self._change("set_promiscuous", True)

    def promiscuous_disable(self) -> None:
        self._change("set_promiscuous", False)

    def allmulticast_enable(self) -> None:
        self._change("set_allmulticast", True)

    def allmulticast_disable(self) -> None:
        self._change("set_allmulticast", False)

    def mac_addr_add(self, mac: MacAddr, index: int) -> None:
        self._change("mac_addr_add", str(mac))

    def mac_addr_remove(self, index: int) -> None:
        self._change("mac_addr_remove", str(self._filter.addresses[index]))

    def set_mc_addr_list(self, groups: Sequence[MacAddr]) -> None:
        self._change("set_mc_addr_list", [str(group) for group in groups])

    # -- statistics: those of the whole device

    def stats_get(self) -> Stats:
        return from_json(Stats, self._ask("stats"))

    def stats_reset(self) -> None:
        self._ask("stats_reset")

    def xstats_get(self) -> dict[str, int]:
        found: dict[str, int] = {}
        while True:
            part = self._ask("xstats", len(found))
            if not isinstance(part, dict) or not all(type(n) is int for n in part.values()):
                raise MessageError("the statistics are no numbers")
            found.update(part)
            if len(part) < XSTATS_MANY:
                return found

    def xstats_reset(self) -> None:
        self._ask("xstats_reset")
