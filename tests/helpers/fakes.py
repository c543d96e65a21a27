# SPDX-License-Identifier: BSD-3-Clause
"""A driver that only records its calls, and devices of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

import rtap
from rtap import (
    Burst,
    DevInfo,
    EthConf,
    EthDev,
    Link,
    MacAddr,
    Mempool,
    RxOffload,
    Stats,
    TxOffload,
)
from rtap.ethdev import registry
from rtap.ethdev.devargs import DevArgs
from rtap.ethdev.events import Port
from rtap.ethdev.ops import DescLim, EthDevOps

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


class FakeOps(EthDevOps):
    """An ops table that records its calls; ``fail`` names one that raises."""

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


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver for devices called fake..."""
    monkeypatch.setattr(registry, "_drivers", dict(registry._drivers))
    rtap.register_driver("fake", FakeOps, aliases=("phony",))


@pytest.fixture
def dev(driver: None) -> Iterator[EthDev]:
    with rtap.probe("fake0") as dev:
        yield dev
    registry.release(dev.name, dev.port_id)  # also for a device that a test made look inherited


@pytest.fixture(scope="module")
def pool() -> Mempool:
    return Mempool(16)


def ops_of(dev: EthDev) -> FakeOps:
    ops: Any = dev._ops
    assert isinstance(ops, FakeOps)
    return ops


def bring(dev: EthDev, state: str, pool: Mempool) -> None:
    """Brings a fresh device with one queue pair to a state."""
    if state == "inherited":
        dev._in_child()
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
