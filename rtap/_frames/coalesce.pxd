# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t
from rtap._frames.gro cimport gro_t


cdef class Gro:
    cdef gro_t *g
    cdef readonly double timeout
    cdef uint64_t patience      # timeout in ns
    cdef uint32_t made          # a constructor has converted its arguments
    cdef uint32_t owned
    cdef uint64_t timed_out

    cdef int own(self) except -1


cdef uint32_t gro_drain(gro_t *g, mbuf_t **out) noexcept nogil
cdef uint32_t gro_burst(gro_t *g, mbuf_t **v, uint32_t n, uint64_t now, uint64_t patience,
                        uint64_t *timed_out, mbuf_t **out) noexcept nogil
