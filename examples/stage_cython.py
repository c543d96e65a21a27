# SPDX-License-Identifier: BSD-3-Clause
"""A stage in Cython, compiled first."""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import sample

from rtap import stages

with tempfile.TemporaryDirectory() as directory:
    source = Path(directory) / "source"
    shutil.copytree(Path(__file__).with_name("cython_stage"), source)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", directory]
    subprocess.run(build, cwd=source, check=True)
    sys.path.insert(0, directory)
    import cython_stage

count = ctypes.c_uint64()
stage = stages.Native(cython_stage.__pyx_capi__["stage"], count)
sample.show(stage)
print("frames:", count.value)
sample.run(stage)
