# SPDX-License-Identifier: BSD-3-Clause
"""Drivers and devices by name."""

from __future__ import annotations

import threading

import pytest
from fakes import FakeOps
from rigs import talk
from support import frame

import rtap
from rtap import (
    NetNS,
)
from rtap.ethdev import registry


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
    assert registry.driver_names() == ["fake", "fake_long", "net_null", "net_rtap"]


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
    failures: list[BaseException] = []
    ports: set[int] = set()

    def work(n: int) -> None:
        try:
            for _ in range(50):
                with rtap.probe(f"fake{n}") as dev:
                    ports.add(dev.port_id)
                    assert rtap.device(dev.name) is dev
                    rtap.devices()
        except BaseException as exc:  # noqa: BLE001 - shown below
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
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
