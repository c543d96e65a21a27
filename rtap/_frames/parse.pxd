# SPDX-License-Identifier: BSD-3-Clause
"""Finds the headers of a frame and their places; every read is inside the given bytes."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from rtap._core.pool cimport mbuf_read, mbuf_t, mbuf_window
from rtap._frames.headers cimport IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP


cdef enum:
    HEADERS_MAX = 256           # bytes of headers examined in a frame of several segments


cdef struct headers_t:
    uint32_t packet_type        # RTE_PTYPE_* of rte_mbuf_ptype.h
    # Lengths as in an mbuf: in a tunnel, l2_len counts from the outer IP header to the inner one.
    uint16_t outer_l2_len
    uint16_t outer_l3_len
    uint16_t l2_len
    uint16_t l3_len             # with options and extension headers
    uint16_t l4_len
    uint8_t version             # of the innermost IP header: 4, 6 or 0 for none
    uint8_t protocol            # of the payload behind it and its extension headers
    uint8_t fragment            # the innermost IP packet is a fragment, or the outer one is
    uint8_t auth                # there is an IPv6 authentication header
    uint32_t l3                 # offset of the innermost IP header
    uint32_t l4                 # offset of its payload
    uint32_t end                # offset of its end; 0 when its length exceeds the frame
    uint32_t final              # offset of the IPv6 destination for the pseudo-header
    # The outer IP packet of a tunnel, all 0 without one.
    uint32_t outer_l3
    uint32_t outer_l4
    uint32_t outer_end
    uint32_t outer_final
    uint8_t outer_version
    uint8_t outer_protocol


cdef int parse_headers(const uint8_t *p, uint32_t n, uint32_t pkt_len, bint l2,
                       headers_t *out) noexcept nogil
cdef int parse_outermost(const uint8_t *p, uint32_t n, uint32_t pkt_len, bint l2,
                         headers_t *out) noexcept nogil
cdef uint32_t l4_pseudo_sum(const uint8_t *p, uint32_t version, uint32_t l3, uint32_t final,
                            uint32_t protocol, uint32_t l4_len) noexcept nogil


cdef inline uint32_t be16(const uint8_t *p) noexcept nogil:
    return <uint32_t>((p[0] << 8) | p[1])


cdef inline uint32_t be32(const uint8_t *p) noexcept nogil:
    return be16(p) << 16 | be16(p + 2)


cdef inline void put_be16(uint8_t *p, uint32_t v) noexcept nogil:
    p[0] = <uint8_t>(v >> 8 & 0xff)
    p[1] = <uint8_t>(v & 0xff)


cdef inline const uint8_t *headers_of(const mbuf_t *m, uint8_t *copy, uint32_t *n) noexcept nogil:
    """The first bytes of a frame in one piece: its first segment, or, where that is shorter,
    HEADERS_MAX bytes copied to ``copy``."""
    cdef uint8_t *start
    n[0] = mbuf_window(m, &start)
    if m.next == NULL or n[0] >= HEADERS_MAX:
        return start
    n[0] = mbuf_read(m, 0, copy, HEADERS_MAX)
    return copy


cdef inline bint has_ports(const headers_t *h, uint32_t n) noexcept nogil:
    """Whether the packet has ports at ``h.l4``, within ``n`` visible bytes; fragments have none."""
    return (not h.fragment and h.l4 + 4 <= n and (h.end == 0 or h.l4 + 4 <= h.end)
            and (h.protocol == IPPROTO_TCP or h.protocol == IPPROTO_UDP
                 or h.protocol == IPPROTO_SCTP))
