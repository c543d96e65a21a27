# SPDX-License-Identifier: BSD-3-Clause
"""Paths that refuse datagrams: too long, several at once, nobody there. All of them are counted."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest
from datagrams import HERE, PORT, counts, plain, send_all, take, with_loopback
from support import eventually, ip
from veths import veth

import rtap
from rtap import EthDev, NetNS

pytestmark = pytest.mark.root


@pytest.fixture
def hosts(netns: NetNS, netns2: NetNS) -> tuple[NetNS, NetNS]:
    """10.0.0.1 and 10.0.0.2, with 1500 bytes between them."""
    veth(netns, "v0", "v1", netns2)
    ip(netns, "addr", "add", "10.0.0.1/24", "dev", "v0")
    ip(netns2, "addr", "add", "10.0.0.2/24", "dev", "v1")
    return netns, netns2


@pytest.fixture
def sink(hosts: tuple[NetNS, NetNS]) -> Iterator[socket.socket]:
    with plain(hosts[1], ("10.0.0.2", PORT)) as sock:
        yield sock


def open_to(hosts: tuple[NetNS, NetNS], **options: object) -> EthDev:
    return rtap.open_udp(remote=("10.0.0.2", PORT), netns=hosts[0], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("pmtu", ["do", "probe"])
def test_above_the_mtu(hosts: tuple[NetNS, NetNS], sink: socket.socket, pmtu: str) -> None:
    """They are dropped one by one, and the others arrive."""
    with open_to(hosts, pmtu=pmtu) as dev:
        sizes = [1472, 1473, 1473, 1473, 1000, 1472, 5000]
        burst = dev.pool.alloc_burst(len(sizes), [bytes(n) for n in sizes])
        send_all(dev, burst)
        assert [len(sink.recv(9999)) for _ in range(3)] == [1472, 1000, 1472]
        stats, named = dev.stats(), counts(dev)
        assert (stats.opackets, stats.oerrors) == (3, 4)
        assert named["tx_q0_too_big_packets"] == named["tx_q0_kernel_refused_packets"] == 4
        assert dev.send(bytes(1472))
        with pytest.raises(OSError, match="send a frame of 1473 bytes") as caught:
            dev.send(bytes(1473))
        assert caught.value.errno == errno.EMSGSIZE


def test_fragments(hosts: tuple[NetNS, NetNS], sink: socket.socket) -> None:
    """The kernel cuts no message of several datagrams into fragments: they leave one by one."""
    with open_to(hosts, pmtu="dont") as dev:
        send_all(dev, dev.pool.alloc_burst(20, bytes(2000)))
        assert [len(sink.recv(9999)) for _ in range(20)] == [2000] * 20
        assert counts(dev)["tx_q0_gso_fallbacks"] == 1
        assert dev.info().tx_offloads_refused == rtap.TxOffload.UDP_TSO
        send_all(dev, dev.pool.alloc_burst(20, bytes(2000)))
        assert counts(dev)["tx_q0_gso_fallbacks"] == 1  # not tried again so soon
        send_all(dev, dev.pool.alloc_burst(20, bytes(1400)))
        assert counts(dev)["tx_q0_gso_sends"] == 1  # shorter ones are not concerned
        assert len([sink.recv(9999) for _ in range(40)]) == 40
        assert dev.stats().opackets == 60
        assert dev.stats().oerrors == 0


def test_a_falling_mtu(hosts: tuple[NetNS, NetNS], sink: socket.socket) -> None:
    """Below the size of the datagrams: they are counted, and go on when it rises."""
    with open_to(hosts, pmtu="do") as dev:
        send_all(dev, dev.pool.alloc_burst(10, bytes(1400)))
        ip(hosts[0], "link", "set", "v0", "mtu", "1280")
        send_all(dev, dev.pool.alloc_burst(10, bytes(1400)))
        assert counts(dev)["tx_q0_too_big_packets"] == 10
        ip(hosts[0], "link", "set", "v0", "mtu", "1500")
        send_all(dev, dev.pool.alloc_burst(10, bytes(1400)))
        assert [len(sink.recv(9999)) for _ in range(20)] == [1400] * 20


def test_a_socket_without_checksums(hosts: tuple[NetNS, NetNS], sink: socket.socket) -> None:
    """The kernel sends no several datagrams at once for it."""
    with plain(hosts[0], ("10.0.0.1", 0)) as mine:
        mine.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK
        mine.connect(("10.0.0.2", PORT))
        with rtap.open_udp(sock=mine) as dev:
            send_all(dev, dev.pool.alloc_burst(100, bytes(700)))
            assert [len(sink.recv(9999)) for _ in range(100)] == [700] * 100
            assert dev.info().tx_offloads_refused == rtap.TxOffload.UDP_TSO
            assert dev.stats().oerrors == 0


def test_nobody_there(netns: NetNS) -> None:
    """An ICMP error is told with a later call, and concerns none of its datagrams."""
    with_loopback(netns)
    with rtap.open_udp(remote=(HERE, PORT), netns=netns) as dev:
        assert dev.send(b"one")
        assert dev.send(b"two")
        eventually(lambda: len(dev.rx_burst(0)) == 0 and "rx_q0_icmp_errors" in counts(dev), "told")
        named = counts(dev)
        assert named["rx_q0_icmp_errors"] + named.get("tx_q0_icmp_errors", 0) >= 1
        assert (dev.stats().opackets, dev.stats().oerrors) == (2, 0)
        with plain(netns, (HERE, PORT)) as late:
            assert dev.send(b"three")
            assert late.recv(9) == b"three"


def test_no_route(netns: NetNS) -> None:
    with_loopback(netns)
    with rtap.open_udp((HERE, PORT), netns=netns) as dev:
        number = dev.peers.add(("10.1.2.3", 9))
        burst = dev.pool.alloc_burst(3, b"x")
        burst.peers = number
        assert dev.tx_burst(0, burst) == 3
        assert dev.stats().oerrors == 3
        assert counts(dev)["tx_q0_kernel_refused_packets"] == 3


def test_no_peer(netns: NetNS) -> None:
    """A number without an address; 0 on a device without a remote."""
    with_loopback(netns)
    with rtap.open_udp((HERE, PORT), netns=netns) as dev, plain(netns) as peer:
        number = dev.peers.add(peer.getsockname())
        burst = dev.pool.alloc_burst(6, b"x")
        burst.peers = [0, number, 77, number, number, 1 << 31]
        assert dev.tx_burst(0, burst) == 6
        assert [peer.recv(9) for _ in range(3)] == [b"x"] * 3
        named = counts(dev)
        assert named["tx_q0_no_peer_packets"] == named["tx_q0_bad_request_packets"] == 3
        assert dev.stats().oerrors == 3
        with pytest.raises(OSError, match="send a frame of 1 bytes"):
            dev.send(b"x")


@pytest.mark.parametrize("unknown", ["learn", "deliver", "drop"])
def test_unknown_senders(netns: NetNS, unknown: str) -> None:
    with_loopback(netns)
    with (
        rtap.open_udp((HERE, PORT), netns=netns, peers=2, unknown=unknown) as dev,
        plain(netns) as a,
        plain(netns) as b,
        plain(netns) as c,
    ):
        known = dev.peers.add(a.getsockname())
        for sock in (b, c, a, b, c):
            sock.sendto(b"x", (HERE, PORT))
        wanted = {
            "learn": [2, 0, known, 2, 0],
            "deliver": [0, 0, known, 0, 0],
            "drop": [known],
        }[unknown]
        assert list(take(dev, len(wanted)).peers) == wanted
        eventually(lambda: len(dev.rx_burst(0)) == 0, "no more")
        named = counts(dev)
        assert named["rx_q0_unknown_packets"] == (3 if unknown == "learn" else 4)
        assert named.get("rx_q0_unknown_dropped_packets", 0) == (4 if unknown == "drop" else 0)
        strangers = [c, c] if unknown == "learn" else [b, c, b, c]
        assert dev.peers.unknown() == [sock.getsockname() for sock in strangers]


def test_a_peer_under_another_address(netns: NetNS) -> None:
    """The program recognises it and gives it its number back; all that is for it goes there."""
    with_loopback(netns)
    with rtap.open_udp((HERE, PORT), netns=netns, unknown="learn") as dev:
        with plain(netns) as first:
            first.sendto(b"it is me", (HERE, PORT))
            number = take(dev, 1)[0].peer
        with plain(netns) as second:
            second.sendto(b"it is me", (HERE, PORT))
            new = take(dev, 1)[0].peer
            assert new != number
            dev.peers[number] = dev.peers[new]
            assert len(dev.peers) == 1
            burst = dev.pool.alloc_burst(1, b"hello")
            burst.peers = number
            send_all(dev, burst)
            assert second.recv(9) == b"hello"
