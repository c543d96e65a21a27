# SPDX-License-Identifier: BSD-3-Clause
"""Nothing is left behind after many lives, or after a violent end.

Twenty lives show what each of them leaves: a descriptor, a thread, an arena. make soak has the
thousand lives that show small or occasional leaks.
"""

from __future__ import annotations

import errno
import gc
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from leftovers import MB, assert_nothing, memory, names, use
from rigs import iproute
from support import (
    PacketSocket,
    Tap,
    child_environment,
    eventually,
    frame,
    link,
    none_left,
    open_fds,
    running_threads,
    settle,
    skip_without_devices,
    threads_end,
)
from together import in_threads

import rtap
from rtap import DeviceGone, EthConf, Mempool, NetNS, RxOffload
from rtap.ethdev import registry


def collect_now_and_then(n: int) -> None:
    """Without a GIL, garbage may grow to a quarter of all objects, including all of pytest's."""
    if n % 10 == 9:
        gc.collect()


def no_more_fds_than(before: int) -> None:
    """While a device is open, the netlink thread opens some for as long as it handles news."""
    none_left(before)


@contextmanager
def nothing_left(ns: NetNS, *stays: str) -> Iterator[None]:
    """Descriptors, threads, devices, names and interfaces are the same as before."""
    gc.collect()
    before, threads = open_fds(), running_threads()
    yield
    gc.collect()
    assert rtap.devices() == []
    threads_end(threads)
    assert_nothing(ns, before, *stays)


# ---- many lives


#: The number of lives, and of those before them that fill the caches.
lives = pytest.mark.parametrize(
    ("cycles", "first"), [(20, 5), pytest.param(500, 50, marks=pytest.mark.soak)]
)


@lives
def test_many_times_open_and_close(netns: NetNS, engine: str, cycles: int, first: int) -> None:
    pools = []
    for n in range(first + cycles):
        if n == first:
            gc.collect()
            before, size = open_fds(), memory()
        with rtap.open("t0", netns=netns, engine=engine) as dev:
            assert dev.send(frame(n))
            dev.rx_burst(0)
            pools.append(dev.pool)
        assert pools.pop().in_use == 0
        assert names(netns) == ["lo"]
        collect_now_and_then(n)
    gc.collect()
    now = memory()
    none_left(before)
    # One leaked arena takes 9 MB of address space, so twenty take 180 MB.
    assert now[0] - size[0] < 64 * MB
    assert now[1] - size[1] < 8 * MB
    assert registry._devices == {}


@lives
def test_many_times_stop_and_start(netns: NetNS, engine: str, cycles: int, first: int) -> None:
    with (
        # Few buffers, so that each is used soon: memory touched first later would look like a leak.
        rtap.open("t0", netns=netns, engine=engine, queues=2, nb_mbufs=64) as dev,
        PacketSocket(netns, "t0") as kernel,
    ):
        use(dev)
        assert len(kernel.frames(2)) == 2
        for n in range(first + cycles):
            if n == first:
                gc.collect()
                before, size = open_fds(), memory()
            dev.stop()
            dev.start()
            assert dev.send(frame(n), queue=n % 2)
            assert kernel.recv(2000) == frame(n)
            kernel.send(frame(n))
            if n % 10 == 0:
                eventually(lambda: any(len(dev.rx_burst(q)) for q in range(2)), "it receives")
            collect_now_and_then(n)
        gc.collect()
        now = memory()
        no_more_fds_than(before)
        assert settle(dev.pool) == 0
        assert now[0] - size[0] < 16 * MB
        assert now[1] - size[1] < 4 * MB
        assert dev.stats().opackets == first + cycles + 2
    assert names(netns) == ["lo"]


@pytest.mark.parametrize("cycles", [25, pytest.param(100, marks=pytest.mark.soak)])
def test_many_times_configured(netns: NetNS, engine: str, cycles: int) -> None:
    with (
        Mempool(2048, 66000) as pool,
        nothing_left(netns),
        netns.call(rtap.probe, "net_rtap0,iface=t0") as dev,
    ):
        for n in range(cycles):
            queues = 1 + n % 5
            offloads = (RxOffload(0), RxOffload.CHECKSUM, RxOffload.TCP_CKSUM | RxOffload.TCP_LRO)
            dev.configure(queues, queues, EthConf(rx_offloads=offloads[n % 3], engine=engine))
            for q in range(queues):
                dev.rx_queue_setup(q, 64, pool)
                dev.tx_queue_setup(q, 64)
            dev.start()
            use(dev)
            dev.stop()
            assert settle(pool) == 0
            if n == 5:
                before = open_fds()
            if n > 5 and queues == 1:
                no_more_fds_than(before)


def test_many_queues_many_times(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=64) as dev:
        use(dev)
    with nothing_left(netns):
        for _ in range(10):
            with rtap.open("t0", netns=netns, engine=engine, queues=64) as dev:
                use(dev)


def test_many_threads_open_devices(netns: NetNS) -> None:
    def work(n: int) -> None:
        for _ in range(10):
            with rtap.open(f"t{n}", netns=netns) as dev:
                use(dev)

    for attempt in range(2):
        if attempt:
            before = open_fds()  # rings of ended threads wait for new ones
        in_threads(work, 6)
    gc.collect()
    none_left(before, but=2)
    assert names(netns) == ["lo"]


def test_forgotten_devices(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine) as dev:
        use(dev)
    del dev
    with nothing_left(netns), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(10):
            dev = rtap.open("t0", netns=netns, engine=engine)
            use(dev)
            cycle = [dev]
            cycle.append(cycle)  # type: ignore[arg-type]
            del dev, cycle
            gc.collect()
            # The netlink thread may hold the device a moment longer.
            eventually(lambda: names(netns) == ["lo"], "the interface is gone")


# ---- violent ends


def test_killed_and_opened_again(netns: NetNS, engine: str) -> None:
    """After SIGKILL in the middle of traffic, the same name can be opened at once."""
    code = """
import sys, rtap
with rtap.open("k0", netns=sys.argv[1], engine=sys.argv[2], queues=2) as a:
    with rtap.open("k1", netns=sys.argv[1], engine=sys.argv[2]) as b:
        worker = rtap.Worker()
        worker.forward((a, 1), (b, 0))
        worker.start()
        print("up", flush=True)
        while True:
            a.send(bytes(60))
            a.rx_burst(0)
"""
    for attempt in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", code, netns.path, engine],
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(),
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "up\n"
                assert names(netns) == ["lo", "k0", "k1"]
                if attempt == 0:
                    with pytest.raises(OSError, match="k0 is in use") as caught:
                        rtap.open("k0", netns=netns)
                    assert caught.value.errno == errno.EBUSY
            finally:
                process.kill()
            start = time.monotonic()
            with rtap.open("k0", netns=netns, engine=engine) as dev:
                assert time.monotonic() - start < 1.5
                assert link(netns, "k0")["linkinfo"]["info_data"]["numqueues"] == 1
                use(dev)
        assert process.returncode == -signal.SIGKILL
    eventually(lambda: names(netns) == ["lo"], "the other interface goes as well")


@pytest.mark.parametrize("queues", [1, 3])
def test_deleted_then_closed(netns: NetNS, engine: str, queues: int) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=queues) as dev:
        use(dev)
    with nothing_left(netns):
        for n in range(20):
            with rtap.open("t0", netns=netns, engine=engine, queues=queues) as dev:
                use(dev)
                iproute(netns, "link del t0")
                if n % 2:
                    with pytest.raises(DeviceGone):
                        dev.rx_burst(0)
                    dev.stop()
                pool = dev.pool
            assert settle(pool) == 0


def test_a_persistent_one_deleted(netns: NetNS) -> None:
    with nothing_left(netns), rtap.open("t0", netns=netns, persist=True) as dev:
        iproute(netns, "link del t0")
        with pytest.raises(DeviceGone):
            dev.mtu = 1400


def test_moved_and_closed(netns: NetNS, netns2: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine) as dev:
        use(dev)
    with nothing_left(netns), nothing_left(netns2):
        for n in range(10):
            with rtap.open("t0", netns=netns, engine=engine) as dev:
                iproute(netns, f"link set t0 netns {netns2.path}")
                dev.stop()
                dev.start()
                use(dev)
                if n % 2:
                    iproute(netns2, f"link set t0 netns {netns.path}")
                    dev.set_link_up()
                    use(dev)


def test_its_namespace_goes_away(engine: str) -> None:
    """The interface vanishes with the namespace only when the device releases that."""
    skip_without_devices()
    ns = NetNS()
    dev = rtap.open("t0", netns=ns, engine=engine)
    before = open_fds()
    ns.close()
    use(dev)
    assert dev.mtu == 1500
    dev.close()
    gc.collect()
    assert before.keys() - open_fds().keys()


def test_close_says_so_when_the_interface_stays(netns: NetNS) -> None:
    """Another descriptor keeps the interface."""
    dev = rtap.open("t0", netns=netns)
    with Tap(netns, "t0", multi_queue=True):
        with pytest.warns(ResourceWarning, match="t0 outlives its device: another process"):
            dev.close()
        assert names(netns) == ["lo", "t0"]
    eventually(lambda: names(netns) == ["lo"], "it goes with that descriptor")
