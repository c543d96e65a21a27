# SPDX-License-Identifier: BSD-3-Clause
"""Frames of a super-frame as bytes, one behind the other, and super-frames behind other headers.

They need no buffer of any pool: a frame can be sent with any segment size, and with an empty pool.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from rtap._core.pool cimport csum_place, mbuf_read, mbuf_t
from rtap._frames.checksum cimport fold16, sum16
from rtap._frames.headers cimport TCP_CSUM_OFFSET, UDP_CSUM_OFFSET
from rtap._frames.parse cimport HEADERS_MAX, headers_of, headers_t, l4_pseudo_sum, put_be16
from rtap._frames.segment cimport (
    FITS, HEADER_ROOM, cursor_read, cursor_t, plan_segments, plan_t, segment_payload, vnet_of,
    vnet_t, write_header,
)


cdef uint32_t write_alone(const mbuf_t *m, const plan_t *plan, uint8_t *out) noexcept nogil:
    """Writes a super-frame that need not be split, with a finished checksum; returns its length, or
    0 when another thread has shortened it."""
    cdef const headers_t *h = &plan.h
    cdef uint32_t at = h.l4 + (UDP_CSUM_OFFSET if plan.udp else TCP_CSUM_OFFSET)
    cdef uint32_t length = h.end - h.l4, value
    if mbuf_read(m, 0, out, h.end) != h.end:
        return 0
    put_be16(out + at, 0)
    value = fold16(<uint64_t>sum16(out + h.l4, length) + l4_pseudo_sum(
        out, h.version, h.l3, h.final, h.protocol, length)) ^ 0xffff
    put_be16(out + at, value if value != 0 else 0xffff)
    return h.end


cdef uint32_t gso_bytes(const mbuf_t *m, const plan_t *plan, const uint8_t *headers, uint32_t first,
                        uint8_t *out, uint32_t room, uint32_t *lengths,
                        uint32_t most) noexcept nogil:
    """Writes frames of a planned super-frame, from number ``first`` on, one behind the other: as
    many as there are, as fit into ``room`` bytes, and as ``lengths`` has places for.

    Returns how many; fewer when another thread has shortened the frame meanwhile."""
    cdef uint32_t made = 0, part = 0, k, n
    cdef cursor_t c
    if plan.count == 1:
        lengths[0] = write_alone(m, plan, out) if plan.h.end <= room else 0
        return 1 if lengths[0] != 0 else 0
    c.seg = m
    c.offset = plan.hdr_len + first * plan.gso_size
    most = min(most, plan.count - first)
    while made < most:
        k = segment_payload(plan, first + made)
        n = plan.hdr_len + k
        if n > room or not cursor_read(&c, out + plan.hdr_len, k, &part):
            break
        memcpy(out, headers, plan.hdr_len)
        write_header(plan, out, first + made, k, part)
        lengths[made] = n
        out += n
        room -= n
        made += 1
    return made


cdef int plan_inside(const mbuf_t *m, plan_t *plan) noexcept nogil:
    """Prepares the split of a super-frame whose IP header may be anywhere, behind headers of any
    kind, which are repeated as they are: it lies ``l3_len`` in front of the unfinished checksum's
    start.  0, or -EINVAL."""
    cdef uint8_t copy[HEADERS_MAX]
    cdef const uint8_t *p
    cdef vnet_t hdr
    cdef uint32_t n, start, at
    if not csum_place(m, &start) or start < m.l3_len or not vnet_of(m, False, &hdr):
        return -EINVAL
    at = start - m.l3_len
    p = headers_of(m, copy, &n)
    if at >= n or hdr.csum_start < at:
        return -EINVAL
    hdr.csum_start -= <uint16_t>at
    if plan_segments(p + at, n - at, m.pkt_len - at, False, &hdr, plan) != FITS:
        return -EINVAL
    plan.h.l3 += at
    plan.h.l4 += at
    plan.h.end += at
    if plan.h.final != 0:
        plan.h.final += at
    plan.hdr_len += at
    return 0 if plan.hdr_len <= <uint32_t>HEADER_ROOM and plan.hdr_len <= n else -EINVAL
