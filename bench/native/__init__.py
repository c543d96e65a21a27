# SPDX-License-Identifier: BSD-3-Clause
"""Loops over rtap's kernels without Python objects, compiled when a benchmark asks for them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
BUILT = HERE.parent.parent / "build" / "bench" / "native"

_SETUP = """
import shlex, subprocess, sys
import rtap
from Cython.Build import cythonize
from setuptools import Extension, setup

name, level, *sources = sys.argv[1:]
asked = subprocess.run(["pkg-config", "--cflags", "liburing"], capture_output=True, text=True)
extension = Extension(
    name, sources, include_dirs=[rtap.get_include()],
    extra_compile_args=[level, "-fno-strict-aliasing", *shlex.split(asked.stdout)],
)
modules = cythonize(
    [extension], language_level=3, build_dir="c", quiet=True,
    compiler_directives={"cdivision": True, "boundscheck": False, "wraparound": False},
)
setup(name=name, ext_modules=modules, script_args=["-q", "build_ext", "--inplace"])
"""


def load(name: str, *sources: str, level: str = "-O3") -> ModuleType:
    """Compile ``bench/native/NAME.pyx`` and C files beside it against the imported rtap."""
    BUILT.mkdir(parents=True, exist_ok=True)
    import rtap

    files = (f"{name}.pyx", *sources)
    path = os.pathsep.join([str(Path(rtap.__file__).parent.parent), *sys.path])
    subprocess.run(
        [sys.executable, "-c", _SETUP, name, level, *(str(HERE / file) for file in files)],
        cwd=BUILT,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    (found,) = BUILT.glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, found)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
