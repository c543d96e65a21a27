# SPDX-License-Identifier: BSD-3-Clause
"""Changes addresses and ports in place.  The caller must be allowed to write to the frame.  A frame
that is too short for the change keeps its bytes."""

from libc.stdint cimport uint8_t

from rtap._core.pool cimport mbuf_t


cdef void swap_mac(mbuf_t *m) noexcept nogil
cdef void set_mac(mbuf_t *m, const uint8_t *addresses) noexcept nogil
cdef void swap_five_tuple(mbuf_t *m) noexcept nogil
