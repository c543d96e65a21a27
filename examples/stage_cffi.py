# SPDX-License-Identifier: BSD-3-Clause
"""A stage in C, loaded with cffi."""

import tempfile

import library
import sample
from cffi import FFI

from rtap import stages

ffi = FFI()
ffi.cdef("int stage(void *ctx, void *burst);")
with tempfile.TemporaryDirectory() as directory:
    code = ffi.dlopen(library.build(directory))
count = ffi.new("uint64_t *")  # must outlive the stage
stage = stages.Native(ffi.addressof(code, "stage"), count)
sample.show(stage)
print("frames:", count[0])
sample.run(stage)
