# SPDX-License-Identifier: BSD-3-Clause
"""Short runs of the wire fuzzer, and faults that it must find. ``make fuzz`` sends millions."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import skip_without_devices, skip_without_engine

from rtap import Burst, EthDev, NetNS

pytestmark = [pytest.mark.root]

TOOLS = Path(__file__).resolve().parents[2] / "tools"
#: Runs with a worker or bursts from Python, with TAP or TUN, and with a stop in the middle.
SEEDS = (1, 2, 8, 11)


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """The fuzzer's modules, set to runs of some hundred frames."""
    skip_without_devices()
    skip_without_engine("uring")
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    run = importlib.import_module("wire_run")
    monkeypatch.setattr(run, "FRAMES", 600)
    monkeypatch.setattr(run, "VOLLEYS", 24)
    monkeypatch.setattr(run, "VOLLEY", 48)
    return importlib.import_module


@pytest.fixture
def ns(fuzz: Callable[[str], ModuleType]) -> Iterator[NetNS]:
    with fuzz("fuzz_wire").quiet() as made:
        yield made


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_found(fuzz: Callable[[str], ModuleType], ns: NetNS, seed: int) -> None:
    assert fuzz("fuzz_wire").one(seed, ns) > 0


def bursts(fuzz: Callable[[str], ModuleType]) -> Any:
    """A plain plan: bursts from Python, from one device to another."""
    plan = fuzz("wire_plan").Plan(1)
    plain: dict[str, Any] = {"nb_mbufs": None, "txqueuelen": 1000, "tx_gro": False, "rx_gso": False}
    plan.mode, plan.worker, plan.untouched, plan.asked, plan.event = "tap", False, True, False, ""
    plan.queues = plan.targets = 1
    plan.hostile, plan.vnet, plan.narrow, plan.back, plan.filtered = 0.0, False, False, False, 0
    plan.mtu, plan.a, plan.b = 1500, dict(plain), plain | {"sndbuf": None}
    return plan


def found(fuzz: Callable[[str], ModuleType], ns: NetNS, plan: Any) -> None:
    run = fuzz("wire_run").Run(plan, ns)
    try:
        run.go()
        run.check()
    finally:
        run.close()


def test_such_a_plan_finds_nothing(fuzz: Callable[[str], ModuleType], ns: NetNS) -> None:
    found(fuzz, ns, bursts(fuzz))


def test_a_frame_in_no_counter_is_seen(
    fuzz: Callable[[str], ModuleType], ns: NetNS, monkeypatch: pytest.MonkeyPatch
) -> None:
    balance, run = fuzz("wire_balance"), fuzz("wire_run")

    def one_less(queues: Any) -> Any:
        made = balance.merge(queues)
        if "purged_packets" in made and made["packets"]:
            made["packets"] -= 1
        return made

    monkeypatch.setattr(run, "merge", one_less)
    with pytest.raises(AssertionError, match="read from the kernel = received"):
        found(fuzz, ns, bursts(fuzz))


def test_a_frame_that_was_not_sent_is_seen(
    fuzz: Callable[[str], ModuleType], ns: NetNS, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = EthDev.tx_burst
    lost = []

    def loses_one(self: EthDev, queue: int, burst: Burst) -> int:
        if len(burst) and not lost:
            lost.append(burst[0])
            rest = burst[1:]
            burst.free()
            return 1 + right(self, queue, rest)
        return right(self, queue, burst)

    monkeypatch.setattr(EthDev, "tx_burst", loses_one)
    with pytest.raises(AssertionError, match="frames were taken"):
        found(fuzz, ns, bursts(fuzz))
    lost.clear()


@pytest.mark.parametrize("at", [-1, 24])
def test_other_bytes_are_seen(
    fuzz: Callable[[str], ModuleType], ns: NetNS, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """One bit of a payload or of a header's checksum changes."""
    run = fuzz("wire_run")

    def handle(self: Any, burst: Burst, _end: Any) -> None:
        for mbuf in burst:
            if mbuf.pkt_len > 200:
                where = at % mbuf.pkt_len
                mbuf[where] = mbuf[where] ^ 1
        self.send(burst, self.ends[1])

    monkeypatch.setattr(run.Run, "handle", handle)
    with pytest.raises(
        AssertionError, match=r"other bytes|wrong .*checksum|nobody sent|came 1 times"
    ):
        found(fuzz, ns, bursts(fuzz))


def test_a_lost_slot_is_seen(fuzz: Callable[[str], ModuleType], ns: NetNS) -> None:
    run = fuzz("wire_run").Run(bursts(fuzz), ns)
    kept = run.tx_pool.alloc(b"kept")
    try:
        run.go()
        with pytest.raises(AssertionError, match="1 slots are lost"):
            run.check()
    finally:
        kept.free()
        run.close()


def test_a_death_is_told_with_its_seed(
    fuzz: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "dies.py"
    program.write_text("import os\nprint('7 600\\n8 ', end='', flush=True)\nos.abort()\n")
    fuzz_wire = fuzz("fuzz_wire")
    monkeypatch.setattr(fuzz_wire, "__file__", os.fspath(program))
    runs, frames, text = fuzz_wire.batch(7, 3)
    assert (runs, frames) == (1, 600)
    assert text.startswith("seed 8: exit -6")
    assert text.endswith("--seed 8 --runs 1")
