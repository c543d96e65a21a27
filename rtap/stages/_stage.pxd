# SPDX-License-Identifier: BSD-3-Clause
"""What every stage is for the core: a function, its context, and what it needs of the frames."""

from libc.stdint cimport uint32_t

from rtap._chain cimport stage_fn


cdef class Stage:
    cdef stage_fn fn
    cdef void *ctx
    cdef uint32_t flags

    cdef int failed(self, int error) except -1
