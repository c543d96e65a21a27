# SPDX-License-Identifier: BSD-3-Clause
"""Checksums of whole frames: checked, and written."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t
from rtap._frames.parse cimport headers_t


cdef uint64_t verify_frame(const mbuf_t *m, bint l2) noexcept nogil
cdef uint64_t verify_parsed(const mbuf_t *m, const uint8_t *p, uint32_t n, const headers_t *h,
                            bint whole, bint layer4) noexcept nogil
cdef void note_verdict(mbuf_t *m, uint64_t found) noexcept nogil
cdef bint unfinished_at(const mbuf_t *m, uint32_t *start) noexcept nogil
cdef int fill_unfinished(mbuf_t *m, bint l2) noexcept nogil
cdef int fill_frame(mbuf_t *m, bint l2) noexcept nogil
cdef bint fillable(const mbuf_t *m, bint l2) noexcept nogil
