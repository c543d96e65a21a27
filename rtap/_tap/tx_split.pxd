# SPDX-License-Identifier: BSD-3-Clause
"""A super-frame on its way into the kernel in pieces."""

from libc.stdint cimport uint8_t, uint32_t

from rtap._core.pool cimport mbuf_t
from rtap._frames.segment cimport HEADER_ROOM, plan_t


cdef enum:
    PIECES_MAX = 256            # at once
    PIECES_BYTES = 1 << 17


cdef struct tx_split_t:
    mbuf_t *frame               # with pieces still to be made; NULL: all are made
    uint32_t next               # the first of these
    plan_t plan
    uint8_t headers[HEADER_ROOM]
    mbuf_t *v[PIECES_MAX]       # pieces to be sent, in order
    uint32_t n
    mbuf_t pieces[PIECES_MAX]   # not slots: they describe bytes of `bytes`
    uint8_t bytes[PIECES_BYTES]


cdef int split_begin(tx_split_t *s, mbuf_t *m, bint l2) noexcept nogil
cdef uint32_t split_more(tx_split_t *s) noexcept nogil
cdef void split_drop(tx_split_t *s) noexcept nogil
