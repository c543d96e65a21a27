# SPDX-License-Identifier: BSD-3-Clause
"""Events for routes that end, and a worker's limit on the latency of idle processors."""

from __future__ import annotations

import logging
import os
import queue
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import PacketSocket, eventually, frame, ip, none_left, open_fds, skip_without_devices

import rtap
from rtap import Burst, DeviceStateError, EthDev, EthEvent, Mempool, NetNS, RouteStats, Worker
from rtap._work import power as rtap_power

LATENCY = Path("/dev/cpu_dma_latency")


class Told:
    """Records the route events that callbacks of all devices get."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[tuple[str, RouteStats]] = queue.SimpleQueue()
        self.handle = rtap.callback_register(EthEvent.ROUTE_END, self._hear)

    def _hear(self, dev: EthDev, event: EthEvent, data: Any) -> None:
        assert event is EthEvent.ROUTE_END
        self.queue.put((dev.name, data))

    def next(self) -> tuple[str, RouteStats]:
        return self.queue.get(timeout=10)


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()
    yield made
    made.handle.unregister()
    assert made.queue.empty()


@pytest.fixture
def devs(netns: NetNS) -> Iterator[list[EthDev]]:
    skip_without_devices()
    with ExitStack() as stack:
        yield [stack.enter_context(rtap.open(f"d{n}", netns=netns)) for n in range(4)]


@pytest.fixture
def null() -> Iterator[EthDev]:
    """A started net_null device."""
    with Mempool(256) as pool, rtap.probe("net_null0") as dev:
        dev.configure(1, 1)
        dev.rx_queue_setup(0, 64, pool)
        dev.tx_queue_setup(0, 64)
        dev.start()
        yield dev


def circle(dev: EthDev, stages: Iterable[Any] = (), **options: Any) -> Worker:
    """A worker that sends a device's received frames back to it."""
    worker = Worker(**options)
    worker.forward((dev, 0), (dev, 0), stages=stages)
    return worker


@pytest.mark.root
@pytest.mark.parametrize("wait", ["poll", "sleep", "adaptive"])
def test_a_device_that_disappears(
    netns: NetNS, devs: list[EthDev], told: Told, wait: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its route reports it once and by name, even in a sleeping worker; the other route goes on."""
    worker = Worker(wait=wait)
    worker.forward((devs[0], 0), (devs[1], 0))
    worker.forward((devs[2], 0), (devs[3], 0))
    with (
        PacketSocket(netns, "d2") as near,
        PacketSocket(netns, "d3") as far,
        caplog.at_level(logging.WARNING, "rtap"),
        worker,
    ):
        ip(netns, "link", "del", "d0")
        name, stats = told.next()
        assert name == devs[0].name
        assert stats.source == "rx queue 0 of d0"
        assert "rx queue 0 of d0: " in stats.error
        eventually(lambda: stats.error in caplog.text, "it is logged, after the event")
        near.send(frame(1))
        assert far.frames(1) == [frame(1)]
        assert worker.running
        # A callback can already use the queues of the route.
        assert devs[1].tx_burst(0, Burst()) == 0
        with pytest.raises(DeviceStateError):
            devs[3].tx_burst(0, Burst())
    assert [bool(r.error) for r in worker.stats().routes] == [True, False]


@pytest.mark.root
def test_a_stopped_queue_and_a_stopped_worker(devs: list[EthDev], told: Told) -> None:
    """A stopped queue ends its route with an event without error; a worker's stop sends none."""
    worker = Worker()
    worker.forward((devs[0], 0), (devs[1], 0))
    worker.forward((devs[2], 0), (devs[3], 0))
    with worker:
        devs[0].rx_queue_stop(0)
        name, stats = told.next()
        assert (name, stats.error) == (devs[0].name, "")
    assert told.queue.empty()
    devs[0].rx_queue_start(0)
    with worker:  # a new limit for each start
        devs[2].rx_queue_stop(0)
        devs[0].rx_queue_stop(0)
        assert {told.next()[0] for _ in range(2)} == {devs[0].name, devs[2].name}
        eventually(lambda: not worker.running, "the worker ends with its last route")


def test_a_stage_that_fails(null: EthDev, told: Told) -> None:
    def stage(burst: Burst) -> None:
        raise LookupError("no such flow")

    with circle(null, stages=[stage]):
        name, stats = told.next()
        assert name == "net_null0"
        assert "stage 0 (stage) of the route from rx queue 0 of net_null0: " in stats.error


def test_a_callback_of_the_source_may_start_it_again(null: EthDev) -> None:
    heard: queue.SimpleQueue[int] = queue.SimpleQueue()
    worker = circle(null)

    def again(source: EthDev, event: EthEvent, data: RouteStats) -> None:
        worker.join()
        source.rx_queue_start(0)
        worker.start()
        heard.put(data.rx_packets)

    handle = null.callback_register(EthEvent.ROUTE_END, again)
    with worker:
        for _ in range(3):
            eventually(lambda: worker.stats().rx_packets > 0, "it runs")
            null.rx_queue_stop(0)
            assert heard.get(timeout=10) > 0
    handle.unregister()


# ---- processors that idle


def limit() -> int:
    """The lowest limit that any process requests, in microseconds."""
    (value,) = struct.unpack("=i", LATENCY.read_bytes()[:4])
    return int(value)


def waiting_child() -> tuple[Callable[[int, int], None], int, int]:
    """Forks a child; returns the function that ends it, and its arguments."""
    come, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(come, 1)
        os._exit(0)
    os.close(come)
    return end, go, child


def end(go: int, child: int) -> None:
    os.close(go)
    os.waitpid(child, 0)


@pytest.mark.root
@pytest.mark.skipif(not os.access(LATENCY, os.W_OK), reason=f"{LATENCY} cannot be written")
def test_resume_latency(null: EthDev) -> None:
    """The limit holds while the worker runs, and a forked child does not keep it."""
    before, open_before = limit(), open_fds()
    worker = circle(null, resume_latency=7)
    assert worker.resume_latency == 7
    with ExitStack() as stack:
        for _ in range(2):
            with worker:
                assert limit() == min(before, 7)
                stack.callback(*waiting_child())
            eventually(lambda: limit() == before, "the child has let go as well")
    with worker:
        null.rx_queue_stop(0)
        eventually(lambda: not worker.running, "it ended by itself")
        assert limit() == before
    none_left(open_before)


def test_a_latency_that_cannot_be_had(
    null: EthDev, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rtap_power, "_DEVICE", str(tmp_path / "none"))
    worker = circle(null, resume_latency=0)
    with pytest.raises(FileNotFoundError, match=r"resume_latency=0 needs .*none: No such"):
        worker.start()
    assert not worker.running
    with circle(null) as other:  # the queues are free
        assert other.running


@pytest.mark.parametrize("value", [-1, 1_000_001])
def test_a_latency_that_makes_no_sense(value: int) -> None:
    with pytest.raises(ValueError, match=r"resume_latency must be 0\.\.1000000"):
        Worker(resume_latency=value)
