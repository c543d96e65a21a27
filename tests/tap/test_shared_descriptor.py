# SPDX-License-Identifier: BSD-3-Clause
"""A device on a descriptor that its lender makes blocking: no burst waits in the kernel.

The tests use child processes, since one that waits in the kernel for ever must be killed.
"""

from __future__ import annotations

from pathlib import Path

import preload
import pytest

pytestmark = pytest.mark.root

PRELUDE = """
import ctypes, json, os, sys, time
from rigs import redirect
from support import Tap, frame, quiet_netns
import rtap

shim = ctypes.CDLL(sys.argv[1])
engine = sys.argv[2]

def blocking(fd):
    os.set_blocking(fd, True)
    assert os.get_blocking(fd)

refused = []  # calls that each program has met

def count():
    refused.append(shim.refused_so_far() - sum(refused))
"""

RECEIVE = """
with quiet_netns() as ns, Tap(ns, "t0") as tap:
    dev = rtap.open(fd=tap.fd, engine=engine)
    peer = tap.packets(rcvbuf=1 << 24)
    blocking(tap.fd)
    assert len(dev.rx_burst(0)) == 0
    for n in range(200):
        peer.send(frame(n))
    got = [bytes(m) for m in dev.rx_burst(0, 256)]
    assert got == [frame(n) for n in range(200)]
    before = time.monotonic()
    assert len(dev.rx_burst(0, 64, 0.05)) == 0
    assert time.monotonic() - before >= 0.05
    assert dev.recv(0.01) == b""
    assert all(dev.send(frame(n)) for n in range(100))
    assert peer.drain() == [frame(n) for n in range(100)]
    peer.send(frame(1))
    dev.stop()
    dev.start()  # which purges
    assert len(dev.rx_burst(0)) == 0
    assert dev.xstats()["rx_q0_purged_packets"] == 1
    peer.send(frame(2))
    assert dev.recv(5) == frame(2)
    blocking(tap.fd)
    dev.close()
    count()
"""

CHAINS = """
with quiet_netns() as ns, Tap(ns, "t0") as tap:
    dev = rtap.open(fd=tap.fd, engine=engine, data_room=256, rx_offloads=rtap.RxOffload.SCATTER)
    peer = tap.packets(rcvbuf=1 << 24)
    blocking(tap.fd)
    assert len(dev.rx_burst(0)) == 0
    peer.send(frame(3, 1500))
    burst = dev.rx_burst(0)
    assert burst[0].nb_segs == 6
    assert dev.tx_burst(0, burst) == 1
    assert peer.drain() == [frame(3, 1500)]
    blocking(tap.fd)
    dev.close()
    count()
"""

FULL = """
with quiet_netns() as ns, Tap(ns, "t0") as tap, rtap.open("s0", netns=ns) as sink:
    dev = rtap.open(fd=tap.fd, engine=engine, sndbuf=20_000)
    redirect(ns, "t0", "s0", "8kbit")
    blocking(tap.fd)
    sent = 0
    while True:
        burst = dev.pool.alloc_burst(16, frame(sent, 1000))
        took = dev.tx_burst(0, burst)
        sent += took
        assert sent < 1000
        if took < 16:
            break
    assert len(burst) == 16 - took
    assert not dev.send(frame(0, 1000))
    assert sent == dev.stats().opackets > 0
    burst.free()
    blocking(tap.fd)
    dev.close()
    count()
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """refuse.c, compiled."""
    return preload.build("refuse", tmp_path_factory.mktemp("shim"))


PROGRAMS = RECEIVE + CHAINS + FULL + "print(json.dumps(refused))\n"


def test_bursts_do_not_wait(shim: Path, engine: str) -> None:
    assert preload.run(shim, engine, PRELUDE, PROGRAMS) == [0, 0, 0]


def test_bursts_do_not_wait_on_older_kernels(shim: Path) -> None:
    """Before Linux 6.4 a TAP descriptor does not support RWF_NOWAIT."""
    refused = preload.run(shim, "syscall", PRELUDE + "shim.refuse_nowait()\n", PROGRAMS)
    assert all(refused), refused
