# SPDX-License-Identifier: BSD-3-Clause
"""The fuzzing harness in small: its corpus replayed, and a mistake that it has to see.

``make fuzz`` runs it on ten million new inputs.
"""

from __future__ import annotations

import importlib
import os
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

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


def test_the_corpus(fuzz: ModuleType) -> None:
    corpus = list(fuzz.unpack(fuzz.CORPUS.read_bytes()))
    assert len(corpus) > 100
    assert {data[0] & 7 for data in corpus if data} >= set(range(7))
    inputs = [*corpus, *fuzz.prefixes()]
    done = fuzz.replay(fuzz.build_replay(), inputs)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
    assert done.stdout == f"{len(inputs)} inputs\n".encode()


def test_one_byte_too_far_is_seen(fuzz: ModuleType) -> None:
    """A parser with a wrong bound, over the very same inputs."""
    program = fuzz.build_replay(planted=True)
    done = fuzz.replay(program, chain(fuzz.unpack(fuzz.CORPUS.read_bytes()), fuzz.prefixes()))
    report = done.stderr.decode(errors="replace")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in report
    assert "READ of size 1" in report
    assert "parse_l4" in report
