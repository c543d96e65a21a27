# SPDX-License-Identifier: BSD-3-Clause
"""Frames that borrow their payload pass workers whose stages write; every byte arrives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rigs import Shape, bridged, wire
from support import PacketSocket, pattern, settle

import rtap
from rtap import Burst, Mempool, RxOffload, TxOffload, Worker, stages
from rtap.stages import Stage

pytestmark = pytest.mark.root

ETH_P_IP = 0x0800
MTU = 24_000
TSO = TxOffload.TCP_TSO | TxOffload.UDP_TSO | TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM
LRO = RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM | RxOffload.TCP_LRO | RxOffload.UDP_LRO
WRITERS: dict[str, Callable[[], Stage]] = {
    "MacRewrite": lambda: stages.MacRewrite(source="02:00:00:00:00:09"),
    "ChecksumFill": stages.ChecksumFill,
    "Call": lambda: stages.Call(lambda burst: None),
}


@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS.keys())
def test_tcp_through_a_stage_that_writes(
    engine: str,
    make: Callable[[], Stage],
) -> None:
    """The kernel's super-frames are split by reference; their copies take several slots each."""
    options = {
        "engine": engine,
        "mtu": MTU,
        "nb_mbufs": 4096,
        "data_room": 2048,
        "rx_gso": True,
        "rx_offloads": RxOffload.SCATTER,
        "tx_offloads": TxOffload.MULTI_SEGS,
    }
    with wire(a=options, b=options) as w:
        worker = Worker()
        # The stage changes only the source address, which receivers ignore.
        worker.forward((w.a, 0), (w.b, 0), stages=[make()])
        worker.forward((w.b, 0), (w.a, 0), stages=[make()])
        with worker:
            w.transfer(3 << 20)
            w.transfer(1 << 20, back=True)
        assert w.a.xstats()["rx_q0_gso_split_packets"] > 0
        assert w.b.xstats()["tx_q0_multiseg_packets"] > 0


@pytest.mark.parametrize("room", [256, 2048])
@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_split_into_a_small_pool_and_written_to(
    engine: str,
    proto: str,
    room: int,
) -> None:
    """``Gso`` refers to long payloads; the next stage copies them into far smaller slots.

    The frames leave unchanged.
    """
    shape, payload, segsz = Shape(proto=proto), pattern(7, 60_000), 20_000
    whole = {"mtu": MTU, "data_room": 66_000, "nb_mbufs": 16, "engine": engine}
    with (
        bridged(a={**whole, "tx_offloads": TSO}, b={**whole, "rx_offloads": LRO}) as line,
        rtap.open("c0", netns=line.ns, **whole, tx_offloads=TxOffload.MULTI_SEGS) as out,
        PacketSocket(line.ns, "c0", ETH_P_IP, rcvbuf=1 << 22) as packets,
        Mempool(12 + 4 * (3 + segsz // room), room) as small,
    ):
        worker = Worker()
        worker.forward((line.b, 0), (out, 0), stages=[stages.Gso(small), stages.MacSwap()])
        with worker:
            for _ in range(3):
                mbuf = line.a.pool.alloc(shape.unfinished(payload))
                burst = Burst([shape.request(mbuf, segsz)])
                del mbuf
                assert line.a.tx_burst(0, burst) == 1
                assert packets.frames(3) == [
                    frame[6:12] + frame[:6] + frame[12:] for frame in shape.segments(payload, segsz)
                ]
            (route,) = worker.stats().routes
        assert [stage.drops for stage in route.stages] == [0, 0]
        assert settle(small) == 0
