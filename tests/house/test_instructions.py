# SPDX-License-Identifier: BSD-3-Clause
"""Counting frames costs no more callgrind instructions than bench/baseline.json allows."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASELINE: dict[str, Any] = json.loads((ROOT / "bench" / "baseline.json").read_text())
HELD: dict[str, float] = BASELINE["instructions"]


@pytest.fixture(scope="module")
def instructions() -> ModuleType:
    """The benchmark module."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module("bench.instructions")


@pytest.mark.slow
def test_no_more_than_the_baseline(instructions: ModuleType) -> None:
    """The measurement is exact, whatever else the machine does."""
    if os.environ.get("RTAP_TEST_BUILD"):
        pytest.skip("the baseline is the release build's")
    if platform.machine() != BASELINE["machine"]:
        pytest.skip(f"the baseline is of {BASELINE['machine']}")
    if instructions.unavailable():
        pytest.skip(instructions.unavailable())
    figures = instructions.measure()
    assert figures.keys() == HELD.keys()
    assert instructions.excess(figures, BASELINE) == [], f"compiled by {instructions.compiler()}"


@pytest.mark.parametrize(("compiler", "allowed"), [("gcc 12", 0.03), ("clang 19", 0.2)])
def test_what_is_too_much(
    instructions: ModuleType, monkeypatch: pytest.MonkeyPatch, compiler: str, allowed: float
) -> None:
    monkeypatch.setattr(instructions, "compiler", lambda: compiler)
    assert instructions.excess(HELD, BASELINE) == []
    for name, held in HELD.items():
        near = HELD | {name: held * (1 + allowed) - 0.01}
        assert instructions.excess(near, BASELINE) == []
        (complaint,) = instructions.excess(HELD | {name: held * (1 + allowed) + 0.01}, BASELINE)
        assert complaint.startswith(f"{name}: ")


def test_cost_of_a_function_in_a_report(instructions: ModuleType) -> None:
    """The cost covers the function's lines and its callees, from any file, and nothing else."""
    report = """\
# callgrind format
summary: 1111

fl=a.c
fn=caller
1 1
cfn=callee
calls=3 7
2 1110

fn=callee
7 10
fi=b.h
3 200
fe=a.c
cfn=leaf
calls=4 9
8 300
9 400

fn=leaf
9 300
"""
    assert instructions.cost_of(report, "callee") == 910
    assert instructions.cost_of(report, "nobody") == 0
    assert instructions.summary(report) == 1111
