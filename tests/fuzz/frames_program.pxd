# SPDX-License-Identifier: BSD-3-Clause
"""What a program of the harness is read from, and its operations on mbufs."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t, pool_t

from frames_model cimport handle_t, slot_t

cdef enum:
    N_POOLS = 5
    N_FLOWS = 8
    PARTS_MAX = 100             # frames of a super-frame: more only take time


cdef struct program_t:
    const uint8_t *data
    size_t left
    uint64_t now
    uint32_t filling            # of the next bytes
    uint32_t turn
    uint32_t seq[N_FLOWS]
    uint32_t ip_id[N_FLOWS]


cdef program_t program          # the input
cdef pool_t *pools[N_POOLS]
cdef uint8_t *bytes_a
cdef uint8_t *bytes_b

cdef int buffers() noexcept nogil
cdef uint32_t byte() noexcept nogil
cdef uint32_t size() noexcept nogil
cdef handle_t *pick_frame() noexcept nogil
cdef void keep(mbuf_t *m, const uint8_t *data, uint32_t n) noexcept nogil
cdef void replaced(handle_t *h, mbuf_t *m, const uint8_t *data, uint32_t n) noexcept nogil
cdef uint32_t free_in(uint32_t pool) noexcept nogil
cdef bint copy_fits(slot_t *s) noexcept nogil

cdef void op_alloc() noexcept nogil
cdef void op_build() noexcept nogil
cdef void op_free() noexcept nogil
cdef void op_clone() noexcept nogil
cdef void op_again() noexcept nogil
cdef void op_resize() noexcept nogil
cdef void op_write() noexcept nogil
cdef void op_chain() noexcept nogil
cdef void op_private() noexcept nogil
