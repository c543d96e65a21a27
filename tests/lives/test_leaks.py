# SPDX-License-Identifier: BSD-3-Clause
"""Nothing is left behind: after many lives, after a violent end, after a failure halfway.

Twenty lives show whatever each of them leaves: a descriptor, a thread, an arena. The thousand that
show what is small, or left now and then, and each kind of failure at each step, are for make soak.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from memory import MB, memory
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
    settle,
    skip_without_devices,
    threads_end,
)

import rtap
from rtap import DeviceGone, EthConf, EthDev, Mempool, NetNS, RxOffload
from rtap.control import channel, tun
from rtap.drivers import descriptors, interface, net_rtap, observed
from rtap.drivers import open_tap as opening_module
from rtap.ethdev import registry


def collect_now_and_then(n: int) -> None:
    """Without a GIL garbage may grow to a quarter of all objects, here of all that pytest has."""
    if n % 10 == 9:
        gc.collect()


def no_more_fds_than(before: int) -> None:
    """While a device is open the netlink thread has some for as long as it has news to look at."""
    none_left(before)


def names(ns: NetNS) -> list[str]:
    return [name for _, name in ns.call(socket.if_nameindex)]


@contextmanager
def nothing_left(ns: NetNS, *stays: str) -> Iterator[None]:
    """Descriptors, threads, devices, names and interfaces afterwards are those of before."""
    gc.collect()
    before, threads = open_fds(), threading.active_count()
    yield
    gc.collect()
    assert names(ns) == ["lo", *stays]
    assert rtap.devices() == []
    assert registry._devices == {}
    assert registry._ports == {}
    threads_end(threads)
    none_left(before)


def use(dev: EthDev) -> None:
    for q in range(dev.info().nb_rx_queues):
        assert dev.send(frame(), queue=q)
        dev.rx_burst(q)


# ---- many lives


#: Lives, and those before them that fill the caches.
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
    # A single forgotten arena is 9 MB of address space: twenty are 180 MB.
    assert now[0] - size[0] < 64 * MB
    assert now[1] - size[1] < 8 * MB
    assert registry._devices == {}


@lives
def test_many_times_stop_and_start(netns: NetNS, engine: str, cycles: int, first: int) -> None:
    with (
        # So few that each is used soon, and memory touched for the first time is no leak.
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
    failures: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for _ in range(10):
                with rtap.open(f"t{n}", netns=netns) as dev:
                    use(dev)
        except BaseException as exc:  # noqa: BLE001 - shown below
            failures.append(exc)

    for attempt in range(2):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        if attempt:
            before = open_fds()  # rings of ended threads wait for new ones
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
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
    """SIGKILL in the middle of traffic, and the same name again at once."""
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
    """The interface dies with the namespace only when the device lets go of that."""
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
    """Somebody else holds a descriptor of it."""
    dev = rtap.open("t0", netns=netns)
    with Tap(netns, "t0", multi_queue=True):
        with pytest.warns(ResourceWarning, match="t0 outlives its device: another process"):
            dev.close()
        assert names(netns) == ["lo", "t0"]
    eventually(lambda: names(netns) == ["lo"], "it goes with that descriptor")


# ---- failures halfway


class Boom(OSError):
    pass


class Injector:
    """Makes the n-th of the calls that reach for something outside fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException) -> None:
        self.fail_at, self.error = fail_at, error
        # What the netlink thread does comes when it likes: these tests are without it.
        look = observed.Observer.look
        monkeypatch.setattr(
            observed.Observer,
            "look",
            lambda self: threading.current_thread().name == "rtap-netlink" or look(self),
        )
        for dev in registry.devices():
            with dev._lock:
                pass  # what it has begun is over
        self.calls: list[str] = []
        for owner, name in (
            (fcntl, "ioctl"),
            (tun, "open_control"),
            (channel.Channel, "request"),
            (interface, "RxQueue"),
            (interface, "TxQueue"),
            (net_rtap, "open_netns"),
            (observed, "watch"),
            (descriptors, "find_link"),
            (opening_module, "Mempool"),
        ):
            monkeypatch.setattr(owner, name, self.wrapped(name, getattr(owner, name)))

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self.fail_at:
                raise self.error
            return function(*args, **kwargs)

        return call


OPTIONS: dict[str, Any] = {
    "queues": 3,
    "mtu": 1400,
    "mac": "02:00:00:00:00:05",
    "persist": True,
    "rx_offloads": RxOffload.CHECKSUM,
    "sndbuf": 1 << 20,
    "txqueuelen": 100,
    "owner": 0,
    "group": 0,
    "engine": "syscall",
}


KINDS: dict[str, Callable[[], BaseException]] = {
    "ENOMEM": lambda: OSError(errno.ENOMEM, "injected"),
    "gone": lambda: DeviceGone(errno.EBADFD, "injected", "t0"),
    "ctrl-c": lambda: KeyboardInterrupt("injected"),
}


def one_after_another(*kinds: str) -> pytest.MarkDecorator:
    """At each step another kind of failure; for make soak, each of them at all steps."""
    alone = [pytest.param((kind,), marks=pytest.mark.soak, id=kind) for kind in kinds]
    return pytest.mark.parametrize("kinds", [pytest.param(kinds, id="in turn"), *alone])


errors = one_after_another(*KINDS)


def failing_at_each_step(
    monkeypatch: pytest.MonkeyPatch,
    kinds: Sequence[str],
    make: Callable[[], EthDev | None],
    work: Callable[[Any], object],
    check: Callable[[Any], object],
    *,
    may_swallow: bool = False,
) -> list[str]:
    """Calls ``work(make())`` once for each step in it that can fail, and ``check`` after each.

    Which kind of failure comes at the first step is drawn anew in each run, so that in time every
    kind comes at every step. The message of a failure has the kind and the step.
    """
    steps: list[str] = []
    turn = random.randrange(len(kinds))
    while True:
        error = kinds[(turn + len(steps)) % len(kinds)]
        failure = KINDS[error]()
        code = getattr(failure, "errno", None)
        dev = make()
        step = len(steps)
        with monkeypatch.context() as patch:
            injector = Injector(patch, step, failure)
            try:
                work(dev)
            except BaseException as exc:  # noqa: BLE001 - looked at next
                raised: BaseException | None = exc
            else:
                raised = None
        try:
            if len(injector.calls) <= step:
                assert raised is None
                if dev is not None:
                    dev.close()
                return steps
            steps.append(injector.calls[step])
            # A device that seems gone is looked for, and may be found.
            if raised is None:
                assert error == "gone" or (may_swallow and error != "ctrl-c")
            # An OSError may have passed the gate where errno values become exceptions.
            elif raised is not failure:
                assert type(raised) is type(failure)
                assert isinstance(raised, DeviceGone) or getattr(raised, "errno", None) == code
            check(dev)
        except BaseException as exc:
            raise AssertionError(
                f"step {step}, {error}: {injector.calls[step:]}, {raised!r}"
            ) from exc
        finally:
            del raised, failure, injector
            gc.collect()


@errors
@pytest.mark.parametrize("options", [OPTIONS, {"mode": "tun"}], ids=["much", "little"])
def test_open_that_fails_at_any_step(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, kinds: Sequence[str], options: dict[str, Any]
) -> None:
    with rtap.open("t0", netns=netns):
        pass  # this thread has its ring now
    before = open_fds()
    opened: list[EthDev] = []

    def work(nothing: object) -> None:
        opened.append(rtap.open("t0", netns=netns, **options))

    def check(nothing: object) -> None:
        for dev in opened:
            dev.close()
            if options.get("persist"):
                iproute(netns, "link del t0")
        opened.clear()
        assert_nothing(netns, before)

    steps = failing_at_each_step(monkeypatch, kinds, lambda: None, work, check)
    check(None)
    assert {"ioctl", "open_control", "RxQueue", "TxQueue", "Mempool", "request"} <= set(steps)
    assert len(steps) >= (50 if "queues" in options else 20)


@errors
def test_taking_over_that_fails_at_any_step(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, kinds: Sequence[str]
) -> None:
    """The interface stays, as it was."""
    iproute(netns, "tuntap add mode tap p0 multi_queue")
    iproute(netns, "addr add 10.0.0.1/24 dev p0")
    index = link(netns, "p0")["ifindex"]
    before = open_fds()
    opened: list[EthDev] = []

    def check(nothing: object) -> None:
        for dev in opened:
            dev.close()
        opened.clear()
        shown = link(netns, "p0")
        assert shown["ifindex"] == index
        assert shown["linkinfo"]["info_data"]["persist"] is True
        assert_nothing(netns, before, "p0")

    failing_at_each_step(
        monkeypatch,
        kinds,
        lambda: None,
        lambda nothing: opened.append(rtap.open("p0", netns=netns, queues=2)),
        check,
    )
    check(None)


@one_after_another("ENOMEM", "ctrl-c")  # gone: it is no descriptor to adopt
def test_adopting_that_fails_at_any_step(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, kinds: Sequence[str]
) -> None:
    """The descriptor stays its lender's, and the interface with it."""
    with Tap(netns, "t0", multi_queue=True) as lender:
        before = open_fds()
        opened: list[EthDev] = []

        def check(nothing: object) -> None:
            for dev in opened:
                dev.close()
            opened.clear()
            assert tun.get_iface(lender.fd).name == "t0"
            assert_nothing(netns, before, "t0")

        steps = failing_at_each_step(
            monkeypatch,
            kinds,
            lambda: None,
            lambda nothing: opened.append(rtap.open(fd=lender.fd, queues=2, engine="syscall")),
            check,
        )
        check(None)
        assert len(steps) >= 20


@errors
@pytest.mark.parametrize("header", [False, True])
def test_configure_that_fails_at_any_step(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, kinds: Sequence[str], header: bool
) -> None:
    """The device can still be closed, and nothing stays; mostly it can be configured again."""
    before = open_fds()
    there = RxOffload.CHECKSUM if header else RxOffload(0)
    other = EthConf(rx_offloads=RxOffload(0) if header else RxOffload.CHECKSUM, engine="syscall")
    again = 0

    def make() -> EthDev:
        dev = rtap.open("t0", netns=netns, queues=2, rx_offloads=there, engine="syscall")
        dev.stop()
        return dev

    def check(dev: EthDev) -> None:
        nonlocal again
        assert dev.state in ("unconfigured", "configured")
        repr(dev)
        with pytest.raises(rtap.DeviceStateError):
            dev.start()
        try:
            dev.configure(3, 3, other)
            with Mempool(64) as pool:
                for q in range(3):
                    dev.rx_queue_setup(q, 8, pool)
                    dev.tx_queue_setup(q, 8)
                dev.start()
                use(dev)
                assert len(link(netns, "t0")["linkinfo"]) > 0
                dev.close()
            again += 1
        except DeviceGone:
            assert "t0" not in names(netns)
        dev.close()
        assert_nothing(netns, before)

    steps = failing_at_each_step(
        monkeypatch, kinds, make, lambda dev: dev.configure(3, 3, other), check
    )
    assert len(steps) > 10
    assert again > len(steps) // 2


@errors
def test_start_that_fails_at_any_step(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, kinds: Sequence[str]
) -> None:
    before = open_fds()

    def make() -> EthDev:
        dev = rtap.open("t0", netns=netns, queues=2, engine="syscall")
        dev.stop()
        iproute(netns, "link set t0 down")
        return dev

    def check(dev: EthDev) -> None:
        if dev.state != "started":
            assert dev.state == "stopped"
            with pytest.raises(rtap.DeviceStateError):
                dev.rx_burst(0)
            dev.start()
        use(dev)
        dev.close()
        assert_nothing(netns, before)

    steps = failing_at_each_step(monkeypatch, kinds, make, lambda dev: dev.start(), check)
    assert len(steps) >= 3


@errors
@pytest.mark.parametrize("then", ["stop", "close"])
def test_the_end_that_fails_at_any_step(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, kinds: Sequence[str], then: str
) -> None:
    """Whatever goes wrong on the way, the device is stopped or closed."""
    before = open_fds()

    def end(dev: EthDev) -> None:
        getattr(dev, then)()

    def check(dev: EthDev) -> None:
        if then == "stop":
            assert dev.state == "stopped"
            with pytest.raises(rtap.DeviceStateError):
                dev.rx_burst(0)
        dev.close()
        assert dev.state == "closed"
        eventually(lambda: "t0" not in names(netns), "the interface is gone")
        assert_nothing(netns, before)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        failing_at_each_step(
            monkeypatch,
            kinds,
            lambda: rtap.open("t0", netns=netns, queues=2, engine="syscall"),
            end,
            check,
            may_swallow=True,
        )


def assert_nothing(ns: NetNS, descriptors: Mapping[int, str], *stays: str) -> None:
    assert names(ns) == ["lo", *stays]
    assert registry._devices == {}
    assert registry._ports == {}
    none_left(descriptors)
