# SPDX-License-Identifier: BSD-3-Clause
"""The ioctls of /dev/net/tun, and devices in TUN mode."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rigs import wrong_checksums
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import IPv6
from support import (
    Task,
    add_ipv6,
    carrier,
    child_environment,
    eventually,
    ip,
    link,
    links,
    none_left,
    open_fds,
    ping,
    with_open_tun,
)

import rtap
from rtap import DeviceGone, NetNS
from rtap.control import tun
from rtap.control.netlink import find_link
from rtap.control.tun import QueueFlag, TunFeature

ALL = TunFeature(0x4F) | TunFeature.USO4
NOBODY = 65534


class Descriptors(ExitStack):
    """Queue descriptors, closed at the end."""

    def open(self, ns: NetNS, name: str, mode: str = "tap", **options: Any) -> tuple[int, Any]:
        fd, iface = ns.call(tun.open_queue, name, mode, **options)
        self.callback(os.close, fd)
        return fd, iface


@pytest.fixture
def descriptors() -> Iterator[Descriptors]:
    before = open_fds()
    with Descriptors() as stack:
        yield stack
    none_left(before)


# ---- numbers


def test_ioctl_numbers_as_in_the_kernel_headers() -> None:
    # linux/if_tun.h on the architectures of the usual encoding, such as x86 and arm
    if tun._ioctl_bits(os.uname().machine) != (0, 2, 1, 14):
        pytest.skip("another encoding of ioctl numbers")
    assert tun.TUNSETIFF == 0x400454CA
    assert tun.TUNSETPERSIST == 0x400454CB
    assert tun.TUNSETOWNER == 0x400454CC
    assert tun.TUNSETGROUP == 0x400454CE
    assert tun.TUNGETFEATURES == 0x800454CF
    assert tun.TUNSETOFFLOAD == 0x400454D0
    assert tun.TUNGETIFF == 0x800454D2
    assert tun.TUNGETSNDBUF == 0x800454D3
    assert tun.TUNSETSNDBUF == 0x400454D4
    assert tun.TUNSETVNETHDRSZ == 0x400454D8
    assert tun.TUNSETQUEUE == 0x400454D9
    assert tun.TUNSETVNETLE == 0x400454DC
    assert tun.TUNSETCARRIER == 0x400454E2
    assert tun.TUNGETDEVNETNS == 0x54E3


@pytest.mark.parametrize(
    ("machine", "tunsetiff", "tungetiff", "netns"),
    [
        ("x86_64", 0x400454CA, 0x800454D2, 0x54E3),
        ("i686", 0x400454CA, 0x800454D2, 0x54E3),
        ("armv7l", 0x400454CA, 0x800454D2, 0x54E3),
        ("aarch64", 0x400454CA, 0x800454D2, 0x54E3),
        ("riscv64", 0x400454CA, 0x800454D2, 0x54E3),
        ("s390x", 0x400454CA, 0x800454D2, 0x54E3),
        ("ppc64le", 0x800454CA, 0x400454D2, 0x200054E3),
        ("mips64", 0x800454CA, 0x400454D2, 0x200054E3),
        ("sparc64", 0x800454CA, 0x400454D2, 0x200054E3),
    ],
)
def test_ioctl_numbers_of_an_architecture(
    monkeypatch: pytest.MonkeyPatch, machine: str, tunsetiff: int, tungetiff: int, netns: int
) -> None:
    none, read, write, bits = tun._ioctl_bits(machine)
    monkeypatch.setattr(tun, "_SIZE_BITS", bits)
    assert tun._ioc(write, 202, 4) == tunsetiff
    assert tun._ioc(read, 210, 4) == tungetiff
    assert tun._ioc(none, 227, 0) == netns


def test_feature_bits() -> None:
    # linux/if_tun.h: TUN_F_*
    assert [int(f) for f in TunFeature] == [0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40]
    # IFF_*
    wanted = {"TUN": 1, "TAP": 2, "NO_PI": 0x1000, "MULTI_QUEUE": 0x100, "PERSIST": 0x800}
    wanted |= {"VNET_HDR": 0x4000, "TUN_EXCL": 0x8000, "NAPI": 0x10, "DETACH_QUEUE": 0x400}
    assert {name: int(QueueFlag[name]) for name in wanted} == wanted


# ---- interface names


@pytest.mark.parametrize("name", ["a", "tap0", "a" * 15, "%d", "tap%d", "x%dy", "ä" * 7, "a.b-c_d"])
def test_names(name: str) -> None:
    assert tun.check_ifname(name) == name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "got 0: ''"),
        ("a" * 16, "got 16: '" + "a" * 16),
        ("ä" * 8, "got 16"),
        (".", "'.'"),
        ("..", "'..'"),
        ("a/b", "'a/b'"),
        ("a:b", "'a:b'"),
        ("a b", "'a b'"),
        ("a\tb", r"'a\tb'"),
        ("a\n", r"'a\n'"),
        ("a\0b", r"'a\x00b'"),
        ("a\xa0b", "white space"),
        ("%", "'%'"),
        ("%s", "'%s'"),
        ("%d%d", "'%d%d'"),
        ("%%d", "'%%d'"),
    ],
)
def test_names_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        tun.check_ifname(name)


def test_names_the_kernel_agrees_about(netns: NetNS, descriptors: Descriptors) -> None:
    for name in ("a.b-c_d", "a" * 15, "ä" * 7):
        _, iface = descriptors.open(netns, name)
        assert iface.name == name
    assert links(netns) == ["lo", "a.b-c_d", "a" * 15, "ä" * 7]


def test_name_without_pattern() -> None:
    with pytest.raises(ValueError, match="no %, got 'tap%d'"):
        tun.check_ifname("tap%d", pattern=False)
    with pytest.raises(TypeError, match="int"):
        tun.check_ifname(5)  # type: ignore[arg-type]


# ---- descriptors


def test_first_free_number(netns: NetNS, descriptors: Descriptors) -> None:
    names = [descriptors.open(netns, "t%d")[1].name for _ in range(3)]
    assert names == ["t0", "t1", "t2"]


@pytest.mark.parametrize("mode", ["tap", "tun"])
@pytest.mark.parametrize("vnet_hdr", [True, False])
@pytest.mark.parametrize("multi_queue", [True, False])
def test_flags_asked_for_are_there(
    netns: NetNS, descriptors: Descriptors, mode: str, vnet_hdr: bool, multi_queue: bool
) -> None:
    fd, iface = descriptors.open(netns, "t0", mode, vnet_hdr=vnet_hdr, multi_queue=multi_queue)
    assert iface == tun.get_iface(fd)
    assert bool(iface.flags & QueueFlag.TAP) is (mode == "tap")
    assert bool(iface.flags & QueueFlag.TUN) is (mode == "tun")
    assert bool(iface.flags & QueueFlag.VNET_HDR) is vnet_hdr
    assert bool(iface.flags & QueueFlag.MULTI_QUEUE) is multi_queue
    assert link(netns, "t0")["linkinfo"]["info_data"]["pi"] is False
    assert not os.get_inheritable(fd)
    assert not os.get_blocking(fd)


def test_header_is_ten_bytes_and_little_endian(netns: NetNS, descriptors: Descriptors) -> None:
    fd, _ = descriptors.open(netns, "t0")
    size = struct.unpack("i", fcntl.ioctl(fd, 0x800454D7, bytes(4)))[0]  # TUNGETVNETHDRSZ
    little = struct.unpack("i", fcntl.ioctl(fd, 0x800454DD, bytes(4)))[0]  # TUNGETVNETLE
    assert (size, little) == (10, 1)


def test_kinds_do_not_mix(netns: NetNS, descriptors: Descriptors) -> None:
    descriptors.open(netns, "single", multi_queue=False)
    descriptors.open(netns, "multi")
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("single", {"multi_queue": False}, errno.EBUSY),
        ("single", {"multi_queue": True}, errno.EINVAL),
        ("multi", {"multi_queue": False}, errno.EINVAL),
        ("multi", {"exclusive": True}, errno.EBUSY),
        ("lo", {}, errno.EINVAL),
    ]
    for name, options, code in cases:
        with pytest.raises(OSError, match=f"TUNSETIFF on {name}") as caught:
            descriptors.open(netns, name, **options)
        assert caught.value.errno == code, (name, options)
    with pytest.raises(OSError, match="TUNSETIFF on multi"):
        descriptors.open(netns, "multi", "tun")
    with pytest.raises(ValueError, match="'tup'"):
        descriptors.open(netns, "x", "tup")


def test_second_queue_has_the_first_ones_header(netns: NetNS, descriptors: Descriptors) -> None:
    descriptors.open(netns, "t0", vnet_hdr=False)
    _, iface = descriptors.open(netns, "t0", vnet_hdr=True)
    assert not iface.flags & QueueFlag.VNET_HDR


def test_missing_feature_is_named(
    netns: NetNS, descriptors: Descriptors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tun, "get_features", lambda fd: QueueFlag.TAP | QueueFlag.NO_PI)
    with pytest.raises(OSError, match="lacks IFF_MULTI_QUEUE, IFF_VNET_HDR, which t0 needs"):
        descriptors.open(netns, "t0")
    assert links(netns) == ["lo"]


@pytest.mark.parametrize(
    ("path", "error", "says"),
    [
        ("/nonexistent/tun", FileNotFoundError, "modprobe tun"),
        ("/proc/self/mem/x", NotADirectoryError, "tun"),
    ],
)
def test_no_device_file(
    monkeypatch: pytest.MonkeyPatch, path: str, error: type[OSError], says: str
) -> None:
    monkeypatch.setattr(tun, "DEV_PATH", path)
    with pytest.raises(error, match=says) as caught:
        tun.open_control()
    assert path in str(caught.value)


def test_open_tells_what_the_machine_lacks(netns: NetNS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun, "DEV_PATH", "/nonexistent/tun")
    before = open_fds()
    with pytest.raises(FileNotFoundError, match=r"/nonexistent/tun.*--device /dev/net/tun"):
        rtap.open("t0", netns=netns)
    none_left(before)
    assert rtap.devices() == []


@pytest.mark.parametrize("other", ["/dev/zero", "/dev/null", "file"])
def test_another_file_in_the_place_of_the_device(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: str
) -> None:
    if other == "file":
        other = str(tmp_path / "tun")
        Path(other).touch()
    monkeypatch.setattr(tun, "DEV_PATH", other)
    before = open_fds()
    for mode in ("tap", "tun"):
        with pytest.raises(OSError, match=f"{other} is not the tun driver's device"):
            rtap.open("t0", netns=netns, mode=mode)
    none_left(before)


# ---- requests on a descriptor


def test_offloads_need_the_checksum(netns: NetNS, descriptors: Descriptors) -> None:
    fd, _ = descriptors.open(netns, "t0")
    assert tun.set_offload(fd, TunFeature(0), "t0") == TunFeature(0)
    assert tun.set_offload(fd, TunFeature.CSUM, "t0") == TunFeature.CSUM
    with pytest.raises(OSError, match=r"TUNSETOFFLOAD.*TSO4.* on t0") as caught:
        tun.set_offload(fd, TunFeature.TSO4, "t0")
    assert caught.value.errno == errno.EINVAL


def test_uso_is_dropped_where_the_kernel_does_not_know_it(
    netns: NetNS, descriptors: Descriptors, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, _ = descriptors.open(netns, "t0")
    asked: list[int] = []

    def old_kernel(fd: int, request: int, arg: int) -> int:
        asked.append(arg)
        if arg & 0x60:
            raise OSError(errno.EINVAL, "Invalid argument")
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "ioctl", old_kernel)
        got = tun.set_offload(fd, ALL | TunFeature.USO6, "t0")
    assert asked == [0x6F, 0x0F]
    assert got == TunFeature(0x0F)


def test_persist_owner_group(netns: NetNS, descriptors: Descriptors) -> None:
    fd, _ = descriptors.open(netns, "t0")
    tun.set_persist(fd, True, "t0")
    tun.set_owner(fd, NOBODY, "t0")
    tun.set_group(fd, 4321, "t0")
    assert tun.get_iface(fd).flags & QueueFlag.PERSIST
    data = link(netns, "t0")["linkinfo"]["info_data"]
    assert (data["user"], data["group"], data["persist"]) == ("nobody", "4321", True) or (
        data["persist"] is True and data["group"] in (4321, "4321")
    )
    tun.set_persist(fd, False, "t0")
    assert not tun.get_iface(fd).flags & QueueFlag.PERSIST


@pytest.mark.parametrize("number", [0, 1 << 31, (1 << 32) - 2])
def test_owner_of_any_number(netns: NetNS, descriptors: Descriptors, number: int) -> None:
    fd, _ = descriptors.open(netns, "t0")
    tun.set_owner(fd, number, "t0")
    found = find_link(netns.fd, "t0")
    assert found is not None
    assert found.tun["IFLA_TUN_OWNER"] == number


def test_owner_of_no_number(netns: NetNS, descriptors: Descriptors) -> None:
    fd, _ = descriptors.open(netns, "t0")
    with pytest.raises(OSError, match="TUNSETOWNER 4294967295 on t0") as caught:
        tun.set_owner(fd, (1 << 32) - 1, "t0")
    assert caught.value.errno == errno.EINVAL


def test_sndbuf(netns: NetNS, descriptors: Descriptors) -> None:
    """sndbuf applies to descriptors that exist, not to later ones."""
    fd, _ = descriptors.open(netns, "t0")
    assert tun.get_sndbuf(fd, "t0") is None
    tun.set_sndbuf(fd, 12345, "t0")
    assert tun.get_sndbuf(fd, "t0") == 12345
    other, _ = descriptors.open(netns, "t0")
    assert tun.get_sndbuf(other, "t0") is None


def test_mac(netns: NetNS, descriptors: Descriptors) -> None:
    fd, _ = descriptors.open(netns, "t0")
    assert tun.get_mac(fd, "t0") == link(netns, "t0")["address"]


def test_carrier(netns: NetNS, descriptors: Descriptors) -> None:
    fd, _ = descriptors.open(netns, "t0")
    ip(netns, "link", "set", "t0", "up")
    for on in (False, True):
        tun.set_carrier(fd, on, "t0")
        assert carrier(netns, "t0") is on


def test_queue_detached_and_attached(netns: NetNS, descriptors: Descriptors) -> None:
    first, _ = descriptors.open(netns, "t0")
    second, _ = descriptors.open(netns, "t0")

    def queues() -> tuple[int, int]:
        data = link(netns, "t0")["linkinfo"]["info_data"]
        return data["numqueues"], data["numdisabled"]

    assert queues() == (2, 0)
    tun.set_queue_attached(second, False, "t0")
    assert queues() == (1, 1)
    with pytest.raises(OSError, match="TUNSETQUEUE DETACH_QUEUE on t0") as caught:
        tun.set_queue_attached(second, False, "t0")
    assert caught.value.errno == errno.EINVAL
    tun.set_queue_attached(second, True, "t0")
    assert queues() == (2, 0)
    with pytest.raises(OSError, match="ATTACH_QUEUE"):
        tun.set_queue_attached(first, True, "t0")


def test_deleted_interface(netns: NetNS, descriptors: Descriptors) -> None:
    fd, _ = descriptors.open(netns, "t0")
    ip(netns, "link", "del", "t0")
    for call in (
        lambda: tun.get_iface(fd, "t0"),
        lambda: tun.set_offload(fd, TunFeature(0), "t0"),
        lambda: tun.set_persist(fd, True, "t0"),
        lambda: tun.set_carrier(fd, True, "t0"),
        lambda: tun.set_sndbuf(fd, 1000, "t0"),
        lambda: tun.set_owner(fd, 0, "t0"),
        lambda: tun.get_sndbuf(fd, "t0"),
        lambda: tun.get_mac(fd, "t0"),
        lambda: tun.device_netns(fd, "t0"),
    ):
        with pytest.raises(DeviceGone, match=r"on t0.*gone") as caught:
            call()
        assert (caught.value.errno, caught.value.ifname) == (errno.EBADFD, "t0")


def test_namespace_of_the_interface(netns: NetNS, netns2: NetNS, descriptors: Descriptors) -> None:
    fd, _ = descriptors.open(netns, "t0")
    for home in (netns, netns2):
        if home is netns2:
            ip(netns, "link", "set", "t0", "netns", netns2.path)
        with tun.device_netns(fd, "t0") as there:
            assert os.fstat(there.fileno()).st_ino == home.inode


def test_attaching_without_rights(netns: NetNS, tmp_path: Path) -> None:
    ip(netns, *f"tuntap add mode tap mine multi_queue user {NOBODY}".split())
    ip(netns, *f"tuntap add mode tap theirs multi_queue user {NOBODY - 1}".split())
    code = f"""
import errno, os
from rtap.control import tun
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
fd, iface = tun.open_queue("mine")
assert iface.name == "mine"
for name in ("theirs", "new0"):
    try:
        tun.open_queue(name)
    except PermissionError as exc:
        assert "CAP_NET_ADMIN" in str(exc) and name in str(exc), exc
    else:
        raise SystemExit(f"{{name}} could be had")
"""
    done = netns.run(
        with_open_tun(tmp_path, sys.executable, "-c", code),
        capture_output=True,
        text=True,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr


# ---- TUN mode


def answer(request: bytes) -> bytes:
    """The echo reply to a ping."""
    packet = IP(request) if request[0] >> 4 == 4 else IPv6(request)
    packet.src, packet.dst = packet.dst, packet.src
    packet[ICMP].type = 0
    del packet[ICMP].chksum, packet.chksum
    return bytes(packet)


def test_ping_through_a_tun_device(netns: NetNS, engine: str) -> None:
    with rtap.open("u%d", netns=netns, mode="tun", engine=engine) as dev:
        assert (dev.ifname, dev.info().mode) == ("u0", "tun")
        ip(netns, "addr", "add", "10.1.0.1/24", "dev", "u0")
        pings = Task(ping, netns, "10.1.0.2")
        for _ in range(5):
            request = dev.recv(5)
            assert len(request) == 84
            assert IP(request).dst == "10.1.0.2"
            assert dev.send(answer(request))
        pings.result()
        stats = dev.stats()
        assert (stats.ipackets, stats.ibytes, stats.opackets, stats.obytes) == (5, 420, 5, 420)


@pytest.mark.parametrize("offloads", [0, int(rtap.RxOffload.CHECKSUM)])
def test_udp_through_a_tun_device(netns: NetNS, engine: str, offloads: int) -> None:
    with (
        rtap.open("u0", netns=netns, mode="tun", engine=engine, rx_offloads=offloads) as dev,
        netns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as s,
    ):
        assert dev.info().vnet_hdr is bool(offloads)
        ip(netns, "addr", "add", "10.1.0.1/24", "dev", "u0")
        s.settimeout(5)
        s.bind(("10.1.0.1", 0))
        for n in (0, 1, 2, 100, 1472):
            s.sendto(b"a" * n, ("10.1.0.2", 9))
            (mbuf,) = dev.rx_burst(0, timeout=5)
            packet = IP(bytes(mbuf))
            assert packet.len == 28 + n == mbuf.pkt_len
            assert bytes(packet[UDP].payload) == b"a" * n
            if offloads:
                assert mbuf.ol_flags & rtap.MbufFlag.RX_L4_CKSUM_MASK
                assert (mbuf.l2_len, mbuf.l3_len, mbuf.l4_len) == (0, 20, 8)
            else:
                assert wrong_checksums(bytes(mbuf), l2=False) == []
                assert mbuf.ol_flags == 0
            back = IP(src="10.1.0.2", dst="10.1.0.1") / UDP(sport=9, dport=packet.sport)
            assert dev.send(bytes(back / (b"b" * n)))
            assert s.recv(2000) == b"b" * n


def test_ipv6_through_a_tun_device(engine: str) -> None:
    with NetNS() as ns, rtap.open("u0", netns=ns, mode="tun", engine=engine) as dev:
        add_ipv6(ns, "u0", "fd00::1")
        with ns.call(socket.socket, socket.AF_INET6, socket.SOCK_DGRAM) as s:
            s.sendto(b"hello", ("fd00::2", 9))
            seen = []
            eventually(
                lambda: seen.append(dev.recv(5)) or IPv6(seen[-1]).dst == "fd00::2",  # type: ignore[func-returns-value]
                "the datagram between what IPv6 itself sends",
            )
        assert all(packet[0] >> 4 == 6 for packet in seen)
        assert wrong_checksums(seen[-1], l2=False) == []


def test_tun_has_no_address_but_an_mtu(netns: NetNS) -> None:
    with rtap.open("u0", netns=netns, mode="tun") as dev:
        assert dev.mac == dev.app_mac == "00:00:00:00:00:00"
        with pytest.raises(ValueError, match="u0 is a TUN interface and has no Ethernet address"):
            dev.mac = "02:00:00:00:00:01"
        dev.mtu = 1280
        assert (dev.mtu, link(netns, "u0")["mtu"]) == (1280, 1280)
    with pytest.raises(ValueError, match="no Ethernet address"):
        rtap.open("u0", netns=netns, mode="tun", mac="02:00:00:00:00:01")
    assert links(netns) == ["lo"]


def test_largest_mtu_of_a_tun_device(netns: NetNS) -> None:
    with rtap.open("u0", netns=netns, mode="tun", mtu=65535) as dev:
        assert (dev.mtu, dev.pool.data_room) == (65535, 65536)
    with pytest.raises(ValueError, match="mtu must be 68 to 65535, got 65536"):
        rtap.open("u0", netns=netns, mode="tun", mtu=65536)
