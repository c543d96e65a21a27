# SPDX-License-Identifier: BSD-3-Clause
"""The side that has the device: :func:`share` lends its queue pairs to other processes.

A connection is an attachment: when it ends, for whatever reason, the pairs that it had are free
again.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hmac
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rtap._core.forks import forget_in_child, renew_in_child
from rtap.drivers.options import Account, account_number
from rtap.errors import DeviceGone, DeviceStateError
from rtap.ethdev.device import EthDev
from rtap.ethdev.events import EthEvent
from rtap.sharing import pools
from rtap.sharing.figures import RELAYED, to_json
from rtap.sharing.places import Allowed
from rtap.sharing.server import Client, Server
from rtap.sharing.wire import VERSION, Message, MessageError, encode

__all__ = ["Lease", "Share", "share", "share_of"]


@dataclass(frozen=True)
class Lease:
    """A queue pair and who has it: its number `queue`, and the process `pid` of user `uid`.

    `pid` is 0 for a process that is not seen from here.
    """

    queue: int
    pid: int
    uid: int


#: The number of extended statistics in one message.
XSTATS_MANY = 512


def _bytes(key: str) -> bytes:
    return key.encode(errors="surrogatepass")  # JSON has them


def _assign(name: str) -> Callable[[EthDev, Any], None]:
    return lambda dev, value: setattr(dev, name, value)


#: What those that attached may ask of the device: its name, and how it is done.
CALLS: dict[str, Callable[..., Any]] = {
    "info": lambda dev: to_json(dev.info()),
    "link": lambda dev: to_json(dev.link()),
    "stats": lambda dev: to_json(dev.stats()),
    "xstats": lambda dev, start: dict(islice(dev.xstats().items(), start, start + XSTATS_MANY)),
    "stats_reset": EthDev.stats_reset,
    "xstats_reset": EthDev.xstats_reset,
    "set_link_up": EthDev.set_link_up,
    "set_link_down": EthDev.set_link_down,
    "mac": lambda dev: str(dev.mac),
    "app_mac": lambda dev: str(dev.app_mac),
    "mtu": lambda dev: dev.mtu,
    "set_mac": _assign("mac"),
    "set_app_mac": _assign("app_mac"),
    "set_mtu": _assign("mtu"),
    "set_promiscuous": _assign("promiscuous"),
    "set_allmulticast": _assign("allmulticast"),
    "set_mc_addr_list": _assign("mc_addr_list"),
    "mac_addr_add": EthDev.mac_addr_add,
    "mac_addr_remove": EthDev.mac_addr_remove,
}


class Share:
    """Queue pairs of a device that other processes may use; made by :func:`share`.

    `name` is what they pass to :func:`rtap.attach`, `path` the socket, `queues` the numbers of the
    pairs. A context manager that closes it; it also ends with the device.
    """

    def __init__(
        self, dev: EthDev, queues: Iterable[int], name: str, allowed: Allowed, key: str
    ) -> None:
        self.name = name
        self.queues = tuple(queues)
        self.key = key
        self._dev = weakref.ref(dev)
        self._in_child()
        renew_in_child(self)
        self._leases: dict[int, Client] = {}
        self._news: collections.deque[tuple[EthEvent | None, Any]] = collections.deque()
        self._server = Server(name, allowed, self)
        try:
            dev._set_aside(self.queues, self._server.end)
        except BaseException:
            self._server.end()
            raise
        _shares[dev] = self
        dev._port.listeners.append(self._note)
        try:
            self._server.start()
        except BaseException:
            self._server.end()
            self._leave(dev)
            raise

    def _in_child(self) -> None:
        self._lock = threading.Lock()  # of _leases, which the server's thread changes

    @property
    def path(self) -> str:
        """The socket."""
        return self._server.path

    @property
    def leases(self) -> dict[int, Lease]:
        """Who has which pair now, by its number."""
        with self._lock:
            return {
                queue: Lease(queue, client.peer.pid, client.peer.uid)
                for queue, client in sorted(self._leases.items())
            }

    def close(self) -> None:
        """End all attachments, and give the pairs back to this process. Idempotent."""
        self._server.end()
        self._server.join()
        dev = self._dev()
        if dev is not None and _shares.get(dev) is self:
            self._leave(dev)

    def _leave(self, dev: EthDev) -> None:
        del _shares[dev]
        with contextlib.suppress(ValueError):
            dev._port.listeners.remove(self._note)
        dev._put_back()

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = (
            "closed" if self._server.ended else f"{len(self._leases)} of {len(self.queues)} lent"
        )
        return f"<rtap.Share {self.name} {state}>"

    def _note(self, event: EthEvent | None, data: Any) -> None:
        """A listener of the device's port."""
        if event is None or event in RELAYED:
            self._news.append((event, data))
            self._server.alarm()

    # -- the server's thread

    def dropped(self, client: Client) -> None:
        """See :class:`rtap.sharing.server.Handler`."""
        for queue in sorted(client.queues):
            self._take_back(client, queue)

    def _take_back(self, client: Client, queue: int) -> None:
        client.queues.discard(queue)
        dev = self._dev()
        if dev is not None:
            dev._take_back(queue)
        with self._lock:
            self._leases.pop(queue, None)

    def answer(self, client: Client, message: Message) -> bytes | None:
        """See :class:`rtap.sharing.server.Handler`."""
        dev = self._dev()
        if dev is None:
            raise DeviceGone(errno.ENODEV, f"device {self.name} is closed")
        if message.kind == "list":
            return encode("listing", device=self._listing(dev))
        if message.kind == "attach":
            self._attach(dev, client, message)
            return None
        if not client.attached:
            raise DeviceStateError("attach first")
        if message.kind == "call":
            return encode("result", id=message.id, value=self._call(dev, message))
        if message.kind == "lease":
            self._lease(dev, client, message)
        elif message.kind == "give_back":
            for queue in client.queues & set(message.queues):
                self._take_back(client, queue)
        else:
            raise MessageError(f"{message.kind} goes the other way")
        return encode("result", id=message.id, value=sorted(client.queues))

    def _attach(self, dev: EthDev, client: Client, message: Message) -> None:
        if message.version != VERSION:
            raise ValueError(
                f"version {message.version} of the messages, process {os.getpid()} has {VERSION}: "
                "both need the same rtap"
            )
        if not hmac.compare_digest(_bytes(message.key), _bytes(self.key)):
            raise PermissionError(
                errno.EPERM, f"{self.name} is shared with processes that have its key"
            )
        welcome = encode("welcome", name=dev.name, device=self._state(dev))
        client.attached = True
        # Frames can then change hands between the processes without a copy.
        pool = dev.pool
        pools.know(pool)
        client.tell(welcome, [pool.fd] if pool.shared and pool.fd is not None else [])

    def _listing(self, dev: EthDev) -> dict[str, Any]:
        return {
            "name": self.name,
            "ifname": dev.ifname,
            "pid": os.getpid(),
            "queues": list(self.queues),
            "leases": [[lease.queue, lease.pid, lease.uid] for lease in self.leases.values()],
        }

    # -- leases

    def _wanted(self, message: Message) -> list[int]:
        """The numbers of the pairs that a request is for, all of them free."""
        free = [q for q in self.queues if q not in self._leases]
        if message.count < 0:
            raise ValueError(f"{message.count} queues are wanted")
        wanted = list(dict.fromkeys(message.queues)) or free[: message.count]
        for queue in wanted:
            if queue not in self.queues:
                shared = ", ".join(map(str, self.queues))
                raise ValueError(f"queue {queue} of {self.name} is not shared, {shared} are")
            if queue not in free:
                raise DeviceStateError(
                    f"queue {queue} of {self.name} is in use by {self._holder(queue)}"
                )
        if len(wanted) < (1 if message.queues else message.count):
            raise DeviceStateError(
                f"{self.name} has {len(free)} free queues, {message.count} are wanted; in use are "
                + ", ".join(f"{q} by {self._holder(q)}" for q in sorted(self._leases))
            )
        return wanted

    def _holder(self, queue: int) -> str:
        return f"process {self._leases[queue].peer.pid or '(of another container)'}"

    def _lease(self, dev: EthDev, client: Client, message: Message) -> None:
        for queue in self._wanted(message):
            loan = dev._lend(queue)
            client.queues.add(queue)
            with self._lock:
                self._leases[queue] = client
            with loan.rx_state, loan.tx_state:
                fds = (loan.rx_fd, loan.tx_fd, loan.rx_state.fileno(), loan.tx_state.fileno())
                client.tell(encode("leased", id=message.id, queue=queue), fds)

    # -- the device, asked and told

    def _call(self, dev: EthDev, message: Message) -> Any:
        call = CALLS.get(message.fields["name"])
        if call is None:
            raise ValueError("there is no such request")
        if len(message.args) != (0 if call.__code__.co_argcount == 1 else 1):
            raise TypeError(f"{message.fields['name']}: another number of arguments")
        return call(dev, *message.args)

    def _state(self, dev: EthDev) -> dict[str, Any]:
        """What those that attached have to know of the device."""
        with dev._lock:
            return {
                **dev._loan_terms(),
                "app_mac": str(dev.app_mac),
                "promiscuous": dev.promiscuous,
                "allmulticast": dev.allmulticast,
                "mac_addrs": {str(index): str(mac) for index, mac in dev._mac_addrs.items()},
                "mc_addr_list": [str(mac) for mac in dev.mc_addr_list],
            }

    def tell_news(self) -> None:
        """Pass on what has changed, and the events."""
        if not self._news:
            return
        events = []
        while self._news:
            event, data = self._news.popleft()
            if event is not None:
                data = to_json(data)
                events.append((event, encode("event", event=int(event), data=data)))
        dev = self._dev()
        messages: list[tuple[object, bytes]] = [*events]
        # The interface may be gone: then its end is all that there is to say.
        with contextlib.suppress(OSError, DeviceStateError):
            if dev is not None:
                messages.insert(0, ("state", encode("state", device=self._state(dev))))
        for client in self._server.clients():
            try:
                for news, message in messages:
                    client.tell(message, news=news)
            except OSError:
                self._server.drop(client)


#: The shares of the devices that have one.
_shares: weakref.WeakKeyDictionary[EthDev, Share] = weakref.WeakKeyDictionary()


forget_in_child(_shares.clear)


def share_of(dev: EthDev) -> Share | None:
    """The present share of a device."""
    return _shares.get(dev)


def _numbers(accounts: Iterable[Account], kind: str) -> frozenset[int]:
    numbers = (account_number(account, kind) for account in accounts)
    return frozenset(number for number in numbers if number is not None)


def share(
    dev: EthDev,
    queues: Iterable[int] | None = None,
    *,
    name: str | None = None,
    users: Iterable[Account] = (),
    groups: Iterable[Account] = (),
    key: str = "",
) -> Share:
    """Let other processes use queue pairs of `dev`: they call :func:`rtap.attach` with its name.

    `queues` are the numbers of the pairs, all by default. This process cannot burst on them until
    the share is closed; on its other queues it goes on. The kernel sends frames to a shared pair
    while a process has it. `name` is the device's by default.

    Root and the user of this process may attach, and beside them `users` and `groups`, numbers or
    names. A process is in its own group and in its supplementary ones, if these are 256 at most.
    With `key` all have to give the same one.

    ValueError for a queue that there is not, an unknown user or group, and a bad name;
    DeviceStateError when `dev` is shared already; FileExistsError when another process shares
    something under that name; OSError (EOPNOTSUPP) for a device without a kernel interface.
    """
    numbers = list(range(dev.info().nb_rx_queues) if queues is None else queues)
    if len(set(numbers)) != len(numbers) or (queues is not None and not numbers):
        raise ValueError(f"queues has numbers of queue pairs, each once, got {numbers}")
    allowed = Allowed(_numbers(users, "owner"), _numbers(groups, "group"))
    return Share(dev, numbers, dev.name if name is None else name, allowed, key)
