# SPDX-License-Identifier: BSD-3-Clause
"""Every ioctl on ``/dev/net/tun`` that rtap makes (``linux/if_tun.h``).

The functions take a descriptor and raise OSError through :func:`rtap.errors.raise_errno`;
a deleted interface is a DeviceGone. They know nothing of devices and queues.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import NoReturn

from rtap._core.descriptor import Descriptor
from rtap.errors import raise_errno
from rtap.ether import MacAddr

__all__ = [
    "DEV_PATH",
    "VNET_HDR_LEN",
    "QueueFile",
    "QueueFlag",
    "TunFeature",
    "TunIface",
    "attach_queue",
    "check_ifname",
    "device_netns",
    "get_features",
    "get_iface",
    "get_mac",
    "get_sndbuf",
    "join",
    "open_control",
    "open_file",
    "open_queue",
    "reset_filters",
    "set_carrier",
    "set_group",
    "set_header",
    "set_offload",
    "set_owner",
    "set_persist",
    "set_queue_attached",
    "set_sndbuf",
]

DEV_PATH = "/dev/net/tun"

#: Bytes of ``struct virtio_net_hdr`` in front of each frame (virtio 1.2, 5.1.6).
VNET_HDR_LEN = 10

IFNAMSIZ = 16


class QueueFlag(IntFlag):
    """``ifr_flags`` of TUNSETIFF and TUNGETIFF."""

    TUN = 0x0001
    TAP = 0x0002
    NAPI = 0x0010
    NAPI_FRAGS = 0x0020
    MULTI_QUEUE = 0x0100
    ATTACH_QUEUE = 0x0200
    DETACH_QUEUE = 0x0400
    PERSIST = 0x0800
    NO_PI = 0x1000
    ONE_QUEUE = 0x2000
    VNET_HDR = 0x4000
    TUN_EXCL = 0x8000


class TunFeature(IntFlag):
    """``TUN_F_*``: work that the kernel may leave undone in the frames it hands over."""

    CSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    TSO_ECN = 0x08
    UFO = 0x10
    USO4 = 0x20
    USO6 = 0x40


def _ioctl_bits(machine: str) -> tuple[int, int, int, int]:
    """(none, read, write, bits of the size field) of this architecture's ``asm/ioctl.h``."""
    if machine.startswith(("ppc", "powerpc", "mips", "sparc", "alpha")):
        return 1, 2, 4, 13
    if machine.startswith("parisc"):
        return 0, 1, 2, 14
    return 0, 2, 1, 14


_NONE, _READ, _WRITE, _SIZE_BITS = _ioctl_bits(os.uname().machine)


def _ioc(direction: int, number: int, size: int) -> int:
    # The direction sits above the size, the size above the type byte and the number byte.
    return direction << (16 + _SIZE_BITS) | size << 16 | ord("T") << 8 | number


_INT = struct.calcsize("i")
_INT_MAX = (1 << (8 * _INT - 1)) - 1
TUNSETIFF = _ioc(_WRITE, 202, _INT)
TUNSETPERSIST = _ioc(_WRITE, 203, _INT)
TUNSETOWNER = _ioc(_WRITE, 204, _INT)
TUNSETGROUP = _ioc(_WRITE, 206, _INT)
TUNGETFEATURES = _ioc(_READ, 207, _INT)
TUNSETOFFLOAD = _ioc(_WRITE, 208, _INT)
TUNGETIFF = _ioc(_READ, 210, _INT)
TUNGETSNDBUF = _ioc(_READ, 211, _INT)
TUNSETTXFILTER = _ioc(_WRITE, 209, _INT)
TUNSETSNDBUF = _ioc(_WRITE, 212, _INT)
TUNDETACHFILTER = _ioc(_WRITE, 214, struct.calcsize("HP"))
_TUNDETACHFILTER_64 = _ioc(_WRITE, 214, 16)
TUNSETVNETHDRSZ = _ioc(_WRITE, 216, _INT)
TUNSETQUEUE = _ioc(_WRITE, 217, _INT)
TUNSETVNETLE = _ioc(_WRITE, 220, _INT)
TUNSETSTEERINGEBPF = _ioc(_READ, 224, _INT)
TUNSETFILTEREBPF = _ioc(_READ, 225, _INT)
TUNSETCARRIER = _ioc(_WRITE, 226, _INT)
TUNGETDEVNETNS = _ioc(_NONE, 227, 0)
SIOCGIFHWADDR = 0x8927  # asm-generic/sockios.h, the same everywhere

# struct ifreq: the name, then a union whose largest member is struct ifmap (two longs and more).
_IFREQ_SIZE = IFNAMSIZ + 2 * struct.calcsize("L") + 8


def _ifreq(name: str, flags: int) -> bytes:
    return struct.pack(f"{IFNAMSIZ}sH", os.fsencode(name), flags).ljust(_IFREQ_SIZE, b"\0")


@dataclass(frozen=True)
class TunIface:
    """The answer of TUNGETIFF: the interface's present name and its real flags."""

    name: str
    flags: QueueFlag


def check_ifname(name: str, *, pattern: bool = True) -> str:
    """Return `name` if the kernel would take it as an interface name (``dev_valid_name``).

    1 to 15 bytes, no slash, colon or white space, not ``.`` or ``..``; with `pattern` one ``%d``
    stands for the first free number. ValueError says what is wrong.
    """
    if not isinstance(name, str):
        raise TypeError(f"an interface name is a str, got {type(name).__name__}")
    raw = os.fsencode(name)
    if not 1 <= len(raw) < IFNAMSIZ:
        raise ValueError(f"an interface name has 1 to 15 bytes, got {len(raw)}: {name!r}")
    if name in (".", "..") or "\0" in name or any(c in b"/: \t\n\v\f\r\xa0" for c in raw):
        raise ValueError(
            f"an interface name is not . or .. and has no slash, colon or white space, got {name!r}"
        )
    if "%" in name.replace("%d", "", 1 if pattern else 0):
        raise ValueError(
            f"an interface name has no %{' but one %d' if pattern else ''}, got {name!r}"
        )
    return name


def _fail(exc: OSError, operation: str, ifname: str = "", hint: str = "") -> NoReturn:
    raise_errno(exc.errno or errno.EIO, operation, ifname, hint=hint)


def _set_int(fd: int, request: int, value: int, operation: str, ifname: str) -> None:
    try:
        fcntl.ioctl(fd, request, struct.pack("i", value))
    except OSError as exc:
        _fail(exc, operation, ifname)


def _set_value(fd: int, request: int, value: int, operation: str, ifname: str) -> None:
    # These take the number itself where the others take a pointer to it; fcntl wants it signed.
    try:
        fcntl.ioctl(fd, request, struct.unpack("i", struct.pack("I", value))[0])
    except OSError as exc:
        _fail(exc, operation, ifname)


class QueueFile(Descriptor):
    """An open ``/dev/net/tun``."""


def open_control() -> QueueFile:
    """Open ``/dev/net/tun`` (close-on-exec, non-blocking).

    When it is later attached to an interface, that is searched, and made, in the network namespace
    of the calling thread now.
    """
    try:
        file = QueueFile(DEV_PATH, "r+")
    except OSError as exc:
        hints = {
            errno.ENOENT: "the tun module is not loaded (modprobe tun), or this container was not "
            "given the device (--device /dev/net/tun)",
            errno.ENXIO: "the tun module is not loaded (modprobe tun)",
            errno.ENODEV: "the tun module is not loaded (modprobe tun)",
            errno.EACCES: "the device's mode does not admit this user",
            errno.EPERM: "this container is not allowed to use the device",
        }
        raise OSError(
            exc.errno, f"open {DEV_PATH}: {exc.strerror}; {hints.get(exc.errno or 0, 'see tun(4)')}"
        ) from None
    os.set_blocking(file.fileno(), False)
    return file


def get_features(fd: int) -> QueueFlag:
    """The TUNSETIFF flags this kernel knows (TUNGETFEATURES)."""
    try:
        raw = fcntl.ioctl(fd, TUNGETFEATURES, bytes(_INT))
    except OSError as exc:
        if exc.errno in (errno.ENOTTY, errno.EINVAL):
            raise OSError(
                exc.errno,
                f"{DEV_PATH} is not the tun driver's device, another file stands in its place "
                f"(mknod {DEV_PATH} c 10 200)",
            ) from None
        _fail(exc, f"TUNGETFEATURES of {DEV_PATH}")
    return QueueFlag(struct.unpack("I", raw)[0])


def attach_queue(fd: int, name: str, flags: QueueFlag) -> TunIface:
    """TUNSETIFF: make or join interface `name` with descriptor `fd`; return the result.

    The returned flags may differ from the given ones: a second queue cannot change VNET_HDR.
    """
    # TUN_EXCL is a request, not a feature, and never in the list.
    missing = flags & ~get_features(fd) & ~QueueFlag.TUN_EXCL
    if missing:
        names = ", ".join(f"IFF_{f.name}" for f in QueueFlag if f & missing)
        raise OSError(
            errno.EOPNOTSUPP, f"the kernel's tun driver lacks {names}, which {name} needs"
        )
    try:
        fcntl.ioctl(fd, TUNSETIFF, _ifreq(name, flags))
    except OSError as exc:
        hint = ""
        if exc.errno == errno.EPERM:
            hint = (
                "making an interface, or using one that somebody else owns, needs CAP_NET_ADMIN "
                "in its network namespace"
            )
        _fail(exc, "TUNSETIFF", name, hint)
    return get_iface(fd)


def join(
    fd: int,
    name: str,
    mode: str = "tap",
    *,
    multi_queue: bool = True,
    vnet_hdr: bool = True,
    exclusive: bool = False,
) -> TunIface:
    """Make `fd`, which has no interface, a queue of interface `name`, which is made if needed.

    `name` may hold one ``%d``. Frames carry no protocol information prefix. With `vnet_hdr` they
    have a little-endian virtio-net header of 10 bytes if the interface can still get one:
    check ``VNET_HDR`` in the returned flags. `exclusive` only makes interfaces, and joins none.
    Acts in the network namespace that `fd` was opened in.

    Raises OSError: EBUSY for a single-queue interface in use, or for any existing one with
    `exclusive`, EINVAL for one of another kind (not a TAP, or single-queue against multi-queue),
    EPERM without the right.
    """
    check_ifname(name)
    if mode not in ("tap", "tun"):
        raise ValueError(f"mode must be tap or tun, got {mode!r}")
    flags = QueueFlag.NO_PI | (QueueFlag.TAP if mode == "tap" else QueueFlag.TUN)
    if multi_queue:
        flags |= QueueFlag.MULTI_QUEUE
    if vnet_hdr:
        flags |= QueueFlag.VNET_HDR
    if exclusive:
        flags |= QueueFlag.TUN_EXCL
    iface = attach_queue(fd, name, flags)
    if iface.flags & QueueFlag.VNET_HDR:
        set_header(fd, name)
    return iface


def open_file(name: str, mode: str = "tap", **how: bool) -> tuple[QueueFile, TunIface]:
    """A new queue on interface `name`, see :func:`join`, in the calling thread's namespace."""
    file = open_control()
    try:
        return file, join(file.fileno(), name, mode, **how)
    except BaseException:
        file.close()  # the traceback refers to it
        raise


def open_queue(name: str, mode: str = "tap", **how: bool) -> tuple[int, TunIface]:
    """As :func:`open_file`, but a descriptor for the caller to close."""
    file, iface = open_file(name, mode, **how)
    with file:
        return os.dup(file.fileno()), iface


def get_iface(fd: int, ifname: str = "") -> TunIface:
    """TUNGETIFF: present name and flags of the interface behind `fd`. DeviceGone if deleted.

    The flags are without NO_PI, whose bit means something else here (IFF_NOFILTER: no filter is
    attached).
    """
    try:
        raw = fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ_SIZE))
    except OSError as exc:
        _fail(exc, "TUNGETIFF", ifname)
    name, flags = struct.unpack_from(f"{IFNAMSIZ}sH", raw)
    return TunIface(os.fsdecode(name.partition(b"\0")[0]), QueueFlag(flags) & ~QueueFlag.NO_PI)


def set_header(fd: int, ifname: str = "") -> None:
    """Set virtio-net headers as rtap reads them: 10 bytes, little-endian. Needs VNET_HDR."""
    _set_int(fd, TUNSETVNETHDRSZ, VNET_HDR_LEN, "TUNSETVNETHDRSZ", ifname)
    _set_int(fd, TUNSETVNETLE, 1, "TUNSETVNETLE", ifname)


def get_mac(fd: int, ifname: str = "") -> MacAddr:
    """SIOCGIFHWADDR: the Ethernet address of the TAP interface behind `fd`. Needs no rights."""
    try:
        raw = fcntl.ioctl(fd, SIOCGIFHWADDR, bytes(_IFREQ_SIZE))
    except OSError as exc:
        _fail(exc, "SIOCGIFHWADDR", ifname)
    at = IFNAMSIZ + 2  # past the address family
    return MacAddr(raw[at : at + 6])


def set_offload(fd: int, features: TunFeature, ifname: str = "") -> TunFeature:
    """TUNSETOFFLOAD: allow the kernel to leave `features` undone; returns those it took.

    Drops USO4 and USO6 if the kernel (before 6.2) does not know them. All others need
    CSUM (else EINVAL). Works on the interface, not on the queue.
    """
    uso = TunFeature.USO4 | TunFeature.USO6
    try:
        fcntl.ioctl(fd, TUNSETOFFLOAD, int(features))
    except OSError as exc:
        if exc.errno == errno.EINVAL and features & uso:
            return set_offload(fd, features & ~uso, ifname)
        _fail(exc, f"TUNSETOFFLOAD {features!r}", ifname)
    return features


def set_persist(fd: int, on: bool, ifname: str = "") -> None:
    """TUNSETPERSIST: whether the interface outlives its last descriptor."""
    _set_value(fd, TUNSETPERSIST, int(on), "TUNSETPERSIST", ifname)


def set_owner(fd: int, uid: int, ifname: str = "") -> None:
    """TUNSETOWNER: the user who may attach without CAP_NET_ADMIN, a uid of this user namespace."""
    _set_value(fd, TUNSETOWNER, uid, f"TUNSETOWNER {uid}", ifname)


def set_group(fd: int, gid: int, ifname: str = "") -> None:
    """TUNSETGROUP: the group that may attach without CAP_NET_ADMIN, a gid."""
    _set_value(fd, TUNSETGROUP, gid, f"TUNSETGROUP {gid}", ifname)


def set_sndbuf(fd: int, size: int, ifname: str = "") -> None:
    """TUNSETSNDBUF: bytes that may wait in the stack before writes on `fd` give EAGAIN."""
    _set_int(fd, TUNSETSNDBUF, size, f"TUNSETSNDBUF {size}", ifname)


def get_sndbuf(fd: int, ifname: str = "") -> int | None:
    """TUNGETSNDBUF: the value that :func:`set_sndbuf` set on this descriptor; None for no limit."""
    try:
        raw = fcntl.ioctl(fd, TUNGETSNDBUF, bytes(_INT))
    except OSError as exc:
        _fail(exc, "TUNGETSNDBUF", ifname)
    size: int = struct.unpack("i", raw)[0]
    return None if size == _INT_MAX else size


def set_carrier(fd: int, on: bool, ifname: str = "") -> None:
    """TUNSETCARRIER: the interface's carrier, as a cable plugged in or not (Linux 5.0)."""
    _set_int(fd, TUNSETCARRIER, int(on), "TUNSETCARRIER", ifname)


def reset_filters(fd: int, mode: str, ifname: str = "") -> None:
    """Remove all filters that drop or steer frames before they are read; they would stay.

    These are the address filter and the socket filter (TAP only), the eBPF filter and the eBPF
    program that selects queues.
    """
    nothing = struct.pack("i", -1)
    requests = [
        (TUNSETSTEERINGEBPF, nothing, "TUNSETSTEERINGEBPF"),
        (TUNSETFILTEREBPF, nothing, "TUNSETFILTEREBPF"),
    ]
    if mode == "tap":
        # struct tun_filter without entries.
        requests += [(TUNSETTXFILTER, bytes(4), "TUNSETTXFILTER")]
    for request, argument, operation in requests:
        try:
            fcntl.ioctl(fd, request, argument)
        except OSError as exc:
            _fail(exc, operation, ifname)
    if mode == "tap":
        try:
            _detach_socket_filter(fd)
        except OSError as exc:
            _fail(exc, "TUNDETACHFILTER", ifname)


def _detach_socket_filter(fd: int) -> None:
    nothing = bytes(16)  # struct sock_fprog without entries, which the kernel does not read
    try:
        fcntl.ioctl(fd, TUNDETACHFILTER, nothing)
    except OSError as exc:
        # The number has the struct's size in it, and a kernel of 64 bits knows only its own, from a
        # process of 32 bits as well.
        if exc.errno != errno.EINVAL or TUNDETACHFILTER == _TUNDETACHFILTER_64:
            raise
        fcntl.ioctl(fd, _TUNDETACHFILTER_64, nothing)


def set_queue_attached(fd: int, attached: bool, ifname: str = "") -> None:
    """TUNSETQUEUE: attach or detach one queue of a multi-queue interface.

    A detached queue gets no frames and loses those that waited in it; writes still work. Attaching
    an attached queue, or detaching a detached one, is EINVAL.
    """
    flag = QueueFlag.ATTACH_QUEUE if attached else QueueFlag.DETACH_QUEUE
    try:
        fcntl.ioctl(fd, TUNSETQUEUE, _ifreq("", flag))
    except OSError as exc:
        _fail(exc, f"TUNSETQUEUE {flag.name}", ifname)


def device_netns(fd: int, ifname: str = "") -> Descriptor:
    """TUNGETDEVNETNS: the network namespace the interface is in now.

    Needs CAP_NET_ADMIN there (EPERM) and Linux 5.2.
    """
    try:
        return Descriptor.of(fcntl.ioctl, fd, TUNGETDEVNETNS)
    except OSError as exc:
        _fail(exc, "TUNGETDEVNETNS", ifname)
