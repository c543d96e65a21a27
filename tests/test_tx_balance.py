# SPDX-License-Identifier: BSD-3-Clause
"""Frames in are frames out and named drops, to the frame, through a worker and a queue."""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import pytest
from support import eventually, netdev, settle

import rtap
from rtap import Burst, EthDev, MbufFlag, Mempool, NetNS, TxOffload, Worker
from rtap.drivers.observed import Drops

pytestmark = [pytest.mark.root, pytest.mark.lifetime]

#: Claims to be IPv4, and that a checksum can be placed where there is no UDP.
IMPOSSIBLE = MbufFlag.TX_UDP_CKSUM
GENERATED = b"\xff" * 6 + bytes(6) + b"\x08\x00" + b"\x45" + bytes(75)


@pytest.mark.parametrize(
    ("started", "plugged", "missed", "unplugged"),
    [(True, True, 5, 0), (True, False, 0, 5), (False, True, 0, 0), (False, False, 0, 5)],
)
def test_whose_fault_the_kernels_drops_are(
    started: bool, plugged: bool, missed: int, unplugged: int
) -> None:
    drops = Drops(100)
    drops.turn(100, started=started, plugged=plugged)
    drops.count(105)
    assert (drops.missed, drops.unplugged) == (missed, unplugged)
    drops.turn(105, started=True, plugged=True)
    drops.count(106)
    assert (drops.missed, drops.unplugged) == (missed + 1, unplugged)
    drops.restart(3)
    drops.count(3)
    assert (drops.missed, drops.unplugged) == (missed + 1, unplugged)


def source(stack: ExitStack, args: str, pool: Mempool) -> EthDev:
    """A started net_null device, which has frames without end."""
    dev = stack.enter_context(rtap.probe(args))
    dev.configure(1, 1)
    dev.rx_queue_setup(0, 64, pool)
    dev.tx_queue_setup(0, 64)
    dev.start()
    return dev


#: For each target, which of its frames ask for the impossible.
REQUESTS = {
    "all": ["1", "1"],
    "one target's": ["0", "1"],
    "the other's": ["1", "0"],
    "some": ["011", "10010", "1101"],
    "of one among many": ["0", "0", "0", "1"],
}


@pytest.mark.parametrize("on_full", ["drop", "retry"])
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=list(REQUESTS))
def test_impossible_requests_to_several_targets(
    netns: NetNS, engine: str, requests: list[str], on_full: str
) -> None:
    """None of them is on the wire, whichever targets share an entry into the kernel."""
    turns = [itertools.cycle(map(int, turn)) for turn in requests]
    asked = [0] * len(turns)
    sent = [0] * len(turns)

    def mark(burst: Burst) -> list[int]:
        targets = [n % len(turns) for n in range(len(burst))]
        flags = [next(turns[t]) for t in targets]
        for t, bad in zip(targets, flags, strict=True):
            asked[t] += bad
            sent[t] += not bad
        burst.ol_flags = [int(IMPOSSIBLE) * bad for bad in flags]
        return targets

    with ExitStack() as stack:
        pool = stack.enter_context(Mempool(512))
        null = source(stack, "net_null0,size=90", pool)
        outs = [
            stack.enter_context(
                rtap.open(f"b{n}", netns=netns, engine=engine, tx_offloads=TxOffload.UDP_CKSUM)
            )
            for n in range(len(turns))
        ]
        worker = Worker(burst=8)
        worker.forward((null, 0), [(out, 0) for out in outs], stages=[mark], on_full=on_full)
        with worker:
            eventually(lambda: worker.stats().rx_packets > 500, "frames are forwarded")
        (route,) = worker.stats().routes
        assert not route.error
        assert route.rx_packets == route.tx_packets + route.drops == sum(asked) + sum(sent)
        for n, (out, target) in enumerate(zip(outs, route.targets, strict=True)):
            stats = out.stats()
            assert (stats.opackets, stats.oerrors) == (target.packets, target.drops)
            assert (target.packets, target.drops) == (sent[n], asked[n])
            assert out.xstats()["tx_q0_bad_request_packets"] == asked[n]
            assert netdev(netns, out.ifname)["rx_packets"] == sent[n]
        assert settle(pool) == 0
