# SPDX-License-Identifier: BSD-3-Clause
"""Which routes a worker takes, how its figures name them, and starts that fail."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from fakes import FakeOps, FakeRxQueue, FakeTxQueue, driver  # noqa: F401 - a fixture
from forks import alone
from support import eventually, none_left, open_fds, running_threads, threads_end

import rtap
from rtap import Burst, DeviceStateError, EthDev, Mempool, NetNS, Worker, stages
from rtap._queues.null import NullRxQueue, NullTxQueue
from rtap._ring import RxQueue, TxQueue

# The queues made here have no descriptor.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed [rt]x queue:ResourceWarning")

MAC = "02:00:00:00:00:01"


class Ends:
    """Like a device, with queues of any kind, but without support for weak references."""

    __slots__ = ("rx", "tx")

    def __init__(self, rx: Any = None, tx: Any = None) -> None:
        self.rx, self.tx = rx, tx

    def rx_queue(self, number: int) -> Any:
        return self.rx

    def tx_queue(self, number: int) -> Any:
        return self.tx


def ends(mode: str) -> Any:
    """Queues of a TAP device, of a TUN device, or of one for which both are the same."""
    if mode == "null":
        return Ends(NullRxQueue(Mempool(8), name="n"), NullTxQueue("n"))
    l2 = mode == "tap"
    options: dict[str, Any] = {"name": mode, "l2": l2, "engine": "syscall"}
    return Ends(RxQueue(1 << 20, Mempool(8), **options), TxQueue(1 << 20, **options))


@contextmanager
def two_devices() -> Iterator[list[EthDev]]:
    """Two started net_null devices with two queue pairs each."""
    with ExitStack() as stack:
        pool = stack.enter_context(Mempool(256))
        made = []
        for n in range(2):
            dev = stack.enter_context(rtap.probe(f"net_null{n},size=64"))
            dev.configure(2, 2)
            for q in range(2):
                dev.rx_queue_setup(q, 64, pool)
                dev.tx_queue_setup(q, 64)
            dev.start()
            made.append(dev)
        yield made


@pytest.fixture
def devs() -> Iterator[list[EthDev]]:
    with two_devices() as made:
        yield made


# ---- queues


@pytest.mark.parametrize("what", [None, 5, "queue", Burst])
def test_what_is_no_queue(devs: list[EthDev], what: Any) -> None:
    worker = Worker()
    kind = type(what).__name__
    for source, target, says in (
        (Ends(rx=what), devs[0], rf"rx_queue\(0\) of .* is {kind}: .* RxQueueBase"),
        (devs[0], Ends(tx=what), rf"tx_queue\(0\) of .* is {kind}: .* TxQueueBase"),
        (Ends(rx=devs[0].tx_queue(0)), devs[0], "is NullTxQueue: a worker needs a RxQueueBase"),
        (devs[0], [(devs[0], 0), (Ends(tx=what), 0)], f"is {kind}"),
    ):
        end: Any = target if isinstance(target, list) else (target, 0)
        with pytest.raises(TypeError, match=says):
            worker.forward((source, 0), end)  # type: ignore[arg-type]
    with pytest.raises(DeviceStateError, match="no route"):
        worker.start()


def test_a_driver_in_python_has_no_queue_for_a_worker(devs: list[EthDev]) -> None:
    worker = Worker()
    with Mempool(8) as pool:
        fake: Any = Ends(FakeRxQueue(pool), FakeTxQueue())
        with pytest.raises(TypeError, match="is FakeRxQueue: a worker needs"):
            worker.forward((fake, 0), (devs[0], 0))
        with pytest.raises(TypeError, match="is FakeTxQueue: a worker needs"):
            worker.forward((devs[0], 0), (fake, 0))


@pytest.mark.parametrize("end", [None, 5, (), (1, 2, 3), "ab"])
def test_ends_that_are_none(devs: list[EthDev], end: Any) -> None:
    worker = Worker()
    for source, target in ((end, (devs[0], 0)), ((devs[0], 0), end)):
        with pytest.raises(TypeError, match=r"must be \(device, queue number\)"):
            worker.forward(source, target)


@pytest.mark.parametrize("side", ["rx", "tx"])
def test_a_driver_that_gives_no_queue(
    driver: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    side: str,
) -> None:
    monkeypatch.setattr(FakeOps, f"{side}_queue_setup", lambda *args: None)
    with Mempool(16) as pool, rtap.probe("fake0") as dev:
        dev.configure(1, 1)
        says = f"{side}_queue_setup: the driver of fake0 gave NoneType, which has no {side}_burst"
        with pytest.raises(TypeError, match=says):
            dev.rx_queue_setup(0, 8, pool) if side == "rx" else dev.tx_queue_setup(0, 8)
        with pytest.raises(ValueError, match="is not set up"):
            dev.rx_queue(0) if side == "rx" else dev.tx_queue(0)


def test_a_device_that_nothing_can_refer_to_weakly(
    devs: list[EthDev], caplog: pytest.LogCaptureFixture
) -> None:
    """Its routes run, and only the log reports their end."""

    def refuse(burst: Burst) -> None:
        raise ValueError("no more")

    like: Any = Ends(devs[0].rx_queue(0), devs[0].tx_queue(0))
    worker = Worker()
    worker.forward((like, 0), (like, 0), stages=[refuse])
    with caplog.at_level(logging.WARNING, "rtap"):
        worker.start()
        assert worker.join(10)
    assert "a route of net_null0 has ended: stage 0 (refuse) of" in caplog.text
    (route,) = worker.stats().routes
    assert (route.device, route.targets[0].device) == ("net_null0", "net_null0")


# ---- routes that would lose frames


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        (lambda: stages.Match("udp", action=3), 3),
        (lambda: stages.Match("udp", otherwise=1), 1),
        (lambda: stages.Match("udp", action=1, otherwise=3), 3),
        (lambda: stages.Match("udp", action=3, otherwise=1), 3),
        (lambda: stages.Echo(MAC, others=2), 2),
    ],
)
def test_stages_that_name_a_target(devs: list[EthDev], stage: Any, names: int) -> None:
    """The named target must exist, both in a route and in a call."""
    targets = [(dev, q) for dev in devs for q in range(2)]
    with Mempool(8) as pool:
        burst = pool.alloc_burst(2, bytes(60))
        for n in range(1, 5):
            worker = Worker()
            if n > names:
                worker.forward((devs[0], 0), targets[:n], stages=[stages.Counter(), stage()])
                stage()(burst, n)
                continue
            says = f"names target {names}, and there (is|are) only target"
            with pytest.raises(ValueError, match=says):
                worker.forward((devs[0], 0), targets[:n], stages=[stages.Counter(), stage()])
            with pytest.raises(ValueError, match=says):
                stage()(burst, n)
            assert len(burst) == 2
            with pytest.raises(DeviceStateError, match="no route"):
                worker.start()
        burst.free()


@pytest.mark.parametrize("protocol", ["icmp", "icmpv6", 47, 51, 0])
@pytest.mark.parametrize("ports", [{"source_port": 80}, {"destination_port": (1, 9)}])
def test_ports_of_what_has_none(protocol: Any, ports: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no ports"):
        stages.Match(protocol, **ports)
    for fine in (None, "tcp", "udp", "sctp", 6, 17, 132):
        stages.Match(fine, **ports)
    stages.Match(protocol)


@pytest.mark.parametrize(
    ("source", "target"), [("tap", "tun"), ("tun", "tap")], ids=["tap to tun", "tun to tap"]
)
def test_frames_for_a_device_of_packets(source: str, target: str) -> None:
    """Frames for packets, or the reverse, are refused unless a user's stage may convert them."""
    layer: Any = {"l2": source == "tap"}
    worker = Worker()
    for chain in ([], [stages.Counter()], [stages.Spread(**layer)], [stages.Gso(**layer)]):
        with pytest.raises(ValueError, match=f"tx queue 0 of {target} takes .* from rx queue 0"):
            worker.forward((ends(source), 0), (ends(target), 0), stages=chain)
        with pytest.raises(ValueError, match=f"tx queue 0 of {target}"):
            worker.forward((ends(source), 0), [(ends(source), 0), (ends(target), 0)], stages=chain)
    other: Any = {"l2": target == "tap"}
    worker.forward(
        (ends(source), 0),
        (ends(target), 0),
        stages=[stages.Spread(**layer), lambda burst: None, stages.Spread(**other)],
    )
    worker.forward((ends(source), 0), (ends(target), 0), stages=[stages.Native(1)])
    for a, b in (("null", target), (source, "null"), (source, source), ("null", "null")):
        worker.forward((ends(a), 0), (ends(b), 0))


LAYERED: list[Any] = [
    stages.ChecksumFill,
    stages.ChecksumVerify,
    stages.Gro,
    stages.Gso,
    stages.Match,
    stages.Spread,
]
ETHERNET: list[Any] = [
    stages.MacSwap,
    stages.FiveTupleSwap,
    lambda: stages.MacRewrite(MAC),
    lambda: stages.Echo(MAC),
]


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_stages_for_other_frames(mode: str) -> None:
    worker = Worker()
    wrong = [lambda kind=kind: kind(l2=mode == "tun") for kind in LAYERED]
    right = [lambda kind=kind: kind(l2=mode == "tap") for kind in LAYERED]
    (right if mode == "tap" else wrong).extend(ETHERNET)
    for make in wrong:
        with pytest.raises(ValueError, match=r"is for .*, and gets .* device"):
            worker.forward((ends(mode), 0), (ends(mode), 0), stages=[stages.Counter(), make()])
        with pytest.raises(ValueError, match=f"tx queue 0 of {mode} takes"):
            worker.forward((ends("null"), 0), (ends(mode), 0), stages=[make()])
    for make in right:
        worker.forward((ends(mode), 0), (ends(mode), 0), stages=[make()])


# ---- figures


def test_figures_name_devices(devs: list[EthDev]) -> None:
    worker = Worker()
    worker.forward((devs[0], 1), [(devs[1], 0), (devs[1], 1)])
    with worker:
        (route,) = worker.stats().routes
    assert (route.device, route.port, route.queue) == ("net_null0", devs[0].port_id, 1)
    assert [(t.device, t.port, t.queue) for t in route.targets] == [
        ("net_null1", devs[1].port_id, 0),
        ("net_null1", devs[1].port_id, 1),
    ]


def test_two_interfaces_of_one_name(netns: NetNS, netns2: NetNS) -> None:
    with rtap.open("tap0", netns=netns) as a, rtap.open("tap0", netns=netns2) as b:
        worker = Worker()
        worker.forward((a, 0), (b, 0))
        worker.forward((b, 0), (a, 0))
        with worker:
            there, back = worker.stats().routes
        assert there.source == back.source
        assert (there.device, there.targets[0].device) == (a.name, b.name)
        assert (back.device, back.targets[0].device) == (b.name, a.name)
        assert (there.port, back.port) == (a.port_id, b.port_id)
        assert a.name != b.name


# ---- starts that fail


def free_again(devs: list[EthDev]) -> None:
    for dev in devs:
        for q in range(2):
            dev.rx_burst(q, 1).free()
            assert dev.tx_burst(q, Burst()) == 0


def start_without_memory(testcapi: Any) -> None:
    """One allocation of each start fails: the first, the second, and so on."""
    with two_devices() as devs, Mempool(16) as pool:
        worker = Worker()
        for dev in devs:
            for q in range(2):
                worker.forward(
                    (dev, q),
                    [(devs[0], 0), (devs[1], 0)],
                    stages=[stages.Gso(pool), stages.Counter()],
                )
        with worker:
            pass
        before, threads = open_fds(), running_threads()
        tasks = len(os.listdir("/proc/self/task"))
        failures = 0
        for step in range(120):
            testcapi.set_nomemory(step, step + 1)
            try:
                worker.start()
            except (MemoryError, RuntimeError):
                failures += 1
            finally:
                testcapi.remove_mem_hooks()
            worker.stop()
            assert not worker.running
            free_again(devs)
            # A start may fail while its thread begins: that one shall have all memory.
            eventually(lambda: len(os.listdir("/proc/self/task")) <= tasks, "its threads are gone")
        assert failures > 20
        none_left(before)
        threads_end(threads)
        with worker:
            eventually(lambda: worker.stats().tx_packets > 0, "it can be started")


def test_no_memory_at_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed start releases queues, descriptors, threads and the stage's pool; a retry works."""
    testcapi = pytest.importorskip("_testcapi")
    start = threading.Thread.start

    def with_memory(self: threading.Thread) -> None:
        testcapi.remove_mem_hooks()  # Python waits for ever for a thread without memory to start
        start(self)

    monkeypatch.setattr(threading.Thread, "start", with_memory)
    alone(lambda: start_without_memory(testcapi))


@pytest.mark.parametrize("exc", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_thread_that_cannot_be_made(
    devs: list[EthDev], monkeypatch: pytest.MonkeyPatch, exc: BaseException
) -> None:
    def cannot(thread: threading.Thread) -> None:
        raise exc

    worker = Worker()
    worker.forward((devs[0], 0), (devs[1], 0))
    before = open_fds()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", cannot)
        with pytest.raises(type(exc)):
            worker.start()
    assert not worker.running
    none_left(before)
    free_again(devs)
    with worker:
        eventually(lambda: worker.stats().tx_packets > 0, "it can be started")


@pytest.mark.parametrize("where", ["__init__", "start"])
def test_a_thread_without_one_for_its_events(
    devs: list[EthDev], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A worker's thread that cannot start its events thread ends and releases all it holds."""
    real = getattr(threading.Thread, where)
    told: list[type[BaseException] | None] = []

    def cannot(self: threading.Thread, *args: Any, **kwargs: Any) -> Any:
        if "-events" in kwargs.get("name", getattr(self, "_name", "")):
            raise MemoryError
        return real(self, *args, **kwargs)

    with Mempool(16) as pool:
        worker = Worker()
        worker.forward((devs[0], 0), (devs[1], 0), stages=[stages.Gso(pool)])
        with monkeypatch.context() as patch:
            patch.setattr(threading, "excepthook", lambda args: told.append(args.exc_type))
            patch.setattr(threading.Thread, where, cannot)
            worker.start()
            assert worker.join(10)
        assert told == [MemoryError]
        free_again(devs)
        with worker:
            eventually(lambda: worker.stats().tx_packets > 0, "it can be started")


@pytest.mark.parametrize("again", [False, True], ids=["stopped", "started again"])
def test_a_thread_that_comes_late(
    devs: list[EthDev], monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Ctrl-C comes before the thread starts: it finds nothing to do, even beside a later one."""
    arrive = threading.Event()
    made: list[threading.Thread] = []

    def interrupted(self: threading.Thread) -> None:
        run = self.run
        self.run = lambda: (arrive.wait(10), run())  # type: ignore[assignment, func-returns-value]
        made.append(self)
        start(self)
        raise KeyboardInterrupt

    start = threading.Thread.start
    worker = Worker()
    worker.forward((devs[0], 0), (devs[1], 0))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.start()
    assert not worker.running
    free_again(devs)
    if again:
        worker.start()
    arrive.set()
    made[0].join(10)
    assert not made[0].is_alive()
    if again:
        eventually(lambda: worker.stats().tx_packets > 0, "the second one runs")
        assert worker.running
        worker.stop()
    free_again(devs)


def test_ctrl_c_once_the_thread_runs(devs: list[EthDev], monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is stopped like any that runs."""
    start = threading.Thread.start
    worker = Worker()

    def interrupted(self: threading.Thread) -> None:
        monkeypatch.undo()  # of its own thread for events it knows nothing
        start(self)
        # Not of the worker: start() has its lock.
        eventually(lambda: devs[1].stats().opackets > 0, "it runs")
        raise KeyboardInterrupt

    worker.forward((devs[0], 0), (devs[1], 0))
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.start()
    assert not worker.running
    free_again(devs)
