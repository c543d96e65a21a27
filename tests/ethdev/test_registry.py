# SPDX-License-Identifier: BSD-3-Clause
"""Drivers and devices by name."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, cast

import pytest
from fakes import FakeOps, FakeRxQueue, FakeTxQueue
from rigs import talk
from support import frame
from together import in_threads

import rtap
from rtap import DevInfo, EthConf, Mempool, NetNS
from rtap.ethdev import registry
from rtap.ethdev.devargs import DevArgs
from rtap.ethdev.events import Port
from rtap.ethdev.ops import EthDevOps


def test_names_and_ports(driver: None) -> None:
    with rtap.probe("fake0") as a, rtap.probe("fake1") as b, rtap.probe("phony0") as c:
        assert rtap.device("fake0") is a
        assert rtap.device("phony0") is c
        assert {d.name for d in rtap.devices()} == {"fake0", "fake1", "phony0"}
        assert [d.port_id for d in (a, b, c)] == [0, 1, 2]
        b.close()
        with pytest.raises(KeyError, match=r"no device 'fake1'; open devices: fake0, phony0"):
            rtap.device("fake1")
        with rtap.probe("fake_again") as d:
            assert d.port_id == 1
    assert rtap.devices() == []
    with pytest.raises(KeyError, match="open devices: none"):
        rtap.device("fake0")


def test_a_name_in_use(driver: None) -> None:
    with rtap.probe("fake0") as dev:
        with pytest.raises(ValueError, match=r"a device 'fake0' already: <rtap.EthDev fake0"):
            rtap.probe("fake0")
        assert rtap.device("fake0") is dev
        assert dev.state == "unconfigured"


def test_drivers_by_longest_prefix(driver: None) -> None:
    class Longer(FakeOps):
        ifname = "longer"

    registry.register_driver("fake_long", Longer)
    with rtap.probe("fake_lon") as a, rtap.probe("fake_long0") as b:
        assert (a.ifname, b.ifname) == ("fake0", "longer")
    own = ["net_af_packet", "net_null", "net_rtap", "net_udp"]
    assert registry.driver_names() == ["fake", "fake_long", *own]


@pytest.mark.parametrize("aliases", [("fake",), ("other", "phony")])
def test_a_driver_name_in_use(driver: None, aliases: tuple[str, ...]) -> None:
    before = dict(registry._drivers)
    with pytest.raises(ValueError, match="there is a driver for"):
        registry.register_driver("new", FakeOps, aliases=aliases)
    assert registry._drivers == before


def test_the_registry_keeps_nothing_open(driver: None) -> None:
    rtap.probe("fake0").close()
    assert registry._devices == {}
    assert registry._ports == {}


def test_many_threads_open_and_close(driver: None) -> None:
    ports: set[int] = set()

    def work(n: int) -> None:
        for _ in range(50):
            with rtap.probe(f"fake{n}") as dev:
                ports.add(dev.port_id)
                assert rtap.device(dev.name) is dev
                rtap.devices()

    in_threads(work, 8)
    assert ports <= set(range(8))
    assert rtap.devices() == []


def test_open_numbers_its_devices(netns: NetNS) -> None:
    with (
        rtap.open("a0", netns=netns) as a,
        rtap.open("b0", netns=netns) as b,
        netns.call(rtap.probe, "net_rtap2,iface=c0") as c,
    ):
        assert [dev.name for dev in (a, b, c)] == ["net_rtap0", "net_rtap1", "net_rtap2"]
        assert [dev.port_id for dev in (a, b, c)] == [0, 1, 2]
        a.close()
        with rtap.open("d0", netns=netns) as d:
            assert (d.name, d.port_id) == ("net_rtap0", 0)
            d.send(frame())
            assert {dev.name for dev in rtap.devices()} == {"net_rtap0", "net_rtap1", "net_rtap2"}


def test_mbufs_carry_their_port(netns: NetNS) -> None:
    with (
        rtap.open("a0", netns=netns),
        rtap.open("b0", netns=netns) as b,
    ):
        talk(netns, b, b"hello")
        (mbuf,) = b.rx_burst(0, 1, 5)
        assert mbuf.port == b.port_id == 1


# ---- drivers of users


@pytest.mark.parametrize(
    ("name", "fn", "kind", "match"),
    [
        ("", FakeOps, ValueError, "1 to 63 letters"),
        ("net fake", FakeOps, ValueError, "got 'net fake'"),
        ("x" * 64, FakeOps, ValueError, "1 to 63 letters"),
        (b"net_fake", FakeOps, TypeError, "a driver name is a str, got bytes"),
        ("net_fake", None, TypeError, r"called as probe_fn\(args, port\), got None"),
    ],
)
def test_what_is_no_driver(
    driver: None, name: Any, fn: Any, kind: type[Exception], match: str
) -> None:
    before = dict(registry._drivers)
    with pytest.raises(kind, match=match):
        rtap.register_driver(name, fn)
    with pytest.raises(kind, match=match):
        rtap.register_driver("fine", fn, aliases=(name,))
    assert registry._drivers == before


class LeastOps(EthDevOps):
    """The minimum that a driver must have."""

    def __init__(self, args: DevArgs, port: Port) -> None:
        args.finish(())

    def dev_infos_get(self) -> DevInfo:
        return DevInfo(driver_name="net_least", max_rx_queues=1, max_tx_queues=1)

    def dev_configure(self, nb_rx_queues: int, nb_tx_queues: int, conf: EthConf) -> None: ...
    def dev_start(self) -> None: ...
    def dev_stop(self) -> None: ...
    def dev_close(self) -> None: ...

    def rx_queue_setup(
        self, queue_id: int, nb_desc: int, pool: Mempool, deferred_start: bool
    ) -> FakeRxQueue:
        return FakeRxQueue(pool)

    def rx_queue_release(self, queue_id: int) -> None: ...

    def tx_queue_setup(self, queue_id: int, nb_desc: int, deferred_start: bool) -> FakeTxQueue:
        return FakeTxQueue()

    def tx_queue_release(self, queue_id: int) -> None: ...


def test_a_driver_writes_only_what_it_has(driver: None, pool: Mempool) -> None:
    rtap.register_driver("net_least", LeastOps)
    with rtap.probe("net_least0") as dev:
        dev.configure(1, 1)
        dev.rx_queue_setup(0, 8, pool)
        dev.tx_queue_setup(0, 8)
        dev.start()
        assert len(dev.rx_burst(0)) == 0
        assert dev.link().link_status
        assert dev.stats() == rtap.Stats()
        assert dev.xstats() == {}
        assert dev.xstats_names() == []
        assert dev.mtu == 1500
        assert not any(dev.mac.packed)
        assert dev.app_mac == dev.mac
        assert dev.ifname == ""
        dev.promiscuous = False
        dev.allmulticast = True
        dev.mc_addr_list = ["01:00:5e:00:00:01"]
        dev.stats_reset()
        dev.xstats_reset()
        refused: list[Callable[[], object]] = [
            dev.set_link_up,
            dev.set_link_down,
            lambda: setattr(dev, "mac", "02:00:00:00:00:01"),
            lambda: setattr(dev, "mtu", 1400),
            lambda: dev.rx_queue_stop(0),
            lambda: dev.tx_queue_stop(0),
            lambda: dev.rx_queue_intr_fd(0),
            lambda: dev.rx_queue_intr_enable(0),
            lambda: dev.rx_queue_intr_disable(0),
        ]
        for call in refused:
            with pytest.raises(OSError, match=r"net_least (cannot|has no)") as caught:
                call()
            assert caught.value.errno == errno.EOPNOTSUPP
        assert (dev.mtu, any(dev.mac.packed)) == (1500, False)
        dev.stop()


def test_what_a_driver_has_to_have(driver: None) -> None:
    class Half(EthDevOps):
        pass

    def make(args: DevArgs, port: Port) -> EthDevOps:
        kind: Any = Half
        return cast("EthDevOps", kind())

    rtap.register_driver("net_half", make)
    with pytest.raises(TypeError, match="dev_close, dev_configure") as caught:
        rtap.probe("net_half0")
    assert "abstract" in str(caught.value)
    assert rtap.devices() == []
