# SPDX-License-Identifier: BSD-3-Clause
"""Frames in one piece of memory each: made, and as what others have to become."""

from libc.stdint cimport uint8_t, uint32_t

from rtap.stages._runner cimport stage_t
from rtap._core.pool cimport mbuf_t

from frames_model cimport slot_t

cdef enum:
    # of build_t.kind
    KIND_IPV6 = 1
    KIND_UDP = 2
    KIND_VLAN = 4
    KIND_PUSH = 8
    KIND_WRONG = 16             # a wrong checksum
    KIND_UNFINISHED = 32        # only the sum of the pseudo-header
    PIECES_MAX = 600


cdef struct build_t:            # what a frame is made by, and where its headers are then
    uint32_t kind
    uint32_t flow
    uint32_t payload
    uint32_t seq
    uint32_t ip_id
    uint32_t l3
    uint32_t l4
    uint32_t headers


cdef struct pieces_t:           # frames, in order
    mbuf_t *v[PIECES_MAX]
    uint32_t n
    uint32_t dropped            # by the stages that they went through
    bint unsure                 # there were more, or one that only its own kernel can judge


cdef uint32_t build(build_t *b, uint8_t *out) noexcept nogil
cdef mbuf_t *flat_of(const slot_t *head) noexcept nogil
cdef void flat_free(mbuf_t *m) noexcept nogil
cdef bint deep(const mbuf_t *m) noexcept nogil
cdef void pieces_add(pieces_t *p, mbuf_t *m) noexcept nogil
cdef void pieces_free(pieces_t *p) noexcept nogil
cdef int split_flat(mbuf_t *m, pieces_t *out) noexcept nogil
cdef void through_stage(stage_t *stage, pieces_t *p, uint32_t n_targets, bint splits) noexcept nogil
cdef bint take_equal(pieces_t *p, const uint8_t *data, uint32_t n, uint32_t *at) noexcept nogil
cdef bint take_next(pieces_t *p, uint32_t *at, const uint8_t *data, uint32_t n,
                    uint32_t target) noexcept nogil
cdef bint take_merged(pieces_t *p, const mbuf_t *super_frame, const uint8_t *data,
                      uint32_t n) noexcept nogil
