# SPDX-License-Identifier: BSD-3-Clause
"""Splits super-frames that the kernel cannot split, in portions, in a queue's own memory.

It needs no buffer of any pool: a frame can be sent with any segment size, and with an empty pool.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from rtap._core.pool cimport mbuf_free, mbuf_read, mbuf_t
from rtap._frames.checksum cimport fold16, sum16
from rtap._frames.headers cimport TCP_CSUM_OFFSET, UDP_CSUM_OFFSET
from rtap._frames.parse cimport headers_of, headers_t, l4_pseudo_sum, put_be16
from rtap._frames.segment cimport (
    cursor_read, cursor_t, plan_split, plan_t, segment_payload, write_header,
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


cdef int split_begin(tx_split_t *s, mbuf_t *m, bint l2) noexcept nogil:
    """Takes over a super-frame, when none is in hand, and makes its first pieces; returns how many
    it makes in all.  -EINVAL when it does not match its own offload fields; the caller keeps it
    then.

    A super-frame from ``tx_gro`` has at most PIECES_MAX pieces and 64 KiB of payload.  So all of
    them are made at once, and its borrowed bytes are not needed any more."""
    cdef const uint8_t *p
    cdef uint32_t n
    if plan_split(m, l2, &s.plan) != 0:
        return -EINVAL
    p = headers_of(m, s.headers, &n)
    if p != s.headers:
        memcpy(s.headers, p, s.plan.hdr_len)
    s.frame = m
    s.next = 0
    if split_more(s) == 0:
        s.frame = NULL
        return -EINVAL
    return <int>s.plan.count


cdef uint32_t split_more(tx_split_t *s) noexcept nogil:
    """Makes the next pieces, after the earlier ones are gone; 0 when there are none, or another
    holder of the frame has shortened it."""
    cdef uint32_t lengths[PIECES_MAX]
    cdef uint32_t n, at = 0, i
    cdef mbuf_t *piece
    if s.frame == NULL:
        return 0
    n = gso_bytes(s.frame, &s.plan, s.headers, s.next, s.bytes, PIECES_BYTES, lengths, PIECES_MAX)
    for i in range(n):
        piece = &s.pieces[i]
        memset(piece, 0, sizeof(mbuf_t))
        piece.buf = s.bytes + at
        piece.buf_len = piece.data_len = piece.pkt_len = lengths[i]
        piece.refcnt = 2        # never the last reference: no pool has it
        piece.nb_segs = 1
        s.v[i] = piece
        at += lengths[i]
    s.n = n
    s.next += n
    if n > 0 and s.next == s.plan.count:
        mbuf_free(s.frame)
        s.frame = NULL
    return n


cdef void split_drop(tx_split_t *s) noexcept nogil:
    """Drops all pieces, whether made or not."""
    if s.frame != NULL:
        mbuf_free(s.frame)
    s.frame = NULL
    s.n = 0
