# SPDX-License-Identifier: BSD-3-Clause
"""The generic device layer: states, failing drivers, lifetime of devices."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections.abc import Callable

import pytest
from fakes import (
    CLOSED,
    CONFIGURED,
    INHERITED,
    MISSING,
    STARTED,
    STATES,
    STOPPED,
    UNCONFIGURED,
    FakeOps,
    bring,
    ops_of,
)

import rtap
from rtap import (
    Burst,
    DeviceStateError,
    EthDev,
    Mempool,
)

# ---- states


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
    "rx_queue_intr_disable": (lambda dev, pool: dev.rx_queue_intr_disable(0), {*READY, CLOSED}),
    "with": (lambda dev, pool: dev.__enter__(), ALIVE),
    "state": (lambda dev, pool: dev.state, set(STATES)),
    "repr": (lambda dev, pool: repr(dev), set(STATES)),
}


#: Calls that any state allows, or that have tests of their own.
ELSEWHERE = {
    *("name", "port_id", "rx_burst", "tx_burst", "recv", "send", "callback_register", "peers"),
}


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
        "rx_queue_setup(1, 4)",  # the driver replaces the old queue
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


@pytest.mark.parametrize("kind", ["rx", "tx"])
def test_what_a_stop_of_one_queue_left_undone_ends_with_the_device(
    dev: EthDev, pool: Mempool, kind: str
) -> None:
    """What an interrupted stop left undone is not done later to a queue that was started again."""
    ops = ops_of(dev)
    dev.configure(1, 1)
    dev.rx_queue_setup(0, 8, pool, deferred_start=True)
    dev.tx_queue_setup(0, 8, deferred_start=True)
    dev.start()
    getattr(dev, f"{kind}_queue_start")(0)
    ops.fail[f"{kind}_queue_stop"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        getattr(dev, f"{kind}_queue_stop")(0)
    dev.stop()
    dev.start()
    ops.take()
    getattr(dev, f"{kind}_queue_start")(0)
    assert ops.take() == [f"{kind}_queue_start(0)"]


@pytest.mark.parametrize("kind", ["rx", "tx"])
def test_a_queue_that_could_not_be_set_up_anew_is_the_old_one(
    dev: EthDev, pool: Mempool, kind: str
) -> None:
    bring(dev, STOPPED, pool)
    before = dev.rx_queue(0), dev.tx_queue(0)
    ops_of(dev).fail[f"{kind}_queue_setup"] = ValueError("too small")
    with pytest.raises(ValueError, match="too small"):
        dev.rx_queue_setup(0, 8, pool) if kind == "rx" else dev.tx_queue_setup(0, 8)
    assert (dev.rx_queue(0), dev.tx_queue(0)) == before
    assert dev.pool is pool
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


# ---- made, collected, copied


def test_made_by_open_and_probe_only(dev: EthDev) -> None:
    with pytest.raises(TypeError, match=r"rtap.open\(\) or rtap.probe\(\)"):
        EthDev()
    with pytest.raises(AttributeError):
        dev.colour = 5  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["name", "port_id"])
def test_name_and_number_are_its_own(dev: EthDev, name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(dev, name, 77)
    with pytest.raises(AttributeError):
        delattr(dev, name)
    dev.close()
    rtap.probe("fake0").close()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_device_has_one_owner(dev: EthDev, how: Callable[[EthDev], object]) -> None:
    with pytest.raises(TypeError, match=r"fake0.* cannot be copied or pickled"):
        how(dev)


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
