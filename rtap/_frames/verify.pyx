# SPDX-License-Identifier: BSD-3-Clause
"""Checks and writes the IPv4, TCP and UDP checksums of frames, in tunnels those of both layers.

The IP length bounds a sum, so that Ethernet padding stays out.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._core.flags cimport (
    RX_CKSUM_MASK, RX_IP_CKSUM_BAD, RX_IP_CKSUM_GOOD, RX_L4_CKSUM_BAD, RX_L4_CKSUM_GOOD,
    RX_L4_CKSUM_NONE, RX_LRO, RX_OUTER_IP_CKSUM_BAD, RX_OUTER_L4_CKSUM_BAD, RX_OUTER_L4_CKSUM_GOOD,
)
from rtap._core.linux cimport VIRTIO_NET_HDR_F_NEEDS_CSUM
from rtap._core.pool cimport csum_inside, mbuf_read, mbuf_t, mbuf_window, mbuf_write
from rtap._frames.checksum cimport chain_sum, fold16, sum16, swap16
from rtap._frames.headers cimport IPPROTO_TCP, IPPROTO_UDP, TCP_CSUM_OFFSET, UDP_CSUM_OFFSET
from rtap._frames.parse cimport (
    HEADERS_MAX, be16, headers_of, headers_t, l4_pseudo_sum, parse_headers, parse_outermost,
    put_be16,
)

cdef enum:
    UNKNOWN
    BAD
    GOOD
    NONE


cdef struct packet_t:           # one IP packet and its payload
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
    """How many bytes a TCP or UDP checksum covers; 0 when there is none, or when it is unknown."""
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


cdef bint unfinished_at(const mbuf_t *m, uint32_t *start) noexcept nogil:
    """Where the bytes covered by an unfinished checksum begin; false for a frame without one, and
    when the place is no longer in the frame."""
    return (m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0
            and (m.ol_flags & RX_LRO != 0 or m.ol_flags & RX_L4_CKSUM_NONE == RX_L4_CKSUM_NONE)
            and csum_inside(m, start))


cdef inline int parse(const mbuf_t *m, const uint8_t *p, uint32_t n, bint l2,
                      headers_t *h) noexcept nogil:
    """Parses the headers with checksums.  A UDP super-frame is parsed without looking into tunnels:
    its datagrams belong to a tunnel only after the split."""
    if m.ol_flags & RX_LRO:
        return parse_outermost(p, n, m.pkt_len, l2, h)
    return parse_headers(p, n, m.pkt_len, l2, h)


cdef inline bint encloses(const packet_t *q, uint32_t length, uint32_t start) noexcept nogil:
    return q.l4 < start < q.l4 + length


cdef uint64_t sum_around(const mbuf_t *m, const packet_t *q, uint32_t start) noexcept nogil:
    """Sum from a TCP or UDP header on, as it will be when the unfinished checksum of the bytes from
    ``start`` on is finished: these bytes then sum up to the complement of the present checksum
    field (Linux: local checksum offload)."""
    cdef uint8_t field[2]
    cdef uint32_t rest
    if mbuf_read(m, start + m.csum_offset, field, 2) != 2:
        return 0
    rest = be16(field) ^ 0xffff
    return (<uint64_t>chain_sum(m, q.l4, start - q.l4)
            + (swap16(rest) if (start - q.l4) & 1 else rest))


cdef inline uint64_t l4_sum(const mbuf_t *m, const uint8_t *p, const packet_t *q, uint32_t length,
                            uint32_t start) noexcept nogil:
    """Sum of the bytes that a TCP or UDP checksum covers; an unfinished one inside them counts as
    finished."""
    cdef uint64_t total = l4_pseudo_sum(p, q.version, q.l3, q.final, q.protocol, length)
    if start != 0 and encloses(q, length, start):
        return total + sum_around(m, q, start)
    return total + chain_sum(m, q.l4, length)


cdef uint32_t verify_l4(const mbuf_t *m, const uint8_t *p, uint32_t n, const packet_t *q,
                        uint32_t start) noexcept nogil:
    """``start``: where the bytes of an unfinished checksum begin, or 0."""
    cdef uint32_t length = l4_bytes(p, n, q), field
    if length == 0:
        return UNKNOWN
    field = be16(p + q.l4 + (UDP_CSUM_OFFSET if q.protocol == IPPROTO_UDP else TCP_CSUM_OFFSET))
    if start != 0 and start == q.l4:    # has to be the pseudo-header's sum, or the result is wrong
        return NONE if fold16(<uint64_t>(field ^ 0xffff) + l4_pseudo_sum(
            p, q.version, q.l3, q.final, q.protocol, length)) in (0, 0xffff) else BAD
    if q.protocol == IPPROTO_UDP and field == 0:
        return NONE if q.version == 4 else BAD
    return GOOD if fold16(l4_sum(m, p, q, length, start)) == 0xffff else BAD


cdef inline uint32_t ipv4_sum(const uint8_t *p, uint32_t n, const packet_t *q) noexcept nogil:
    """Sum of the header, or of ``n`` bytes if it is longer: another thread may write to it."""
    return sum16(p + q.l3, min(<uint32_t>(p[q.l3] & 15) * 4, n - q.l3))


cdef inline bint ipv4_good(const uint8_t *p, uint32_t n, const packet_t *q) noexcept nogil:
    return ipv4_sum(p, n, q) == 0xffff


cdef uint64_t verify_frame(const mbuf_t *m, bint l2) noexcept nogil:
    """The right RX_*_CKSUM_* flags for a frame.  Layer 4 is unknown when it cannot be
    summed: fragments, other protocols, missing bytes.

    An unfinished checksum is RX_L4_CKSUM_NONE, or bad when its place does not hold the sum of the
    pseudo-header."""
    cdef uint8_t copy[HEADERS_MAX]
    cdef uint32_t n
    cdef const uint8_t *p = headers_of(m, copy, &n)
    cdef headers_t h
    cdef bint whole = parse(m, p, n, l2, &h) == 0
    return verify_parsed(m, p, n, &h, whole, True)


cdef void note_verdict(mbuf_t *m, uint64_t found) noexcept nogil:
    """Sets the flags of a frame to the result of ``verify_frame``.  A frame with an unfinished
    checksum keeps its flag, or nobody would finish it."""
    cdef uint32_t start
    if unfinished_at(m, &start):
        found |= RX_L4_CKSUM_NONE
    m.ol_flags = m.ol_flags & ~RX_CKSUM_MASK | found


cdef uint64_t verify_parsed(const mbuf_t *m, const uint8_t *p, uint32_t n, const headers_t *h,
                            bint whole, bint layer4) noexcept nogil:
    """The same for a frame whose headers, at ``p``, have been parsed, with success if ``whole``;
    without ``layer4`` only IPv4 headers are checked."""
    cdef uint32_t status = UNKNOWN, start = 0
    cdef packet_t q
    cdef uint64_t flags = 0
    cdef bint unfinished = unfinished_at(m, &start)
    if not unfinished:
        start = 0
    if h.outer_version != 0:
        q = outer(h)
        if q.version == 4 and not ipv4_good(p, n, &q):
            flags |= RX_OUTER_IP_CKSUM_BAD
        if layer4:
            status = verify_l4(m, p, n, &q, start)
        if status == GOOD:
            flags |= RX_OUTER_L4_CKSUM_GOOD
        elif status == BAD and q.protocol == IPPROTO_UDP and be16(p + q.l4 + 6) != 0:
            flags |= RX_OUTER_L4_CKSUM_BAD      # zero: RFC 6935 allows it for tunnels over IPv6
    status = UNKNOWN
    q = inner(h)
    if q.version == 4:
        flags |= RX_IP_CKSUM_GOOD if ipv4_good(p, n, &q) else RX_IP_CKSUM_BAD
    if not layer4:
        return flags
    if whole and not h.fragment:
        status = verify_l4(m, p, n, &q, start)
        if status == BAD:
            return flags | RX_L4_CKSUM_BAD
        if status == GOOD and not unfinished:
            return flags | RX_L4_CKSUM_GOOD
    return flags | RX_L4_CKSUM_NONE if unfinished or status == NONE else flags


cdef inline void put_field(mbuf_t *m, uint32_t at, uint32_t value) noexcept nogil:
    """Writes a 16-bit field of a frame."""
    cdef uint8_t field[2]
    cdef uint8_t *start
    if at + 2 <= mbuf_window(m, &start):
        put_be16(start + at, value)
    else:
        put_be16(field, value)
        mbuf_write(m, at, field, 2)


cdef void fill_l4(mbuf_t *m, const uint8_t *p, const packet_t *q, uint32_t length,
                  uint32_t start) noexcept nogil:
    cdef bint udp = q.protocol == IPPROTO_UDP
    cdef uint32_t at = q.l4 + (UDP_CSUM_OFFSET if udp else TCP_CSUM_OFFSET)
    cdef uint32_t value
    cdef uint64_t total
    if start != 0 and start == q.l4:
        put_field(m, at, l4_pseudo_sum(p, q.version, q.l3, q.final, q.protocol, length))
        return
    if start == 0:              # the old value of the field is subtracted again
        total = l4_sum(m, p, q, length, 0) + (be16(p + at) ^ 0xffff)
    else:
        put_field(m, at, 0)
        total = l4_sum(m, p, q, length, start)
    value = ~fold16(total) & 0xffff
    put_field(m, at, 0xffff if udp and value == 0 else value)


cdef void fill_ipv4(mbuf_t *m, const uint8_t *p, uint32_t n, const packet_t *q) noexcept nogil:
    cdef uint32_t old = be16(p + q.l3 + 10)
    put_field(m, q.l3 + 10, ~fold16(<uint64_t>ipv4_sum(p, n, q) + (old ^ 0xffff)) & 0xffff)


cdef inline int fill(mbuf_t *m, bint l2, uint32_t start, bint write) noexcept nogil:
    cdef uint8_t copy[HEADERS_MAX]
    cdef uint32_t n, length
    cdef const uint8_t *p = headers_of(m, copy, &n)
    cdef headers_t h
    cdef packet_t q
    if parse(m, p, n, l2, &h) != 0:
        return -EINVAL
    q = inner(&h)
    if q.version != 0 and not h.fragment and (
            q.protocol == IPPROTO_TCP or q.protocol == IPPROTO_UDP):
        length = l4_bytes(p, n, &q)
        if length == 0:
            return -EINVAL
        # Around an unfinished checksum this is the checksum of an unknown tunnel, which may have
        # none.
        if write and (not encloses(&q, length, start) or be16(p + q.l4 + UDP_CSUM_OFFSET) != 0):
            fill_l4(m, p, &q, length, start)
    if write and q.version == 4:
        fill_ipv4(m, p, n, &q)
    if h.outer_version == 0:
        return 0
    q = outer(&h)
    if q.protocol == IPPROTO_UDP and (start == q.l4 or be16(p + q.l4 + UDP_CSUM_OFFSET) != 0):
        length = l4_bytes(p, n, &q)
        if length == 0:
            return -EINVAL
        if write:
            fill_l4(m, p, &q, length, start)
    if write and q.version == 4:
        fill_ipv4(m, p, n, &q)
    return 0


cdef int fill_frame(mbuf_t *m, bint l2) noexcept nogil:
    """Writes every IPv4, TCP and UDP checksum of a frame, inner ones first; an outer UDP checksum
    of zero stays.  The frame may have segments; the caller must be allowed to write to it.

    0, also when there is nothing to write; -EINVAL when the frame's lengths contradict each other
    or its bytes."""
    return fill(m, l2, 0, True)


cdef bint fillable(const mbuf_t *m, bint l2) noexcept nogil:
    """Whether fill_frame can write the checksums of a frame."""
    return fill(<mbuf_t *>m, l2, 0, False) == 0


cdef int fill_unfinished(mbuf_t *m, bint l2) noexcept nogil:
    """The same for a frame with an unfinished checksum, such as a super-frame.  The unfinished
    field gets the sum of the pseudo-header, and checksums around it become right.  If the
    unfinished checksum is neither TCP's nor UDP's, only the checksums around it are written."""
    cdef uint32_t start
    return fill(m, l2, start if unfinished_at(m, &start) else 0, True)
