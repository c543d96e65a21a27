# SPDX-License-Identifier: BSD-3-Clause
"""The examples run, and the stages in all languages treat the same frames the same way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import child_environment

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")


def output(name: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected() -> str:
    """Of thirteen frames, the ten IPv4 ones with ports 1000 to 1009 and addresses swapped."""
    head = "02000000000b" + "02000000000a" + "0800" + "45" + "00" * 19
    lines = [f"{port % 2} {head}{port:04x}\n" for port in range(1000, 1010)]
    return "".join(lines) + "frames: 13\n"


@pytest.mark.parametrize("language", ["python", "ctypes", "cffi", "numba", "cython"])
def test_stages_are_alike(language: str) -> None:
    needs = {"cffi": "cffi", "numba": "numba", "cython": "Cython"}
    if language in needs:
        pytest.importorskip(needs[language])
    said = output(f"stage_{language}.py")
    assert said.endswith(expected()), said
