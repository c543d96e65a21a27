# SPDX-License-Identifier: BSD-3-Clause
"""A stage in C, loaded with ctypes."""

import ctypes
import tempfile

import library
import sample

from rtap import stages

with tempfile.TemporaryDirectory() as directory:
    code = ctypes.CDLL(library.build(directory))
count = ctypes.c_uint64()
stage = stages.Native(code.stage, count)
sample.show(stage)
print("frames:", count.value)
sample.run(stage)
