# SPDX-License-Identifier: BSD-3-Clause
"""A program blocks io_uring with a seccomp filter while queues use it.

The tests use child processes, since a filter cannot be removed.
"""

from __future__ import annotations

from pathlib import Path

import preload
import pytest
from support import skip_without_engine
from this_kernel import skip_without_short_ring_bursts

pytestmark = pytest.mark.root

PRELUDE = """
import ctypes, errno, json, os, sys, time, warnings
from patience import patient
from support import PacketSocket, block_io_uring, eventually, frame, links, netdev, quiet_netns
import rtap
from rtap import Worker

warnings.simplefilter("error")
shim = ctypes.CDLL(sys.argv[1])
code, only_enter, engine = json.loads(sys.argv[2])

def opened(ns, name="t0"):
    shim.slow_writes(1)
    dev = rtap.open(name, netns=ns, engine=engine)
    shim.slow_writes(0)
    assert dev.info().engine == "uring", dev.info()
    return dev

def block():
    block_io_uring(getattr(errno, code), only_enter)

def calls_until(call, done, most=3):
    for n in range(most):
        call()
        if done():
            return
    raise AssertionError(f"not within {most} calls")
"""

AUTO = """
with quiet_netns() as ns:
    dev = opened(ns)
    peer = PacketSocket(ns, "t0", rcvbuf=1 << 24)
    for _ in range(20):  # so that descriptor and pool are registered
        peer.send(frame(1))
        assert dev.tx_burst(0, dev.rx_burst(0)) == 1
    peer.drain()
    block()

    for n in range(50):
        peer.send(frame(n))
    got = []
    calls_until(lambda: got.extend(bytes(m) for m in dev.rx_burst(0)), lambda: len(got) == 50)
    assert got == [frame(n) for n in range(50)]

    burst = dev.pool.alloc_burst(64, [frame(n) for n in range(64)])
    calls_until(lambda: dev.tx_burst(0, burst), lambda: len(burst) == 0)
    assert peer.drain() == [frame(n) for n in range(64)]
    assert dev.send(frame(7))

    cpu = time.thread_time()
    assert len(dev.rx_burst(0, 64, 0.3)) == 0
    assert time.thread_time() - cpu < patient(0.1)

    info = dev.info()
    assert info.engine == "syscall", info
    assert "io_uring is refused meanwhile (" in info.engine_reason
    assert os.strerror(getattr(errno, code)) in info.engine_reason
    assert dev.pool.in_use == 0
    dev.stop()
    dev.start()
    peer.send(frame(9))
    assert dev.recv(5) == frame(9)
    peer.close()
    dev.close()  # waits until the interface is gone: no ring keeps it
    assert "t0" not in links(ns)
    with rtap.open("t1", netns=ns, engine="auto") as other:
        assert other.info().engine == "syscall"
        assert "blocked" in other.info().engine_reason
print(json.dumps("fine"))
"""

URING = """
with quiet_netns() as ns:
    dev = opened(ns)
    peer = PacketSocket(ns, "t0", rcvbuf=1 << 24)
    peer.send(frame(1))
    assert dev.tx_burst(0, dev.rx_burst(0)) == 1
    peer.drain()
    peer.send(frame(2))
    burst = dev.pool.alloc_burst(8, frame(3))
    block()
    for call in (
        lambda: dev.rx_burst(0),
        lambda: dev.rx_burst(0, timeout=30),
        lambda: dev.tx_burst(0, burst),
        lambda: dev.send(frame(4)),
    ):
        said = ""
        for _ in range(2):  # the burst that meets it may be short
            try:
                call()
            except OSError as exc:
                assert exc.errno == getattr(errno, code), exc
                said = str(exc)
        assert "io_uring is blocked since" in said and "engine='auto'" in said, said
    assert len(burst) == 8
    assert peer.drain() == []
    assert os.read(dev.rx_queue(0).fd, 4096) == frame(2)  # where it was
    try:
        dev.tx_queue_stop(0)
        dev.tx_queue_setup(0, 64)
    except OSError as exc:
        assert "engine='uring' cannot be used" in str(exc), exc
    else:
        sys.exit("engine='uring' was not refused")
    burst.free()
    assert dev.pool.in_use == 0
    peer.close()
    dev.close()
    assert "t0" not in links(ns)
print(json.dumps("fine"))
"""

CLOSE = """
with quiet_netns() as ns:
    dev = opened(ns)
    pool = dev.pool
    for _ in range(20):
        dev.tx_burst(0, pool.alloc_burst(8, frame(1)))
    block()
    dev.close()  # without a burst that would have met it
    assert "t0" not in links(ns)
    pool.close()
print(json.dumps("fine"))
"""

WORKER = """
with quiet_netns() as ns:
    devs = [opened(ns, f"t{n}") for n in range(4)]
    for dev in devs:  # a burst before, as rings are made by the first
        dev.rx_burst(0)
    peers = [PacketSocket(ns, f"t{n}", rcvbuf=1 << 24) for n in range(4)]
    block()  # also for the threads that this one starts
    worker = Worker()
    for n in range(4):
        worker.forward((devs[n], 0), (devs[n ^ 1], 0), on_full="retry")
    for n in range(4):
        for seq in range(100):
            peers[n].send(frame(seq))
    with worker:
        if engine == "auto":
            for n in range(4):
                assert peers[n].frames(100) == [frame(seq) for seq in range(100)]
        else:
            eventually(lambda: not worker.running, "every route has ended")
    routes = worker.stats().routes
    if engine == "auto":
        assert [r.tx_packets for r in routes] == [100] * 4
        assert [r.error for r in routes] == [""] * 4, routes
    else:
        assert all(os.strerror(getattr(errno, code)) in str(r.error) for r in routes), routes
        for dev in devs:  # still in the kernel
            assert netdev(ns, dev.ifname)["tx_packets"] == 0
    assert all(dev.pool.in_use == 0 for dev in devs)
    for each in (*peers, *devs):
        each.close()
print(json.dumps("fine"))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """refuse.c, compiled."""
    return preload.build("refuse", tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize(("code", "blocked"), [("EPERM", "all"), ("ENOSYS", "enter")])
@pytest.mark.parametrize(
    ("program", "engine"),
    [(AUTO, "auto"), (URING, "uring"), (CLOSE, "uring"), (WORKER, "auto"), (WORKER, "uring")],
    ids=["auto", "uring", "close", "worker-auto", "worker-uring"],
)
def test_blocked_after_open(shim: Path, program: str, engine: str, code: str, blocked: str) -> None:
    skip_without_engine("uring")
    if program in (URING, WORKER) and engine == "uring":
        skip_without_short_ring_bursts()
    options = f'["{code}", {str(blocked == "enter").lower()}, "{engine}"]'
    assert preload.run(shim, options, PRELUDE, program) == "fine"
