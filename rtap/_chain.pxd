# SPDX-License-Identifier: BSD-3-Clause
"""Stages as a worker runs them, one after the other over a burst."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._pool cimport mbuf_t
from rtap.stage cimport RTAP_DROP as DROP, RTAP_STAGE_ABI as STAGE_ABI, rtap_burst

ctypedef int (*stage_fn)(void *ctx, rtap_burst *burst) noexcept nogil


cdef enum:
    # stage_t.flags
    STAGE_WRITES = 1            # to bytes, so that frames must be nobody else's
    STAGE_ARRAYS = 2            # it reads data, len and ol_flags, not the frames themselves


cdef struct stage_t:
    stage_fn fn
    void *ctx
    uint32_t flags
    uint64_t packets            # that came to it
    uint64_t bytes
    uint64_t drops
    uint64_t cycles


cdef struct scratch_t:          # the arrays of a burst, for one thread
    uint8_t **data
    uint32_t *len
    uint64_t *ol_flags
    uint32_t *verdict


cdef int scratch_alloc(scratch_t *s, uint32_t room) noexcept nogil
cdef void scratch_free(scratch_t *s) noexcept nogil
cdef int chain_run(stage_t *stages, uint32_t n_stages, uint32_t n_targets, scratch_t *s,
                   mbuf_t **frames, uint32_t *n, uint32_t *failed) noexcept nogil
