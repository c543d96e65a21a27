# SPDX-License-Identifier: BSD-3-Clause
"""UDP devices at the ends of a worker's routes: tunnels for kernel traffic, with no GIL inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from clients import iperf3, snmp
from datagrams import HERE, PORT, counts, plain, with_loopback
from rigs import Wire, wire
from support import eventually, ip, pattern

import rtap
from rtap import Burst, EthDev, NetNS, RxOffload, TxOffload, Worker, stages

pytestmark = pytest.mark.root

SUPERS = {
    "rx_offloads": RxOffload.TCP_CKSUM
    | RxOffload.UDP_CKSUM
    | RxOffload.TCP_LRO
    | RxOffload.UDP_LRO,
    "tx_offloads": TxOffload.UDP_TSO,
    "tx_gro": True,
}
PLAIN: dict[str, Any] = {}


@contextmanager
def tunnel(
    netns: NetNS, options: dict[str, Any], mode: str, wait: str
) -> Iterator[tuple[Wire, EthDev, EthDev]]:
    """Two TAP or TUN devices, whose frames go through datagrams in a third namespace."""
    with_loopback(netns)
    options = {**options, "mode": mode} if mode == "tap" else {**options, "mode": mode, "mac": None}
    with (
        wire(a=options, b=options) as w,
        rtap.open_udp((HERE, PORT), (HERE, PORT + 1), netns=netns) as left,
        rtap.open_udp((HERE, PORT + 1), (HERE, PORT), netns=netns) as right,
    ):
        worker = Worker(wait=wait)
        for a, b in ((w.a, left), (right, w.b), (w.b, right), (left, w.a)):
            worker.forward((a, 0), (b, 0), on_full="retry")
        with worker:
            yield w, left, right
            assert all(route.error == "" for route in worker.stats().routes)


@pytest.mark.parametrize("wait", ["sleep", "adaptive"])
@pytest.mark.parametrize("mode", ["tap", "tun"])
@pytest.mark.parametrize("options", [SUPERS, PLAIN], ids=["super-frames", "plain"])
def test_tcp(netns: NetNS, options: dict[str, Any], mode: str, wait: str) -> None:
    """A connection each way: the bytes that arrive are those that were sent."""
    with tunnel(netns, options, mode, wait) as (w, left, right):
        w.transfer(20 << 20)
        w.transfer(5 << 20, back=True)
        if options:
            for dev in (left, right):
                named = counts(dev)
                assert named["tx_q0_software_gso_packets"] > 50
                assert named["tx_q0_gso_segments"] > 10 * named["tx_q0_gso_sends"]
                assert named["rx_q0_gro_segments"] > 10 * named["rx_q0_gro_messages"]
        for dev in (left, right):
            assert dev.stats().oerrors == dev.stats().ierrors == 0
            eventually(lambda dev=dev: dev.pool.in_use == 0, "all buffers are back")


@pytest.mark.parametrize("options", [SUPERS, PLAIN], ids=["super-frames", "plain"])
def test_udp(netns: NetNS, options: dict[str, Any]) -> None:
    """A stream of datagrams: none is lost without a counter."""
    with tunnel(netns, options, "tun", "adaptive") as (w, left, right):
        _, received = iperf3(
            w.left, w.right, "10.9.0.2", "-u", "-b", "200M", "-l", "1200", "-t", "1"
        )
        lost = received["sum"]["lost_packets"]
        counted = sum(
            dev.stats().imissed + dev.stats().ierrors + dev.stats().oerrors
            for dev in (w.a, w.b, left, right)
        )
        counted += snmp(w.right)["UdpRcvbufErrors"]  # iperf3's own socket
        assert lost <= counted
        assert received["sum"]["packets"] > 1000


def test_stages_see_payloads(netns: NetNS) -> None:
    """Stages between UDP and UDP: a counter, and one in Python that answers each peer."""
    with_loopback(netns)
    counter = stages.Counter()

    def louder(burst: Burst) -> None:
        for mbuf in burst:
            mbuf[:] = bytes(mbuf).upper()

    with (
        rtap.open_udp((HERE, PORT), netns=netns, unknown="learn") as dev,
        plain(netns) as a,
        plain(netns) as b,
    ):
        worker = Worker(wait="sleep")
        worker.forward((dev, 0), (dev, 0), stages=[counter, louder])
        with worker:
            for sock, text in ((a, b"one"), (b, b"two")):
                sock.sendto(text, (HERE, PORT))
                assert sock.recv(9) == text.upper()
        assert sorted(dev.peers.items()) == [(1, a.getsockname()), (2, b.getsockname())]


def test_a_full_path_is_a_short_burst(netns: NetNS, netns2: NetNS) -> None:
    """The socket's buffer is full while a queueing discipline holds what was sent."""
    ip(netns, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", netns2.path)
    ip(netns, "addr", "add", "10.0.0.1/24", "dev", "v0")
    ip(netns2, "addr", "add", "10.0.0.2/24", "dev", "v1")
    for ns, name in ((netns, "v0"), (netns2, "v1")):
        ip(ns, "link", "set", name, "up")
    slow = "tc qdisc add dev v0 root tbf rate 20mbit burst 20k latency 60s"
    done = netns.run(slow.split(), capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this kernel has no tbf: {done.stderr}")
    with (
        rtap.open_udp(remote=("10.0.0.2", PORT), netns=netns, sndbuf=40000) as dev,
        plain(netns2, ("10.0.0.2", PORT)) as peer,
    ):
        data = [pattern(i, 1000) for i in range(300)]
        burst = dev.pool.alloc_burst(300, data)
        got = []
        while len(burst):
            dev.tx_burst(0, burst)
            got.append(peer.recv(9999))
        while len(got) < 300:
            got.append(peer.recv(9999))
        assert got == data
        assert dev.stats().oerrors == 0
        assert dev._txq[0].counters()["full"] > 0
