# SPDX-License-Identifier: BSD-3-Clause
"""The application's offload requests for single frames; every read is inside the frame."""

from libc.stdint cimport uint64_t

from rtap._core.pool cimport mbuf_t


cdef int take_requests(mbuf_t **frame, bint l2) noexcept nogil
cdef int finish_checksum(mbuf_t **frame) noexcept nogil
cdef mbuf_t *private_of(mbuf_t *m) noexcept nogil
cdef int make_private(mbuf_t **frame) noexcept nogil
