# SPDX-License-Identifier: BSD-3-Clause
"""Checks and writes the IPv4, TCP and UDP checksums of frames, in tunnels both layers' ones.

What is summed is bounded by the IP length, so that Ethernet padding stays out.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._checksum cimport chain_sum, fold16, sum16
from rtap._linux cimport VIRTIO_NET_HDR_F_NEEDS_CSUM
from rtap._parse cimport (
    HEADERS_MAX, IPPROTO_TCP, IPPROTO_UDP, TCP_CSUM_OFFSET, UDP_CSUM_OFFSET, be16, headers_of,
    headers_t, l4_pseudo_sum, parse_headers, put_be16,
)
from rtap._pool cimport mbuf_t, mbuf_write

cdef enum:
    UNKNOWN
    BAD
    GOOD
    NONE


cdef struct packet_t:           # one IP packet and what it carries
    uint32_t version, protocol, l3, l4, end, final


cdef inline packet_t inner(const headers_t *h) noexcept nogil:
    cdef packet_t q
    q.version, q.protocol, q.l3, q.l4, q.end, q.final = (
        h.version, h.protocol, h.l3, h.l4, h.end, h.final)
    return q


cdef inline packet_t outer(const headers_t *h) noexcept nogil:
    cdef packet_t q
    q.version, q.protocol, q.l3, q.l4, q.end, q.final = (
        h.outer_version, h.outer_protocol, h.outer_l3, h.outer_l4, h.outer_end, h.outer_final)
    return q


cdef uint32_t l4_bytes(const uint8_t *p, uint32_t n, const packet_t *q) noexcept nogil:
    """How many bytes a TCP or UDP checksum covers; 0 when there is none, or it cannot be told."""
    cdef uint32_t length
    if q.end == 0 or q.l4 > q.end:
        return 0
    length = q.end - q.l4
    if q.protocol == IPPROTO_TCP:
        return length if length >= 20 and q.l4 + 20 <= n else 0
    if q.protocol == IPPROTO_UDP and length >= 8 and q.l4 + 8 <= n:
        if 8 <= be16(p + q.l4 + 4) <= length:
            return be16(p + q.l4 + 4)
    return 0


cdef uint32_t verify_l4(const mbuf_t *m, const uint8_t *p, uint32_t n,
                        const packet_t *q) noexcept nogil:
    cdef uint32_t length = l4_bytes(p, n, q)
    if length == 0:
        return UNKNOWN
    if q.protocol == IPPROTO_UDP and be16(p + q.l4 + UDP_CSUM_OFFSET) == 0:
        return NONE if q.version == 4 else BAD
    if fold16(<uint64_t>chain_sum(m, q.l4, length) + l4_pseudo_sum(
            p, q.version, q.l3, q.final, q.protocol, length)) == 0xffff:
        return GOOD
    return BAD


cdef inline uint32_t ipv4_sum(const uint8_t *p, uint32_t n, const packet_t *q) noexcept nogil:
    """Of the header, or of what is in ``n`` bytes of it: another thread may write to it."""
    return sum16(p + q.l3, min(<uint32_t>(p[q.l3] & 15) * 4, n - q.l3))


cdef inline bint ipv4_good(const uint8_t *p, uint32_t n, const packet_t *q) noexcept nogil:
    return ipv4_sum(p, n, q) == 0xffff


cdef uint64_t verify_frame(const mbuf_t *m, bint l2) noexcept nogil:
    """The RX_*_CKSUM_* flags that a frame deserves.  Layer 4 is left unknown where nothing can be
    summed: fragments, other protocols, bytes that are missing."""
    cdef uint8_t copy[HEADERS_MAX]
    cdef uint32_t n
    cdef const uint8_t *p = headers_of(m, copy, &n)
    cdef headers_t h
    cdef bint whole = parse_headers(p, n, m.pkt_len, l2, &h) == 0
    return verify_parsed(m, p, n, &h, whole, True)


cdef uint64_t verify_parsed(const mbuf_t *m, const uint8_t *p, uint32_t n, const headers_t *h,
                            bint whole, bint layer4) noexcept nogil:
    """The same for a frame whose headers, at ``p``, have been parsed, with success if ``whole``;
    without ``layer4`` only IPv4 headers are looked at."""
    cdef uint32_t status = UNKNOWN
    cdef packet_t q
    cdef uint64_t flags = 0
    if h.outer_version != 0:
        q = outer(h)
        if q.version == 4 and not ipv4_good(p, n, &q):
            flags |= RX_OUTER_IP_CKSUM_BAD
        if layer4:
            status = verify_l4(m, p, n, &q)
        if status == GOOD:
            flags |= RX_OUTER_L4_CKSUM_GOOD
        elif status == BAD and q.protocol == IPPROTO_UDP and be16(p + q.l4 + 6) != 0:
            flags |= RX_OUTER_L4_CKSUM_BAD      # zero: RFC 6935 allows it for tunnels over IPv6
    q = inner(h)
    if q.version == 4:
        flags |= RX_IP_CKSUM_GOOD if ipv4_good(p, n, &q) else RX_IP_CKSUM_BAD
    if not layer4:
        return flags
    if (m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM
            and m.ol_flags & RX_L4_CKSUM_NONE == RX_L4_CKSUM_NONE):
        return flags | RX_L4_CKSUM_NONE
    if whole and not h.fragment:
        status = verify_l4(m, p, n, &q)
        if status == GOOD:
            flags |= RX_L4_CKSUM_GOOD
        elif status == BAD:
            flags |= RX_L4_CKSUM_BAD
        elif status == NONE:
            flags |= RX_L4_CKSUM_NONE
    return flags


cdef void fill_l4(mbuf_t *m, const uint8_t *p, const packet_t *q, uint32_t length) noexcept nogil:
    cdef bint udp = q.protocol == IPPROTO_UDP
    cdef uint32_t at = q.l4 + (UDP_CSUM_OFFSET if udp else TCP_CSUM_OFFSET)
    cdef uint32_t value
    cdef uint8_t field[2]
    put_be16(field, 0)
    mbuf_write(m, at, field, 2)
    value = ~fold16(<uint64_t>chain_sum(m, q.l4, length) + l4_pseudo_sum(
        p, q.version, q.l3, q.final, q.protocol, length)) & 0xffff
    if udp and value == 0:
        value = 0xffff
    put_be16(field, value)
    mbuf_write(m, at, field, 2)


cdef void fill_ipv4(mbuf_t *m, const uint8_t *p, uint32_t n, const packet_t *q) noexcept nogil:
    cdef uint32_t old = be16(p + q.l3 + 10)
    cdef uint8_t field[2]
    put_be16(field, ~fold16(<uint64_t>ipv4_sum(p, n, q) + (old ^ 0xffff)) & 0xffff)
    mbuf_write(m, q.l3 + 10, field, 2)


cdef int fill_frame(mbuf_t *m, bint l2) noexcept nogil:
    """Writes every IPv4, TCP and UDP checksum of a frame, inner ones first; an outer UDP checksum
    of zero stays.  The frame may have segments and must be the caller's to write to.

    0, also when there is nothing to write; -EINVAL when the frame's lengths contradict each other
    or its bytes."""
    cdef uint8_t copy[HEADERS_MAX]
    cdef uint32_t n, length
    cdef const uint8_t *p = headers_of(m, copy, &n)
    cdef headers_t h
    cdef packet_t q, o
    if parse_headers(p, n, m.pkt_len, l2, &h) != 0:
        return -EINVAL
    q = inner(&h)
    o = outer(&h)
    if q.version != 0 and not h.fragment and (
            q.protocol == IPPROTO_TCP or q.protocol == IPPROTO_UDP):
        length = l4_bytes(p, n, &q)
        if length == 0:
            return -EINVAL
        fill_l4(m, p, &q, length)
    if q.version == 4:
        fill_ipv4(m, p, n, &q)
    if o.version != 0 and o.protocol == IPPROTO_UDP and be16(p + o.l4 + UDP_CSUM_OFFSET) != 0:
        length = l4_bytes(p, n, &o)
        if length == 0:
            return -EINVAL
        fill_l4(m, p, &o, length)
    if o.version == 4:
        fill_ipv4(m, p, n, &o)
    return 0
