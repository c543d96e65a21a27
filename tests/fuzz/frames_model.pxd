# SPDX-License-Identifier: BSD-3-Clause
"""What every frame must contain: its slots, their windows and bytes, and who holds them."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t

from rtap._core.pool cimport mbuf_t, pool_t

cdef enum:
    POOLS_MAX = 6
    SLOTS_MAX = 48
    HANDLES = 32
    LONGEST_FRAME = 1 << 20


cdef struct slot_t:
    mbuf_t *m                   # the header that this is the model of
    uint8_t *bytes              # a copy of what the slot holds
    slot_t *owner               # whose bytes it shows; NULL: its own
    slot_t *next
    uint32_t pool
    uint32_t shift              # where its room begins in the owner's bytes
    uint32_t room
    uint32_t off
    uint32_t n
    uint32_t refs               # as of the last count


cdef struct handle_t:           # one reference
    slot_t *head                # NULL: none
    bint part                   # from a later segment of a frame on
    uint32_t table              # of the GRO table that has it, from 1 on
    uint32_t turn               # when it got there


cdef handle_t handles[HANDLES]

cdef void claim(bint what, const char *text) noexcept nogil
cdef int model_pool(pool_t *p) noexcept nogil
cdef slot_t *slot_of(const mbuf_t *m) noexcept nogil
cdef uint32_t length_of(const slot_t *s) noexcept nogil
cdef uint32_t segments_of(const slot_t *s) noexcept nogil
cdef uint32_t content_of(const slot_t *s, uint8_t *out) noexcept nogil
cdef void store(slot_t *s, uint32_t offset, const uint8_t *src, uint32_t n) noexcept nogil
cdef slot_t *base_of(slot_t *s) noexcept nogil
cdef bint is_private(const slot_t *s) noexcept nogil
cdef bint in_table(slot_t *head) noexcept nogil
cdef uint32_t slots_used(uint32_t pool) noexcept nogil
cdef handle_t *new_handle(slot_t *head) noexcept nogil
cdef void count() noexcept nogil
cdef slot_t *adopt(mbuf_t *m, const uint8_t *expected, uint32_t n) noexcept nogil
cdef void settle() noexcept nogil
