# SPDX-License-Identifier: BSD-3-Clause
"""Processes with a preloaded library before liburing, which fakes the kernel's answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from patience import patient
from support import child_place, skip_without_devices, skip_without_engine


def build(name: str, where: Path) -> Path:
    """Compiles a C file of this directory."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    out = where / f"{name}.so"
    source = Path(__file__).with_name(f"{name}.c")
    flags = ["-shared", "-fPIC", "-Wall", "-Wl,--no-as-needed"]
    subprocess.run(
        ["cc", *flags, "-o", str(out), str(source), "-luring", "-ldl"],
        check=True,
        timeout=patient(60),
    )
    return out


def run(shim: Path, engine: str, prelude: str, code: str) -> Any:
    """Runs code with the library and the engine as arguments; returns the JSON it prints last."""
    skip_without_devices()
    skip_without_engine(engine)
    place = child_place()
    place["env"] = place["env"] | {"LD_PRELOAD": str(shim)}
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), str(shim), engine],
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
        **place,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
