# SPDX-License-Identifier: BSD-3-Clause
"""The core's view of a stage: a function, its context, and its requirements on frames."""

from libc.stdint cimport uint32_t

from rtap._core.pool cimport mbuf_t
from rtap.stages._runner cimport scratch_t, stage_fn, stage_t


cdef class Stage:
    cdef stage_fn fn            # or reshape
    cdef uint32_t (*reshape)(stage_t *stage, scratch_t *s, mbuf_t **v, uint32_t n) noexcept nogil
    cdef void *ctx
    cdef uint32_t flags
    cdef uint32_t made          # a constructor has reached `once`
    cdef uint32_t targets       # the highest target that it names, plus one
    cdef int layer              # LAYER_*: the first header that it expects

    cdef int once(self) except -1
    cdef int checked(self) except -1
    cdef int passes(self, int layer, uint32_t n_targets) except -1
    cdef int enter(self, stage_t *stage) except -1
    cdef int leave(self) except -1
    cdef int failed(self, stage_t *stage, int error) except -1


cdef str why_failed(const stage_t *stage, int error)
