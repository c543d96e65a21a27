# SPDX-License-Identifier: BSD-3-Clause
"""Splits super-frames that the kernel cannot split, in portions, in a queue's own memory.

It needs no buffer of any pool: a frame can be sent with any segment size, and with an empty pool.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from rtap._core.pool cimport mbuf_free, mbuf_t
from rtap._frames.parse cimport headers_of
from rtap._frames.pieces cimport gso_bytes
from rtap._frames.segment cimport plan_split


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
