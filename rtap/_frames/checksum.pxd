# SPDX-License-Identifier: BSD-3-Clause
"""The Internet checksum (RFC 1071) over bytes and over chains.

Sums are over big-endian 16-bit words, folded to 0..0xffff, and not complemented unless a name says
otherwise; a header field takes the complement.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t


cdef extern from "rtap_checksum.h" nogil:
    uint32_t _fold16 "rtap_fold16" (uint64_t total)
    uint32_t _sum16 "rtap_sum16" (const uint8_t *p, size_t n)
    uint32_t _copy_sum16 "rtap_copy_sum16" (uint8_t *to, const uint8_t *p, size_t n)


cdef inline uint32_t fold16(uint64_t total) noexcept nogil:
    """Any sum of 16-bit words, folded."""
    return _fold16(total)


cdef inline uint32_t swap16(uint32_t v) noexcept nogil:
    """A folded sum whose bytes started at an odd place."""
    return (v & 0xff) << 8 | v >> 8


cdef uint32_t sum16(const uint8_t *p, size_t n) noexcept nogil
cdef uint32_t copy_sum16(uint8_t *to, const uint8_t *p, size_t n) noexcept nogil
cdef uint32_t chain_sum(const mbuf_t *m, uint32_t offset, uint32_t n) noexcept nogil
cdef uint32_t pseudo_sum(const uint8_t *ip, uint32_t version, uint32_t protocol,
                         uint32_t l4_len) noexcept nogil
cdef uint32_t update16(uint32_t checksum, uint32_t old, uint32_t new) noexcept nogil
