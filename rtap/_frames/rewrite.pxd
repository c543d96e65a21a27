# SPDX-License-Identifier: BSD-3-Clause
"""Changes of addresses and ports in place.  The frame must be the caller's to write to; one that is
too short for what is to be changed keeps its bytes."""

from libc.stdint cimport uint8_t

from rtap._core.pool cimport mbuf_t


cdef void swap_mac(mbuf_t *m) noexcept nogil
cdef void set_mac(mbuf_t *m, const uint8_t *addresses) noexcept nogil
cdef void swap_five_tuple(mbuf_t *m) noexcept nogil
