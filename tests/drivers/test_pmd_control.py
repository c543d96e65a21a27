# SPDX-License-Identifier: BSD-3-Clause
"""The cases of the C driver's own suite about configuration and control, under the same names.

A warning there is a failure here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pmd
import pytest
from pmd import IFNAME, Port
from support import LOCAL, carrier, frame, ip, link, links, none_left, open_fds, opened_since

import rtap
from rtap import MacAddr, Mempool, NetNS, Stats

pytestmark = pytest.mark.root

GROUP = bytes.fromhex("01005e000001")


@pytest.fixture
def port(netns: NetNS, engine: str) -> Iterator[Port]:
    with pmd.port(netns, engine) as made:
        yield made


def attached(port: Port) -> int:
    """The number of queues that the kernel has for the interface."""
    data = link(port.ns, IFNAME)["linkinfo"]["info_data"]
    assert data["numdisabled"] == 0
    return int(data["numqueues"])


def zeros(queues: int) -> Stats:
    names = ("q_ipackets", "q_opackets", "q_ibytes", "q_obytes", "q_errors")
    return Stats(**{name: [0] * queues for name in names})  # type: ignore[arg-type]


def exchange(port: Port, n: int = 1) -> None:
    """Moves `n` frames each way."""
    with port.kernel() as kernel:
        for seq in range(n):
            assert port.send(frame(seq)) == 1
            kernel.send(frame(seq))
        assert kernel.frames(n) == [frame(seq) for seq in range(n)]
    assert [bytes(m) for m in port.receive(n)] == [frame(seq) for seq in range(n)]


# ---- configuration


def test_ethdev_configure_ports(port: Port, engine: str) -> None:
    with pmd.port(port.ns, engine, 1) as other:
        assert links(port.ns) == ["lo", "rtap_test0", "rtap_test1"]
        for each in (port, other):
            each.reconfigure()
            assert each.dev.state == "started"
            assert each.dev.link().link_status
            exchange(each)
        assert port.dev.port_id != other.dev.port_id


def test_dev_info(port: Port) -> None:
    info = port.dev.info()
    assert info.driver_name == "net_rtap"
    assert info.if_index == link(port.ns, IFNAME)["ifindex"]
    assert (info.max_rx_queues, info.max_tx_queues) == (128, 128)
    assert (info.nb_rx_queues, info.nb_tx_queues) == (1, 1)
    assert (info.min_mtu, info.max_mtu) == (68, 65521)
    # The C driver has only one address.
    assert info.max_mac_addrs == 32
    for address in range(info.max_mac_addrs - 1):
        port.dev.mac_addr_add(bytes((2, 0, 0, 0, 1, address)))
    with pytest.raises(ValueError, match="room for 32"):
        port.dev.mac_addr_add("02:00:00:00:02:00")


def test_get_stats(port: Port) -> None:
    port.dev.stats_reset()
    assert port.dev.stats() == zeros(1)
    exchange(port, 3)
    assert port.dev.stats() == Stats(
        ipackets=3,
        opackets=3,
        ibytes=192,
        obytes=192,
        q_ipackets=[3],
        q_opackets=[3],
        q_ibytes=[192],
        q_obytes=[192],
        q_errors=[0],
    )


def test_stats_reset(port: Port) -> None:
    for _ in range(2):
        exchange(port, 5)
        assert port.dev.stats().ipackets == port.dev.stats().opackets == 5
        port.dev.stats_reset()
        assert port.dev.stats() == zeros(1)


# ---- link


def test_link_status(port: Port) -> None:
    found = port.dev.link()
    assert found.link_status
    assert found.link_duplex
    assert not found.link_autoneg
    assert found.link_speed == 0xFFFFFFFF  # RTE_ETH_SPEED_NUM_UNKNOWN


def test_link_up_down(port: Port) -> None:
    for _ in range(3):
        port.dev.set_link_down()
        assert not port.dev.link().link_status
        assert not carrier(port.ns, IFNAME)
        port.dev.set_link_up()
        assert port.dev.link().link_status
        assert carrier(port.ns, IFNAME)
        exchange(port)


# ---- addresses


@pytest.mark.parametrize(
    ("mode", "other", "count"),
    [
        pytest.param("promiscuous", LOCAL, "filtered_unicast", id="promiscuous"),
        pytest.param("allmulticast", GROUP, "filtered_multicast", id="allmulticast"),
    ],
)
def test_what_is_let_in(port: Port, mode: str, other: bytes, count: str) -> None:
    """The cases test_promiscuous and test_allmulticast: a mode lets in what is sent to `other`."""
    port.dev.promiscuous = False
    others = frame(1, dst=other)
    with port.kernel() as kernel:
        for on in (True, False, True, False):
            setattr(port.dev, mode, on)
            assert getattr(port.dev, mode) is on
            kernel.send(others)
            mine = frame(2, dst=bytes(port.dev.app_mac))
            kernel.send(mine)
            wanted = [others, mine] if on else [mine]
            assert [bytes(m) for m in port.receive(len(wanted))] == wanted
    assert port.dev.xstats()[f"rx_q0_{count}_packets"] == 2


def test_mac_address(port: Port) -> None:
    before = port.dev.mac
    port.dev.mac = "00:11:22:33:44:55"
    assert port.dev.mac == MacAddr("00:11:22:33:44:55") != before
    assert link(port.ns, IFNAME)["address"] == "00:11:22:33:44:55"
    assert port.dev.app_mac != port.dev.mac
    port.reconfigure()
    assert port.dev.mac == "00:11:22:33:44:55"
    exchange(port)


def test_mtu(port: Port) -> None:
    # With 2 KiB buffers, the C driver accepts the MTU and truncates frames.
    with pytest.raises(ValueError, match=r"MTU of 9000 needs .* 9023"):
        port.dev.mtu = 9000
    assert port.dev.mtu == link(port.ns, IFNAME)["mtu"] == 1500
    with Mempool(512, 9023) as large:
        port.reconfigure(pool=large)
        port.dev.mtu = 9000
        assert port.dev.mtu == link(port.ns, IFNAME)["mtu"] == 9000
        longest = frame(1, 9014)
        with port.kernel() as kernel:
            kernel.send(longest)
            assert [bytes(m) for m in port.receive(1)] == [longest]
            assert port.dev.send(longest)
            assert kernel.frames(1) == [longest]
        port.dev.mtu = 1500
        assert port.dev.mtu == link(port.ns, IFNAME)["mtu"] == 1500
        port.reconfigure()


# ---- queues


def test_multiqueue(port: Port) -> None:
    for queues in (1, 2, 4):
        port.reconfigure(queues)
        info = port.dev.info()
        assert (info.nb_rx_queues, info.nb_tx_queues) == (queues, queues)
        assert attached(port) == queues
        port.dev.stats_reset()
        assert port.dev.stats() == zeros(queues)
        xstats = port.dev.xstats()
        there = {f"{way}_q{q}" for way in ("rx", "tx") for q in range(queues)}
        assert {name[:5] for name in xstats if "_q" in name} == there
        assert not any(xstats.values())
        assert port.dev.link().link_status
        port.flows_arrive()
        for q in range(queues):
            assert port.send(frame(q), queue=q) == 1
        assert port.dev.stats().q_opackets == [1] * queues


def test_multiqueue_reduce(port: Port) -> None:
    for queues in (4, 2, 1):
        port.reconfigure(queues)
        assert attached(port) == queues
        port.dev.stats_reset()
        assert port.dev.stats() == zeros(queues)
        # No frame goes to a queue that no longer exists.
        port.flows_arrive()
        assert port.dev.stats().imissed == 0
        assert port.counters()["tx_dropped"] == 0


def test_multiqueue_mismatch(port: Port) -> None:
    port.reconfigure(3)
    port.dev.stop()
    for rx, tx in ((1, 2), (2, 1), (4, 2), (1, 4)):
        with pytest.raises(ValueError, match=f"must be equal, got {rx} and {tx}"):
            port.dev.configure(rx, tx)
        assert port.dev.state == "stopped"
        assert attached(port) == 3
    # The refusals changed nothing: the device starts as before.
    port.dev.start()
    port.flows_arrive()
    port.reconfigure()
    exchange(port)


def test_queue_reconfigure(port: Port) -> None:
    index = port.dev.info().if_index
    ip(port.ns, "addr", "add", "10.0.0.1/24", "dev", IFNAME)
    for queues in (2, 1, 3, 1):
        port.reconfigure(queues)
        info = port.dev.info()
        assert (info.nb_rx_queues, info.nb_tx_queues, info.if_index) == (queues, queues, index)
        assert attached(port) == queues
        port.flows_arrive()
    assert "10.0.0.1/24" in ip(port.ns, "addr", "show", "dev", IFNAME)


# ---- life


def test_fd_leak(netns: NetNS, engine: str) -> None:
    with pmd.port(netns, engine) as warm:  # makes this thread's ring
        exchange(warm)
    before = open_fds()
    with Mempool(4096) as pool:
        for _ in range(3):
            dev = netns.call(rtap.probe, "net_rtap_fdtest,iface=rtap_fdtest")
            leaking = Port(netns, dev, pool, engine)
            leaking.reconfigure(2)
            assert opened_since(before)
            exchange(leaking)
            dev.stop()
            dev.close()
            none_left(before)
            assert links(netns) == ["lo"]


@pytest.mark.parametrize(
    ("text", "ifname", "stays"),
    [
        ("net_rtap0", "rtap0", False),
        ("net_rtap5,iface=foo0", "foo0", False),
        ("eth_rtap0,iface=foo0,persist", "foo0", True),
    ],
)
def test_command_line_rtap_port(
    netns: NetNS, engine: str, text: str, ifname: str, stays: bool
) -> None:
    name = text.partition(",")[0]
    with Mempool(4096) as pool:
        dev = netns.call(rtap.probe, text)
        assert rtap.device(name) is dev
        assert rtap.devices() == [dev]
        made = Port(netns, dev, pool, engine)
        made.reconfigure()
        assert (dev.ifname, dev.info().driver_name) == (ifname, "net_rtap")
        dev.stats_reset()
        assert dev.stats() == zeros(1)
        exchange(made)
        dev.stop()
        dev.close()
    assert links(netns) == (["lo", ifname] if stays else ["lo"])
    with pytest.raises(KeyError):
        rtap.device(name)
