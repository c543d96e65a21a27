# SPDX-License-Identifier: BSD-3-Clause
"""rtap.open: interfaces that it makes and takes over, traffic, counters."""

from __future__ import annotations

import errno
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from patience import rate
from rigs import iproute, redirect, talk
from support import (
    Tap,
    addresses,
    carrier,
    child_environment,
    frame,
    link,
    links,
    none_left,
    open_fds,
    seq_of,
    skip_without_engine,
    with_open_tun,
)
from this_kernel import kernel

import rtap
from rtap import NetNS, RxOffload, TxOffload

CHECKSUM_LRO = RxOffload.CHECKSUM | RxOffload.TCP_LRO


# ---- what open() makes


def test_defaults(netns: NetNS) -> None:
    with rtap.open(netns=netns) as dev:
        info = dev.info()
        assert (dev.name, dev.ifname, dev.state) == ("net_rtap0", "rtap0", "started")
        assert (info.nb_rx_queues, info.nb_tx_queues, info.mtu) == (1, 1, 1500)
        assert (info.mode, info.persist, info.multi_queue, info.vnet_hdr) == (
            "tap",
            False,
            True,
            False,
        )
        assert (info.rx_offloads, info.tx_offloads) == (0, 0)
        assert info.max_rx_queues == info.max_tx_queues == 128
        assert info.if_index == link(netns, "rtap0")["ifindex"]
        assert info.mac == dev.mac == link(netns, "rtap0")["address"]
        assert info.engine in ("uring", "syscall")
        assert info.engine_reason
        assert (info.min_mtu, info.max_mtu) == (68, 65521)
        assert dev.link().link_status
        assert "UP" in link(netns, "rtap0")["flags"]
        assert (dev.pool.size, dev.pool.data_room) == (4096, 2048)
    assert links(netns) == ["lo"]


def test_name_patterns(netns: NetNS) -> None:
    with (
        rtap.open("tap%d", netns=netns) as a,
        rtap.open("tap%d", netns=netns) as b,
        rtap.open("x%dy", netns=netns) as c,
    ):
        assert [d.ifname for d in (a, b, c)] == ["tap0", "tap1", "x0y"]
        a.close()
        with rtap.open("tap%d", netns=netns) as d:
            assert d.ifname == "tap0"


@pytest.mark.parametrize("choice", ["uring", "syscall"])
def test_engine_asked_for(netns: NetNS, choice: str) -> None:
    skip_without_engine(choice)
    with rtap.open("t0", netns=netns, engine=choice) as dev:
        info = dev.info()
        assert info.engine == choice
        without_nowait = choice == "uring" and kernel() < (6, 4)
        assert info.engine_reason == (
            "asked for; without RWF_NOWAIT, each batch of reads ends with a cancel"
            if without_nowait
            else "asked for"
        )


@pytest.mark.parametrize(
    ("options", "size", "room"),
    [
        ({}, 4096, 2048),
        ({"queues": 20}, 5120, 2048),
        ({"mtu": 9000}, 2048, 9023),
        ({"mtu": 9000, "queues": 20}, 2560, 9023),
        ({"rx_offloads": CHECKSUM_LRO}, 512, 65598),
        ({"rx_offloads": CHECKSUM_LRO, "queues": 9}, 576, 65598),
        ({"rx_offloads": CHECKSUM_LRO | RxOffload.SCATTER}, 4096, 2048),
        ({"nb_mbufs": 77}, 77, 2048),
        ({"data_room": 3000}, 4096, 3000),
        ({"mtu": 68}, 4096, 2048),
    ],
)
def test_pool(netns: NetNS, options: dict[str, Any], size: int, room: int) -> None:
    with rtap.open("t0", netns=netns, **options) as dev:
        assert (dev.pool.size, dev.pool.data_room) == (size, room)
        assert dev.pool.name == dev.name


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"name": "a" * 16}, ValueError, "a" * 16),
        ({"name": "a/b"}, ValueError, "'a/b'"),
        ({"name": 5}, TypeError, "int"),
        ({"queues": 0}, ValueError, "got 0"),
        ({"queues": 129}, ValueError, "1 to 128, got 129"),
        ({"queues": "1"}, TypeError, "str"),
        ({"mtu": 65522}, ValueError, "68 to 65521, got 65522"),
        ({"mtu": "1500"}, TypeError, "str"),
        ({"mac": "x"}, ValueError, "'x'"),
        ({"mac": "01:00:00:00:00:01"}, ValueError, "unicast"),
        ({"mode": "tup"}, ValueError, "mode must be tap or tun, got 'tup'"),
        ({"mode": None}, ValueError, "None"),
        ({"engine": "x"}, ValueError, "engine must be one of auto, uring, syscall, got 'x'"),
        ({"gil": "x"}, ValueError, "gil must be one of auto, release, hold, got 'x'"),
        ({"rx_offloads": TxOffload.TCP_TSO}, TypeError, "rx_offloads"),
        ({"tx_offloads": RxOffload.TCP_LRO}, TypeError, "tx_offloads"),
        ({"rx_offloads": -1}, ValueError, "-1"),
        ({"rx_offloads": 1 << 40}, ValueError, hex(1 << 40)),
        ({"nb_mbufs": 0}, ValueError, "0"),
        ({"nb_mbufs": "many"}, TypeError, "str"),
        ({"data_room": 1522}, ValueError, "at least 1523, the pool's is 1522"),
        ({"data_room": 2048, "mtu": 9000}, ValueError, "at least 9023, the pool's is 2048"),
        ({"data_room": 2048, "rx_offloads": CHECKSUM_LRO}, ValueError, "65598"),
        ({"data_room": -1}, ValueError, "-1"),
        ({"nb_desc": 0}, ValueError, "nb_desc must be 1 to 32768, got 0"),
        ({"nb_desc": 32769}, ValueError, "nb_desc must be 1 to 32768, got 32769"),
        ({"nb_desc": 1.5}, TypeError, "float"),
        (
            {"sndbuf": 0},
            ValueError,
            "sndbuf must be None or a number of bytes, 1 to 2147483647, go",
        ),
        ({"sndbuf": 1 << 31}, ValueError, "got 2147483648"),
        (
            {"txqueuelen": 0},
            ValueError,
            "txqueuelen must be None or a number of frames, 1 to 524288",
        ),
        ({"txqueuelen": "9"}, ValueError, "got '9'"),
        (
            {"owner": -1},
            ValueError,
            "owner must be None or a name or a number, 0 to 4294967294, got",
        ),
        ({"owner": "no such user"}, ValueError, "owner: there is no user 'no such user'"),
        ({"owner": 1.5}, ValueError, "got 1.5"),
        ({"group": ""}, ValueError, "group: there is no group ''"),
        ({"fd": 3.0}, ValueError, "fd must be None or a descriptor, 0 to 2147483647, got 3.0"),
        ({"fd": True}, ValueError, "got True"),
        ({"fd": 5}, ValueError, "leave name and netns out"),
        ({"sndbuf": "1"}, ValueError, "'1'"),
        ({"netns": 4.5}, TypeError, "float"),
        ({"netns": "rtap-no-such"}, FileNotFoundError, "rtap-no-such"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_refusals_leave_nothing(
    netns: NetNS, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    before = open_fds()
    options = {"name": "t0", "netns": netns, "persist": True, **options}
    with pytest.raises(error, match=re.escape(says)):
        rtap.open(options.pop("name"), **options)
    assert links(netns) == ["lo"]
    assert rtap.devices() == []
    none_left(before, but=1)  # 1: the ring of this thread


# ---- existing interfaces


@pytest.mark.parametrize("multi_queue", ["", " multi_queue"])
@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_existing_interface_is_taken_over(netns: NetNS, mode: str, multi_queue: str) -> None:
    iproute(netns, f"tuntap add mode {mode} p0{multi_queue}")
    iproute(netns, "link set dev p0 mtu 9000")
    iproute(netns, "addr add 10.0.0.1/24 dev p0")
    before = link(netns, "p0")
    for offloads in (RxOffload(0), RxOffload.CHECKSUM, RxOffload(0)):
        with rtap.open("p0", netns=netns, mode=mode, rx_offloads=offloads) as dev:
            info = dev.info()
            assert info.multi_queue is bool(multi_queue)
            assert info.max_rx_queues == (128 if multi_queue else 1)
            assert info.persist
            assert info.vnet_hdr is bool(offloads)
            assert (info.mtu, info.if_index) == (9000, before["ifindex"])
            assert dev.pool.data_room > 9000
            assert dev.link().link_status
            talk(netns, dev, b"hello", "10.0.0.1")
            assert dev.recv(5).endswith(b"hello")
        after = link(netns, "p0")
        assert after["ifindex"] == before["ifindex"]
        assert after.get("address") == before.get("address")
        assert addresses(netns, "p0")[0].startswith("10.0.0.1/24")
        assert after["linkinfo"]["info_data"]["persist"] is True
        assert not carrier(netns, "p0")


def test_multi_queue_interface_with_more_queues(netns: NetNS) -> None:
    iproute(netns, "tuntap add mode tap p0 multi_queue")
    with rtap.open("p0", netns=netns, queues=7) as dev:
        assert dev.info().nb_rx_queues == 7
        assert link(netns, "p0")["linkinfo"]["info_data"]["numqueues"] == 7


@pytest.mark.parametrize("queues", [2, 4])
def test_single_queue_interface_has_one(netns: NetNS, queues: int) -> None:
    iproute(netns, "tuntap add mode tap p0")
    why = f"must be 1, got {queues}: p0 is a single-queue interface"
    with pytest.raises(ValueError, match=why):
        rtap.open("p0", netns=netns, queues=queues)
    assert links(netns) == ["lo", "p0"]
    with rtap.open("p0", netns=netns) as dev:
        assert dev.info().nb_rx_queues == 1


@pytest.mark.parametrize(("there", "asked"), [("tap", "tun"), ("tun", "tap")])
@pytest.mark.parametrize("multi_queue", ["", " multi_queue"])
def test_the_other_mode_is_refused(netns: NetNS, there: str, asked: str, multi_queue: str) -> None:
    iproute(netns, f"tuntap add mode {there} p0{multi_queue}")
    with pytest.raises(FileExistsError, match=f"p0 is there already in mode {there}, mode {asked}"):
        rtap.open("p0", netns=netns, mode=asked)
    assert links(netns) == ["lo", "p0"]


@pytest.mark.parametrize("name", ["lo", "br0"])
def test_other_interfaces_are_refused(netns: NetNS, name: str) -> None:
    iproute(netns, "link add br0 type bridge")
    with pytest.raises(FileExistsError, match=f"{name} is there already and is not a TAP or TUN"):
        rtap.open(name, netns=netns)
    assert links(netns) == ["lo", "br0"]


@pytest.mark.parametrize("persist", [False, True])
@pytest.mark.parametrize("multi_queue", [False, True])
def test_an_interface_in_use_is_refused(netns: NetNS, multi_queue: bool, persist: bool) -> None:
    """Otherwise the kernel would add a queue, and the device would take half of the frames."""
    with Tap(netns, "t0", multi_queue=multi_queue, vnet_hdr=False) as tap:
        rtap.control.tun.set_persist(tap.fd, persist, "t0")
        with pytest.raises(OSError, match="t0 is in use by another process or device") as caught:
            rtap.open("t0", netns=netns)
        assert caught.value.errno == errno.EBUSY
        assert link(netns, "t0")["linkinfo"]["info_data"].get("numqueues", 1) == 1
        assert rtap.devices() == []
        rtap.control.tun.set_persist(tap.fd, False, "t0")


@pytest.mark.parametrize("persist", [False, True])
def test_an_interface_of_another_device_is_refused(netns: NetNS, persist: bool) -> None:
    with rtap.open("t0", netns=netns, persist=persist) as dev:
        with pytest.raises(OSError, match="t0 is in use"):
            rtap.open("t0", netns=netns)
        assert dev.send(frame())
        assert rtap.devices() == [dev]


def test_waits_for_a_dying_namesake(netns: NetNS) -> None:
    tap = Tap(netns, "t0")
    threading.Timer(0.2, tap.close).start()
    with rtap.open("t0", netns=netns) as dev:
        assert dev.ifname == "t0"
        assert dev.send(frame())


def test_same_name_in_two_namespaces(netns: NetNS, netns2: NetNS) -> None:
    with (
        rtap.open("t0", netns=netns, mac="02:00:00:00:00:01") as a,
        rtap.open("t0", netns=netns2, mac="02:00:00:00:00:02") as b,
    ):
        assert (a.ifname, b.ifname) == ("t0", "t0")
        assert link(netns, "t0")["address"] == a.mac == "02:00:00:00:00:01"
        assert link(netns2, "t0")["address"] == b.mac == "02:00:00:00:00:02"


def test_persist(netns: NetNS) -> None:
    with rtap.open("t0", netns=netns, persist=True, mtu=1400, mac="02:00:00:00:00:05") as dev:
        assert dev.info().persist
        iproute(netns, "addr add 10.0.0.1/24 dev t0")
        index = dev.info().if_index
    assert links(netns) == ["lo", "t0"]
    assert not carrier(netns, "t0")
    with rtap.open("t0", netns=netns, queues=3) as dev:
        info = dev.info()
        assert (info.persist, info.mtu, info.mac, info.if_index) == (
            True,
            1400,
            "02:00:00:00:00:05",
            index,
        )
        assert addresses(netns, "t0") == ["10.0.0.1/24 global"]
        assert dev.link().link_status
    assert links(netns) == ["lo", "t0"]


def test_without_root_on_an_interface_of_ones_own(netns: NetNS, tmp_path: Path) -> None:
    iproute(netns, "tuntap add mode tap mine multi_queue user 65534")
    iproute(netns, "link set mine up")
    code = """
import os, rtap, asyncio, encodings.idna, pyroute2
pyroute2.IPRoute().close()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    rtap.open("new0")
    raise SystemExit("new0 could be made")
except PermissionError as exc:
    assert "CAP_NET_ADMIN" in str(exc) and "new0" in str(exc), exc
with rtap.open("mine") as dev:
    assert dev.link().link_status
    assert dev.send(bytes(60))
    dev.rx_burst(0)
    dev.stop()
    dev.start()
    assert dev.stats().opackets == 1
    try:
        dev.mtu = 1400
        raise SystemExit("the MTU could be set")
    except PermissionError as exc:
        assert "set the MTU to 1400 on mine" in str(exc), exc
print("fine")
"""
    done = netns.run(
        with_open_tun(tmp_path, sys.executable, "-c", code),
        capture_output=True,
        text=True,
        env=child_environment(),
    )
    assert (done.stdout, done.stderr) == ("fine\n", "")


# ---- sndbuf


def test_a_finite_sndbuf_makes_sends_fall_short(netns: NetNS, engine: str) -> None:
    """While frames wait, the kernel takes no more at some point; what it took is sent on."""
    with (
        rtap.open("a0", netns=netns, engine=engine, sndbuf=20_000) as dev,
        rtap.open("b0", netns=netns) as other,
    ):
        redirect(netns, "a0", "b0", rate(20))
        burst = dev.pool.alloc_burst(200, [frame(n, 1000) for n in range(200)])
        sent = dev.tx_burst(0, burst)
        assert 0 < sent < 200
        assert len(burst) == 200 - sent
        assert seq_of(bytes(burst[0])) == sent
        stats = dev.stats()
        assert (stats.opackets, stats.oerrors) == (sent, 0)
        got = []
        for _ in range(200):
            got.append(seq_of(other.recv(5)))
            dev.tx_burst(0, burst)
        assert got == list(range(200))
        assert len(burst) == 0
        assert (dev.stats().opackets, dev.stats().oerrors) == (200, 0)
