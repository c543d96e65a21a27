# SPDX-License-Identifier: BSD-3-Clause
"""Short runs of the fuzzing harnesses: corpora replayed, and planted faults that must be found.

``make fuzz`` runs them on millions of new inputs.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """tools/fuzz.py."""
    if os.environ.get("RTAP_TEST_BUILD"):
        pytest.skip("the harness is over the C of the release build")
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    module = importlib.import_module("tools.fuzz")
    if module.unavailable("gcc"):
        pytest.skip(module.unavailable("gcc"))
    return module


def corpus(fuzz: ModuleType, target: str) -> list[bytes]:
    inputs = list(fuzz.unpack(fuzz.TARGETS[target].corpus.read_bytes()))
    assert len(inputs) > (50 if target == "wire" else 100)
    return [*inputs, *fuzz.prefixes()] if target == "offload" else inputs


def test_the_corpus(fuzz: ModuleType) -> None:
    inputs = corpus(fuzz, "offload")
    assert {data[0] & 7 for data in inputs if data} >= set(range(7))


@pytest.mark.parametrize("target", ["offload", "frames", "wire"])
def test_every_input_is_handled(fuzz: ModuleType, target: str) -> None:
    inputs = corpus(fuzz, target)
    done = fuzz.replay(fuzz.build_replay(), fuzz.TARGETS[target], inputs)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
    assert done.stdout == f"{len(inputs)} inputs\n".encode()


def planted(fuzz: ModuleType, name: str) -> str:
    """The report for a kernel with a planted fault, over the same inputs."""
    target = fuzz.TARGETS[name]
    done = fuzz.replay(fuzz.build_replay(target), target, corpus(fuzz, name))
    assert done.returncode != 0
    return done.stderr.decode(errors="replace")


def test_one_byte_too_far_is_seen(fuzz: ModuleType) -> None:
    """The parser gets a wrong bound."""
    report = planted(fuzz, "offload")
    assert "heap-buffer-overflow" in report
    assert "READ of size 1" in report
    assert "parse_l4" in report


def test_a_copy_into_a_slot_that_is_too_small_is_seen(fuzz: ModuleType) -> None:
    """The copy takes its bound from the pool from which a segment borrows."""
    report = planted(fuzz, "frames")
    assert "use-after-poison" in report
    assert "WRITE of size" in report
    assert "copy_in" in report


def test_a_field_too_many_is_seen(fuzz: ModuleType) -> None:
    """Messages get past the check of their fields."""
    report = planted(fuzz, "wire")
    assert "AssertionError" in report or "KeyError" in report
