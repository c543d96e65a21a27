# SPDX-License-Identifier: BSD-3-Clause
"""The Internet checksum; the loop itself is in ``include/rtap_checksum.h``."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t, mbuf_window


cdef uint32_t sum16(const uint8_t *p, size_t n) noexcept nogil:
    """Sum of ``n`` bytes; an odd last byte is the high half of a word."""
    return _sum16(p, n)


cdef uint32_t copy_sum16(uint8_t *to, const uint8_t *p, size_t n) noexcept nogil:
    """Copies ``n`` bytes between places that do not overlap and returns their sum, in one pass."""
    return _copy_sum16(to, p, n)


cdef uint32_t chain_sum(const mbuf_t *m, uint32_t offset, uint32_t n) noexcept nogil:
    """Sum of up to ``n`` bytes of a frame from ``offset`` on, over several segments if needed."""
    cdef uint64_t total = 0
    cdef uint32_t part, k, done = 0
    cdef uint8_t *start
    k = mbuf_window(m, &start)
    if offset <= k and n <= k - offset:         # as nearly always
        return _sum16(start + offset, n)
    while m != NULL and done < n:
        k = mbuf_window(m, &start)
        if offset >= k:
            offset -= k
        else:
            k = min(k - offset, n - done)
            part = _sum16(start + offset, k)
            total += swap16(part) if done & 1 else part
            done += k
            offset = 0
        m = m.next
    return _fold16(total)


cdef uint32_t pseudo_sum(const uint8_t *ip, uint32_t version, uint32_t protocol,
                         uint32_t l4_len) noexcept nogil:
    """Sum of the pseudo-header (RFC 9293 3.1, RFC 8200 8.1) with the addresses of the IP header
    at ``ip``, which has 20 or 40 readable bytes."""
    cdef uint64_t total = protocol + (l4_len >> 16) + (l4_len & 0xffff)
    if version == 4:
        return _fold16(total + _sum16(ip + 12, 8))
    return _fold16(total + _sum16(ip + 8, 32))


cdef uint32_t update16(uint32_t checksum, uint32_t old, uint32_t new) noexcept nogil:
    """A header's checksum field after words with the sum ``old`` became words with the sum
    ``new`` (RFC 1624, equation 3)."""
    return _fold16(<uint64_t>(~checksum & 0xffff) + (~old & 0xffff) + new) ^ 0xffff
