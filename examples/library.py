# SPDX-License-Identifier: BSD-3-Clause
"""Compiles examples/stage.c into a shared library."""

import shlex
import subprocess
import sysconfig
from pathlib import Path

import rtap


def build(directory: str) -> str:
    """Compile the library into `directory` and return its path."""
    target = str(Path(directory) / "stage.so")
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    source = str(Path(__file__).with_name("stage.c"))
    flags = ["-O3", "-shared", "-fPIC", f"-I{rtap.get_include()}", "-o", target]
    subprocess.run([*compiler, *flags, source], check=True)
    return target
