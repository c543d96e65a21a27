# SPDX-License-Identifier: BSD-3-Clause
"""The layer check finds an import from a higher layer, however it is written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("tools.layers")


def planted(layers: Any, package: Path, name: str, text: str) -> list[str]:
    path = package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    found = layers.arrows_up(package)
    return [f"{where.relative_to(package)}:{line}: {what}" for where, line, what in found]


def test_no_module_imports_from_above(layers: Any) -> None:
    assert list(layers.arrows_up(ROOT / "rtap")) == []


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("from rtap._tap.uring cimport uring_t\n", "rtap._tap.uring"),
        ("cimport rtap._ring as ring\n", "rtap._ring"),
        ("from rtap.stages import (\n    Call,\n    MacSwap,\n)\n", "rtap.stages"),
        ("def f():\n    from rtap import drivers, errors\n", "rtap.drivers"),
        ("import rtap\n", "rtap"),
        ("from rtap import Mempool\n", "rtap"),
    ],
)
def test_an_arrow_upwards_is_seen(layers: Any, tmp_path: Path, text: str, module: str) -> None:
    said = planted(layers, tmp_path, "_core/pool.pyx", f"x = 1\n{text}")
    line = 3 if text.startswith("def") else 2
    assert said == [f"_core/pool.pyx:{line}: imports {module} from a layer above its own"]


def test_imports_downwards_and_for_types_are_fine(layers: Any, tmp_path: Path) -> None:
    text = (
        "from typing import TYPE_CHECKING\n\nfrom rtap._core.burst import Burst\n"
        "from rtap.errors import raise_errno\n\nif TYPE_CHECKING:\n"
        "    from rtap.drivers.net_rtap import NetRtap\n\nx = 1\n"
    )
    assert planted(layers, tmp_path, "_work/worker.py", text) == []


def test_a_room_without_a_layer_is_told(layers: Any, tmp_path: Path) -> None:
    (said,) = planted(layers, tmp_path, "_attic/old.py", "")
    assert said == "_attic/old.py:1: rtap/_attic is in no layer of tools/layers.py"
