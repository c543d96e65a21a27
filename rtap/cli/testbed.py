# SPDX-License-Identifier: BSD-3-Clause
"""Two network namespaces joined by rtap between two TAP devices, or by a veth pair.

The namespaces are anonymous: they and the devices in them vanish with the process,
however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import rtap
from rtap.cli.errors import CommandError
from rtap.control.netns import NetNS
from rtap.errors import raise_errno
from rtap.flags import RxOffload, TxOffload

__all__ = ["Path", "RtapPath", "Traffic", "rtap_path", "veth_path"]

CLIENT = "10.9.0.1"
SERVER = "10.9.0.2"
PREFIX = 24


class Traffic(NamedTuple):
    """The kernel's counts of an interface's traffic in both directions."""

    n_bytes: int
    packets: int


class Path:
    """Two namespaces that reach each other; interface `ifname` is the server's end."""

    def __init__(self, name: str, client: NetNS, server: NetNS, ifname: str) -> None:
        self.name = name
        self.client = client
        self.server = server
        self.address = SERVER
        self._ifname = ifname.encode()
        # The file shows the interfaces of the namespace it was opened in.
        self._fd: int = server.call(os.open, "/proc/thread-self/net/dev", os.O_RDONLY)

    def traffic(self) -> Traffic:
        """The totals at the server's end: cheap enough to query during a measurement."""
        for line in os.pread(self._fd, 65536, 0).splitlines():
            name, colon, rest = line.partition(b":")
            if colon and name.strip() == self._ifname:
                numbers = [int(field) for field in rest.split()]
                return Traffic(numbers[0] + numbers[8], numbers[1] + numbers[9])
        raise CommandError(f"the interface {self._ifname.decode()} of {self.name} has vanished")

    def check(self) -> None:
        """CommandError when the connection of the namespaces has stopped working."""

    def close(self) -> None:
        """Release the counters. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class RtapPath(Path):
    """A worker that forwards between two devices, both directions."""

    def __init__(
        self,
        client: NetNS,
        server: NetNS,
        devices: tuple[rtap.EthDev, rtap.EthDev],
        worker: rtap.Worker,
    ) -> None:
        super().__init__("rtap", client, server, devices[1].ifname)
        self.devices = devices
        self.worker = worker

    def check(self) -> None:
        for route in self.worker.stats().routes:
            if route.error:
                raise CommandError(f"forwarding {route.source} ended: {route.error}")
        if not self.worker.running:
            raise CommandError("the forwarding worker has ended")


@contextlib.contextmanager
def _namespace() -> Iterator[NetNS]:
    try:
        ns = NetNS()
    except PermissionError:
        raise CommandError(
            "making network namespaces needs root, or a user namespace of one's own (unshare -Urn)"
        ) from None
    with ns:
        # Neighbour discovery and the like would only add unwanted packets.
        for scope in ("all", "default"):
            with contextlib.suppress(OSError):
                ns.call(_write, f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "1")
        yield ns


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _netlink(ns: NetNS, operation: str, fn: Callable[[Any], None]) -> None:
    """``fn(iproute)`` in a namespace; its failures as OSErrors."""
    pyroute2 = importlib.import_module("pyroute2")

    def request() -> None:
        with pyroute2.IPRoute() as ipr:
            try:
                fn(ipr)
            except pyroute2.NetlinkError as exc:
                raise_errno(exc.code, operation)

    ns.call(request)


def _configure(ns: NetNS, ifname: str, address: str, mtu: int) -> None:
    """Give an interface its address and MTU and set it up."""

    def request(ipr: Any) -> None:
        (index,) = ipr.link_lookup(ifname=ifname)
        ipr.link("set", index=index, mtu=mtu)
        ipr.addr("add", index=index, address=address, prefixlen=PREFIX)
        ipr.link("set", index=index, state="up")

    _netlink(ns, f"configure {ifname} with {address}/{PREFIX} and MTU {mtu}", request)


@contextlib.contextmanager
def veth_path(mtu: int) -> Iterator[Path]:
    """Two namespaces joined by a veth pair, with the kernel's defaults."""

    def make(ipr: Any) -> None:
        ipr.link("add", ifname="veth0", kind="veth", peer={"ifname": "veth1"})
        (peer,) = ipr.link_lookup(ifname="veth1")
        ipr.link("set", index=peer, net_ns_fd=server.fd)

    with _namespace() as client, _namespace() as server:
        try:
            _netlink(client, "make a veth pair", make)
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            raise CommandError("the kernel has no veth devices to compare with") from None
        _configure(client, "veth0", CLIENT, mtu)
        _configure(server, "veth1", SERVER, mtu)
        path = Path("veth", client, server, "veth1")
        with contextlib.closing(path):
            yield path


@contextlib.contextmanager
def rtap_path(*, offload: bool, engine: str, mtu: int) -> Iterator[RtapPath]:
    """Two namespaces with a TAP device each, and a worker that forwards between them.

    With `offload` TCP crosses in frames of up to 64 KiB whose checksums nobody computes, as it
    does over veth; without, in frames of the MTU.
    """
    rx, tx = RxOffload(0), TxOffload(0)
    if offload:
        rx = RxOffload.UDP_CKSUM | RxOffload.TCP_CKSUM | RxOffload.TCP_LRO
        tx = TxOffload.UDP_CKSUM | TxOffload.TCP_CKSUM | TxOffload.TCP_TSO
    with ExitStack() as stack:
        sides, devices = [], []
        for ifname, address in (("tap0", CLIENT), ("tap1", SERVER)):
            ns = stack.enter_context(_namespace())
            dev = rtap.open(
                ifname, netns=ns, mtu=mtu, rx_offloads=rx, tx_offloads=tx, engine=engine
            )
            stack.enter_context(dev)
            _configure(ns, ifname, address, mtu)
            sides.append(ns)
            devices.append(dev)
        worker = rtap.Worker()
        worker.forward((devices[0], 0), (devices[1], 0))
        worker.forward((devices[1], 0), (devices[0], 0))
        stack.enter_context(worker)
        path = RtapPath(sides[0], sides[1], (devices[0], devices[1]), worker)
        stack.enter_context(contextlib.closing(path))
        yield path
