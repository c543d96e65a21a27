# SPDX-License-Identifier: BSD-3-Clause
"""Real traffic through net_af_packet: offloads, workers, several queues, odd frames."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import clients
import pytest
from flows import flow, flow_of
from odd_frames import HEADLESS, ODD
from rigs import Shape, Wire
from support import PacketSocket, eventually, ip, ping, quiet_netns
from veths import pair, started, veth

import rtap
from rtap import Burst, EthDev, MbufFlag, Mempool, NetNS, RxOffload, TxOffload, Worker

pytestmark = pytest.mark.root

LRO = RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM | RxOffload.TCP_LRO | RxOffload.UDP_LRO
TSO = TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM | TxOffload.TCP_TSO | TxOffload.UDP_TSO
WHOLE: dict[str, Any] = {
    "rx_offloads": LRO,
    "tx_offloads": TSO | TxOffload.MULTI_SEGS,
    "data_room": 66000,
    "nb_mbufs": 1024,
}
SIZE = 16 << 20


def joined(w: Wire) -> Iterator[Wire]:
    """A worker forwards between the devices of a wire while the context is open."""
    worker = Worker()
    worker.forward((w.a, 0), (w.b, 0), on_full="retry")
    worker.forward((w.b, 0), (w.a, 0), on_full="retry")
    with worker:
        yield w


@contextmanager
def between_veths(**options: Any) -> Iterator[Wire]:
    """Two hosts, each on one end of a veth pair; a worker joins the other ends."""
    with quiet_netns() as left, quiet_netns() as right, quiet_netns() as middle:
        for ns, name, address in ((left, "l", "10.9.0.1"), (right, "r", "10.9.0.2")):
            veth(middle, f"{name}0", f"{name}1", ns)
            ip(ns, "addr", "add", f"{address}/24", "dev", f"{name}1")
        with (
            started(middle, "l0", **options) as a,
            started(middle, "r0", **options) as b,
        ):
            yield from joined(Wire(left, right, a, b))


@contextmanager
def tap_and_veth(options: dict[str, Any], tap: dict[str, Any]) -> Iterator[Wire]:
    """A host on a TAP device, another behind a veth pair, and a worker that joins them."""
    with quiet_netns() as left, quiet_netns() as right, quiet_netns() as middle:
        veth(middle, "r0", "r1", right)
        ip(right, "addr", "add", "10.9.0.2/24", "dev", "r1")
        with (
            rtap.open("a0", netns=left, txqueuelen=20000, **tap) as a,
            started(middle, "r0", **options) as b,
        ):
            ip(left, "addr", "add", "10.9.0.1/24", "dev", "a0")
            yield from joined(Wire(left, right, a, b))


def assert_nothing_lost(w: Wire) -> None:
    clients.assert_nothing_lost(w)
    assert [dev.stats().rx_nombuf for dev in (w.a, w.b)] == [0, 0]


def average(dev: EthDev) -> float:
    stats = dev.stats()
    return stats.ibytes / stats.ipackets


def test_super_frames_stay_whole_between_two_veth_pairs(engine: str) -> None:
    with between_veths(engine=engine, **WHOLE) as w:
        ping(w.left, "10.9.0.2")
        w.transfer(SIZE)
        w.transfer(SIZE, back=True)
        assert_nothing_lost(w)
        for there, back in ((w.a, w.b), (w.b, w.a)):
            whole = there.xstats()["rx_q0_lro_packets"]
            assert whole > SIZE / 65536 * 0.9
            assert back.xstats()["tx_q0_tso_packets"] == whole
            assert back.xstats()["tx_q0_software_gso_packets"] == 0


def test_super_frames_stay_whole_between_a_tap_and_a_veth_pair(engine: str) -> None:
    tap = {"rx_offloads": LRO, "tx_offloads": TSO, "nb_mbufs": 1024, "engine": engine}
    with tap_and_veth(WHOLE | {"engine": engine}, tap) as w:
        ping(w.left, "10.9.0.2")
        w.transfer(SIZE)
        w.transfer(SIZE, back=True)
        assert_nothing_lost(w)
        for there, back in ((w.a, w.b), (w.b, w.a)):
            whole = there.xstats()["rx_q0_lro_packets"]
            assert whole > SIZE / 65536 * 0.9
            assert back.xstats()["tx_q0_tso_packets"] == whole


@pytest.mark.parametrize("tx_gro", [False, True])
def test_without_offloads_frames_are_plain(engine: str, tx_gro: bool) -> None:
    """They are within the MTU and have finished checksums, whatever the kernel handed over."""
    with between_veths(engine=engine, tx_gro=tx_gro) as w:
        ping(w.left, "10.9.0.2")
        w.transfer(SIZE // 4)
        assert_nothing_lost_but_split(w)
        came, left = w.a.xstats(), w.b.xstats()
        assert came["rx_q0_gso_super_packets"] > 0
        assert came["rx_q0_gso_split_packets"] > SIZE // 4 // 1500 // 2
        assert left["tx_q0_checksum_offload"] == left["tx_q0_tso_packets"]
        assert (left["tx_q0_gro_merged_packets"] > SIZE // 4 // 1500 // 2) is tx_gro
        assert (left["tx_q0_size_above_1518_packets"] > 0) is tx_gro


def assert_nothing_lost_but_split(w: Wire) -> None:
    """As above, but super-frames were split on the way in, and maybe merged on the way out."""
    for dev in (w.a, w.b):
        stats = dev.stats()
        assert (stats.ierrors, stats.oerrors, stats.imissed) == (0, 0, 0)


@pytest.mark.parametrize("vlans", [0, 1, 2])
@pytest.mark.parametrize("version", [4, 6])
def test_what_a_header_says_of_a_tagged_frame(
    netns: NetNS, engine: str, version: int, vlans: int
) -> None:
    """The header stays right when the tag is restored.

    A super-frame and a frame with an unfinished checksum come to one end. When they are sent on,
    they are split and finished at the other end.
    """
    veth(netns, "v0", "v1")
    shape = Shape(version=version, vlans=vlans)
    payload = bytes(range(256)) * 40
    with (
        started(netns, "v0", engine=engine, tx_offloads=WHOLE["tx_offloads"]) as a,
        started(netns, "v1", engine=engine, **WHOLE) as b,
        Mempool(8, 16384) as pool,
    ):
        for size, segsz in ((len(payload), 1000), (1000, 0)):
            data = payload[:size]
            request = shape.request(pool.alloc(shape.unfinished(data)), segsz)
            assert a.tx_burst(0, Burst([request])) == 1
            (mbuf,) = burst = b.rx_burst(0, 1, 5)
            assert len(mbuf) == len(shape.finished(data))
            assert bytes(mbuf)[: shape.l2_len] == shape.finished(data)[: shape.l2_len]
            assert (mbuf.l2_len, mbuf.l3_len, mbuf.tso_segsz) == (
                (shape.l2_len, shape.l3_len, segsz)
            )
            assert mbuf.ol_flags & MbufFlag.RX_L4_CKSUM_NONE == MbufFlag.RX_L4_CKSUM_NONE
            del mbuf, request
            assert b.tx_burst(0, burst) == 1
            expected = shape.segments(data, segsz) if segsz else [shape.finished(data)]
            assert [a.recv(timeout=5) for _ in expected] == expected
        assert a.xstats()["tx_q0_software_gso_packets"] == 0
        assert (a.stats().ierrors, b.stats().ierrors, pool.in_use) == (0, 0, 0)


@pytest.mark.skipif(shutil.which("iperf3") is None, reason="needs iperf3")
def test_iperf3(engine: str) -> None:
    size = 32 << 20
    with between_veths(engine=engine, **WHOLE) as w:
        clients.at_any_speed(w)
        end, _ = clients.iperf3(w.left, w.right, "10.9.0.2", "-n", str(size))
        assert end["sum_sent"]["bytes"] >= size
        assert_nothing_lost(w)
        assert average(w.a) > 5 * 1500


# ---- several queues

FLOWS = 64
ROUNDS = 20


def take(dev: EthDev, queues: range, n: int) -> dict[int, list[int]]:
    """The flows of `n` frames by queue, in order of arrival."""
    got: dict[int, list[int]] = {q: [] for q in queues}

    def look() -> bool:
        for q in queues:
            got[q] += [flow_of(bytes(m)) for m in dev.rx_burst(q, 64)]
        return sum(map(len, got.values())) >= n

    eventually(look, f"{n} frames came")
    return got


def test_flows_are_spread_and_stay_in_order(netns: NetNS, engine: str) -> None:
    veth(netns, "v0", "v1")
    with (
        started(netns, "v1", queues=4, engine=engine) as dev,
        PacketSocket(netns, "v0", rcvbuf=1 << 22) as peer,
    ):
        seen: dict[int, set[int]] = {q: set() for q in range(4)}
        for step in range(ROUNDS):
            for n in range(FLOWS):
                peer.send(flow(n))
            for q, came in take(dev, range(4), FLOWS).items():
                assert len(set(came)) == len(came)  # one frame of each flow
                assert came == sorted(came)
                assert step == 0 or set(came) == seen[q]
                seen[q] = set(came)
        assert sorted(n for flows in seen.values() for n in flows) == list(range(FLOWS))
        assert all(seen.values())
        stats = dev.stats()
        assert stats.ipackets == sum(stats.q_ipackets) == FLOWS * ROUNDS
        assert stats.imissed == stats.ierrors == 0


def test_a_stopped_queue_leaves_its_flows_to_the_others(netns: NetNS, engine: str) -> None:
    veth(netns, "v0", "v1")
    with (
        started(netns, "v1", queues=3, engine=engine) as dev,
        PacketSocket(netns, "v0", rcvbuf=1 << 22) as peer,
    ):

        def send_all(queues: range) -> dict[int, list[int]]:
            for n in range(FLOWS):
                peer.send(flow(n))
            got = take(dev, queues, FLOWS)
            assert sorted(n for came in got.values() for n in came) == list(range(FLOWS))
            return got

        assert all(send_all(range(3)).values())
        dev.rx_queue_stop(0)
        assert send_all(range(1, 3))
        dev.rx_queue_start(0)
        assert all(send_all(range(3)).values())
        dev.rx_queue_stop(2)
        dev.rx_queue_stop(1)
        assert send_all(range(1))
        dev.stop()
        dev.start()
        assert all(send_all(range(3)).values())
        assert dev.stats().imissed == 0


def test_queues_in_a_worker_each(engine: str) -> None:
    options = {"engine": engine, "queues": 2}
    with quiet_netns() as ns:
        veth(ns, "l0", "l1")
        veth(ns, "r0", "r1")
        with (
            started(ns, "l0", **options) as a,
            started(ns, "r0", **options) as b,
            PacketSocket(ns, "l1", protocol=0x0800) as peer,
            PacketSocket(ns, "r1", protocol=0x0800, rcvbuf=1 << 24) as end,
        ):
            workers = [Worker(), Worker()]
            for q, worker in enumerate(workers):
                worker.forward((a, q), (b, q), on_full="retry")
                worker.start()
            for _ in range(ROUNDS):
                for n in range(FLOWS):
                    peer.send(flow(n))
            got = [flow_of(data) for data in end.frames(FLOWS * ROUNDS)]
            for worker in workers:
                worker.stop()
            assert sorted(got) == sorted(list(range(FLOWS)) * ROUNDS)
            assert a.stats().ipackets == b.stats().opackets == FLOWS * ROUNDS
            assert all(b.stats().q_opackets)


# ---- odd frames


@pytest.mark.parametrize("options", [{}, WHOLE], ids=["split", "whole"])
def test_odd_frames_come_as_they_are(netns: NetNS, engine: str, options: dict[str, Any]) -> None:
    """Frames with contradictory or truncated headers are passed on for the application to judge."""
    with pair(netns, engine=engine, **options) as (a, b):
        for data in ODD + HEADLESS:
            assert a.send(data)
            assert b.recv(timeout=5) == data
        stats = b.stats()
        assert (stats.ipackets, stats.ierrors) == (len(ODD + HEADLESS), 0)


@pytest.mark.parametrize("bypass", [(), ("qdisc_bypass",)], ids=["qdisc", "bypass"])
def test_a_full_queueing_discipline_is_a_short_burst(
    netns: NetNS, engine: str, bypass: tuple[str, ...]
) -> None:
    """From the first frame that finds no room, frames stay with the caller.

    With `qdisc_bypass` there is no queueing discipline in the way.
    """
    veth(netns, "v0", "v1")
    tbf = "tbf rate 8kbit burst 3000 limit 6000"
    netns.run(["tc", "qdisc", "add", "dev", "v0", "root", *tbf.split()], check=True)
    with (
        started(netns, "v0", *bypass, engine=engine) as dev,
        PacketSocket(netns, "v1", protocol=0x0003, rcvbuf=1 << 22) as peer,
    ):
        frames = [bytes(m) for m in map(flow, range(300))]
        burst = dev.pool.alloc_burst(len(frames), frames)
        sent = dev.tx_burst(0, burst)
        stats = dev.stats()
        assert stats.opackets == sent
        assert stats.oerrors == 0
        if bypass:
            assert sent == len(frames)
            assert peer.frames(sent) == frames
        else:
            assert 0 < sent < len(frames)
            assert list(map(bytes, burst)) == frames[sent:]
