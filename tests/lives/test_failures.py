# SPDX-License-Identifier: BSD-3-Clause
"""Failures at any step of opening, taking over, configuring, starting or ending leave nothing.

Each step gets another kind of failure; make soak tries each kind at all steps.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import random
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from leftovers import assert_nothing, names, use
from rigs import iproute
from support import Tap, eventually, link, open_fds

import rtap
from rtap import DeviceGone, EthConf, EthDev, Mempool, NetNS, RxOffload
from rtap.control import channel, tun
from rtap.drivers import descriptors, interface, net_rtap, observed
from rtap.drivers import open_tap as opening_module
from rtap.ethdev import registry


class Injector:
    """Makes the n-th call to something outside the process fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException) -> None:
        self.fail_at, self.error = fail_at, error
        # The netlink thread acts at any time, so these tests run without it.
        look = observed.Observer.look
        monkeypatch.setattr(
            observed.Observer,
            "look",
            lambda self: threading.current_thread().name == "rtap-netlink" or look(self),
        )
        for dev in registry.devices():
            with dev._lock:
                pass  # wait until it has finished its work
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
    """Another kind of failure at each step; with make soak, each kind at all steps."""
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
    first: int = 0,
    stride: int = 1,
) -> list[str]:
    """Calls ``work(make())`` once for each step in it that can fail, and ``check`` after each;
    returns the steps. With `stride`, only for every so many, from the `first` one on.

    Each run draws the kind of failure for the first step, so that in time every kind comes at every
    step. The message of a failed check has the kind and the step.
    """
    turn = random.randrange(len(kinds))
    step = first - stride
    while True:
        step += stride
        error = kinds[(turn + step) % len(kinds)]
        failure = KINDS[error]()
        code = getattr(failure, "errno", None)
        dev = make()
        with monkeypatch.context() as patch:
            injector = Injector(patch, step, failure)
            try:
                work(dev)
            except BaseException as exc:  # noqa: BLE001 - checked next
                raised: BaseException | None = exc
            else:
                raised = None
        try:
            if len(injector.calls) <= step:
                assert raised is None
                if dev is not None:
                    dev.close()
                return injector.calls
            # A device that seems gone is searched for, and may be found.
            if raised is None:
                assert error == "gone" or (may_swallow and error != "ctrl-c")
            # The OSError may have passed through the function that maps errno to exceptions.
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
@pytest.mark.parametrize(
    ("options", "first", "stride"),
    [*((OPTIONS, first, 4) for first in range(4)), ({"mode": "tun"}, 0, 1)],
    ids=["much-0", "much-1", "much-2", "much-3", "little"],
)
def test_open_that_fails_at_any_step(
    netns: NetNS,
    monkeypatch: pytest.MonkeyPatch,
    kinds: Sequence[str],
    options: dict[str, Any],
    first: int,
    stride: int,
) -> None:
    """With many options it has so many steps that it is four tests."""
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

    steps = failing_at_each_step(
        monkeypatch, kinds, lambda: None, work, check, first=first, stride=stride
    )
    check(None)
    assert {"ioctl", "open_control", "RxQueue", "TxQueue", "Mempool", "request"} <= set(steps)
    assert len(steps) >= (50 if "queues" in options else 20)


@errors
def test_taking_over_that_fails_at_any_step(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, kinds: Sequence[str]
) -> None:
    """The interface stays unchanged."""
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


@one_after_another("ENOMEM", "ctrl-c")  # not "gone": there would be no descriptor to adopt
def test_adopting_that_fails_at_any_step(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, kinds: Sequence[str]
) -> None:
    """The lender keeps the descriptor, and the interface with it."""
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
    """The device can still be closed without leftovers, and mostly be configured again."""
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
    """Whatever fails on the way, the device is stopped or closed."""
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
