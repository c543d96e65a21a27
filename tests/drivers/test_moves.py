# SPDX-License-Identifier: BSD-3-Clause
"""Interfaces that others move, rename or exchange the indexes of at the worst moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
from rigs import MAC_A, MAC_B
from support import ip, link, quiet_netns, skip_without_devices

import rtap
from rtap import DeviceGone, EthDev, NetNS
from rtap._core.descriptor import Descriptor
from rtap.control import tun


@pytest.fixture
def away() -> Iterator[NetNS]:
    """A third namespace."""
    skip_without_devices()
    with quiet_netns() as ns:
        yield ns


@pytest.fixture
def a(netns: NetNS) -> Iterator[EthDev]:
    with rtap.open("a0", netns=netns, mac=MAC_A) as dev:
        yield dev


@pytest.fixture
def b(netns2: NetNS) -> Iterator[EthDev]:
    with rtap.open("b0", netns=netns2, mac=MAC_B) as dev:
        yield dev


def between(monkeypatch: pytest.MonkeyPatch, times: int, disturb: Callable[[], None]) -> None:
    """Calls `disturb` right after a descriptor says where its interface is, several times."""
    ask = tun.device_netns

    def asked(fd: int, ifname: str = "") -> Descriptor:
        nonlocal times
        answer = ask(fd, ifname)
        if times > 0:
            times -= 1
            disturb()
        return answer

    monkeypatch.setattr(tun, "device_netns", asked)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_moved_again_while_looked_for(
    netns: NetNS, away: NetNS, a: EthDev, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    ways = cycle(((away, netns), (netns, away)))

    def move() -> None:
        here, there = next(ways)
        ip(here, "link", "set", "a0", "netns", there.path)

    ip(netns, "link", "set", "a0", "netns", away.path)
    between(monkeypatch, times, move)
    a.mtu = 1400
    assert link(netns if times % 2 else away, "a0")["mtu"] == 1400
    assert a.mac == MAC_A


def test_renamed_while_looked_for(
    netns: NetNS, away: NetNS, a: EthDev, monkeypatch: pytest.MonkeyPatch
) -> None:
    ip(netns, "link", "set", "a0", "netns", away.path)
    between(monkeypatch, 1, lambda: ip(away, "link", "set", "a0", "name", "other0"))
    assert a.mac == MAC_A
    assert a.info().ifname == "other0"


def test_deleted_while_looked_for(
    netns: NetNS, away: NetNS, a: EthDev, monkeypatch: pytest.MonkeyPatch
) -> None:
    ip(netns, "link", "set", "a0", "netns", away.path)
    between(monkeypatch, 1, lambda: ip(away, "link", "del", "a0"))
    with pytest.raises(DeviceGone):
        a.link()


def test_another_interface_takes_its_index(
    netns: NetNS, netns2: NetNS, away: NetNS, a: EthDev, b: EthDev
) -> None:
    """Two interfaces have the same index, first in their namespaces, then each in a third one."""
    assert a.info().if_index == b.info().if_index
    ip(netns, "link", "set", "a0", "netns", away.path)
    assert a.mac == MAC_A  # the device saw it there
    ip(away, "link", "set", "a0", "netns", netns.path)
    ip(netns2, "link", "set", "b0", "netns", away.path)
    a.mtu = 1400
    assert (link(netns, "a0")["mtu"], link(away, "b0")["mtu"]) == (1400, 1500)
    assert (a.mac, b.mac) == (MAC_A, MAC_B)
