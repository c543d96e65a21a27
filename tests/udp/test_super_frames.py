# SPDX-License-Identifier: BSD-3-Clause
"""Super-frames over ``net_udp``: datagrams equal to the frames that ``offload.segment`` makes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from datagrams import HERE, PORT, counts, plain, send_all, with_loopback
from support import pattern
from vnet import SUPER, Shape

import rtap
from rtap import Burst, EthDev, MbufFlag, NetNS, RxOffload, TxOffload, offload

pytestmark = pytest.mark.root

SUPERS = RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM | RxOffload.TCP_LRO | RxOffload.UDP_LRO


@pytest.fixture
def dev(netns: NetNS) -> Iterator[EthDev]:
    with_loopback(netns)
    flags = TxOffload.TCP_TSO | TxOffload.UDP_TSO
    with rtap.open_udp((HERE, PORT), netns=netns, tx_offloads=flags, data_room=65535) as device:
        yield device


def asking(dev: EthDev, shape: Shape, prefix: bytes, *, chains: bool) -> Burst:
    """The shape behind a prefix, as an mbuf whose flags ask for segmentation."""
    data = prefix + shape.frame()
    pool = rtap.Mempool(256, 700) if chains else dev.pool
    mbuf = pool.alloc(data)
    mbuf.l2_len = len(prefix) + 14
    mbuf.l3_len = shape.l3_len
    mbuf.l4_len = shape.l4_len
    mbuf.tso_segsz = shape.gso_size
    mbuf.ol_flags = MbufFlag.TX_UDP_SEG if shape.protocol == 17 else MbufFlag.TX_TCP_SEG
    return Burst([mbuf])


@pytest.mark.parametrize("chains", [False, True], ids=["", "chains"])
@pytest.mark.parametrize("prefix", [b"", b"8 bytes!", bytes(range(80))], ids=len)
@pytest.mark.parametrize("shape", SUPER, ids=lambda shape: shape.name)
def test_as_segment_makes_them(
    netns: NetNS, dev: EthDev, shape: Shape, prefix: bytes, chains: bool
) -> None:
    """Whatever lies in front of the IP header is repeated."""
    hdr = offload.VnetHdr.unpack(shape.header())
    wanted = [prefix + frame for frame in offload.segment(shape.frame(), hdr)]
    with plain(netns) as peer:
        burst = asking(dev, shape, prefix, chains=chains)
        burst.peers = dev.peers.add(peer.getsockname())
        send_all(dev, burst)
        assert [peer.recv(1 << 16) for _ in wanted] == wanted
    named, stats = counts(dev), dev.stats()
    assert (stats.opackets, stats.obytes) == (len(wanted), sum(map(len, wanted)))
    assert named["tx_q0_tso_packets"] == named["tx_q0_software_gso_packets"] == 1
    assert named["tx_q0_gso_sends"] >= len(wanted) // 64
    assert stats.oerrors == 0
    assert dev.pool.in_use == 0


def test_none_overtakes(netns: NetNS, dev: EthDev) -> None:
    """Frames, super-frames and bad ones in one burst, for two peers."""
    chance = random.Random(5)
    with plain(netns) as a, plain(netns) as b:
        numbers = [dev.peers.add(sock.getsockname()) for sock in (a, b)]
        wanted: list[list[bytes]] = [[], []]
        burst, bad = Burst(), 0
        for i in range(60):
            k = chance.randrange(2)
            if i % 7 == 3:
                shape = chance.choice(SUPER[:2])
                part = asking(dev, shape, b"", chains=False)
                wanted[k] += offload.segment(shape.frame(), offload.VnetHdr.unpack(shape.header()))
            elif i % 7 == 5:
                part = asking(dev, SUPER[0], b"", chains=False)
                part[0].l3_len = 24  # this is no such frame
                bad += 1
            else:
                part = Burst([dev.pool.alloc(pattern(i, 300))])
                wanted[k].append(pattern(i, 300))
            part.peers = numbers[k]
            burst.extend(list(part))
            del part
        send_all(dev, burst)
        for k, sock in enumerate((a, b)):
            assert [sock.recv(1 << 16) for _ in wanted[k]] == wanted[k]
        assert counts(dev)["tx_q0_bad_request_packets"] == bad == dev.stats().oerrors
