# SPDX-License-Identifier: BSD-3-Clause
"""The cases of the C driver's own suite about packets, under the same names.

A warning there is a failure here.
"""

from __future__ import annotations

import select
from collections.abc import Iterator

import pmd
import pytest
from pmd import Port
from rigs import MAC_B, Shape, add_bridge, wrong_checksums
from support import BROADCAST, frame, ip

from rtap import Burst, EthConf, MacAddr, Mempool, NetNS, RxOffload, TxOffload

pytestmark = pytest.mark.root


@pytest.fixture
def port(netns: NetNS, engine: str) -> Iterator[Port]:
    with pmd.port(netns, engine) as made:
        yield made


def test_rx_inject(port: Port) -> None:
    data = frame(1, 14 + 64, dst=bytes(port.dev.mac))
    with port.kernel() as kernel:
        port.dev.stats_reset()
        kernel.send(data)
        (mbuf,) = port.receive(1)
    assert bytes(mbuf) == data
    assert (mbuf.pkt_len, mbuf.nb_segs, mbuf.port) == (len(data), 1, port.dev.port_id)
    stats = port.dev.stats()
    assert (stats.ipackets, stats.ibytes, stats.ierrors) == (1, len(data), 0)
    assert port.nothing_waits()


def test_tx_capture(port: Port) -> None:
    data = frame(1, 14 + 64, dst=BROADCAST, src=bytes(port.dev.mac))
    with port.kernel() as kernel:
        port.dev.stats_reset()
        assert port.send(data) == 1
        assert kernel.frames(1) == [data]
        assert kernel.drain() == []
    stats = port.dev.stats()
    assert (stats.opackets, stats.obytes, stats.oerrors) == (1, len(data), 0)
    assert port.pool.in_use == 0


def test_tx_multiseg(port: Port) -> None:
    data = frame(1, 3 * 64, dst=BROADCAST)
    with Mempool(8, 64) as pool, port.kernel() as kernel:
        (head,) = pool.alloc_burst(1, [data])
        assert (head.nb_segs, head.pkt_len, head.data_len) == (3, len(data), 64)
        assert port.dev.tx_burst(0, Burst([head])) == 1
        assert kernel.frames(1) == [data]
        del head
        assert pool.in_use == 0
    stats = port.dev.stats()
    assert (stats.opackets, stats.obytes) == (1, len(data))
    assert port.dev.xstats()["tx_q0_multiseg_packets"] == 1


def test_rx_multiseg(port: Port) -> None:
    data = frame(1, 14 + 200)
    with Mempool(4096, 128) as small:
        with pytest.raises(ValueError, match="at least 1523, the pool's is 128"):
            port.reconfigure(pool=small)
        port.reconfigure(pool=small, rx_offloads=RxOffload.SCATTER)
        with port.kernel() as kernel:
            kernel.send(data)
            (mbuf,) = port.receive(1)
        assert (mbuf.nb_segs, mbuf.pkt_len, mbuf.data_len) == (2, len(data), 128)
        assert mbuf.next is not None
        assert mbuf.next.data_len == len(data) - 128
        assert bytes(mbuf) == data
        del mbuf
        port.reconfigure()
        assert small.in_use == 0


def test_offload_config(port: Port) -> None:
    cksum = TxOffload.UDP_CKSUM | TxOffload.TCP_CKSUM
    wanted = TxOffload.MULTI_SEGS | cksum | TxOffload.TCP_TSO
    assert port.dev.info().tx_offload_capa & wanted == wanted
    for offloads in (cksum, wanted, TxOffload(0)):
        port.reconfigure(tx_offloads=offloads)
        info = port.dev.info()
        assert info.tx_offloads == offloads
        assert info.vnet_hdr is bool(offloads)
        with port.kernel() as kernel:
            assert port.send(frame(1)) == 1
            assert kernel.frames(1) == [frame(1)]
    port.dev.stop()
    with pytest.raises(ValueError, match="this device cannot do IP_TNL_TSO"):
        port.dev.configure(1, 1, EthConf(tx_offloads=TxOffload.IP_TNL_TSO))
    port.dev.start()


@pytest.mark.parametrize(
    "offloads", [TxOffload(0), TxOffload.UDP_CKSUM], ids=["software", "kernel"]
)
@pytest.mark.parametrize("version", [4, 6])
def test_tx_csum_offload(
    port: Port, netns: NetNS, engine: str, offloads: TxOffload, version: int
) -> None:
    """A port without offloads behind a bridge reads frames with finished checksums."""
    shape = Shape(version, "udp")
    payload = b"\xcc" * 32
    with pmd.port(netns, engine, 1) as other:
        add_bridge(netns)
        port.reconfigure(tx_offloads=offloads)
        for each in (port, other):
            ip(netns, "link", "set", each.dev.ifname, "master", "br0")
        (mbuf,) = port.pool.alloc_burst(1, [shape.unfinished(payload)])
        assert wrong_checksums(bytes(mbuf))
        port.dev.stats_reset()
        assert port.dev.tx_burst(0, Burst([shape.request(mbuf)])) == 1
        (arrived,) = other.receive(1)
        assert bytes(arrived) == shape.finished(payload)
        assert wrong_checksums(bytes(arrived)) == []
        del mbuf, arrived
        assert port.dev.stats().opackets == 1
        assert port.dev.xstats()["tx_q0_checksum_offload"] == 1


def test_stats_imissed(port: Port) -> None:
    port.reconfigure(nb_desc=64)
    before = port.counters()["tx_dropped"]
    with port.kernel() as kernel:
        port.dev.stats_reset()
        for seq in range(1500):
            kernel.send(frame(seq, 128))
        assert [bytes(m) for m in port.receive(1000)] == [frame(n, 128) for n in range(1000)]
        assert port.nothing_waits()
    stats = port.dev.stats()
    # The interface has room for txqueuelen frames, and every other frame is accounted for.
    assert (stats.ipackets, stats.imissed, stats.ierrors) == (1000, 500, 0)
    assert port.counters()["tx_dropped"] - before == 500
    port.dev.stats_reset()
    stats = port.dev.stats()
    assert (stats.ipackets, stats.imissed) == (0, 0)


def test_rxq_interrupt(port: Port) -> None:
    dev = port.dev
    dev.rx_queue_intr_enable(0)
    with port.kernel() as kernel, select.epoll() as epoll:
        fd = dev.rx_queue_intr_fd(0)
        epoll.register(fd, select.EPOLLIN)
        assert epoll.poll(0) == []
        for seq in range(3):
            kernel.send(frame(seq))
            assert epoll.poll(5) == [(fd, select.EPOLLIN)]
            assert [bytes(m) for m in dev.rx_burst(0)] == [frame(seq)]
            assert epoll.poll(0) == []
        dev.rx_queue_intr_disable(0)
        kernel.send(frame(9))
        assert epoll.poll(0.05) == []
        # The frame waits anyway, and signals once interrupts are enabled again.
        dev.rx_queue_intr_enable(0)
        assert epoll.poll(5) == [(fd, select.EPOLLIN)]
        assert [bytes(m) for m in port.receive(1)] == [frame(9)]


# ---- extended statistics

BUCKETS = {
    60: "size_64_packets",
    100: "size_65_to_127_packets",
    200: "size_128_to_255_packets",
    500: "size_256_to_511_packets",
    1000: "size_512_to_1023_packets",
    1500: "size_1024_to_1518_packets",
}


def moved(port: Port) -> dict[str, int]:
    return {name: n for name, n in port.dev.xstats().items() if n}


def both_ways(port: Port, *frames: bytes) -> None:
    with port.kernel() as kernel:
        assert port.send(*frames) == len(frames)
        assert kernel.frames(len(frames)) == list(frames)
        for each in frames:
            kernel.send(each)
        assert [bytes(m) for m in port.receive(len(frames))] == list(frames)


def test_xstats_get_names(port: Port) -> None:
    names = port.dev.xstats_names()
    assert len(names) == len(set(names)) > 0
    for way in ("rx", "tx"):
        for what in (*BUCKETS.values(), "broadcast_packets", "multicast_packets"):
            assert f"{way}_q0_{what}" in names
    assert {name[:6] for name in names if "_q" in name} == {"rx_q0_", "tx_q0_"}


def test_xstats_get_values(port: Port) -> None:
    both_ways(port, frame())
    values = port.dev.xstats()
    # As in the C driver, ids are positions in the list of names.
    assert list(values) == port.dev.xstats_names()
    assert all(isinstance(n, int) and n >= 0 for n in values.values())
    assert sum(values.values()) == 4  # one size and one kind of destination, each way


def test_xstats_reset(port: Port) -> None:
    both_ways(port, frame(), frame(1, 1000))
    assert moved(port)
    port.dev.xstats_reset()
    assert moved(port) == {}
    assert port.dev.stats().ipackets == 2  # basic statistics have a reset of their own
    both_ways(port, frame())
    assert sum(moved(port).values()) == 4


def test_xstats_packet_sizes(port: Port) -> None:
    both_ways(port, *(frame(seq, size) for seq, size in enumerate(BUCKETS)))
    sizes = {name: n for name, n in moved(port).items() if "_size_" in name}
    assert sizes == {f"{way}_q0_{name}": 1 for way in ("rx", "tx") for name in BUCKETS.values()}


def test_xstats_packet_types(port: Port) -> None:
    group, someone = bytes.fromhex("01005e000001"), bytes(MacAddr(MAC_B))
    kinds = {"broadcast": (BROADCAST, 1), "multicast": (group, 2), "unicast": (someone, 3)}
    both_ways(port, *(frame(n, dst=dst) for dst, count in kinds.values() for n in range(count)))
    types = {name: n for name, n in moved(port).items() if "cast_" in name}
    assert types == {
        f"{way}_q0_{kind}_packets": count
        for way in ("rx", "tx")
        for kind, (_, count) in kinds.items()
    }


def test_xstats_multiqueue(port: Port) -> None:
    one = port.dev.xstats_names()
    port.reconfigure(2)
    assert moved(port) == {}
    names = [name for name in port.dev.xstats_names() if "_q" in name]
    assert sorted(names) == sorted(
        n.replace("_q0_", f"_q{q}_") for n in one if "_q" in n for q in range(2)
    )
    assert port.send(frame(), queue=1) == 1
    assert set(moved(port)) == {"tx_q1_size_64_packets", "tx_q1_unicast_packets"}
    port.reconfigure()
    assert port.dev.xstats_names() == one
    assert moved(port) == {}


def test_xstats_offload_stats(port: Port) -> None:
    payload = bytes(20)
    port.reconfigure(tx_offloads=TxOffload.UDP_CKSUM | TxOffload.TCP_CKSUM | TxOffload.TCP_TSO)
    for count, (kind, segsz) in enumerate((("udp", 0), ("tcp", 0), ("tcp", 10)), 1):
        shape = Shape(4, kind)
        (mbuf,) = port.pool.alloc_burst(1, [shape.unfinished(payload)])
        assert port.dev.tx_burst(0, Burst([shape.request(mbuf, segsz)])) == 1
        found = moved(port)
        assert found["tx_q0_checksum_offload"] == count
        assert found.get("tx_q0_tso_packets", 0) == (segsz > 0)
    assert port.dev.stats().oerrors == 0
