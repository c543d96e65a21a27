# SPDX-License-Identifier: BSD-3-Clause
"""Short runs of the API fuzzer, and faults that it must find.

``make fuzz`` makes many more calls.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fuzz_api() -> ModuleType:
    """tools/fuzz_api.py."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module("tools.fuzz_api")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("seed", [2, 3])  # as root, the second has a TAP device
def test_nothing_is_found(fuzz_api: ModuleType, seed: int, threads: int) -> None:
    assert fuzz_api.run(seed, threads) == ""


def test_a_lost_slot_is_seen(fuzz_api: ModuleType) -> None:
    world = fuzz_api.World(1)
    kept = world.pools[0].alloc(b"kept")
    with pytest.raises(AssertionError, match="1 slots are lost"):
        world.end()
    kept.free()
    world.end()


def test_a_death_is_told_with_its_seed(
    fuzz_api: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "dies.py"
    program.write_text("import os\nos.abort()\n")
    monkeypatch.setattr(fuzz_api, "__file__", os.fspath(program))
    assert fuzz_api.run(7, 1).startswith("seed 7, 1 threads: exit -6")
