# SPDX-License-Identifier: BSD-3-Clause
"""What a device receives while it is not promiscuous, and how it follows every change."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from flows import flow
from support import BROADCAST, PacketSocket, Task, eventually, frame, ip, link

import rtap
from rtap import EthDev, MacAddr, Mempool, NetNS, RxOffload

MAC = MacAddr("02:00:00:00:00:0a")
OURS = MAC.peer()
EXTRA = MacAddr("02:00:00:00:00:0e")
STRANGER = MacAddr("02:00:00:00:00:0f")
GROUP = MacAddr("01:00:5e:00:00:01")
GROUP6 = MacAddr("33:33:00:00:00:01")
ALL = MacAddr(BROADCAST)
EVERYBODY = (OURS, EXTRA, STRANGER, GROUP, GROUP6, ALL)


@pytest.fixture
def dev(netns: NetNS, engine: str) -> Iterator[EthDev]:
    with rtap.open("t0", netns=netns, engine=engine, mac=MAC) as device:
        yield device


@pytest.fixture
def peer(netns: NetNS, dev: EthDev) -> Iterator[PacketSocket]:
    with PacketSocket(netns, "t0") as packets:
        yield packets


def heard(dev: EthDev, peer: PacketSocket, *destinations: MacAddr) -> list[MacAddr]:
    """Sends a frame to each destination; returns those whose frame arrived, in order."""
    for n, mac in enumerate(destinations):
        peer.send(frame(n, dst=bytes(mac)))
    # A broadcast is never filtered: once it arrives, so have all frames before it.
    peer.send(frame(99, dst=BROADCAST))
    got: list[bytes] = []
    while not got or got[-1] != frame(99, dst=BROADCAST):
        burst = dev.rx_burst(0, 64, 5)
        assert len(burst) > 0
        got += map(bytes, burst)
    return [MacAddr(data[:6]) for data in got[:-1]]


def test_open_and_probe_start_promiscuous(netns: NetNS, dev: EthDev, peer: PacketSocket) -> None:
    assert dev.promiscuous is True
    assert dev.allmulticast is False
    assert heard(dev, peer, *EVERYBODY) == list(EVERYBODY)
    with contextlib.closing(netns.call(rtap.probe, "net_rtap7,iface=t7")) as other:
        assert other.promiscuous is True


def test_not_promiscuous(dev: EthDev, peer: PacketSocket) -> None:
    dev.promiscuous = False
    assert dev.promiscuous is False
    before = dev.stats()
    assert heard(dev, peer, *EVERYBODY) == [OURS, ALL]
    stats, xstats = dev.stats(), dev.xstats()
    assert xstats["rx_q0_filtered_unicast_packets"] == 2
    assert xstats["rx_q0_filtered_multicast_packets"] == 2
    # A filtered frame is not received, missed or an error, and its buffers are free.
    assert stats.ipackets - before.ipackets == 3
    assert (stats.imissed, stats.ierrors, stats.rx_nombuf) == (0, 0, 0)
    assert xstats["rx_q0_unicast_packets"] == 1
    assert xstats["rx_q0_multicast_packets"] == 0
    assert xstats["rx_q0_broadcast_packets"] == 2
    assert dev.pool.in_use == 0
    dev.xstats_reset()
    assert dev.xstats()["rx_q0_filtered_unicast_packets"] == 0
    dev.promiscuous = True
    assert heard(dev, peer, *EVERYBODY) == list(EVERYBODY)
    assert dev.xstats()["rx_q0_filtered_unicast_packets"] == 0


def test_allmulticast(dev: EthDev, peer: PacketSocket) -> None:
    dev.allmulticast = True
    assert dev.allmulticast is True
    assert heard(dev, peer, *EVERYBODY) == list(EVERYBODY)
    dev.promiscuous = False
    assert heard(dev, peer, *EVERYBODY) == [OURS, GROUP, GROUP6, ALL]
    dev.allmulticast = False
    assert heard(dev, peer, *EVERYBODY) == [OURS, ALL]
    # Each setting is kept while the other overrides it.
    dev.allmulticast = True
    dev.promiscuous = True
    assert dev.allmulticast is True
    dev.promiscuous = False
    assert heard(dev, peer, *EVERYBODY) == [OURS, GROUP, GROUP6, ALL]


def test_subscribed_groups(dev: EthDev, peer: PacketSocket) -> None:
    dev.promiscuous = False
    dev.mc_addr_list = [str(GROUP)]
    assert dev.mc_addr_list == (GROUP,)
    assert heard(dev, peer, *EVERYBODY) == [OURS, GROUP, ALL]
    dev.mc_addr_list = iter((bytes(GROUP6), GROUP6))
    assert dev.mc_addr_list == (GROUP6,)
    assert heard(dev, peer, *EVERYBODY) == [OURS, GROUP6, ALL]
    dev.mc_addr_list = ()
    assert heard(dev, peer, *EVERYBODY) == [OURS, ALL]


def test_added_addresses(dev: EthDev, peer: PacketSocket) -> None:
    dev.promiscuous = False
    dev.mac_addr_add(EXTRA)
    dev.mac_addr_add(EXTRA)
    assert list(dev.mac_addrs) == [OURS, EXTRA]
    assert heard(dev, peer, *EVERYBODY) == [OURS, EXTRA, ALL]
    dev.mac_addr_remove(EXTRA)
    assert list(dev.mac_addrs) == [OURS]
    assert heard(dev, peer, *EVERYBODY) == [OURS, ALL]


def test_tables_when_full(dev: EthDev, peer: PacketSocket) -> None:
    dev.promiscuous = False
    room = dev.info().max_mac_addrs
    assert room > 16
    addresses = [MacAddr(bytes((2, 1, 0, 0, 0, n))) for n in range(room - 1)]
    groups = [MacAddr(bytes((3, 1, 0, 0, 0, n))) for n in range(32)]
    for mac in addresses:
        dev.mac_addr_add(mac)
    dev.mc_addr_list = groups
    with pytest.raises(ValueError, match=f"room for {room}"):
        dev.mac_addr_add(EXTRA)
    with pytest.raises(ValueError, match="at most 32 groups, got 33"):
        dev.mc_addr_list = [*groups, GROUP]
    assert dev.mc_addr_list == tuple(groups)
    everybody = (OURS, *addresses, *groups)
    assert heard(dev, peer, STRANGER, *everybody, EXTRA, GROUP) == list(everybody)
    dev.mac_addr_remove(addresses[3])
    dev.mac_addr_add(EXTRA)
    assert heard(dev, peer, addresses[3], addresses[4], EXTRA) == [addresses[4], EXTRA]


@pytest.mark.parametrize("bad", ["", "02:00:00:00:00", b"\2\0\0\0\0", GROUP, ALL, bytes(6)])
def test_addresses_refused(dev: EthDev, bad: str | bytes) -> None:
    with pytest.raises(ValueError, match="address"):
        dev.mac_addr_add(bad)
    assert list(dev.mac_addrs) == [OURS]


def test_what_cannot_be_removed_or_subscribed(dev: EthDev) -> None:
    for mac in (OURS, EXTRA):
        with pytest.raises(ValueError, match="was not added"):
            dev.mac_addr_remove(mac)
    dev.mc_addr_list = [GROUP]
    with pytest.raises(ValueError, match=f"group addresses, got {EXTRA}"):
        dev.mc_addr_list = [GROUP6, EXTRA]
    assert dev.mc_addr_list == (GROUP,)


def test_follows_app_mac(netns: NetNS, dev: EthDev, peer: PacketSocket) -> None:
    dev.promiscuous = False
    dev.app_mac = STRANGER
    assert heard(dev, peer, *EVERYBODY) == [STRANGER, ALL]
    assert dev.mac_addrs == (STRANGER,)
    # Once assigned, it no longer depends on the interface's address.
    dev.mac = "02:00:00:00:00:77"
    assert heard(dev, peer, *EVERYBODY) == [STRANGER, ALL]


def test_follows_the_interface(netns: NetNS, dev: EthDev, peer: PacketSocket) -> None:
    dev.promiscuous = False
    dev.mac = other = MacAddr("02:00:00:00:00:77")
    assert heard(dev, peer, OURS, other.peer()) == [other.peer()]
    third = MacAddr("02:00:00:00:00:78")
    ip(netns, "link", "set", "t0", "address", third)
    assert dev.app_mac == third.peer()
    assert heard(dev, peer, OURS, other.peer(), third.peer()) == [third.peer()]


def test_survives_stop_and_reconfigure(netns: NetNS, dev: EthDev, peer: PacketSocket) -> None:
    dev.promiscuous = False
    dev.mac_addr_add(EXTRA)
    dev.mc_addr_list = [GROUP]
    expected = [OURS, EXTRA, GROUP, ALL]
    dev.stop()
    dev.start()
    assert heard(dev, peer, *EVERYBODY) == expected
    pool = dev.pool
    dev.stop()
    dev.configure(1, 1)
    dev.rx_queue_setup(0, 64, pool)
    dev.tx_queue_setup(0, 64)
    dev.start()
    assert (dev.promiscuous, dev.mac_addrs, dev.mc_addr_list) == (False, (OURS, EXTRA), (GROUP,))
    assert heard(dev, peer, *EVERYBODY) == expected


def test_set_before_there_is_a_queue(netns: NetNS, engine: str) -> None:
    with Mempool(64) as pool, netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        dev.promiscuous = False
        dev.mac_addr_add(EXTRA)
        dev.configure(1, 1, rtap.EthConf(engine=engine))
        dev.rx_queue_setup(0, 64, pool)
        dev.tx_queue_setup(0, 64)
        dev.start()
        with PacketSocket(netns, "t0") as peer:
            ours = dev.app_mac
            assert heard(dev, peer, ours, EXTRA, STRANGER, ALL) == [ours, EXTRA, ALL]


def test_every_queue_filters(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=4, mac=MAC) as dev:
        dev.promiscuous = False
        with PacketSocket(netns, "t0", 0x0800) as peer:
            for n in range(200):
                peer.send(flow(n, dst=bytes(STRANGER)))
                peer.send(flow(n, dst=bytes(OURS)))
        got = [bytes(m) for q in range(4) for m in dev.rx_burst(q, 512)]
        assert len(got) == 200
        assert {MacAddr(data[:6]) for data in got} == {OURS}
        xstats = dev.xstats()
        dropped = [xstats[f"rx_q{q}_filtered_unicast_packets"] for q in range(4)]
        assert sum(dropped) == 200
        assert all(dropped)


def test_changes_under_a_waiting_burst(dev: EthDev, peer: PacketSocket) -> None:
    dev.promiscuous = False
    waiting = Task(lambda: [bytes(m) for m in dev.rx_burst(0, 8, 10)])
    peer.send(frame(1, dst=bytes(EXTRA)))
    eventually(lambda: dev.xstats()["rx_q0_filtered_unicast_packets"] == 1, "filtered")
    assert waiting.is_alive()
    dev.mac_addr_add(EXTRA)
    peer.send(frame(2, dst=bytes(EXTRA)))
    assert waiting.result() == [frame(2, dst=bytes(EXTRA))]


def test_offloads_of_what_is_left_out_are_not_counted(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, rx_offloads=RxOffload.CHECKSUM) as dev:
        ip(netns, "addr", "add", "10.0.0.1/24", "dev", "t0")
        ip(netns, "neigh", "add", "10.0.0.2", "lladdr", STRANGER, "dev", "t0")
        ip(netns, "neigh", "add", "10.0.0.3", "lladdr", dev.app_mac, "dev", "t0")
        dev.promiscuous = False
        with netns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as udp:
            for n in range(5):
                udp.sendto(bytes(100), ("10.0.0.2", 9))
                udp.sendto(bytes(100 + n), ("10.0.0.3", 9))
        assert [len(m) for m in dev.rx_burst(0)] == [142 + n for n in range(5)]
        assert {name: n for name, n in dev.xstats().items() if n} == {
            "rx_q0_size_128_to_255_packets": 5,
            "rx_q0_unicast_packets": 5,
            "rx_q0_checksum_none": 5,
            "rx_q0_filtered_unicast_packets": 5,
        }


def test_the_interface_keeps_its_own_flags(netns: NetNS, dev: EthDev) -> None:
    """The interface's flags are about what the kernel's end accepts."""
    before = link(netns, "t0")["flags"]
    for on in (False, True):
        dev.promiscuous = dev.allmulticast = on
        assert link(netns, "t0")["flags"] == before
        assert link(netns, "t0")["promiscuity"] == 0


def test_tun_has_no_addresses(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, mode="tun") as dev:
        with pytest.raises(ValueError, match="TUN interface"):
            dev.promiscuous = False
        assert dev.promiscuous is True
        dev.promiscuous = True
        with pytest.raises(ValueError, match="room for 1"):
            dev.mac_addr_add(EXTRA)


def test_closed(netns: NetNS) -> None:
    dev = rtap.open("t0", netns=netns)
    dev.close()
    for use in (
        lambda: dev.promiscuous,
        lambda: dev.allmulticast,
        lambda: dev.mac_addrs,
        lambda: dev.mc_addr_list,
        lambda: dev.mac_addr_add(EXTRA),
        lambda: dev.mac_addr_remove(EXTRA),
        lambda: setattr(dev, "promiscuous", False),
        lambda: setattr(dev, "mc_addr_list", []),
    ):
        with pytest.raises(rtap.DeviceStateError, match="closed"):
            use()
