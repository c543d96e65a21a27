# SPDX-License-Identifier: BSD-3-Clause
"""The generic device layer: states, argument checks, registry; over a driver that only notes
what it is asked to do, and over a real one where the kernel has a say."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from rigs import talk
from support import eventually, fds, frame, ip, link, links, python, settle

import rtap
from rtap import (
    Burst,
    DeviceStateError,
    DevInfo,
    EthConf,
    EthDev,
    Link,
    MacAddr,
    MbufFlag,
    Mempool,
    NetNS,
    RxOffload,
    Stats,
    TxOffload,
    registry,
)
from rtap.devargs import DevArgs
from rtap.events import Port
from rtap.ops import DescLim, EthDevOps

if TYPE_CHECKING:
    from typing_extensions import Buffer


class FakeRxQueue:
    engine = "fake"
    engine_reason = "there is no other"

    def __init__(self, pool: Mempool) -> None:
        self.pool = pool

    def rx_burst(self, n: int = 64, timeout: float | None = 0) -> Burst:
        return Burst()


class FakeTxQueue:
    engine = "fake"
    engine_reason = "there is no other"

    def tx_burst(self, burst: Burst) -> int:
        return len(burst)

    def send(self, frame: Buffer, pool: Mempool) -> bool:
        return True


class FakeOps:
    """An ops table that notes its calls; ``fail`` names one that raises."""

    ifname = "fake0"

    def __init__(self, args: DevArgs, port: Port) -> None:
        args.finish(())
        self.port = port
        self.calls: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.mac = MacAddr("02:00:00:00:00:01")
        self.mtu = 1500

    def note(self, call: str) -> None:
        self.calls.append(call)
        name = call.partition("(")[0]
        if name in self.fail:
            raise self.fail.pop(name)

    def take(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls

    def dev_infos_get(self) -> DevInfo:
        return DevInfo(
            driver_name="fake",
            max_rx_queues=4,
            max_tx_queues=8,
            max_mac_addrs=4,
            rx_offload_capa=RxOffload.CHECKSUM,
            tx_offload_capa=TxOffload(0),
            rx_desc_lim=DescLim(2, 32),
            tx_desc_lim=DescLim(1, 16),
            min_mtu=100,
            max_mtu=2000,
        )

    def dev_configure(self, nb_rx_queues: int, nb_tx_queues: int, conf: EthConf) -> None:
        self.note(f"dev_configure({nb_rx_queues}, {nb_tx_queues})")

    def dev_start(self) -> None:
        self.note("dev_start")

    def dev_stop(self) -> None:
        self.note("dev_stop")

    def dev_close(self) -> None:
        self.note("dev_close")

    def dev_forked(self) -> None:
        self.note("dev_forked")

    def dev_events(self, sink: object) -> None:
        pass

    def rx_queue_setup(
        self, queue_id: int, nb_desc: int, pool: Mempool, deferred_start: bool
    ) -> FakeRxQueue:
        self.note(f"rx_queue_setup({queue_id}, {nb_desc})")
        return FakeRxQueue(pool)

    def rx_queue_release(self, queue_id: int) -> None:
        self.note(f"rx_queue_release({queue_id})")

    def tx_queue_setup(self, queue_id: int, nb_desc: int, deferred_start: bool) -> FakeTxQueue:
        self.note(f"tx_queue_setup({queue_id}, {nb_desc})")
        return FakeTxQueue()

    def tx_queue_release(self, queue_id: int) -> None:
        self.note(f"tx_queue_release({queue_id})")

    def link_update(self) -> Link:
        self.note("link_update")
        return Link(link_status=True)

    def dev_set_link_up(self) -> None:
        self.note("dev_set_link_up")

    def dev_set_link_down(self) -> None:
        self.note("dev_set_link_down")

    def mac_addr_get(self) -> MacAddr:
        return self.mac

    def mac_addr_set(self, mac: MacAddr) -> None:
        self.note(f"mac_addr_set({mac})")
        self.mac = mac

    def mtu_get(self) -> int:
        return self.mtu

    def mtu_set(self, mtu: int) -> None:
        self.note(f"mtu_set({mtu})")
        self.mtu = mtu

    def stats_get(self) -> Stats:
        self.note("stats_get")
        return Stats()

    def stats_reset(self) -> None:
        self.note("stats_reset")

    def xstats_get_names(self) -> list[str]:
        return []

    def xstats_get(self) -> dict[str, int]:
        return {}

    def xstats_reset(self) -> None:
        self.note("xstats_reset")

    def rx_queue_start(self, queue_id: int) -> None:
        self.note(f"rx_queue_start({queue_id})")

    def rx_queue_stop(self, queue_id: int) -> None:
        self.note(f"rx_queue_stop({queue_id})")

    def tx_queue_start(self, queue_id: int) -> None:
        self.note(f"tx_queue_start({queue_id})")

    def tx_queue_stop(self, queue_id: int) -> None:
        self.note(f"tx_queue_stop({queue_id})")

    def rx_queue_intr_fd(self, queue_id: int) -> int:
        return -1

    def rx_queue_intr_enable(self, queue_id: int) -> None:
        self.note(f"rx_queue_intr_enable({queue_id})")

    def rx_queue_intr_disable(self, queue_id: int) -> None:
        self.note(f"rx_queue_intr_disable({queue_id})")

    def promiscuous_enable(self) -> None:
        pass

    def promiscuous_disable(self) -> None:
        pass

    def allmulticast_enable(self) -> None:
        pass

    def allmulticast_disable(self) -> None:
        pass

    def mac_addr_add(self, mac: MacAddr, index: int) -> None:
        pass

    def mac_addr_remove(self, index: int) -> None:
        pass

    def set_mc_addr_list(self, groups: Sequence[MacAddr]) -> None:
        pass


_typed: Callable[[DevArgs, int], EthDevOps] = FakeOps  # a driver as the protocol describes it


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver for devices called fake..."""
    monkeypatch.setattr(registry, "_drivers", dict(registry._drivers))
    registry.register_driver("fake", FakeOps, aliases=("phony",))


@pytest.fixture
def dev(driver: None) -> Iterator[EthDev]:
    with rtap.probe("fake0") as dev:
        yield dev
    registry.release(dev.name, dev.port_id)  # of one made to look inherited


@pytest.fixture(scope="module")
def pool() -> Mempool:
    return Mempool(16)


def ops_of(dev: EthDev) -> FakeOps:
    ops: Any = dev._ops
    assert isinstance(ops, FakeOps)
    return ops


# ---- states


def bring(dev: EthDev, state: str, pool: Mempool) -> None:
    """Takes a fresh device of one queue pair to a state."""
    if state == "inherited":
        dev._forked()
    elif state == "closed":
        dev.close()
    elif state != "unconfigured":
        dev.configure(1, 1)
        if state == "queues missing":
            return
        dev.rx_queue_setup(0, 8, pool)
        dev.tx_queue_setup(0, 8)
        if state in ("started", "stopped"):
            dev.start()
        if state == "stopped":
            dev.stop()


UNCONFIGURED, MISSING, CONFIGURED = "unconfigured", "queues missing", "configured"
STARTED, STOPPED, CLOSED, INHERITED = "started", "stopped", "closed", "inherited"
STATES = (UNCONFIGURED, MISSING, CONFIGURED, STARTED, STOPPED, CLOSED, INHERITED)
ALIVE = set(STATES) - {CLOSED, INHERITED}
IDLE = {MISSING, CONFIGURED, STOPPED}
READY = {CONFIGURED, STARTED, STOPPED}


def set_mac(dev: EthDev) -> None:
    dev.mac = "02:00:00:00:00:02"


def set_app_mac(dev: EthDev) -> None:
    dev.app_mac = "02:00:00:00:00:02"


def set_mtu(dev: EthDev) -> None:
    dev.mtu = 1400


def set_promiscuous(dev: EthDev) -> None:
    dev.promiscuous = False


def set_allmulticast(dev: EthDev) -> None:
    dev.allmulticast = True


def set_mc_addr_list(dev: EthDev) -> None:
    dev.mc_addr_list = ["01:00:5e:00:00:01"]


def add_and_remove(dev: EthDev) -> None:
    if dev.state not in (CLOSED, INHERITED):
        dev.mac_addr_add("02:00:00:00:00:03")
    dev.mac_addr_remove("02:00:00:00:00:03")


METHODS: dict[str, tuple[Callable[[EthDev, Mempool], object], set[str]]] = {
    "configure": (lambda dev, pool: dev.configure(1, 1), IDLE | {UNCONFIGURED}),
    "rx_queue_setup": (lambda dev, pool: dev.rx_queue_setup(0, 8, pool), IDLE),
    "tx_queue_setup": (lambda dev, pool: dev.tx_queue_setup(0, 8), IDLE),
    "start": (lambda dev, pool: dev.start(), READY),
    "stop": (lambda dev, pool: dev.stop(), {STARTED, STOPPED}),
    "close": (lambda dev, pool: dev.close(), set(STATES)),
    "rx_queue": (lambda dev, pool: dev.rx_queue(0), READY),
    "tx_queue": (lambda dev, pool: dev.tx_queue(0), READY),
    "pool": (lambda dev, pool: dev.pool, READY),
    "info": (lambda dev, pool: dev.info(), ALIVE),
    "ifname": (lambda dev, pool: dev.ifname, ALIVE),
    "link": (lambda dev, pool: dev.link(), ALIVE),
    "set_link_up": (lambda dev, pool: dev.set_link_up(), ALIVE),
    "set_link_down": (lambda dev, pool: dev.set_link_down(), ALIVE),
    "mac": (lambda dev, pool: dev.mac, ALIVE),
    "set mac": (lambda dev, pool: set_mac(dev), ALIVE),
    "app_mac": (lambda dev, pool: dev.app_mac, ALIVE),
    "set app_mac": (lambda dev, pool: set_app_mac(dev), ALIVE),
    "mtu": (lambda dev, pool: dev.mtu, ALIVE),
    "set mtu": (lambda dev, pool: set_mtu(dev), ALIVE),
    "stats": (lambda dev, pool: dev.stats(), ALIVE),
    "stats_reset": (lambda dev, pool: dev.stats_reset(), ALIVE),
    "xstats": (lambda dev, pool: dev.xstats(), ALIVE),
    "xstats_names": (lambda dev, pool: dev.xstats_names(), ALIVE),
    "xstats_reset": (lambda dev, pool: dev.xstats_reset(), ALIVE),
    "promiscuous": (lambda dev, pool: dev.promiscuous, ALIVE),
    "set promiscuous": (lambda dev, pool: set_promiscuous(dev), ALIVE),
    "allmulticast": (lambda dev, pool: dev.allmulticast, ALIVE),
    "set allmulticast": (lambda dev, pool: set_allmulticast(dev), ALIVE),
    "mac_addrs": (lambda dev, pool: dev.mac_addrs, ALIVE),
    "mac_addr_add": (lambda dev, pool: dev.mac_addr_add("02:00:00:00:00:03"), ALIVE),
    "mac_addr_remove": (lambda dev, pool: add_and_remove(dev), ALIVE),
    "mc_addr_list": (lambda dev, pool: dev.mc_addr_list, ALIVE),
    "set mc_addr_list": (lambda dev, pool: set_mc_addr_list(dev), ALIVE),
    "rx_queue_release": (lambda dev, pool: dev.rx_queue_release(0), {CONFIGURED, STOPPED}),
    "tx_queue_release": (lambda dev, pool: dev.tx_queue_release(0), {CONFIGURED, STOPPED}),
    "rx_queue_start": (lambda dev, pool: dev.rx_queue_start(0), {STARTED}),
    "rx_queue_stop": (lambda dev, pool: dev.rx_queue_stop(0), {STARTED}),
    "tx_queue_start": (lambda dev, pool: dev.tx_queue_start(0), {STARTED}),
    "tx_queue_stop": (lambda dev, pool: dev.tx_queue_stop(0), {STARTED}),
    "rx_queue_intr_fd": (lambda dev, pool: dev.rx_queue_intr_fd(0), READY),
    "rx_queue_intr_enable": (lambda dev, pool: dev.rx_queue_intr_enable(0), READY),
    "rx_queue_intr_disable": (lambda dev, pool: dev.rx_queue_intr_disable(0), READY),
    "with": (lambda dev, pool: dev.__enter__(), ALIVE),
    "state": (lambda dev, pool: dev.state, set(STATES)),
    "repr": (lambda dev, pool: repr(dev), set(STATES)),
}


#: Not restricted to states, or tested on their own.
ELSEWHERE = {"name", "port_id", "rx_burst", "tx_burst", "recv", "send", "callback_register"}


def test_no_method_is_left_out() -> None:
    public = {name for name in dir(EthDev) if not name.startswith("_")}
    assert sorted(public - ELSEWHERE - {name.removeprefix("set ") for name in METHODS}) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("state", STATES)
def test_every_method_in_every_state(dev: EthDev, pool: Mempool, state: str, method: str) -> None:
    bring(dev, state, pool)
    shown = "configured" if state == MISSING else state
    assert dev.state == shown
    ops_of(dev).take()
    call, legal = METHODS[method]
    if state in legal:
        call(dev, pool)
        return
    name = method.removeprefix("set ")
    if state == MISSING and name in ("rx_queue", "tx_queue"):
        with pytest.raises(ValueError, match="queue 0 is not set up"):
            call(dev, pool)
        return
    start = f"{name}: device fake0"
    if state == MISSING and ("intr" in name or "release" in name):
        start, shown = f"{name}: queue 0 of device fake0", "is not set up"
    with pytest.raises(DeviceStateError, match=f"^{start}") as caught:
        call(dev, pool)
    assert isinstance(caught.value, RuntimeError)
    if state == MISSING and name in ("start", "pool"):
        shown = "needs rx_queue_setup for queue 0"
    if state == STARTED and name.endswith(("queue_setup", "queue_release")):
        shown = f"{name[:2]} queue 0 is running, call {name[:2]}_queue_stop(0) first"
    said = {CLOSED: "is closed", INHERITED: "before fork"}.get(state, shown)
    assert said in str(caught.value)
    assert ops_of(dev).take() == []


@pytest.mark.parametrize("state", [s for s in STATES if s not in READY])
def test_bursts_in_other_states(dev: EthDev, pool: Mempool, state: str) -> None:
    bring(dev, state, pool)
    for name, call in (
        ("rx_burst", lambda: dev.rx_burst(0)),
        ("tx_burst", lambda: dev.tx_burst(0, Burst())),
        ("send", lambda: dev.send(b"x" * 60)),
        ("rx_burst", lambda: dev.recv(0)),
    ):
        with pytest.raises(DeviceStateError, match=f"^{name}: device fake0"):
            call()


def test_a_life(dev: EthDev, pool: Mempool) -> None:
    ops = ops_of(dev)
    dev.configure(2, 3)
    for q in range(2):
        dev.rx_queue_setup(q, 8, pool)
    for q in range(3):
        dev.tx_queue_setup(q, 16)
    dev.start()
    dev.start()
    dev.stop()
    dev.stop()
    dev.start()
    dev.stop()
    dev.rx_queue_setup(1, 4, pool)
    dev.tx_queue_setup(2, 4)
    dev.configure(1, 1)
    dev.close()
    dev.close()
    assert ops.take() == [
        "dev_configure(2, 3)",
        *(f"rx_queue_setup({q}, 8)" for q in range(2)),
        *(f"tx_queue_setup({q}, 16)" for q in range(3)),
        "dev_start",
        "dev_stop",
        "dev_start",
        "dev_stop",
        "rx_queue_release(1)",
        "rx_queue_setup(1, 4)",
        "tx_queue_release(2)",
        "tx_queue_setup(2, 4)",
        "dev_configure(1, 1)",
        "dev_close",
    ]


def test_start_names_the_queues_that_are_missing(dev: EthDev, pool: Mempool) -> None:
    dev.configure(4, 3)
    dev.rx_queue_setup(2, 8, pool)
    with pytest.raises(DeviceStateError, match=r"needs rx_queue_setup for queue 0, 1, 3$"):
        dev.start()
    for q in (0, 1, 3):
        dev.rx_queue_setup(q, 8, pool)
    dev.tx_queue_setup(1, 8)
    with pytest.raises(DeviceStateError, match=r"needs tx_queue_setup for queue 0, 2$"):
        dev.start()
    assert dev.state == "configured"
    assert "dev_start" not in ops_of(dev).calls


def test_configure_forgets_the_queues(dev: EthDev, pool: Mempool) -> None:
    bring(dev, STOPPED, pool)
    dev.configure(2, 2)
    with pytest.raises(DeviceStateError, match="queue 0, 1"):
        dev.start()
    with pytest.raises(DeviceStateError, match="needs rx_queue_setup for queue 0"):
        dev.pool  # noqa: B018
    with pytest.raises(ValueError, match="queue 0 is not set up"):
        dev.rx_queue(0)
    with pytest.raises(DeviceStateError, match="rx_burst"):
        dev.rx_burst(0)


def test_pool_stays_readable_after_close(dev: EthDev, pool: Mempool) -> None:
    bring(dev, STARTED, pool)
    dev.close()
    assert dev.pool is pool


def test_a_queue_that_could_not_be_set_up_anew_is_missing(dev: EthDev, pool: Mempool) -> None:
    bring(dev, STOPPED, pool)
    ops_of(dev).fail["rx_queue_setup"] = ValueError("too small")
    with pytest.raises(ValueError, match="too small"):
        dev.rx_queue_setup(0, 8, pool)
    with pytest.raises(DeviceStateError, match="needs rx_queue_setup for queue 0"):
        dev.pool  # noqa: B018
    with pytest.raises(DeviceStateError, match="needs rx_queue_setup for queue 0"):
        dev.start()
    dev.rx_queue_setup(0, 8, pool)
    dev.start()


# ---- drivers that fail


def test_a_refusal_by_the_driver_changes_nothing(dev: EthDev, pool: Mempool) -> None:
    bring(dev, STOPPED, pool)
    ops_of(dev).fail["dev_configure"] = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        dev.configure(2, 2)
    assert dev.state == "stopped"
    assert dev.info().nb_rx_queues == 1
    dev.start()
    assert len(dev.rx_burst(0)) == 0


def test_a_failure_of_the_driver_leaves_it_unconfigured(dev: EthDev, pool: Mempool) -> None:
    bring(dev, STOPPED, pool)
    ops_of(dev).fail["dev_configure"] = OSError(5, "broken")
    with pytest.raises(OSError, match="broken"):
        dev.configure(2, 2)
    assert dev.state == "unconfigured"
    assert dev.info().nb_rx_queues == 0
    bring(dev, STARTED, pool)


def test_a_start_that_fails(dev: EthDev, pool: Mempool) -> None:
    bring(dev, CONFIGURED, pool)
    ops_of(dev).fail["dev_start"] = OSError(5, "broken")
    with pytest.raises(OSError, match="broken"):
        dev.start()
    assert dev.state == "configured"
    dev.start()
    assert dev.state == "started"


def test_a_close_that_fails_still_frees_the_name(driver: None) -> None:
    dev = rtap.probe("fake0")
    ops_of(dev).fail["dev_close"] = OSError(5, "broken")
    with pytest.raises(OSError, match="broken"):
        dev.close()
    assert dev.state == "closed"
    rtap.probe("fake0").close()


def test_a_probe_that_fails_frees_the_name(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("__init__", "dev_infos_get"):
        with monkeypatch.context() as patch:
            closed: list[object] = []
            patch.setattr(FakeOps, "dev_close", lambda ops, closed=closed: closed.append(ops))

            def fail(*args: object) -> None:
                raise OSError(5, "broken")

            patch.setattr(FakeOps, name, fail)
            with pytest.raises(OSError, match="broken"):
                rtap.probe("fake0")
            assert len(closed) == (name == "dev_infos_get")
        assert rtap.devices() == []
        rtap.probe("fake0").close()


# ---- arguments


@pytest.mark.parametrize(
    ("counts", "error", "says"),
    [
        ((0, 1), ValueError, "nb_rx_queues must be 1 to 4, got 0"),
        ((1, 0), ValueError, "nb_tx_queues must be 1 to 8, got 0"),
        ((5, 5), ValueError, "nb_rx_queues must be 1 to 4, got 5"),
        ((4, 9), ValueError, "nb_tx_queues must be 1 to 8, got 9"),
        ((-1, 1), ValueError, "got -1"),
        (("1", 1), TypeError, "nb_rx_queues must be an int, got str"),
        ((1, 1.0), TypeError, "nb_tx_queues must be an int, got float"),
        ((True, 1), TypeError, "got bool"),
        ((None, 1), TypeError, "got NoneType"),
    ],
)
def test_queue_counts(
    dev: EthDev, counts: tuple[Any, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        dev.configure(*counts)
    assert dev.state == "unconfigured"
    assert ops_of(dev).take() == []


@pytest.mark.parametrize(
    ("conf", "says"),
    [
        (
            EthConf(rx_offloads=RxOffload.VLAN_STRIP),
            "rx_offloads: this device cannot do VLAN_STRIP",
        ),
        (
            EthConf(rx_offloads=RxOffload.TCP_CKSUM | RxOffload.TCP_LRO | RxOffload.SCATTER),
            "cannot do TCP_LRO, SCATTER; it can do IPV4_CKSUM, UDP_CKSUM, TCP_CKSUM",
        ),
        (EthConf(rx_offloads=RxOffload(1 << 40)), "cannot do 0x10000000000"),
        (EthConf(tx_offloads=TxOffload.TCP_TSO), "cannot do TCP_TSO; it can do none"),
        (EthConf(mtu=99), "mtu must be 100 to 2000, got 99"),
        (EthConf(mtu=2001), "got 2001"),
    ],
)
def test_conf_the_device_cannot_do(dev: EthDev, conf: EthConf, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        dev.configure(1, 1, conf)
    assert dev.state == "unconfigured"
    assert ops_of(dev).take() == []


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"engine": "fast"}, ValueError, "engine must be one of auto, uring, syscall, got 'fast'"),
        ({"engine": None}, ValueError, "got None"),
        ({"gil": "keep"}, ValueError, "gil must be one of auto, release, hold, got 'keep'"),
        ({"rx_offloads": TxOffload.TCP_TSO}, TypeError, "RxOffload"),
        ({"tx_offloads": RxOffload.TCP_LRO}, TypeError, "TxOffload"),
        ({"tx_offloads": MbufFlag.TX_TCP_SEG}, TypeError, "TxOffload"),
        ({"rx_offloads": "TCP_LRO"}, TypeError, "str"),
        ({"rx_offloads": -1}, ValueError, "-1"),
    ],
)
def test_conf_that_is_none(fields: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        EthConf(**fields)


@pytest.mark.parametrize("conf", [5, "x", {"mtu": 1500}])
def test_conf_of_another_type(dev: EthDev, conf: Any) -> None:
    with pytest.raises(TypeError, match=f"conf must be an EthConf, got {type(conf).__name__}"):
        dev.configure(1, 1, conf)


@pytest.mark.parametrize("mtu", ["1500", 1500.0, True])
def test_mtu_of_another_type(dev: EthDev, mtu: Any) -> None:
    with pytest.raises(TypeError, match="mtu must be an int"):
        dev.mtu = mtu
    with pytest.raises(TypeError, match="mtu must be an int"):
        dev.configure(1, 1, EthConf(mtu=mtu))


@pytest.mark.parametrize("mtu", [99, 2001, -1])
def test_mtu_out_of_range(dev: EthDev, mtu: int) -> None:
    with pytest.raises(ValueError, match=f"mtu must be 100 to 2000, got {mtu}"):
        dev.mtu = mtu
    assert ops_of(dev).take() == []


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((1, 8), ValueError, "queue must be 0 to 0, got 1"),
        ((-1, 8), ValueError, "got -1"),
        (("0", 8), TypeError, "queue must be an int"),
        ((0, 0), ValueError, "nb_desc must be"),
        ((0, 33), ValueError, "nb_desc must be"),
        ((0, None), TypeError, "nb_desc must be an int"),
    ],
)
def test_queue_setup_arguments(
    dev: EthDev, pool: Mempool, args: tuple[Any, Any], error: type[Exception], says: str
) -> None:
    dev.configure(1, 1)
    with pytest.raises(error, match=says):
        dev.rx_queue_setup(*args, pool)
    with pytest.raises(error, match=says):
        dev.tx_queue_setup(*args)


def test_descriptor_limits_are_the_queues_own(dev: EthDev, pool: Mempool) -> None:
    dev.configure(1, 1)
    with pytest.raises(ValueError, match="nb_desc must be 2 to 32, got 1"):
        dev.rx_queue_setup(0, 1, pool)
    with pytest.raises(ValueError, match="nb_desc must be 1 to 16, got 17"):
        dev.tx_queue_setup(0, 17)
    dev.rx_queue_setup(0, 32, pool)
    dev.tx_queue_setup(0, 1)


@pytest.mark.parametrize("pool", [None, 5, "pool", b""])
def test_pool_of_another_type(dev: EthDev, pool: Any) -> None:
    dev.configure(1, 1)
    with pytest.raises(TypeError, match=f"pool must be a Mempool, got {type(pool).__name__}"):
        dev.rx_queue_setup(0, 8, pool)


@pytest.mark.parametrize("queue", [1, -1, 2**70])
def test_bursts_on_a_queue_that_is_not_there(dev: EthDev, pool: Mempool, queue: int) -> None:
    bring(dev, STARTED, pool)
    for call in (
        lambda: dev.rx_burst(queue),
        lambda: dev.tx_burst(queue, Burst()),
        lambda: dev.send(b"x", queue),
        lambda: dev.recv(0, queue),
    ):
        with pytest.raises(ValueError, match=f"queue must be 0 to 0, got {queue}"):
            call()
    with pytest.raises(ValueError, match="is not set up"):
        dev.rx_queue(queue)
    with pytest.raises(ValueError, match="is not set up"):
        dev.tx_queue(queue)


@pytest.mark.parametrize("queue", ["0", None, [0], 0.5])
def test_queue_of_another_type(dev: EthDev, pool: Mempool, queue: Any) -> None:
    bring(dev, STARTED, pool)
    for call in (
        lambda: dev.rx_burst(queue),
        lambda: dev.tx_burst(queue, Burst()),
        lambda: dev.send(b"x", queue),
        lambda: dev.recv(0, queue),
    ):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize(
    "mac", ["01:00:00:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", bytes(6)]
)
def test_only_unicast_addresses(dev: EthDev, mac: str) -> None:
    with pytest.raises(ValueError, match=r"^mac must be a unicast address, got"):
        dev.mac = mac
    with pytest.raises(ValueError, match=r"^app_mac must be a unicast address, got"):
        dev.app_mac = mac
    assert ops_of(dev).take() == []


@pytest.mark.parametrize(("mac", "error"), [("x", ValueError), (b"12", ValueError), (5, TypeError)])
def test_no_address_at_all(dev: EthDev, mac: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        dev.mac = mac
    with pytest.raises(error):
        dev.app_mac = mac


def test_app_mac_follows_mac_until_it_is_assigned(dev: EthDev) -> None:
    assert dev.app_mac == dev.mac.peer() != dev.mac
    dev.mac = b"\x02\0\0\0\0\x09"
    assert dev.mac == "02:00:00:00:00:09"
    assert dev.app_mac == dev.mac.peer()
    dev.app_mac = "02-00-00-00-00-77"
    dev.mac = "02:00:00:00:00:0a"
    assert dev.app_mac == "02:00:00:00:00:77"
    assert ops_of(dev).take() == [
        "mac_addr_set(02:00:00:00:00:09)",
        "mac_addr_set(02:00:00:00:00:0a)",
    ]


def test_info_has_what_the_layer_knows(dev: EthDev, pool: Mempool) -> None:
    info = dev.info()
    assert (info.name, info.state, info.nb_rx_queues, info.engine) == (
        "fake0",
        "unconfigured",
        0,
        "auto",
    )
    dev.configure(1, 2)
    assert dev.info().engine == "auto"
    dev.rx_queue_setup(0, 8, pool)
    info = dev.info()
    assert (info.state, info.nb_rx_queues, info.nb_tx_queues) == ("configured", 1, 2)
    assert (info.engine, info.engine_reason) == ("fake", "there is no other")
    assert info.driver_name == "fake"
    with pytest.raises(AttributeError):
        info.mtu = 5  # type: ignore[misc]


# ---- made, collected, copied


def test_made_by_open_and_probe_only(dev: EthDev) -> None:
    with pytest.raises(TypeError, match=r"rtap.open\(\) or rtap.probe\(\)"):
        EthDev()
    with pytest.raises(AttributeError):
        dev.colour = 5  # type: ignore[attr-defined]


def test_repr(dev: EthDev) -> None:
    assert repr(dev) == "<rtap.EthDev fake0 (fake0) unconfigured>"
    dev.close()
    assert repr(dev) == "<rtap.EthDev fake0 closed>"


def test_forgotten_devices_are_closed_with_a_warning(driver: None) -> None:
    held = [rtap.probe("fake0")]
    ops = ops_of(held[0])
    with pytest.warns(ResourceWarning, match="unclosed device <rtap.EthDev fake0"):
        held.clear()
    gc.collect()
    assert ops.take() == ["dev_close"]
    assert rtap.devices() == []


def test_context_manager_closes_on_errors(driver: None) -> None:
    with contextlib.suppress(KeyError), rtap.probe("fake0") as dev:
        raise KeyError
    assert dev.state == "closed"


# ---- registry


def test_names_and_ports(driver: None) -> None:
    with rtap.probe("fake0") as a, rtap.probe("fake1") as b, rtap.probe("phony0") as c:
        assert rtap.device("fake0") is a
        assert rtap.device("phony0") is c
        assert {d.name for d in rtap.devices()} == {"fake0", "fake1", "phony0"}
        assert [d.port_id for d in (a, b, c)] == [0, 1, 2]
        b.close()
        with pytest.raises(KeyError, match=r"no device 'fake1'; open devices: fake0, phony0"):
            rtap.device("fake1")
        with rtap.probe("fake_again") as d:
            assert d.port_id == 1
    assert rtap.devices() == []
    with pytest.raises(KeyError, match="open devices: none"):
        rtap.device("fake0")


def test_a_name_in_use(driver: None) -> None:
    with rtap.probe("fake0") as dev:
        with pytest.raises(ValueError, match=r"a device 'fake0' already: <rtap.EthDev fake0"):
            rtap.probe("fake0")
        assert rtap.device("fake0") is dev
        assert dev.state == "unconfigured"


def test_drivers_by_longest_prefix(driver: None) -> None:
    class Longer(FakeOps):
        ifname = "longer"

    registry.register_driver("fake_long", Longer)
    with rtap.probe("fake_lon") as a, rtap.probe("fake_long0") as b:
        assert (a.ifname, b.ifname) == ("fake0", "longer")
    assert registry.driver_names() == ["fake", "fake_long", "net_null", "net_rtap"]


@pytest.mark.parametrize("aliases", [("fake",), ("other", "phony")])
def test_a_driver_name_in_use(driver: None, aliases: tuple[str, ...]) -> None:
    before = dict(registry._drivers)
    with pytest.raises(ValueError, match="there is a driver for"):
        registry.register_driver("new", FakeOps, aliases=aliases)
    assert registry._drivers == before


def test_the_registry_keeps_nothing_open(driver: None) -> None:
    rtap.probe("fake0").close()
    assert registry._devices == {}
    assert registry._ports == {}


def test_many_threads_open_and_close(driver: None) -> None:
    failures: list[BaseException] = []
    ports: set[int] = set()

    def work(n: int) -> None:
        try:
            for _ in range(50):
                with rtap.probe(f"fake{n}") as dev:
                    ports.add(dev.port_id)
                    assert rtap.device(dev.name) is dev
                    rtap.devices()
        except BaseException as exc:  # noqa: BLE001 - shown below
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert ports <= set(range(8))
    assert rtap.devices() == []


def test_open_numbers_its_devices(netns: NetNS) -> None:
    with (
        rtap.open("a0", netns=netns) as a,
        rtap.open("b0", netns=netns) as b,
        netns.call(rtap.probe, "net_rtap2,iface=c0") as c,
    ):
        assert [dev.name for dev in (a, b, c)] == ["net_rtap0", "net_rtap1", "net_rtap2"]
        assert [dev.port_id for dev in (a, b, c)] == [0, 1, 2]
        a.close()
        with rtap.open("d0", netns=netns) as d:
            assert (d.name, d.port_id) == ("net_rtap0", 0)
            d.send(frame())
            assert {dev.name for dev in rtap.devices()} == {"net_rtap0", "net_rtap1", "net_rtap2"}


def test_mbufs_carry_their_port(netns: NetNS) -> None:
    with (
        rtap.open("a0", netns=netns),
        rtap.open("b0", netns=netns) as b,
    ):
        talk(netns, b, b"hello")
        (mbuf,) = b.rx_burst(0, 1, 5)
        assert mbuf.port == b.port_id == 1


# ---- a real device


def test_real_states(netns: NetNS, engine: str) -> None:
    conf = EthConf(engine=engine)
    with Mempool(512) as pool, netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        assert (dev.state, links(netns)) == ("unconfigured", ["lo", "t0"])
        dev.configure(2, 2, conf)
        assert dev.info().engine == engine
        for q in range(2):
            dev.rx_queue_setup(q, 64, pool)
            dev.tx_queue_setup(q, 64)
        with pytest.raises(DeviceStateError, match="not started"):
            dev.rx_burst(0)
        with pytest.raises(DeviceStateError, match="not started"):
            dev.send(frame())
        for n in range(1, 4):
            dev.start()
            assert dev.link().link_status
            assert dev.send(frame(), queue=1)
            assert dev.tx_burst(0, pool.alloc_burst(3, frame())) == 3
            assert dev.stats().q_opackets == [3 * n, n]
            assert dev.rx_burst(1) is not None
            dev.stop()
            assert not dev.link().link_status
            for call in (
                lambda: dev.rx_burst(0),
                lambda: dev.tx_burst(0, Burst()),
                lambda: dev.recv(0),
                lambda: dev.send(frame()),
            ):
                with pytest.raises(DeviceStateError, match="not started"):
                    call()
        assert settle(pool) == 0
        dev.configure(1, 1, conf)
        assert dev.info().nb_rx_queues == 1
        dev.rx_queue_setup(0, 1, pool)
        dev.tx_queue_setup(0, 1)
        dev.start()
        assert dev.send(frame())
        assert dev.stats().q_opackets == [1]
    assert links(netns) == ["lo"]


def queues(ns: NetNS, ifname: str) -> int:
    found: int = link(ns, ifname)["linkinfo"]["info_data"]["numqueues"]
    return found


def test_queues_taken_away_and_added(netns: NetNS, engine: str) -> None:
    before = fds()
    with Mempool(2048) as pool, netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        ip(netns, "addr", "add", "10.0.0.1/24", "dev", "t0")
        for n in (4, 2, 6, 1, 128, 3):
            dev.configure(n, n, EthConf(engine=engine))
            for q in range(n):
                dev.rx_queue_setup(q, 64, pool)
                dev.tx_queue_setup(q, 64)
            dev.start()
            assert queues(netns, "t0") == n == dev.info().nb_rx_queues
            for q in range(n):
                assert dev.tx_burst(q, pool.alloc_burst(2, frame(q))) == 2
                assert len(dev.rx_burst(q)) == 0
            stats = dev.stats()
            assert stats.q_opackets == [2] * n
            assert stats.opackets == 2 * n
            assert len(stats.q_ipackets) == len(stats.q_errors) == n
            dev.stop()
        assert "10.0.0.1" in ip(netns, "addr", "show", "dev", "t0")
    gc.collect()
    # The ring of this thread stays for the next device.
    assert fds() <= before + 1


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((1, 2), "nb_rx_queues and nb_tx_queues must be equal, got 1 and 2"),
        ((128, 127), "got 128 and 127"),
        ((129, 129), "nb_rx_queues must be 1 to 128, got 129"),
        ((128, 129), "nb_tx_queues must be 1 to 128, got 129"),
        ((0, 0), "nb_rx_queues must be 1 to 128, got 0"),
    ],
)
def test_real_queue_counts_refused(netns: NetNS, counts: tuple[int, int], says: str) -> None:
    with Mempool(64) as pool, netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        bring(dev, STOPPED, pool)
        with pytest.raises(ValueError, match=re.escape(says)):
            dev.configure(*counts)
        assert dev.state == "stopped"
        assert queues(netns, "t0") == 1
        dev.start()
        assert dev.send(frame())


@pytest.mark.parametrize(
    ("offloads", "says"),
    [
        (RxOffload.VLAN_STRIP, "cannot do VLAN_STRIP"),
        (RxOffload.CHECKSUM | RxOffload.RSS_HASH | RxOffload.KEEP_CRC, "KEEP_CRC, RSS_HASH"),
        (RxOffload(1 << 50), hex(1 << 50)),
        (RxOffload.TCP_LRO, "TCP_LRO needs TCP_CKSUM too"),
        (RxOffload.TCP_LRO | RxOffload.UDP_CKSUM, "TCP_LRO needs TCP_CKSUM too"),
        (RxOffload.UDP_LRO | RxOffload.TCP_CKSUM, "UDP_LRO needs UDP_CKSUM too"),
    ],
)
def test_real_rx_offloads_refused(netns: NetNS, offloads: RxOffload, says: str) -> None:
    with netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        with pytest.raises(ValueError, match=says):
            dev.configure(1, 1, EthConf(rx_offloads=offloads))
        assert dev.state == "unconfigured"
    with pytest.raises(ValueError, match=says):
        rtap.open("t0", netns=netns, rx_offloads=offloads)
    assert links(netns) == ["lo"]


@pytest.mark.parametrize(
    ("offloads", "says"),
    [
        (TxOffload.SCTP_CKSUM, "tx_offloads: this device cannot do SCTP_CKSUM"),
        (TxOffload.TCP_TSO | TxOffload.VXLAN_TNL_TSO, "cannot do VXLAN_TNL_TSO"),
        (TxOffload(1 << 60), hex(1 << 60)),
    ],
)
def test_real_tx_offloads_refused(netns: NetNS, offloads: TxOffload, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rtap.open("t0", netns=netns, tx_offloads=offloads)
    assert links(netns) == ["lo"]


def test_everything_it_says_it_can_do_it_does(netns: NetNS) -> None:
    with rtap.open("t0", netns=netns) as dev:
        info = dev.info()
    with rtap.open(
        "t0", netns=netns, rx_offloads=info.rx_offload_capa, tx_offloads=info.tx_offload_capa
    ) as dev:
        assert dev.info().rx_offloads == info.rx_offload_capa
        assert dev.info().tx_offloads == info.tx_offload_capa
        assert dev.send(frame())


@pytest.mark.parametrize(
    ("mtu", "offloads", "room"),
    [
        (1500, 0, 1500 + 22 + 1),
        (9000, 0, 9000 + 22 + 1),
        (68, 0, 68 + 22 + 1),
        (1500, int(RxOffload.TCP_CKSUM | RxOffload.TCP_LRO), 65535 + 40 + 22 + 1),
    ],
)
def test_data_room_names_what_it_has_to_be(
    netns: NetNS, mtu: int, offloads: int, room: int
) -> None:
    conf = EthConf(rx_offloads=RxOffload(offloads), mtu=mtu)
    with (
        Mempool(8, room) as enough,
        Mempool(8, room - 1) as short,
        netns.call(rtap.probe, "net_rtap0,iface=t0") as dev,
    ):
        dev.configure(1, 1, conf)
        with pytest.raises(
            ValueError, match=rf"data_room of at least {room}, the pool's is {room - 1}"
        ):
            dev.rx_queue_setup(0, 64, short)
        dev.rx_queue_setup(0, 64, enough)
        assert dev.pool is enough
        dev.configure(1, 1, EthConf(conf.rx_offloads | RxOffload.SCATTER, mtu=mtu))
        dev.rx_queue_setup(0, 64, short)


def test_mtu_that_the_buffers_cannot_take(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2, data_room=2048) as dev:
        with pytest.raises(ValueError, match=r"MTU of 9000 needs .* at least 9023, .* is 2048"):
            dev.mtu = 9000
        assert dev.mtu == link(netns, "t0")["mtu"] == 1500
        dev.mtu = 2048 - 22 - 1
        assert link(netns, "t0")["mtu"] == 2025
        with pytest.raises(ValueError, match="2049"):
            dev.mtu = 2026
    with rtap.open("t0", netns=netns, mtu=9000) as dev:
        assert (dev.mtu, dev.pool.data_room) == (9000, 9023)
        for mtu in (68, 1500, 9000):
            dev.mtu = mtu
            assert link(netns, "t0")["mtu"] == mtu
    for mtu, scatter in ((65521, 0), (65521, int(RxOffload.SCATTER))):
        with rtap.open("t0", netns=netns, mtu=mtu, rx_offloads=scatter) as dev:
            assert dev.mtu == mtu
            assert dev.pool.data_room == (2048 if scatter else 65521 + 23)


@pytest.mark.parametrize("mtu", [67, 65522, 0, -5])
def test_mtu_limits(netns: NetNS, mtu: int) -> None:
    with pytest.raises(ValueError, match=f"mtu must be 68 to 65521, got {mtu}"):
        rtap.open("t0", netns=netns, mtu=mtu)
    assert links(netns) == ["lo"]
    with rtap.open("t0", netns=netns) as dev, pytest.raises(ValueError, match="68 to 65521"):
        dev.mtu = mtu


def test_mac(netns: NetNS) -> None:
    with rtap.open("t0", netns=netns, mac="02-00-00-00-00-33") as dev:
        assert dev.mac == link(netns, "t0")["address"] == "02:00:00:00:00:33"
        assert dev.app_mac == "82:00:00:00:00:33"
        dev.mac = bytes.fromhex("02000000ff01")
        assert link(netns, "t0")["address"] == "02:00:00:00:ff:01"
        ip(netns, "link", "set", "dev", "t0", "address", "02:00:00:00:00:44")
        assert dev.mac == dev.info().mac == "02:00:00:00:00:44"


# ---- stopping


def test_stop_ends_waits_in_other_threads(netns: NetNS, engine: str) -> None:
    ends: list[BaseException] = []
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev:

        def wait(queue: int) -> None:
            try:
                dev.rx_burst(queue, 64, None)
            except BaseException as exc:  # noqa: BLE001 - looked at below
                ends.append(exc)

        for end in (dev.stop, dev.close):
            ends.clear()
            threads = [threading.Thread(target=wait, args=(q,)) for q in range(2)]
            for thread in threads:
                thread.start()
            for q in range(2):
                eventually(lambda q=q: busy(dev, q), "the other thread waits")  # type: ignore[misc]
            end()
            for thread in threads:
                thread.join(10)
                assert not thread.is_alive()
            assert [type(exc) for exc in ends] == [DeviceStateError] * 2
            if dev.state == "stopped":
                dev.start()


def busy(dev: EthDev, queue: int) -> bool:
    try:
        dev.rx_burst(queue)
    except DeviceStateError as exc:
        return "in use by another thread" in str(exc)
    return False


def test_control_from_many_threads(netns: NetNS) -> None:
    failures: list[BaseException] = []
    with rtap.open("t0", netns=netns) as dev:

        def work(n: int) -> None:
            try:
                for i in range(15):
                    dev.mtu = 1400 + n
                    dev.link(), dev.stats(), dev.info()
                    dev.set_link_down() if i % 2 else dev.set_link_up()
                    if n == 0:
                        dev.stop()
                        dev.start()
            except BaseException as exc:  # noqa: BLE001 - shown below
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert 1400 <= dev.mtu < 1406
    assert links(netns) == ["lo"]


# ---- after fork


def test_a_forked_child_cannot_use_the_device_but_can_open_its_own(netns: NetNS) -> None:
    done = python(
        """
        import os, sys, traceback, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        import rtap
        dev = rtap.open("t0", netns=sys.argv[1])
        read, write = os.pipe()
        again, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                said = []
                for call in (
                    lambda: dev.rx_burst(0), lambda: dev.send(bytes(60)), lambda: dev.mtu,
                    lambda: dev.info(), lambda: dev.stats(), lambda: dev.stop(),
                    lambda: dev.configure(1, 1), lambda: dev.__enter__(),
                ):
                    try:
                        call()
                        said.append("nothing")
                    except rtap.DeviceStateError as exc:
                        said.append("ok" if "fork" in str(exc) else str(exc))
                dev.close()
                assert rtap.devices() == []
                assert repr(dev).endswith("inherited>"), repr(dev)
                with rtap.NetNS() as ns, rtap.open("t0", netns=ns) as own:
                    assert own.name == "net_rtap0"
                    assert own.send(bytes(60))
                    own.rx_burst(0)
                os.write(write, " ".join(said).encode())
                os.read(again, 1)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(write)
        print(os.read(read, 999).decode())
        assert dev.send(bytes(60)) and dev.stats().opackets == 1
        dev.close()                     # while the child lives
        with rtap.NetNS.from_name(sys.argv[1]) as ns:
            print(ns.run(["ip", "-br", "link"], capture_output=True, text=True).stdout.split()[::4])
        os.write(go, b"x")
        print(os.waitpid(pid, 0)[1])
        """,
        netns.path,
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.split() == ["ok"] * 8
    assert rest == ["['lo']", "0"]
    assert done.stderr == ""
    assert os.getpid()
