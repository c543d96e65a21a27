# SPDX-License-Identifier: BSD-3-Clause
"""Transfers over TCP and UDP between two kernels: super-frames are forwarded whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import LOCAL, REMOTE, Tap, Task, add_ipv6, eventually, ip, pattern
from vnet import MAX_SUPER_FRAME, OFFLOADS, ROOMS, USO, offload, rfc1071

from rtap import Mbuf, MbufFlag, Mempool, NetNS
from rtap._ring import RxQueue, TxQueue
from rtap.control.tun import TunFeature

pytestmark = pytest.mark.root

UDP_SEGMENT = 103  # linux/udp.h
ARP_LENGTH = 42


class Forwarder:
    """Forwards in both directions between two devices, in two Python threads."""

    def __init__(self, a: Tap, b: Tap, engine: str, room: int) -> None:
        self.pool = Mempool(512 if room > 2048 else 16384, room)
        self.seen: list[tuple[int, int, int, int, int, int]] = []
        self.touch: Callable[[Mbuf], None] | None = None
        self.stop = threading.Event()
        options: dict[str, Any] = {"engine": engine, "scatter": True, "max_frame": MAX_SUPER_FRAME}
        self.queues = [(t.rx(self.pool, **options), t.tx(engine=engine)) for t in (a, b)]
        (rx_a, tx_a), (rx_b, tx_b) = self.queues
        self.tasks = [Task(self.run, rx_a, tx_b, True), Task(self.run, rx_b, tx_a, False)]

    def run(self, rx: RxQueue, tx: TxQueue, look: bool) -> None:
        while not self.stop.is_set():
            burst = rx.rx_burst(32, 0.05)
            if look:
                for m in burst:
                    if self.touch is not None:
                        self.touch(m)
                    seen = (m.ol_flags, len(m), m.tso_segsz, m.l2_len, m.l3_len, m.l4_len)
                    self.seen.append(seen)
                    m.free()
            while len(burst) and not self.stop.is_set():
                tx.tx_burst(burst)

    def close(self) -> None:
        self.stop.set()
        for task in self.tasks:
            task.result()

    def super_frames(self) -> list[tuple[int, int, int, int, int, int]]:
        return [entry for entry in self.seen if entry[0] & MbufFlag.RX_LRO]


@contextlib.contextmanager
def routed(
    ns1: NetNS, ns2: NetNS, engine: str, room: int, version: int, features: TunFeature
) -> Iterator[tuple[Forwarder, Tap, Tap, str]]:
    """Two network stacks that talk over rtap: A at .1, B at .2."""
    with (
        Tap(ns1, "tap0", mac=LOCAL, up=False) as a,
        Tap(ns2, "tap1", mac=REMOTE, up=False) as b,
    ):
        for tap, n in ((a, 1), (b, 2)):
            offload(tap, features)
            if version == 4:
                tap.set("up")
                ip(tap.ns, "addr", "add", f"10.9.0.{n}/24", "dev", tap.name)
            else:
                # Before it is up: a report due when it goes down would count as dropped.
                tap.ns.call(_enable_ipv6)
                tap.set("addrgenmode", "none", "up")
                add_ipv6(tap.ns, tap.name, f"fd09::{n}")
        forwarder = Forwarder(a, b, engine, room)
        try:
            yield forwarder, a, b, "10.9.0.2" if version == 4 else "fd09::2"
        finally:
            forwarder.close()


def _enable_ipv6() -> None:
    for conf in ("all", "default", *(d for d in ("tap0", "tap1"))):
        path = f"/proc/sys/net/ipv6/conf/{conf}/disable_ipv6"
        if os.path.exists(path):
            with open(path, "w") as f:
                f.write("0")


def transfer(ns1: NetNS, ns2: NetNS, address: str, size: int) -> str:
    """Sends from the first namespace to the second over TCP; returns the digest of the data."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = ns2.call(socket.socket, family, socket.SOCK_STREAM)
    client = ns1.call(socket.socket, family, socket.SOCK_STREAM)
    with listener, client:
        listener.bind((address, 5001))
        listener.listen()
        listener.settimeout(20)
        client.settimeout(20)

        def receive() -> str:
            connection, _ = listener.accept()
            digest = hashlib.sha256()
            with connection:
                connection.settimeout(20)
                while data := connection.recv(1 << 18):
                    digest.update(data)
            return digest.hexdigest()

        receiver = Task(receive)
        client.connect((address, 5001))
        client.sendall(payload(size))
        client.shutdown(socket.SHUT_WR)
        return receiver.result(60)


def payload(size: int) -> bytes:
    return b"".join(struct.pack("!I", i) + pattern(i, 60) for i in range(size // 64))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("room", [ROOMS["single"], 2048], ids=["single", "chains"])
def test_tcp_super_frames_are_forwarded_whole(
    netns: NetNS, netns2: NetNS, engine: str, version: int, room: int
) -> None:
    size = 8 << 20
    with routed(netns, netns2, engine, room, version, OFFLOADS) as (forwarder, a, b, address):
        ear = b.packets(0x0800 if version == 4 else 0x86DD, rcvbuf=256 << 20)
        digest = transfer(netns, netns2, address, size)
        assert digest == hashlib.sha256(payload(size)).hexdigest()
        supers = forwarder.super_frames()
        assert sum(length for _, length, *_ in supers) > size // 2
        assert max(length for _, length, *_ in supers) > 3 * 1514
        for flags, length, segsz, l2, l3, l4 in supers:
            assert flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_NONE
            assert (l2, l3) == (14, 20 if version == 4 else 40)
            assert l4 >= 20
            assert segsz == 1500 - l3 - l4
            assert length > 14 + l3 + l4 + segsz
        # As many frames left as came: no super-frame was split on the way. The ear hears no ARP,
        # and hears the last frames a moment later than the forwarder saw them.
        arrived: list[int] = []

        def all_heard() -> bool:
            arrived.extend(len(f) for f in ear.drain())
            came = [length for _, length, *_ in forwarder.seen if length != ARP_LENGTH]
            return arrived == came[-len(arrived) :]

        eventually(all_heard, "each frame that came has left whole")
        assert sum(n > 1514 for n in arrived) >= len(supers)
        for rx, tx in forwarder.queues:
            assert rx.counters()["errors"] == tx.counters()["errors"] == 0
        assert a.counters()["tx_dropped"] == 0
    assert forwarder.pool.in_use == 0


def test_ecn_super_frames_are_not_lost(netns: NetNS, netns2: NetNS, engine: str) -> None:
    """Congestion is marked on the way, so the sender's next super-frame carries CWR."""
    size = 4 << 20
    seen_cwr = 0
    count = 0

    def congest(mbuf: Mbuf) -> None:
        nonlocal seen_cwr, count
        if mbuf[12:14] != b"\x08\x00" or mbuf[23] != 6:
            return
        if mbuf.ol_flags & MbufFlag.RX_LRO and mbuf[14 + 20 + 13] & 0x80:
            seen_cwr += 1
        count += 1
        if mbuf[15] & 3 and count % 20 == 0:
            head = bytearray(mbuf[14:34])
            head[1] |= 3
            head[10:12] = bytes(2)
            head[10:12] = struct.pack("!H", ~rfc1071(bytes(head)) & 0xFFFF)
            mbuf[14:34] = head

    for ns in (netns, netns2):
        ns.call(_write, "/proc/sys/net/ipv4/tcp_ecn", "1")
    with routed(netns, netns2, engine, ROOMS["single"], 4, OFFLOADS) as (forwarder, _, _, address):
        forwarder.touch = congest
        assert transfer(netns, netns2, address, size) == hashlib.sha256(payload(size)).hexdigest()
        assert seen_cwr > 0, "no super-frame with CWR came by: the test is too easy"
        for rx, tx in forwarder.queues:
            assert rx.counters()["errors"] == tx.counters()["errors"] == 0


def _write(path: str, value: str) -> None:
    with open(path, "w") as f:
        f.write(value)


@pytest.mark.parametrize("version", [4, 6])
def test_udp_super_frames_are_forwarded_whole(
    netns: NetNS, netns2: NetNS, engine: str, version: int
) -> None:
    features = TunFeature.CSUM | USO
    room = ROOMS["single"]
    with routed(netns, netns2, engine, room, version, features) as (forwarder, _, _, address):
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        receiver = netns2.call(socket.socket, family, socket.SOCK_DGRAM)
        sender = netns.call(socket.socket, family, socket.SOCK_DGRAM)
        with receiver, sender:
            receiver.bind((address, 5002))
            receiver.settimeout(10)
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            sender.connect((address, 5002))
            sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1200)
            for i in range(30):
                data = pattern(i, 1200 * 40 + 7 * i)
                sender.send(data)
                parts = [data[at : at + 1200] for at in range(0, len(data), 1200)]
                assert [receiver.recv(1 << 16) for _ in parts] == parts
        supers = forwarder.super_frames()
        assert len(supers) == 30
        for flags, _, segsz, l2, l3, l4 in supers:
            assert flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_NONE
            assert (segsz, l2, l3, l4) == (1200, 14, 20 if version == 4 else 40, 8)
        for rx, tx in forwarder.queues:
            assert rx.counters()["errors"] == tx.counters()["errors"] == 0


def test_without_offloads_no_frame_is_longer_than_the_mtu(
    netns: NetNS, netns2: NetNS, engine: str
) -> None:
    size = 1 << 20
    features = TunFeature(0)
    with routed(netns, netns2, engine, 2048, 4, features) as (forwarder, _, _, address):
        assert transfer(netns, netns2, address, size) == hashlib.sha256(payload(size)).hexdigest()
        assert max(length for _, length, *_ in forwarder.seen) == 1514
        assert {flags for flags, *_ in forwarder.seen} == {0}
