# SPDX-License-Identifier: BSD-3-Clause
"""rtnetlink: links that are renamed, moved and deleted, under load and with overruns."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import PacketSocket, frame, ip, link, links, netdev, none_left, open_fds
from together import in_threads

import rtap
from rtap import DeviceGone, MacAddr, NetNS
from rtap.control import netlink, tun
from rtap.control.netlink import IFF_PROMISC, Control, LinkState, find_link


@pytest.fixture
def fd(netns: NetNS) -> Iterator[int]:
    """A descriptor of ``tap0``."""
    fd, _ = netns.call(tun.open_queue, "tap0")
    yield fd
    os.close(fd)


@pytest.fixture
def control(netns: NetNS, fd: int) -> Iterator[Control]:
    """A control object for ``tap0`` that finds the interface again through its descriptor."""

    def relocate() -> tuple[NetNS, int] | None:
        try:
            there = tun.device_netns(fd)
        except DeviceGone:
            return None
        with there:
            ns = NetNS.from_fd(there.fileno())
        moved = find_link(ns.fd, tun.get_iface(fd).name)
        if moved is None:
            ns.close()
            return None
        return ns, moved.index

    state = find_link(netns.fd, "tap0")
    assert state is not None
    control = Control(NetNS.from_fd(netns.fd), state.index, "tap0", relocate)
    yield control
    control.close()


def test_find_link(netns: NetNS, fd: int) -> None:
    state = find_link(netns.fd, "tap0")
    assert state is not None
    shown = link(netns, "tap0")
    assert state.index == shown["ifindex"]
    assert (state.name, state.mtu, state.mac) == ("tap0", shown["mtu"], shown["address"])
    assert (state.kind, state.persist, state.queues, state.up) == ("tun", False, 1, False)
    assert type(state.mac) is MacAddr
    assert find_link(netns.fd, "tap1") is None


def test_other_kinds_of_link(netns: NetNS) -> None:
    ip(netns, "link", "add", "v0", "type", "veth", "peer", "v1")
    lo, veth = find_link(netns.fd, "lo"), find_link(netns.fd, "v0")
    assert lo is not None
    assert veth is not None
    assert (lo.kind, lo.tun, lo.queues, lo.mac) == ("", {}, None, "00:00:00:00:00:00")
    assert (veth.kind, veth.tun, veth.persist) == ("veth", {}, False)


def test_queues_of_a_single_queue_device_are_not_told(netns: NetNS) -> None:
    fd, _ = netns.call(tun.open_queue, "one", multi_queue=False)
    try:
        state = find_link(netns.fd, "one")
        assert state is not None
        assert state.queues is None
    finally:
        os.close(fd)


def test_queues_counts_detached_ones(netns: NetNS, fd: int, control: Control) -> None:
    second, _ = netns.call(tun.open_queue, "tap0")
    try:
        assert control.get().queues == 2
        tun.set_queue_attached(second, False)
        assert control.get().queues == 2
    finally:
        os.close(second)
    assert control.get().queues == 1


@pytest.mark.parametrize(
    ("change", "seen", "expected"),
    [
        (lambda c: c.set_mtu(9000), lambda s: s.mtu, 9000),
        (lambda c: c.set_mtu(68), lambda s: s.mtu, 68),
        (lambda c: c.set_mtu(65521), lambda s: s.mtu, 65521),
        (lambda c: c.set_mac(MacAddr("02:00:00:00:00:07")), lambda s: s.mac, "02:00:00:00:00:07"),
        (lambda c: c.set_up(True), lambda s: (s.up, s.carrier), (True, True)),
    ],
)
def test_changes(
    control: Control,
    change: Callable[[Control], None],
    seen: Callable[[LinkState], object],
    expected: object,
) -> None:
    control.set_up(True)
    change(control)
    assert seen(control.get()) == expected


def test_other_flags_stay(netns: NetNS, control: Control) -> None:
    ip(netns, "link", "set", "tap0", "promisc", "on")
    for up in (True, False, True):
        control.set_up(up)
        assert control.get().up is up
        assert control.get().flags & IFF_PROMISC


def test_txqueuelen(netns: NetNS, control: Control) -> None:
    control.set_txqueuelen(17)
    assert link(netns, "tap0")["txqlen"] == 17


@pytest.mark.parametrize("kernel", ["today's", "before 4.7"])
def test_the_count_of_drops_alone(
    netns: NetNS, netns2: NetNS, control: Control, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "before 4.7":  # without this request
        monkeypatch.setattr(netlink, "_RTM_GETSTATS", 0xFE0)
    control.set_txqueuelen(1)
    control.set_up(True)
    with PacketSocket(netns, "tap0") as sock:
        for k in range(20):
            with contextlib.suppress(OSError):  # ENOBUFS is the drop itself
                sock.send(frame(k), socket.MSG_DONTWAIT)
    # The kernel sends frames of its own to the interface, so the count may still rise.
    for there in (netns, netns2):
        if there is netns2:
            ip(netns, "link", "set", "tap0", "netns", netns2.path)
        before = netdev(there, "tap0")["tx_dropped"]
        assert 0 < before <= control.get_dropped() <= netdev(there, "tap0")["tx_dropped"]


@pytest.mark.parametrize("mtu", [67, 65522])
def test_refusals_say_what_was_asked(control: Control, mtu: int) -> None:
    with pytest.raises(OSError, match=f"set the MTU to {mtu} on tap0") as caught:
        control.set_mtu(mtu)
    assert caught.value.errno == errno.EINVAL
    assert not isinstance(caught.value, DeviceGone)


def test_follows_renames(netns: NetNS, control: Control) -> None:
    ip(netns, "link", "set", "tap0", "name", "other0")
    assert control.get().name == control.name == "other0"
    control.set_mtu(1400)
    assert link(netns, "other0")["mtu"] == 1400


def test_follows_to_another_namespace_and_back(
    netns: NetNS, netns2: NetNS, control: Control
) -> None:
    for here, there in ((netns, netns2), (netns2, netns), (netns, netns2)):
        ip(here, "link", "set", "tap0", "netns", there.path)
        control.set_mtu(1300)
        assert control.netns.inode == there.inode
        assert link(there, "tap0")["mtu"] == 1300


def test_moved_and_renamed_with_its_index_taken(
    netns: NetNS, netns2: NetNS, control: Control
) -> None:
    index = control.index
    ip(netns2, "link", "add", "x0", "index", str(index), "type", "bridge")
    ip(netns, "link", "set", "tap0", "netns", netns2.path, "name", "moved0")
    ip(netns, "link", "add", "y0", "type", "bridge")
    control.set_mtu(1300)
    assert control.index != index
    assert link(netns2, "moved0")["mtu"] == 1300
    assert link(netns2, "x0")["mtu"] == 1500


def test_deleted(netns: NetNS, control: Control) -> None:
    assert control.peek() is not None
    control.delete()
    assert links(netns) == ["lo"]
    assert control.peek() is None
    for call in (
        control.get,
        control.get_dropped,
        lambda: control.set_mtu(1400),
        control.delete,
    ):
        with pytest.raises(DeviceGone, match="tap0") as caught:
            call()
        assert caught.value.ifname == "tap0"


def test_peek_does_not_follow(netns: NetNS, netns2: NetNS, control: Control) -> None:
    ip(netns, "link", "set", "tap0", "netns", netns2.path)
    assert control.peek() is None
    assert control.get().name == "tap0"
    assert control.peek() is not None


def test_close_is_idempotent(control: Control) -> None:
    control.close()
    control.close()
    with pytest.raises(ValueError, match="closed"):
        control.get()


# ---- sockets


def test_no_descriptor_stays(control: Control) -> None:
    control.get()
    before = open_fds()
    for n in range(50):
        control.set_mtu(1000 + n)
        with pytest.raises(OSError, match="MTU"):
            control.set_mtu(1)
        assert find_link(control.netns.fd, "nope") is None
    none_left(before)


def test_inside_a_running_loop(control: Control) -> None:
    async def change() -> int:
        control.set_mtu(1234)
        return control.get().mtu

    assert asyncio.run(change()) == 1234


def test_many_threads_at_once(netns: NetNS, control: Control) -> None:
    seen: list[int] = []

    def work(n: int) -> None:
        for _ in range(20):
            control.set_mtu(1000 + n)
            seen.append(control.get().mtu)

    in_threads(work, 8)
    assert len(seen) == 160
    assert set(seen) <= set(range(1000, 1008))


class Broken:
    """Replaces a channel's socket; its first reads fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, control: Control, *codes: int) -> None:
        control.get()
        self.codes = list(codes)
        self.sent = 0
        self.real = control._channel._sock
        monkeypatch.setattr(control._channel, "_sock", self)

    def send(self, message: bytearray) -> int:
        assert self.real is not None
        self.sent += 1
        return self.real.send(message)

    def recvfrom(self, size: int) -> Any:
        assert self.real is not None
        if self.codes:
            raise OSError(self.codes.pop(0), "overrun")
        return self.real.recvfrom(size)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.EINTR, errno.EAGAIN])
def test_an_overrun_is_answered_with_the_request_once_more(
    control: Control, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    broken = Broken(monkeypatch, control, code, code)
    control.set_mtu(1100)
    assert broken.sent == 3
    monkeypatch.undo()
    assert control.get().mtu == 1100


def test_overruns_without_end(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(monkeypatch, control, *[errno.ENOBUFS] * 99)
    with pytest.raises(OSError, match="set the MTU to 1100 on tap0") as caught:
        control.set_mtu(1100)
    assert caught.value.errno == errno.ENOBUFS
    assert broken.sent <= 5


def test_other_errors_are_not_tried_again(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(monkeypatch, control, errno.EIO)
    with pytest.raises(OSError, match="set the MTU to 1100 on tap0") as caught:
        control.set_mtu(1100)
    assert (caught.value.errno, broken.sent) == (errno.EIO, 1)


class Interrupted(Exception):
    """The exception that a signal handler raises."""


def test_an_exception_between_request_and_answer(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(size: int) -> Any:
        raise Interrupted

    broken = Broken(monkeypatch, control)
    monkeypatch.setattr(broken, "recvfrom", interrupt)
    with pytest.raises(Interrupted):
        control.set_mtu(1100)
    with pytest.raises(Interrupted):
        control.get()
    monkeypatch.undo()
    # Two late answers wait in the socket.
    assert control.get().mtu == 1100
    control.set_mtu(1200)
    assert control.get().mtu == 1200
    assert not control._channel._answers  # no request would fetch them


def test_a_request_inside_a_request(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler or a finalizer makes a request; neither takes the other's answer."""
    inner: list[LinkState] = []
    broken = Broken(monkeypatch, control)
    real = broken.recvfrom

    def nested(size: int) -> Any:
        monkeypatch.setattr(broken, "recvfrom", real)
        inner.append(control.get())
        return real(size)

    monkeypatch.setattr(broken, "recvfrom", nested)
    control.set_mtu(1100)
    assert [state.mtu for state in inner] == [1100]
    assert not control._channel._answers
    assert not control._channel._waiting


def test_what_others_send_is_no_answer(netns: NetNS, control: Control) -> None:
    """Who may administrate the namespace may send to our socket: errors for requests to come."""
    control.get()
    sock = control._channel._sock
    assert sock is not None
    port = sock.getsockname()[0]

    def forge() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as other:
            for sequence in range(100):
                error = struct.pack("=IHHIIi16x", 36, 2, 0, sequence, port, -errno.EIO)
                other.sendto(error, (port, 0))

    netns.call(forge)
    control.set_mtu(1100)
    assert control.get().mtu == 1100


def test_devices_of_a_namespace_share_a_socket(netns: NetNS, netns2: NetNS) -> None:
    def sockets() -> int:
        count = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the descriptor of this listing
                count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        return count

    before = sockets()
    with rtap.open("a0", netns=netns) as first:
        one = sockets() - before
        with rtap.open("b0", netns=netns) as second, rtap.open("c0", netns=netns2) as third:
            for dev in (first, second, third):
                dev.stats(), dev.xstats(), dev.link(), dev.info()
            assert sockets() - before == 2 * one
        assert sockets() - before == one
        first.stats()
    assert sockets() == before


def test_looking_makes_no_socket_and_no_thread(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rtap.open("t0", netns=netns) as dev:

        def refuse(*_: object, **__: object) -> Any:
            raise AssertionError("a socket or a thread was made")

        monkeypatch.setattr("rtap.control.channel._open", refuse)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        dev.stats(), dev.xstats(), dev.link(), dev.info()
        dev.mtu = 1300
        assert dev.mtu == 1300
