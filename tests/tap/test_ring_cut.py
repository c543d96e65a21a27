# SPDX-License-Identifier: BSD-3-Clause
"""A kernel that does not run all reads of an entry: no slot is lost, and no frame."""

from __future__ import annotations

from pathlib import Path

import preload
import pytest
from support import no_io_uring
from this_kernel import skip_without_short_ring_bursts

pytestmark = [
    pytest.mark.root,
    pytest.mark.lifetime,
    pytest.mark.skipif(no_io_uring() != "", reason=no_io_uring()),
]

PRELUDE = """
import ctypes, errno, json, sys
from support import PacketSocket, Tap, eventually, frame, quiet_netns
import rtap
from rtap import Mempool, Worker

shim = ctypes.CDLL(sys.argv[1])
READS, NOTHING = 5, 6  # as in enters.c
ROOM, SCATTER = json.loads(sys.argv[2])

def fed(peer, n):
    frames = [frame(seq, 1000) for seq in range(n)]
    for each in frames:
        peer.send(each)
    return frames
"""

ONE_QUEUE = """
with Mempool(400, ROOM) as pool, quiet_netns() as ns, Tap(ns) as tap:
    peer = tap.packets(rcvbuf=1 << 24)
    rx = tap.rx(pool, engine="uring", max_frame=1100, scatter=SCATTER)
    segs = -(-1000 // ROOM)
    for attempt in range(4):
        fed(peer, 32)
        assert len(rx.rx_burst(32)) == 32  # the next one begins with so many reads
        frames = fed(peer, 80)
        shim.watch(READS, 1)
        burst = rx.rx_burst(80)
        assert shim.hit() == 1
        assert 0 < len(burst) < 40
        assert pool.in_use == segs * len(burst), (pool.in_use, len(burst))
        got = [bytes(m) for m in burst]
        del burst
        assert pool.in_use == 0
        shim.watch(0, 0)
        while len(got) < 80:
            burst = rx.rx_burst(80)
            assert len(burst) > 0
            got += map(bytes, burst)
            del burst
        assert got == frames
    assert pool.in_use == 0
    counters = rx.counters()
    assert (counters["packets"], counters["errors"], counters["nombuf"]) == (4 * 112, 0, 0)
print(json.dumps("fine"))
"""

MANY_QUEUES = """
with quiet_netns() as ns:
    devs = [rtap.open(f"t{n}", netns=ns, engine="uring") for n in range(4)]
    peers = [PacketSocket(ns, f"t{n}", rcvbuf=1 << 24) for n in range(4)]
    pools = [dev.pool for dev in devs]
    frames = [fed(peer, 200) for peer in peers]
    worker = Worker(wait="poll")
    for n in range(4):
        worker.forward((devs[n], 0), (devs[n ^ 1], 0))
    shim.watch(READS, 10)
    with worker:
        for n in range(4):
            assert peers[n].frames(200) == frames[n ^ 1]
        eventually(lambda: shim.hit() == 10, "ten entries were cut")
    assert [pool.in_use for pool in pools] == [0] * 4
    routes = worker.stats().routes
    assert [r.tx_packets for r in routes] == [200] * 4
    for each in (*peers, *devs):
        each.close()
print(json.dumps("fine"))
"""

NEVER = """
with Mempool(64) as pool, quiet_netns() as ns, Tap(ns) as tap:
    peer = tap.packets(rcvbuf=1 << 24)
    rx = tap.rx(pool, engine="uring", max_frame=1522)
    frames = fed(peer, 20)
    assert len(rx.rx_burst(8)) == 8
    shim.watch(NOTHING, 2)
    for attempt in range(2):
        assert len(rx.rx_burst(8)) == 0
    assert shim.hit() == 2
    assert [bytes(m) for m in rx.rx_burst(6)] == frames[8:14]  # it was for a moment
    shim.watch(NOTHING, 1000)
    try:
        for attempt in range(4):
            assert len(rx.rx_burst(8)) == 0
    except OSError as exc:
        assert exc.errno == errno.EINVAL, exc
    else:
        sys.exit("nothing was said")
    assert attempt > 0
    assert pool.in_use == 0
    for turn in range(10):
        try:
            rx.rx_burst(8)
        except OSError:
            pass
    assert shim.hit() < 4, "no ring is made again and again"
print(json.dumps("fine"))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """enters.c, compiled."""
    return preload.build("enters", tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize("slots", ["[2048, false]", "[400, true]"], ids=["single", "chains"])
def test_slots_of_reads_that_were_not_run(shim: Path, slots: str) -> None:
    assert preload.run(shim, slots, PRELUDE, ONE_QUEUE) == "fine"


def test_slots_of_reads_of_several_queues(shim: Path) -> None:
    assert preload.run(shim, "[2048, false]", PRELUDE, MANY_QUEUES) == "fine"


def test_a_kernel_that_takes_nothing(shim: Path) -> None:
    skip_without_short_ring_bursts()
    assert preload.run(shim, "[2048, false]", PRELUDE, NEVER) == "fine"
