# SPDX-License-Identifier: BSD-3-Clause
"""Shared by many test modules: namespaces, TAP devices, packet sockets, frames.

conftest.py loads this as a plugin, so its fixtures need no import. Import the rest:
``from support import Tap, frame``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import gc
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
from patience import patient
from this_kernel import kernel

import rtap
from rtap._core.mempool import Mempool
from rtap._ring import RxQueue, TxQueue
from rtap.control import tun
from rtap.control.netns import NetNS
from rtap.control.tun import TunFeature

#: Local experimental ethertype 1 (IEEE 802), which no protocol of the kernel takes.
ETHERTYPE = 0x88B5
ETH_P_ALL = 0x0003
VNET_HDR_LEN = 10
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
SO_SNDBUFFORCE = 32
SOL_PACKET = 263
PACKET_IGNORE_OUTGOING = 23  # linux/if_packet.h

_RING = "anon_inode:[io_uring]"

T = TypeVar("T")

ENGINES = ("uring", "syscall")
_IO_URING_SETUP = 425

LOCAL = bytes.fromhex("020000000001")
REMOTE = bytes.fromhex("020000000002")
BROADCAST = b"\xff" * 6


def pytest_collection_finish() -> None:
    """Makes full collections quick: tests that force one need not walk all of pytest."""
    gc.collect()
    gc.freeze()


# ---- what this machine can do


@functools.cache
def no_devices() -> str:
    """Why TAP devices in namespaces cannot be made here, in one phrase; "" when they can."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces and TAP devices"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    try:
        NetNS().close()
    except OSError as exc:
        return f"needs network namespaces: {exc.strerror}"
    return ""


@functools.cache
def no_io_uring() -> str:
    """Why io_uring cannot be used here, in one phrase; "" when it can."""
    if kernel() < (5, 19):
        return "needs Linux 5.19 for io_uring on TAP devices"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.syscall(ctypes.c_long(_IO_URING_SETUP), ctypes.c_uint(1), None)
    code = ctypes.get_errno()
    return "" if code == errno.EFAULT else f"needs io_uring: {os.strerror(code)}"


def skip_without_devices() -> None:
    if no_devices():
        pytest.skip(no_devices())


def skip_without_engine(engine: str) -> None:
    if engine == "uring" and no_io_uring():
        pytest.skip(no_io_uring())


#: Use ``@both_engines`` on a test that takes ``engine`` where the fixture does not fit.
both_engines = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each packet engine in turn."""
    name: str = request.param
    skip_without_engine(name)
    return name


# ---- namespaces


def _disable_ipv6() -> None:
    for conf in ("all", "default"):
        path = f"/proc/sys/net/ipv6/conf/{conf}/disable_ipv6"
        if os.path.exists(path):
            with open(path, "w") as f:
                f.write("1")


def quiet_netns() -> NetNS:
    """A namespace without IPv6, in which the kernel sends no frames of its own."""
    ns = NetNS()
    try:
        ns.call(_disable_ipv6)
    except BaseException:
        ns.close()
        raise
    return ns


@pytest.fixture
def netns() -> Iterator[NetNS]:
    """A private network namespace without IPv6."""
    skip_without_devices()
    with quiet_netns() as ns:
        yield ns


@pytest.fixture
def netns2() -> Iterator[NetNS]:
    """A second one."""
    skip_without_devices()
    with quiet_netns() as ns:
        yield ns


def ip(ns: NetNS, *args: str) -> str:
    """Runs ip(8) in a namespace and returns what it printed."""
    # Without the sanitizer's library, which would report faults of ip(8) itself.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = ns.run(["ip", *args], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")
    out: str = done.stdout
    return out


def add_ipv6(ns: NetNS, ifname: str, address: str) -> None:
    """Gives an interface ``address``/64 and waits until the kernel receives packets for it.

    The kernel adds the local route for this in a work queue, some time after the address.
    """
    ip(ns, "addr", "add", f"{address}/64", "dev", ifname, "nodad")
    eventually(
        lambda: f"local {address} " in ip(ns, "-6", "route", "show", "table", "local"),
        f"{address} is local",
    )


def ping(ns: NetNS, address: str, *options: str) -> None:
    """Fails unless each of five requests is answered within 5 s.

    Each request is a ping(8) of its own. After a first answer, ping waits for the last one only
    twice as long as that took, which is too short on a busy machine.
    """
    if shutil.which("ping") is None:
        pytest.skip("needs ping")
    command = ["ping", "-n", "-c1", f"-W{patient(5):.0f}", *options, address]
    for _ in range(5):
        done = ns.run(command, capture_output=True, text=True)
        assert " 0% packet loss" in done.stdout, done.stdout + done.stderr


def carrier(ns: NetNS, ifname: str) -> bool:
    """Whether an interface that is up has a carrier.

    ``NO-CARRIER`` and the operational state follow it up to a second later on older kernels.
    """
    return "LOWER_UP" in link(ns, ifname)["flags"]


def rename(ns: NetNS, ifname: str, new: str) -> None:
    """Renames an interface that is up. Before Linux 6.2 it has to be down for that moment."""
    live = kernel() >= (6, 2)
    if not live:
        ip(ns, "link", "set", ifname, "down")
    ip(ns, "link", "set", ifname, "name", new)
    if not live:
        ip(ns, "link", "set", new, "up")


def addresses(ns: NetNS, ifname: str) -> list[str]:
    entries = json.loads(ip(ns, "-j", "addr", "show", "dev", ifname))
    return sorted(
        f"{a['local']}/{a['prefixlen']} {a['scope']}" for e in entries for a in e["addr_info"]
    )


def link(ns: NetNS, ifname: str) -> dict[str, Any]:
    """One link as ``ip -j -s -d link`` describes it."""
    found: list[dict[str, Any]] = json.loads(
        ip(ns, "-j", "-s", "-d", "link", "show", "dev", ifname)
    )
    return found[0]


def netdev(ns: NetNS, ifname: str) -> dict[str, int]:
    """The kernel's counters, from its own view: frames that rtap sends are in ``rx_packets``."""
    stats = link(ns, ifname)["stats64"]
    return {f"{way}_{name}": n for way in ("rx", "tx") for name, n in stats[way].items()}


def links(ns: NetNS) -> list[str]:
    return [entry["ifname"] for entry in json.loads(ip(ns, "-j", "link"))]


# ---- packet sockets


class PacketSocket(socket.socket):
    """AF_PACKET, SOCK_RAW on one interface: the kernel's end of a TAP device.

    It ignores frames that go out through the same interface.
    """

    def __init__(self, ns: NetNS, ifname: str, protocol: int = ETHERTYPE, rcvbuf: int = 0) -> None:
        fd = ns.call(self._open, ifname, protocol, rcvbuf)
        super().__init__(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol), fileno=fd)

    @staticmethod
    def _open(ifname: str, protocol: int, rcvbuf: int) -> int:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as s:
            s.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            if rcvbuf:
                s.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, rcvbuf)
                s.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, rcvbuf)
            s.bind((ifname, protocol))
            s.settimeout(patient(5))
            return s.detach()

    def frames(self, n: int, timeout: float = 5) -> list[bytes]:
        """The next ``n`` frames; fewer when ``timeout`` seconds pass without one."""
        got: list[bytes] = []
        self.settimeout(patient(timeout))
        while len(got) < n:
            try:
                got.append(self.recv(1 << 17))
            except TimeoutError:
                break
        return got

    def drain(self) -> list[bytes]:
        """All frames that wait now."""
        got: list[bytes] = []
        self.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                got.append(self.recv(1 << 17))
        return got


# ---- TAP devices without the device layer


class Tap:
    """A TAP descriptor on an interface of a namespace that is up, and the queues on it."""

    def __init__(
        self,
        ns: NetNS,
        name: str = "tap0",
        *,
        mtu: int = 0,
        vnet_hdr: bool = True,
        multi_queue: bool = False,
        features: TunFeature | int = 0,
        mac: bytes = LOCAL,
        mode: str = "tap",
        up: bool = True,
    ) -> None:
        self.ns = ns
        self.vnet_hdr = vnet_hdr
        self.l2 = mode == "tap"
        self._stack = contextlib.ExitStack()
        self.fd, iface = ns.call(
            tun.open_queue, name, mode, vnet_hdr=vnet_hdr, multi_queue=multi_queue
        )
        self._stack.callback(self._close_fd)
        try:
            self.name = iface.name
            if features:
                tun.set_offload(self.fd, TunFeature(features), self.name)
            how = ["address", mac.hex(":"), "multicast", "off"] if self.l2 else ["multicast", "off"]
            if mtu:
                how += ["mtu", str(mtu)]
            ip(ns, "link", "set", "dev", self.name, *how, *(["up"] if up else []))
        except BaseException:
            self.close()
            raise

    def _close_fd(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def rx(self, pool: Mempool, *, start: bool = True, **options: Any) -> RxQueue:
        """A receive queue on the descriptor; it closes before the descriptor does."""
        options.setdefault("vnet_hdr", self.vnet_hdr)
        options.setdefault("l2", self.l2)
        queue = RxQueue(self.fd, pool, name=self.name, **options)
        self._stack.callback(queue.close)
        if start:
            queue.start()
        return queue

    def tx(self, *, start: bool = True, **options: Any) -> TxQueue:
        """A send queue on the descriptor; it closes before the descriptor does."""
        options.setdefault("vnet_hdr", self.vnet_hdr)
        queue = TxQueue(self.fd, name=self.name, **options)
        self._stack.callback(queue.close)
        if start:
            queue.start()
        return queue

    def packets(self, protocol: int = ETHERTYPE, rcvbuf: int = 0) -> PacketSocket:
        """A packet socket on the interface."""
        return self._stack.enter_context(PacketSocket(self.ns, self.name, protocol, rcvbuf))

    def set(self, *args: str) -> None:
        """``ip link set NAME args``."""
        ip(self.ns, "link", "set", "dev", self.name, *args)

    def counters(self) -> dict[str, int]:
        return netdev(self.ns, self.name)

    def waiting(self) -> bool:
        """Whether a frame (or an error) waits in the kernel."""
        return bool(select.select([self.fd], [], [], 0)[0])

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@pytest.fixture
def tap(netns: NetNS) -> Iterator[Tap]:
    """``tap0``, MTU 1500, up, with virtio-net headers and no offloads."""
    with Tap(netns) as device:
        yield device


# ---- frames


def frame(seq: int = 0, length: int = 64, dst: bytes = LOCAL, src: bytes = REMOTE) -> bytes:
    """An Ethernet frame of ``length`` (at least 14) bytes, different for each ``seq``."""
    head = dst + src + struct.pack("!H", ETHERTYPE)
    number = struct.pack("!Q", seq)
    body = length - len(head)
    if body <= len(number):
        return head + number[len(number) - body :]
    return head + number + pattern(seq, body - len(number))


_PATTERN = bytes(range(251)) * 600  # a prime period: no two neighbouring slots look alike


def pattern(seed: int, n: int) -> bytes:
    start = seed * 31 % 251
    return _PATTERN[start : start + n]


def seq_of(data: bytes) -> int:
    """The number that :func:`frame` put into the frame."""
    number: int = struct.unpack_from("!Q", data, 14)[0]
    return number


# ---- waiting, children


def eventually(check: Callable[[], bool], what: str, timeout: float = 5.0) -> None:
    """Waits until ``check()`` holds, and fails after ``timeout`` seconds."""
    deadline = time.monotonic() + patient(timeout)
    while not check():
        if time.monotonic() > deadline:
            pytest.fail(f"within {patient(timeout)} s not: {what}")
        time.sleep(0.002)


class Task(threading.Thread, Generic[T]):
    """A thread that has started, and its result."""

    def __init__(self, fn: Callable[..., T], *args: Any) -> None:
        super().__init__(daemon=True)
        self._fn = fn
        self._args = args
        self._result: list[T] = []
        self._failure: BaseException | None = None
        self.ended = 0.0
        self.start()

    def run(self) -> None:
        try:
            self._result.append(self._fn(*self._args))
        except BaseException as exc:  # noqa: BLE001 - result() raises it
            self._failure = exc
        self.ended = time.monotonic()

    def result(self, timeout: float = 60) -> T:
        """What the function returned, or what it raised."""
        self.join(patient(timeout))
        if self.is_alive():
            pytest.fail(f"a thread is still running after {patient(timeout)} s")
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return self._result[0]


def python(
    code: str, *args: str, timeout: float = 60, warnings: str = "always"
) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, by default with every warning shown."""
    return subprocess.run(
        [sys.executable, "-W", warnings, "-X", "faulthandler", "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=patient(timeout),
        check=False,
        **child_place(),
    )


def with_open_tun(directory: Path, *command: str) -> list[str]:
    """`command`, wrapped so that ``/dev/net/tun`` has mode 0666, as distributions set it.

    It runs in a mount namespace of its own with a device node made in `directory`.
    """
    script = (
        'node="$1"; shift; mknod -m 666 "$node" c 10 200 && mount --bind "$node" /dev/net/tun'
        ' && exec "$@"'
    )
    return ["unshare", "--mount", "sh", "-ec", script, "sh", str(directory / "tun"), *command]


def child_environment() -> dict[str, str]:
    """An environment in which a child imports this process's rtap and helpers."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def child_place() -> dict[str, Any]:
    """Options of subprocess with which ``python -c`` imports the same modules as this process.

    With ``-c`` and ``-m``, Python searches the current directory first.
    """
    package = os.path.dirname(rtap.__file__)
    return {"cwd": os.path.dirname(package), "env": child_environment()}


def settle(pool: Mempool) -> int:
    """The slots in use after a garbage collection."""
    gc.collect()
    return pool.in_use


def open_fds() -> dict[int, str]:
    """The descriptors that stay open in this process, and what each refers to.

    It looks several times, because the netlink thread opens one briefly when it handles news.
    """
    found = _look_at_fds()
    for _ in range(7):
        time.sleep(0.004)
        now = _look_at_fds().items()
        found = dict(found.items() & now)
    return found


def _look_at_fds() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # such as the descriptor of this listdir
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def opened_since(before: Mapping[int, str]) -> dict[int, str]:
    """The descriptors opened since :func:`open_fds`.

    Unlike a count, this does not change when threads of an earlier test close theirs meanwhile.
    """
    return dict(open_fds().items() - before.items())


def _left(before: Mapping[int, str]) -> dict[int, str]:
    """The descriptors that are open and that :func:`open_fds` did not see.

    One ring of an ended thread waits for the next thread, and a younger one may take its place: a
    new ring counts only when there are more rings than before.
    """
    now = _look_at_fds()
    left = dict(now.items() - before.items())
    if list(now.values()).count(_RING) <= list(before.values()).count(_RING):
        left = {fd: what for fd, what in left.items() if what != _RING}
    return left


def none_left(before: Mapping[int, str], but: int = 0) -> None:
    """Waits until at most ``but`` descriptors are open that :func:`open_fds` did not see."""
    deadline = time.monotonic() + patient(5)
    while len(left := _left(before)) > but:
        if time.monotonic() > deadline:
            pytest.fail(f"{left} are open, and were not in {dict(before)}")
        time.sleep(0.002)


def running_threads() -> Counter[str]:
    """The names, without their numbers, of the threads that run.

    Not those that Python did not start: it keeps a record of such a one, say of pytest-xdist's,
    from the moment some code in it asks for the current thread, and the garbage collector can run
    code in any thread.
    """
    return Counter(
        thread.name.rstrip("0123456789")
        for thread in threading.enumerate()
        if not isinstance(thread, threading._DummyThread)
    )


def threads_end(before: Counter[str]) -> None:
    """Waits until no thread runs that :func:`running_threads` did not see."""
    deadline = time.monotonic() + patient(5)
    while left := running_threads() - before:
        if time.monotonic() > deadline:
            pytest.fail(f"{dict(left)} run, and did not before")
        time.sleep(0.002)


def drop_capabilities() -> None:
    """Takes all capabilities from this process for good (capset(2)); its user stays."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    if libc.capset(header, bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


def block_io_uring(code: int, only_enter: bool = False) -> None:
    """Makes system calls 425 to 427, or 426 alone, fail with ``code`` (seccomp(2)).

    This lasts for good, in this thread and those it starts.
    """
    first = _IO_URING_SETUP + only_enter
    last = _IO_URING_SETUP + (1 if only_enter else 2)

    def bpf(op: int, jt: int, jf: int, k: int) -> bytes:
        return struct.pack("HBBI", op, jt, jf, k)

    load_word, jump_if_ge, jump_if_gt, ret = 0x20, 0x35, 0x25, 0x06
    errno_action, allow = 0x00050000, 0x7FFF0000
    program = b"".join(
        (
            bpf(load_word, 0, 0, 0),  # seccomp_data.nr
            bpf(jump_if_ge, 0, 2, first),
            bpf(jump_if_gt, 1, 0, last),
            bpf(ret, 0, 0, errno_action | code),
            bpf(ret, 0, 0, allow),
        )
    )
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privs, set_seccomp, mode_filter = 38, 22, 2
    if libc.prctl(no_new_privs, 1, 0, 0, 0) or libc.prctl(
        set_seccomp, mode_filter, ctypes.c_char_p(header), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp")
