# SPDX-License-Identifier: BSD-3-Clause
"""Options of an interface: owner, group, queue lengths, and descriptors of others."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from flows import flow, flow_of
from patience import rate
from rigs import redirect
from support import (
    PacketSocket,
    Tap,
    child_environment,
    eventually,
    frame,
    ip,
    link,
    links,
    none_left,
    open_fds,
    seq_of,
)

import rtap
from rtap import DeviceGone, EthConf, EthDev, Mempool, NetNS, RxOffload, TxOffload
from rtap._ring import TxQueue
from rtap.control import tun
from rtap.control.netlink import find_link
from rtap.control.tun import QueueFlag
from rtap.drivers import interface
from rtap.drivers.options import IfaceOptions

pytestmark = pytest.mark.root

SOMEBODY = 4321


def tun_data(ns: NetNS, ifname: str) -> dict[str, int]:
    found = find_link(ns.fd, ifname)
    assert found is not None
    return found.tun


def run(dev: EthDev, pool: Mempool, conf: EthConf | None = None, queues: int = 1) -> None:
    """Configures and starts the device."""
    dev.configure(queues, queues, conf)
    for q in range(queues):
        dev.rx_queue_setup(q, 64, pool)
        dev.tx_queue_setup(q, 64)
    dev.start()


@pytest.fixture
def pool() -> Iterator[Mempool]:
    with Mempool(512) as made:
        yield made


# ---- owner, group, lengths


@pytest.mark.parametrize("way", ["open", "probe"])
def test_owner_and_group(netns: NetNS, way: str) -> None:
    root = pwd.getpwuid(0).pw_name
    for user, group, uid, gid in (
        (SOMEBODY, SOMEBODY + 1, SOMEBODY, SOMEBODY + 1),
        (root, "root", 0, 0),
        (None, SOMEBODY, None, SOMEBODY),
    ):
        if way == "open":
            dev = rtap.open("t0", netns=netns, owner=user, group=group, queues=3)
        else:
            text = f"net_rtap0,iface=t0,group={group}" + (f",owner={user}" if user else "")
            dev = netns.call(rtap.probe, text)
        with dev:
            data = tun_data(netns, "t0")
            assert data.get("IFLA_TUN_OWNER") == uid
            assert data.get("IFLA_TUN_GROUP") == gid


def test_who_it_is_given_to_may_attach(netns: NetNS) -> None:
    """The owner may attach without CAP_NET_ADMIN, and another user may not."""
    code = """
import sys, rtap, support
support.drop_capabilities()
try:
    with rtap.open("t0") as dev:
        print("sent", dev.send(bytes(60)))
except PermissionError:
    print("refused")
"""
    for owner, says in ((os.geteuid(), "sent True\n"), (SOMEBODY, "refused\n")):
        rtap.open("t0", netns=netns, persist=True, owner=owner).close()
        done = netns.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment()
        )
        assert (done.stdout, done.stderr) == (says, "")
    ip(netns, "link", "del", "t0")


@pytest.mark.parametrize("way", ["open", "probe"])
def test_txqueuelen_is_what_waits_to_be_read(
    netns: NetNS, engine: str, way: str, pool: Mempool
) -> None:
    if way == "open":
        dev = rtap.open("t0", netns=netns, txqueuelen=7, queues=2, engine=engine)
    else:
        dev = netns.call(rtap.probe, "net_rtap0,iface=t0,txqueuelen=7")
        run(dev, pool, EthConf(engine=engine), 2)
    with dev, PacketSocket(netns, "t0") as peer:
        assert link(netns, "t0")["txqlen"] == 7
        for seq in range(50):
            peer.send(frame(seq))
        got = [bytes(m) for q in range(2) for m in dev.rx_burst(q, 64)]
        assert got == [frame(seq) for seq in range(7)]
        assert dev.stats().imissed == 43


def test_most_txqueuelen(netns: NetNS) -> None:
    with rtap.open("t0", netns=netns, txqueuelen=1 << 19):
        assert link(netns, "t0")["txqlen"] == 1 << 19


def assert_sends_fall_short_in_order(ns: NetNS, dev: EthDev, queue: int) -> None:
    """While frames wait in the kernel behind a slow device, it takes a prefix of each burst."""
    with rtap.open("slow", netns=ns) as other, Mempool(512) as pool:
        redirect(ns, dev.ifname, "slow", rate(20))
        burst = pool.alloc_burst(200, [frame(n, 1000) for n in range(200)])
        sent = dev.tx_burst(queue, burst)
        assert 0 < sent < 200
        assert seq_of(bytes(burst[0])) == sent
        for n in range(200):
            assert seq_of(other.recv(5)) == n
            dev.tx_burst(queue, burst)
        assert len(burst) == 0


@pytest.mark.parametrize("queue", [0, 1])
def test_sndbuf_by_device_argument(netns: NetNS, engine: str, pool: Mempool, queue: int) -> None:
    with netns.call(rtap.probe, "net_rtap0,iface=t0,sndbuf=20000") as dev:
        run(dev, pool, EthConf(engine=engine), 2)
        assert_sends_fall_short_in_order(netns, dev, queue)


def test_options_of_an_interface_made_anew(netns: NetNS, engine: str) -> None:
    """After others delete the interface, start() makes one with the same owner and group."""
    options: dict[str, Any] = {"owner": SOMEBODY, "group": 0, "txqueuelen": 7, "sndbuf": 20_000}
    with rtap.open("t0", netns=netns, engine=engine, queues=2, **options) as dev:
        ip(netns, "link", "del", "t0")
        dev.stop()
        dev.start()
        data = tun_data(netns, "t0")
        assert (data["IFLA_TUN_OWNER"], data["IFLA_TUN_GROUP"]) == (SOMEBODY, 0)
        assert link(netns, "t0")["txqlen"] == 7
        assert_sends_fall_short_in_order(netns, dev, 1)


def test_options_are_checked_before_anything_is_made(netns: NetNS) -> None:
    with pytest.raises(ValueError, match="group: there is no group 'no-such-group'"):
        IfaceOptions(group="no-such-group")
    before = open_fds()
    with pytest.raises(ValueError, match="owner"):
        rtap.open("t0", netns=netns, persist=True, owner="no-such-user")
    assert links(netns) == ["lo"]
    none_left(before)


def test_an_option_the_kernel_refuses_leaves_nothing(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, uid: int, ifname: str = "") -> None:
        raise OSError(errno.EINVAL, "no such user here")

    before = open_fds()
    monkeypatch.setattr(tun, "set_owner", refuse)
    with pytest.raises(OSError, match="no such user here"):
        rtap.open("t0", netns=netns, persist=True, owner=5)
    assert links(netns) == ["lo"]
    assert rtap.devices() == []
    none_left(before)


# ---- a descriptor of another owner


def lend(ns: NetNS, name: str = "t0", mode: str = "tap", **options: Any) -> int:
    fd, _ = ns.call(tun.open_queue, name, mode, **options)
    return int(fd)


@pytest.mark.parametrize("multi_queue", [False, True])
@pytest.mark.parametrize("vnet_hdr", [False, True])
@pytest.mark.parametrize("way", ["open", "probe"])
def test_descriptor(
    netns: NetNS, engine: str, pool: Mempool, way: str, vnet_hdr: bool, multi_queue: bool
) -> None:
    before = open_fds()
    fd = lend(netns, multi_queue=multi_queue, vnet_hdr=vnet_hdr)
    os.set_blocking(fd, True)
    os.set_inheritable(fd, True)
    try:
        if way == "open":
            dev = rtap.open(fd=fd, engine=engine)
        else:
            dev = rtap.probe(f"net_rtap0,fd={fd}")
            run(dev, pool, EthConf(engine=engine))
        with dev, PacketSocket(netns, "t0") as peer:
            info = dev.info()
            assert (info.ifname, info.vnet_hdr, info.multi_queue) == ("t0", vnet_hdr, multi_queue)
            assert info.max_rx_queues == (128 if multi_queue else 1)
            assert info.mac == dev.mac == link(netns, "t0")["address"]
            for _ in range(2):
                assert dev.send(frame(1, src=bytes(dev.app_mac)))
                assert peer.frames(1) == [frame(1, src=bytes(dev.app_mac))]
                peer.send(frame(2))
                assert dev.recv(5) == frame(2)
                dev.stop()
                dev.start()
        # The descriptor belongs to the lender, who can still use it.
        assert tun.get_iface(fd).name == "t0"
        assert links(netns) == ["lo", "t0"]
        with rtap.open(fd=fd) as dev:
            assert dev.send(frame())
    finally:
        os.close(fd)
    eventually(lambda: links(netns) == ["lo"], "it goes with the lender's descriptor")
    none_left(before, but=1)  # 1: the ring of this thread


def test_the_lender_may_close_it(netns: NetNS, engine: str) -> None:
    fd = lend(netns)
    dev = rtap.open(fd=fd, engine=engine)
    os.close(fd)
    with dev, PacketSocket(netns, "t0") as peer:
        peer.send(frame(3))
        assert dev.recv(5) == frame(3)
    eventually(lambda: links(netns) == ["lo"], "it goes with the device")


def test_duplicate_is_not_inherited(netns: NetNS) -> None:
    """An exec must not keep the interface alive, whether or not the lender's descriptor does."""
    fd = lend(netns)
    os.set_inheritable(fd, True)
    with rtap.open(fd=fd) as dev:
        mine = dev._ops._tap.fds[0]  # type: ignore[attr-defined]
        assert mine != fd
        assert fcntl.fcntl(mine, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(fd)


@pytest.mark.parametrize("size", [10, 12, 20])
def test_descriptor_with_longer_headers(netns: NetNS, engine: str, size: int) -> None:
    """Frames arrive whole whatever header length the lender chose; virtio 1.0 has 12 bytes."""
    fd = lend(netns)
    tun._set_int(fd, tun.TUNSETVNETHDRSZ, size, "TUNSETVNETHDRSZ", "t0")
    with rtap.open(fd=fd, engine=engine) as dev, PacketSocket(netns, "t0") as peer:
        peer.send(frame(5))
        assert dev.recv(5) == frame(5)
        assert dev.send(frame(6))
        assert peer.frames(1) == [frame(6)]
    os.close(fd)


def test_descriptor_with_headers_takes_offloads(netns: NetNS, pool: Mempool) -> None:
    fd = lend(netns, vnet_hdr=True)
    with rtap.open(fd=fd, rx_offloads=RxOffload.CHECKSUM) as dev:
        assert dev.info().rx_offloads == RxOffload.CHECKSUM
        dev.stop()
        run(dev, pool)
        assert (dev.info().vnet_hdr, dev.info().rx_offloads) == (True, 0)
        assert dev.send(frame())
    os.close(fd)


@pytest.mark.parametrize(
    "conf",
    [EthConf(rx_offloads=RxOffload.CHECKSUM), EthConf(tx_offloads=TxOffload.TCP_TSO)],
    ids=["rx", "tx"],
)
def test_descriptor_without_headers_takes_none(netns: NetNS, pool: Mempool, conf: EthConf) -> None:
    """It is refused when headers are needed, and the refusal changes nothing."""
    fd = lend(netns, vnet_hdr=False)
    with rtap.probe(f"net_rtap0,fd={fd}") as dev:
        run(dev, pool)
        dev.stop()
        with pytest.raises(ValueError, match=r"t0 .* was attached without \(IFF_VNET_HDR\)"):
            dev.configure(1, 1, conf)
        dev.start()
        assert dev.send(frame())
    os.close(fd)


def test_descriptor_of_a_multi_queue_interface_gets_more(
    netns: NetNS, engine: str, pool: Mempool
) -> None:
    fd = lend(netns)
    with rtap.probe(f"net_rtap0,fd={fd}") as dev, Mempool(512) as other:
        for queues in (4, 2, 3, 1):
            run(dev, pool if queues % 2 else other, EthConf(engine=engine), queues)
            assert link(netns, "t0")["linkinfo"]["info_data"]["numqueues"] == queues
            with PacketSocket(netns, "t0", 0x0800) as peer:
                for n in range(64):
                    peer.send(flow(n))
                got = [flow_of(bytes(m)) for q in range(queues) for m in dev.rx_burst(q, 64)]
            assert sorted(got) == list(range(64))
            dev.stop()
    os.close(fd)


def test_detached_descriptor_is_attached(netns: NetNS) -> None:
    fd = lend(netns)
    tun.set_queue_attached(fd, False)
    with rtap.open(fd=fd) as dev, PacketSocket(netns, "t0") as peer:
        peer.send(frame(4))
        assert dev.recv(5) == frame(4)
    os.close(fd)


def test_sndbuf_of_the_descriptor_is_respected(
    netns: NetNS, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device detects the lender's limit by itself, and chains its writes."""
    ordered = []

    def tx_queue(*args: Any, **options: Any) -> TxQueue:
        ordered.append(options["ordered"])
        return TxQueue(*args, **options)

    monkeypatch.setattr(interface, "TxQueue", tx_queue)
    fd = lend(netns)
    with rtap.open(fd=fd, engine=engine):
        assert ordered == [False]
    tun.set_sndbuf(fd, 20_000)
    with rtap.open(fd=fd, engine=engine) as dev:
        assert ordered == [False, True]
        assert_sends_fall_short_in_order(netns, dev, 0)
    os.close(fd)


def test_descriptor_of_a_tun_interface(netns: NetNS) -> None:
    fd = lend(netns, mode="tun")
    with pytest.raises(ValueError, match=r"is that of a TUN interface \(t0\), mode tap was asked"):
        rtap.open(fd=fd)
    with rtap.open(fd=fd, mode="tun") as dev:
        assert (dev.info().mode, dev.ifname) == ("tun", "t0")
    os.close(fd)


def test_frames_that_waited_are_thrown_away(netns: NetNS, engine: str) -> None:
    with Tap(netns, "t0", multi_queue=True) as lender, lender.packets() as peer:
        peer.send(frame(1))
        assert select.select([lender.fd], [], [], 5)[0]
        with rtap.open(fd=lender.fd, engine=engine) as dev:
            peer.send(frame(2))
            assert dev.recv(5) == frame(2)


def test_descriptor_of_another_namespace(netns: NetNS, netns2: NetNS) -> None:
    """The device finds the interface in its namespace, not a namesake in the caller's."""
    fd = lend(netns)
    with rtap.open("t0", netns=netns2) as namesake:
        dev = netns2.call(rtap.open, fd=fd)
        with dev:
            assert dev.mac == link(netns, "t0")["address"] != namesake.mac
            dev.mtu = 1400
        assert (link(netns, "t0")["mtu"], link(netns2, "t0")["mtu"]) == (1400, 1500)
    os.close(fd)


def test_interface_of_the_descriptor_is_deleted_and_made_anew(netns: NetNS, engine: str) -> None:
    """The two descriptors are one open file, so both attach to the new interface."""
    fd = lend(netns)
    with rtap.open(fd=fd, engine=engine) as dev:
        ip(netns, "link", "del", "t0")
        with pytest.raises(DeviceGone):
            dev.rx_burst(0)
        dev.stop()
        dev.start()
        with PacketSocket(netns, "t0") as peer:
            peer.send(frame(1))
            assert dev.recv(5) == frame(1)
        assert tun.get_iface(fd).name == "t0"
    os.close(fd)


# ---- other descriptors


def test_not_such_a_descriptor(netns: NetNS) -> None:
    before = open_fds()
    unattached = tun.open_control()
    read_end, write_end = os.pipe()
    no_device = "is not one of /dev/net/tun"
    with socket.socket() as tcp, open(os.devnull) as null:
        for fd, says in (
            (unattached.fileno(), "is not attached to an interface"),
            (read_end, no_device),
            (tcp.fileno(), no_device),
            (null.fileno(), no_device),
            (1 << 20, "is not open"),
        ):
            with pytest.raises(ValueError, match=f"fd: descriptor {fd} {says}"):
                rtap.open(fd=fd)
            with pytest.raises(ValueError, match=f"fd: descriptor {fd} {says}"):
                rtap.probe(f"net_rtap0,fd={fd}")
    unattached.close()
    for fd in (read_end, write_end):
        os.close(fd)
    assert rtap.devices() == []
    none_left(before)


def test_descriptor_of_a_deleted_interface(netns: NetNS) -> None:
    fd = lend(netns)
    ip(netns, "link", "del", "t0")
    with pytest.raises(ValueError, match="is not attached to an interface"):
        rtap.open(fd=fd)
    os.close(fd)


def test_descriptor_with_a_protocol_prefix(netns: NetNS) -> None:
    with netns.call(tun.open_control) as file:
        tun.attach_queue(file.fileno(), "t0", QueueFlag.TAP)
        with pytest.raises(ValueError, match="IFF_NO_PI"):
            rtap.open(fd=file.fileno())


def test_descriptor_that_cannot_be_written(netns: NetNS) -> None:
    fd = netns.call(os.open, tun.DEV_PATH, os.O_RDONLY | os.O_NONBLOCK)
    tun.attach_queue(fd, "t0", QueueFlag.TAP | QueueFlag.NO_PI)
    with pytest.raises(ValueError, match=r"\(t0\) is not open for reading and writing"):
        rtap.open(fd=fd)
    os.close(fd)


@pytest.mark.parametrize("more", [{"name": "t0"}, {"netns": 0}])
def test_name_and_place_are_the_descriptors(netns: NetNS, more: dict[str, Any]) -> None:
    fd = lend(netns)
    with pytest.raises(ValueError, match="leave name and netns out"):
        rtap.open(fd=fd, **more)
    os.close(fd)


# ---- without rights


CHILD = """
import os, sys, rtap, support
fd = int(sys.argv[1])
support.drop_capabilities()
try:
    os.close(os.open("/proc/1/mem", os.O_RDONLY))
    raise SystemExit("this process still has its rights")
except PermissionError:
    pass
with rtap.open(fd=fd, engine=sys.argv[2]) as dev:
    assert dev.info().ifname == "t0", dev.info()
    for n in range(3):
        print("got", dev.recv(30), flush=True)
        assert dev.send(support.frame(n, src=bytes(dev.app_mac)))
        dev.stop()
        dev.start()
        print("ready", flush=True)
    try:
        dev.mtu = 1400
    except PermissionError:
        print("no right to set the MTU")
"""


def test_descriptor_of_a_helper_without_any_rights(netns: NetNS, engine: str) -> None:
    """As systemd or a privileged helper does: attach, then pass it to a process without rights."""
    with Tap(netns, "t0", vnet_hdr=False) as lender, PacketSocket(netns, "t0") as peer:
        process = netns.popen(
            [sys.executable, "-c", CHILD, str(lender.fd), engine],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[lender.fd],
            env=child_environment(),
        )
        with process:
            assert process.stdout is not None
            mac = link(netns, "t0")["address"]
            app = bytes(rtap.MacAddr(mac).peer())
            for n in range(3):
                # Frames from before its start are thrown away, so send until one is taken.
                line = ""
                while not line:
                    peer.send(frame(n))
                    if select.select([process.stdout], [], [], 0.05)[0]:
                        line = process.stdout.readline()
                assert line == f"got {frame(n)!r}\n", line + process.stdout.read()
                assert peer.frames(1) == [frame(n, src=app)]
                assert process.stdout.readline() == "ready\n"
            assert process.stdout.read() == "no right to set the MTU\n"
        assert process.returncode == 0


def test_without_rights_a_namesake_is_not_taken_for_it(netns: NetNS, netns2: NetNS) -> None:
    code = """
import sys, rtap, support
support.drop_capabilities()
try:
    rtap.open(fd=int(sys.argv[1]))
except PermissionError as exc:
    print(exc)
"""
    fd = lend(netns)
    with rtap.open("t0", netns=netns2):
        done = netns2.run(
            [sys.executable, "-c", code, str(fd)],
            capture_output=True,
            text=True,
            pass_fds=[fd],
            env=child_environment(),
        )
    os.close(fd)
    assert done.stderr == ""
    assert "interface t0" in done.stdout
    assert "another network namespace, which only CAP_NET_ADMIN may ask for" in done.stdout
