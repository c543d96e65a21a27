# SPDX-License-Identifier: BSD-3-Clause
"""How a worker runs stages, one after the other over a burst."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t
from rtap._frames.gro cimport gro_t
from rtap.native cimport RTAP_DROP as DROP, RTAP_STAGE_ABI as STAGE_ABI, rtap_burst

ctypedef int (*stage_fn)(void *ctx, rtap_burst *burst) noexcept nogil


cdef enum:
    # stage_t.flags
    STAGE_WRITES = 1            # to bytes, so frames must be private
    STAGE_ARRAYS = 2            # it reads data, len and ol_flags, not the frames themselves
    STAGE_SPLITS = 4            # may make many frames of one; `reshape`, with room to hold some
    STAGE_MERGES = 8            # makes one frame of many; `reshape`, with scratch_t.gro

    STAGE_WHY = 256             # bytes, including the final 0


cdef struct held_t:             # frames of a burst that a stage has not handled yet
    mbuf_t **frames
    uint32_t *verdict
    uint32_t at
    uint32_t n
    uint32_t made               # frames made of the first one, when only some could be made
    uint32_t left               # and its frames that are still to come


cdef struct scratch_t:          # the arrays of a burst, for one thread
    uint32_t room               # in frames; every array of frames has this room
    uint8_t **data
    uint32_t *len
    uint64_t *ol_flags
    uint32_t *verdict
    mbuf_t **spare
    gro_t *gro                  # empty between calls; NULL without a stage that merges


cdef struct stage_t:
    stage_fn fn
    # Instead of fn, if other frames come out than went in: replaces the frames in v and their
    # verdicts, counts, and returns how many there are now.  A splitting stage keeps frames that it
    # has no room for in `held`, and is called again with n = 0.
    uint32_t (*reshape)(stage_t *stage, scratch_t *s, mbuf_t **v, uint32_t n) noexcept nogil
    void *ctx
    uint32_t flags
    held_t held
    uint64_t packets            # that came to it
    uint64_t bytes
    uint64_t drops
    uint64_t split              # additional frames; of frames in `held`, those made so far
    uint64_t merged             # frames fewer
    uint64_t cycles
    # When it has failed:
    char why[STAGE_WHY]         # in words, UTF-8; empty if the errno is enough
    void *raised                # with `direct`, a reference to the exception
    bint direct                 # called from Python, which gets the exception


cdef struct stage_burst_t:      # a stage's argument; fields after `burst` are rtap's own
    rtap_burst burst
    stage_t *stage


cdef int scratch_alloc(scratch_t *s, uint32_t room, uint32_t flags) noexcept nogil
cdef void scratch_free(scratch_t *s) noexcept nogil
cdef int stage_alloc(stage_t *stage, uint32_t room) noexcept nogil
cdef void stage_free(stage_t *stage) noexcept nogil
cdef bint chain_holds(const stage_t *stages, uint32_t n_stages) noexcept nogil
cdef void held_drop(stage_t *stage, uint32_t n) noexcept nogil
cdef void chain_drop(stage_t *stages, uint32_t n_stages) noexcept nogil
cdef int chain_run(stage_t *stages, uint32_t n_stages, uint32_t n_targets, scratch_t *s,
                   mbuf_t **frames, uint32_t *n, uint32_t *failed) noexcept nogil
