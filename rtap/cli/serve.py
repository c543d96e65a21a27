# SPDX-License-Identifier: BSD-3-Clause
"""Open devices and lend their queue pairs to other processes, until SIGINT or SIGTERM comes.

Others use them with rtap.attach(NAME) and need no rights for that. This process gives up all
rights but CAP_NET_ADMIN before it opens anything, and is no other user's but with --user.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import rtap
from rtap.cli.errors import CommandError, Interrupted, Stop
from rtap.cli.rights import CAP_NET_ADMIN, CAP_NET_RAW, User, keep_only
from rtap.control.netns import NetNS, enter
from rtap.drivers.open_tap import rx_data_room
from rtap.drivers.options import Account, account_number
from rtap.ethdev.devargs import DevArgs, parse_devargs
from rtap.ethdev.events import EthEvent
from rtap.ethdev.ops import EthConf
from rtap.ether import MacAddr
from rtap.flags import RxOffload, TxOffload
from rtap.sharing import places
from rtap.sharing.share import Share, share

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "serve"
HELP = "open devices and lend their queue pairs to other processes"

#: Mbufs of a device: this process receives nothing.
POOL_SIZE = 64
MAX_QUEUES = 128
MAX_MTU = 65535
#: The device arguments that this command takes, beside the driver's.
KEYS = (
    "queues=N",
    "mtu=BYTES",
    "mac=ADDRESS",
    "rx_offloads=FLAGS",
    "tx_offloads=FLAGS",
    "tx_gro",
    "rx_gso",
)
#: Modules that only requests of others need. Without rights it may not be able to read them.
LATER = ("pyroute2.netlink.rtnl.ifinfmsg", "encodings.idna")

_Flags = TypeVar("_Flags", RxOffload, TxOffload)


@dataclass(frozen=True)
class Device:
    """A ``--vdev``: the driver's part of it, and the rest."""

    given: str
    name: str
    devargs: str
    queues: int
    mac: MacAddr | None
    conf: EthConf

    @classmethod
    def parse(cls, text: str) -> Device:
        """ValueError names what is wrong."""
        try:
            args = parse_devargs(text)
            queues = args.take_int("queues", 1, 1, MAX_QUEUES)
            mac = MacAddr(args.take_str("mac", "")) if "mac" in args.args else None
            conf = EthConf(
                rx_offloads=_flags(args, "rx_offloads", RxOffload),
                tx_offloads=_flags(args, "tx_offloads", TxOffload),
                mtu=args.take_int("mtu", 0, 68, MAX_MTU) if "mtu" in args.args else None,
                # Nothing is received or sent here: those that attach choose their own.
                engine="syscall",
                tx_gro=args.take_flag("tx_gro"),
                rx_gso=args.take_flag("rx_gso"),
            )
        except ValueError as exc:
            raise ValueError(f"--vdev={text}: {exc}") from None
        rest = [key if value is None else f"{key}={value}" for key, value in args.args.items()]
        return cls(text, args.name, ",".join([args.name, *rest]), queues, mac, conf)

    @property
    def is_packet(self) -> bool:
        return self.name.startswith(("net_af_packet", "eth_af_packet"))

    def open(self, stack: contextlib.ExitStack) -> rtap.EthDev:
        """The device, started; `stack` closes it."""
        try:
            dev = rtap.probe(self.devargs)
        except ValueError as exc:
            also = f", {', '.join(KEYS)}" if "unknown device argument" in str(exc) else ""
            raise CommandError(f"--vdev={self.given}: {exc}{also}") from None
        stack.enter_context(dev)
        try:
            dev.configure(self.queues, self.queues, self.conf)
            if self.mac is not None:
                dev.mac = self.mac
            # Room for any MTU that others may ask for. It is only reserved.
            room = rx_data_room(dev.info().max_mtu, self.conf.rx_offloads, "tap")
            pool = rtap.Mempool(POOL_SIZE, room, name=dev.name)
            for queue in range(self.queues):
                dev.rx_queue_setup(queue, 1, pool)
                dev.tx_queue_setup(queue, 1)
            dev.start()
        except ValueError as exc:
            raise CommandError(f"--vdev={self.given}: {exc}") from None
        return dev


def _flags(args: DevArgs, key: str, kind: type[_Flags]) -> _Flags:
    """Names joined by ``+``, or a mask as testpmd has it (``0x1c``)."""
    text = args.take_str(key, "0x0")
    found = kind(0)
    try:
        if text.startswith("0x"):
            return kind(int(text, 16))
        for name in text.split("+"):
            found |= kind[name]
    except (KeyError, ValueError):
        names = ", ".join(kind.__members__)
        raise ValueError(
            f"{args.name}: {key} is a mask like 0x1c, or names joined by +, of {names}; got "
            f"{text!r}"
        ) from None
    return found


def _account(kind: str) -> Callable[[str], int]:
    """A parser of users (`kind` is "owner") or groups, by name or number."""

    def parse(text: str) -> int:
        value: Account = int(text) if text.isascii() and text.isdigit() else text
        try:
            number = account_number(value, kind)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from None
        assert number is not None
        return number

    return parse


def _checked(parse: Callable[[str], object]) -> Callable[[str], object]:
    """A type of argparse that passes the message of a ValueError on."""

    def checked(text: str) -> object:
        try:
            return parse(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from None

    return checked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rtap serve``."""
    parser.add_argument(
        "--vdev",
        action="append",
        default=[],
        metavar="DEVARGS",
        help="a device: net_rtap0,iface=tap0,queues=4; may be given several times. "
        f"Beside the driver's arguments it takes {', '.join(KEYS)}",
    )
    parser.add_argument(
        "--owner",
        action="append",
        type=_account("owner"),
        default=[],
        metavar="USER",
        help="a user who may attach, beside root and the user of this process; may be repeated",
    )
    parser.add_argument(
        "--group",
        action="append",
        type=_account("group"),
        default=[],
        metavar="GROUP",
        help="a group whose members may attach, if it is their process's own; may be repeated",
    )
    parser.add_argument(
        "--name", help="the name to attach to, for a single device (default: the device's)"
    )
    parser.add_argument(
        "--netns",
        metavar="NAME",
        help="the network namespace of the interfaces: a name of ip netns, or a path",
    )
    parser.add_argument(
        "--user",
        type=_checked(User.named),
        help="become this user before anything is opened, and keep CAP_NET_ADMIN only",
    )


# ---- waiting


class Wake:
    """Descriptors that become readable when a signal comes, or an interface is gone."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.gone: list[str] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[Wake]:
        before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        try:
            yield self
        finally:
            signal.set_wakeup_fd(before)
            os.close(self._read)
            os.close(self._write)

    def lost(self, dev: rtap.EthDev, event: EthEvent, data: object) -> None:
        """A callback of INTR_RMV."""
        self.gone.append(dev.name)
        with contextlib.suppress(OSError):  # full, or just closed
            os.write(self._write, b"\0")

    def wait(self) -> None:
        select.select([self._read], [], [])
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 512)


def _notify(state: str) -> None:
    """Tell systemd, if it wants to know (``sd_notify(3)``)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        address = "\0" + path[1:] if path.startswith("@") else path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(state.encode(), address)


# ---- the command


def _devices(args: argparse.Namespace) -> list[Device]:
    if not args.vdev:
        raise ValueError(
            "--vdev: at least one device is needed, for instance "
            "--vdev=net_rtap0,iface=tap0,queues=4"
        )
    if args.name is not None:
        if len(args.vdev) > 1:
            raise ValueError("--name is for a single device; several are named by --vdev")
        places.checked_name(args.name)
    devices = [Device.parse(text) for text in args.vdev]
    for device in devices:
        places.checked_name(args.name or device.name)
    return devices


def _make_directory(user: User) -> None:
    """Make the sockets' directory for a user who may not be able to."""
    directory = places.directories()[0]
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
        os.chown(directory, user.uid, user.gid)


def _confine(args: argparse.Namespace, devices: list[Device]) -> None:
    """Go where the interfaces are, and give up the rights that only this takes."""
    for module in LATER:
        importlib.import_module(module)
    if args.netns is not None:
        with NetNS.from_name(args.netns) as there:
            enter(there)
    if args.user is not None:
        _make_directory(args.user)
    keep = {CAP_NET_ADMIN}
    if any(device.is_packet for device in devices):
        keep.add(CAP_NET_RAW)  # each end of a lease takes a new socket
    keep_only(keep, args.user)


def _line(dev: rtap.EthDev, shared: Share) -> str:
    n = len(shared.queues)
    queues = f"{n} queue{'s' if n > 1 else ''}"
    return f"{shared.name}: interface {dev.ifname}, {queues}, socket {shared.path}"


def _serve(
    args: argparse.Namespace,
    devices: list[Device],
    stack: contextlib.ExitStack,
    wake: Wake,
    stop: Stop,
) -> None:
    """Open and share all of them, then say so."""
    lines = []
    for device in devices:
        stop.check()
        dev = device.open(stack)
        name = args.name or dev.name
        shared = stack.enter_context(share(dev, name=name, users=args.owner, groups=args.group))
        stack.callback(dev.close)  # before the share: nothing is given back
        stack.callback(dev.callback_register(EthEvent.INTR_RMV, wake.lost).unregister)
        lines.append(_line(dev, shared))
    print("\n".join(lines), flush=True)
    _notify("READY=1")


def _stay(devices: list[Device], wake: Wake, stop: Stop) -> NoReturn:
    """Until a signal comes, which raises Interrupted, or no interface is left."""
    left = {device.name for device in devices}
    while left:
        wake.wait()
        stop.check()
        while wake.gone:
            name = wake.gone.pop()
            left.discard(name)
            print(f"rtap {NAME}: the interface of {name} is gone", file=sys.stderr, flush=True)
    raise CommandError("no interface is left, start it again to make them anew")


def run(args: argparse.Namespace) -> int:
    """Run ``rtap serve`` with parsed arguments."""
    devices = _devices(args)
    _confine(args, devices)
    with (
        contextlib.suppress(Interrupted),  # the normal end
        Wake().installed() as wake,
        Stop().installed() as stop,
        contextlib.ExitStack() as stack,
    ):
        _serve(args, devices, stack, wake, stop)
        _stay(devices, wake, stop)
    return 0
