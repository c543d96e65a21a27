# SPDX-License-Identifier: BSD-3-Clause
"""Software TSO and USO, after the kernel's own (tcp_gso_segment, __udp_gso_segment).

In the virtio-net header, hdr_len is only a hint and often wrong; the length of the headers is
taken from the frame.  Headers are repeated.  IPv4 length, identification and checksum,
IPv6 length, TCP sequence number and flags, UDP length and all checksums are written anew.  The
pseudo-header sum in the frame is not used.
"""

from libc.errno cimport E2BIG, EINVAL, EMSGSIZE, ENOBUFS
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cimport rtap._core.compat as _compat
from rtap._core.flags cimport (
    RX_CKSUM_MASK, RX_IP_CKSUM_GOOD, RX_L4_CKSUM_GOOD, RX_LRO, TX_CKSUM_REQUESTS, TX_L4_MASK,
    TX_TCP_SEG, TX_UDP_SEG,
)
from rtap._core.linux cimport (
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP,
    VIRTIO_NET_HDR_GSO_UDP_L4,
)
from rtap._core.pool cimport (
    MBUF_SEGS_MAX, csum_inside, csum_place, mbuf_data, mbuf_free, mbuf_free_bulk, mbuf_guard,
    mbuf_ref, mbuf_reset, mbuf_t, mbuf_tailroom, mbuf_write, pool_get, pool_t,
)
from rtap._frames.checksum cimport copy_sum16, fold16, sum16, swap16
from rtap._frames.headers cimport (
    IPPROTO_TCP, IPPROTO_UDP, TCP_CSUM_OFFSET, TCP_CWR, TCP_FIN, TCP_PSH, UDP_CSUM_OFFSET,
)
from rtap._frames.parse cimport (
    HEADERS_MAX, be16, be32, headers_of, headers_t, l4_pseudo_sum, parse_outermost, put_be16,
)
from rtap._frames.request cimport finish_checksum, private_of
from rtap._frames.verify cimport fill_frame, fillable

cdef enum:
    TCP_FIN_PSH = TCP_FIN | TCP_PSH     # in the low byte of the flags word


cdef misfit_t check_completion(const uint8_t *p, uint32_t n, uint32_t pkt_len, bint l2,
                               const vnet_t *hdr, uint32_t *end) noexcept nogil:
    """Whether a frame's checksum can be finished, and where the covered bytes end: Ethernet padding
    is not covered."""
    cdef headers_t h
    cdef bint known = parse_outermost(p, n, pkt_len, l2, &h) == 0
    end[0] = pkt_len
    if hdr.hdr_len > pkt_len:
        return MISFIT_HDR_LEN
    if hdr.csum_start == 0:
        return MISFIT_CSUM_START
    if h.version != 0:
        if hdr.csum_start < h.l3 + (40 if h.version == 6 else (p[h.l3] & 15) * 4):
            return MISFIT_CSUM_START
        if known and h.end != 0 and hdr.csum_start < h.end:
            end[0] = h.end
    if hdr.csum_start >= end[0]:
        return MISFIT_CSUM_START
    if <uint32_t>hdr.csum_start + hdr.csum_offset + 2 > end[0]:
        return MISFIT_CSUM_OFFSET
    return FITS


cdef misfit_t complete(uint8_t *p, uint32_t n, bint l2, const vnet_t *hdr) noexcept nogil:
    """Finishes the checksum of a frame in one piece, from the sum of the pseudo-header in
    the checksum field.  As in the kernel, 0 becomes 0xffff for every protocol."""
    cdef uint32_t end, value
    cdef misfit_t misfit = check_completion(p, n, n, l2, hdr, &end)
    if misfit != FITS:
        return misfit
    value = sum16(p + hdr.csum_start, end - hdr.csum_start) ^ 0xffff
    put_be16(p + hdr.csum_start + hdr.csum_offset, value if value != 0 else 0xffff)
    return FITS


cdef misfit_t check_type(const vnet_t *hdr, bint *udp, uint32_t *version) noexcept nogil:
    cdef uint32_t kind = hdr.gso_type & ~<uint32_t>VIRTIO_NET_HDR_GSO_ECN
    if kind == VIRTIO_NET_HDR_GSO_UDP:
        return MISFIT_UFO
    udp[0] = kind == VIRTIO_NET_HDR_GSO_UDP_L4
    version[0] = (4 if kind == VIRTIO_NET_HDR_GSO_TCPV4 else
                  6 if kind == VIRTIO_NET_HDR_GSO_TCPV6 else 0)
    if not udp[0] and version[0] == 0:
        return MISFIT_GSO_TYPE
    if udp[0] and hdr.gso_type != kind:
        return MISFIT_ECN
    if udp[0] and not hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        return MISFIT_NO_CSUM
    if hdr.gso_size == 0 or hdr.gso_size == 0xffff:
        return MISFIT_GSO_SIZE
    return FITS


cdef misfit_t check_headers(const uint8_t *p, const headers_t *h, const vnet_t *hdr, bint udp,
                            uint32_t version) noexcept nogil:
    if h.version == 0 or version != 0 and h.version != version:
        return MISFIT_VERSION
    if h.fragment:
        return MISFIT_FRAGMENT
    if h.protocol != (IPPROTO_UDP if udp else IPPROTO_TCP):
        return MISFIT_PROTOCOL
    if h.auth:
        return MISFIT_AUTH
    if h.l4_len == 0 or h.end == 0:
        return MISFIT_LENGTH
    if hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        if hdr.csum_start != h.l4:
            return MISFIT_CSUM_START
        if hdr.csum_offset != (UDP_CSUM_OFFSET if udp else TCP_CSUM_OFFSET):
            return MISFIT_CSUM_OFFSET
    return FITS


cdef misfit_t plan_segments(const uint8_t *p, uint32_t n, uint32_t pkt_len, bint l2,
                            const vnet_t *hdr, plan_t *plan) noexcept nogil:
    """Checks a super-frame and its header, of which the first ``n`` bytes are at ``p``, and
    prepares the split."""
    cdef headers_t *h = &plan.h
    cdef bint udp = False
    cdef uint32_t version = 0
    cdef misfit_t misfit = check_type(hdr, &udp, &version)
    memset(plan, 0, sizeof(plan_t))
    if misfit != FITS:
        return misfit
    if hdr.hdr_len > pkt_len:
        return MISFIT_HDR_LEN
    if parse_outermost(p, n, pkt_len, l2, h) != 0:
        return MISFIT_HEADERS
    misfit = check_headers(p, h, hdr, udp, version)
    if misfit != FITS:
        return misfit
    plan.udp = udp
    plan.gso_size = hdr.gso_size
    plan.hdr_len = h.l4 + h.l4_len
    if plan.hdr_len > n:
        return MISFIT_HEADERS
    plan.payload = h.end - plan.hdr_len
    plan.count = 1
    if plan.payload <= plan.gso_size:
        return FITS
    if plan.hdr_len - h.l3 + plan.gso_size > 65535:
        return MISFIT_TOO_LONG
    plan.count = (plan.payload + plan.gso_size - 1) / plan.gso_size
    if udp and plan.count > UDP_SEGMENTS_MAX:
        return MISFIT_TOO_MANY
    if h.version == 4:
        plan.ip_id = be16(p + h.l3 + 4)
        plan.ip_sum = fold16(<uint64_t>sum16(p + h.l3, h.l3_len) + (be16(p + h.l3 + 2) ^ 0xffff)
                             + (plan.ip_id ^ 0xffff) + (be16(p + h.l3 + 10) ^ 0xffff))
    # The length is in the pseudo-header; for UDP it is in the header as well.
    plan.l4_sum = l4_pseudo_sum(p, h.version, h.l3, h.final, h.protocol, 0)
    if udp:
        plan.l4_sum = fold16(<uint64_t>plan.l4_sum + sum16(p + h.l4, 4))
        return FITS
    plan.seq = be32(p + h.l4 + 4)
    plan.flags = be16(p + h.l4 + 12)
    plan.l4_sum = fold16(<uint64_t>plan.l4_sum + sum16(p + h.l4, 4) + sum16(p + h.l4 + 8, 4)
                         + sum16(p + h.l4 + 14, 2) + sum16(p + h.l4 + 18, h.l4_len - 18))
    return FITS


cdef void write_header(const plan_t *plan, uint8_t *out, uint32_t i, uint32_t payload,
                       uint32_t payload_sum) noexcept nogil:
    """Turns a copy of the super-frame's headers into those of frame ``i``, which has ``payload``
    bytes of payload with the sum ``payload_sum``."""
    cdef uint8_t *ip = out + plan.h.l3
    cdef uint8_t *l4 = out + plan.h.l4
    cdef uint32_t length = plan.hdr_len - plan.h.l3 + payload
    cdef uint32_t l4_bytes = plan.h.l4_len + payload
    cdef uint32_t ip_id, seq, flags, value
    if plan.h.version == 4:
        ip_id = plan.ip_id + i & 0xffff
        put_be16(ip + 2, length)
        put_be16(ip + 4, ip_id)
        put_be16(ip + 10, fold16(<uint64_t>plan.ip_sum + length + ip_id) ^ 0xffff)
    else:
        put_be16(ip + 4, length - 40)
    if plan.udp:
        put_be16(l4 + 4, l4_bytes)
        value = fold16(<uint64_t>plan.l4_sum + payload_sum + 2 * l4_bytes) ^ 0xffff
        put_be16(l4 + UDP_CSUM_OFFSET, value if value != 0 else 0xffff)
        return
    seq = plan.seq + i * plan.gso_size
    flags = plan.flags
    if i > 0:
        flags &= ~<uint32_t>TCP_CWR
    if i + 1 < plan.count:
        flags &= ~<uint32_t>TCP_FIN_PSH
    put_be16(l4 + 4, seq >> 16)
    put_be16(l4 + 6, seq & 0xffff)
    put_be16(l4 + 12, flags)
    put_be16(l4 + TCP_CSUM_OFFSET, fold16(<uint64_t>plan.l4_sum + payload_sum + l4_bytes
                                          + (seq >> 16) + (seq & 0xffff) + flags) ^ 0xffff)


cdef void write_segment(const plan_t *plan, const uint8_t *p, uint32_t i,
                        uint8_t *out) noexcept nogil:
    """Writes frame ``i`` of several, ``hdr_len + segment_payload(plan, i)`` bytes, to ``out``."""
    cdef uint32_t k = segment_payload(plan, i)
    memcpy(out, p, plan.hdr_len)
    write_header(plan, out, i, k,
                 copy_sum16(out + plan.hdr_len, p + plan.hdr_len + i * plan.gso_size, k))


# ---- mbufs


cdef bint cursor_read(cursor_t *c, uint8_t *dst, uint32_t n, uint32_t *total) noexcept nogil:
    """Copies ``n`` bytes and adds up their sum; False if another thread has cut the frame
    meanwhile."""
    cdef uint64_t parts = 0
    cdef uint32_t done = 0, k, part
    cdef uint8_t *start
    while done < n:
        k = min(n - done, cursor_piece(c, &start))
        if k == 0:
            return False
        part = copy_sum16(dst + done, start, k)
        parts += swap16(part) if done & 1 else part
        c.offset += k
        done += k
    total[0] = fold16(parts)
    return True


cdef uint32_t vnet_of(const mbuf_t *m, bint l2, vnet_t *hdr) noexcept nogil:
    """The offload fields of an mbuf as a virtio-net header; 0 when the frame need not be split.

    A frame that came as a super-frame has the place of its checksum; for a frame that the
    application wants split, the place is looked up."""
    cdef uint8_t copy[HEADERS_MAX]
    cdef headers_t h
    cdef uint32_t n, start
    cdef const uint8_t *p
    memset(hdr, 0, sizeof(vnet_t))
    if m.ol_flags & RX_LRO and m.gso_type != VIRTIO_NET_HDR_GSO_NONE:
        hdr.gso_type = m.gso_type
        hdr.gso_size = m.tso_segsz
        if m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
            hdr.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
            if csum_place(m, &start) and start <= 0xffff:
                hdr.csum_start = <uint16_t>start
            hdr.csum_offset = m.csum_offset
        return 1
    if m.ol_flags & (TX_TCP_SEG | TX_UDP_SEG):
        p = headers_of(m, copy, &n)
        parse_outermost(p, n, m.pkt_len, l2, &h)
        hdr.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
        hdr.gso_size = m.tso_segsz
        hdr.csum_start = <uint16_t>h.l4
        if m.ol_flags & TX_UDP_SEG:
            hdr.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
            hdr.csum_offset = UDP_CSUM_OFFSET
        else:
            hdr.gso_type = (VIRTIO_NET_HDR_GSO_TCPV4 if h.version == 4 else
                            VIRTIO_NET_HDR_GSO_TCPV6)
            hdr.csum_offset = TCP_CSUM_OFFSET
        return 1
    return 0


cdef misfit_t plan_mbuf(const mbuf_t *m, bint l2, plan_t *plan) noexcept nogil:
    """Checks a frame that is to be sent or received as plain frames, ``plan.count`` of them.
    """
    cdef uint8_t copy[HEADERS_MAX]
    cdef vnet_t hdr
    cdef uint32_t n
    cdef const uint8_t *p
    if not vnet_of(m, l2, &hdr):
        memset(plan, 0, sizeof(plan_t))
        plan.count = 1
        return FITS
    p = headers_of(m, copy, &n)
    return plan_segments(p, n, m.pkt_len, l2, &hdr, plan)


cdef inline void take_metadata(mbuf_t *out, const mbuf_t *m, const plan_t *plan) noexcept nogil:
    out.port = m.port
    out.packet_type = m.packet_type
    out.l2_len = <uint16_t>plan.h.l3
    out.l3_len = plan.h.l3_len
    out.l4_len = plan.h.l4_len
    out.vlan_tci = m.vlan_tci
    out.vlan_tci_outer = m.vlan_tci_outer
    out.ol_flags = m.ol_flags & ~(RX_LRO | TX_CKSUM_REQUESTS | RX_CKSUM_MASK) | RX_L4_CKSUM_GOOD
    if plan.h.version == 4:
        out.ol_flags |= RX_IP_CKSUM_GOOD


cdef mbuf_t *add_segment(mbuf_t *head, mbuf_t *tail, pool_t *pool) noexcept nogil:
    """A new empty segment behind ``tail``; NULL when the pool is empty."""
    cdef mbuf_t *seg
    if pool_get(pool, &seg, 1) == 0:
        return NULL
    mbuf_reset(seg)
    tail.next = seg
    head.nb_segs += 1
    return seg


cdef inline mbuf_t *room_behind(mbuf_t *head, mbuf_t *seg) noexcept nogil:
    """``seg``, the last segment of ``head``, or a new one if that is full; NULL when the pool is
    empty."""
    return seg if mbuf_tailroom(seg) > 0 else add_segment(head, seg, head.pool)


cdef int write_chain(mbuf_t *head, uint8_t *headers, const plan_t *plan, uint32_t i,
                     cursor_t *c) noexcept nogil:
    """Fills the empty ``head``, and more segments of its pool, with a frame that does not fit
    into one slot; 0, -ENOBUFS, or -EINVAL if the frame has been cut meanwhile."""
    cdef uint32_t k = segment_payload(plan, i), done = 0, part, n
    cdef uint64_t total = 0
    cdef mbuf_t *seg = head
    cdef uint32_t at = 0
    # Room for the headers comes first: they are written after the payload is summed.
    while at < plan.hdr_len:
        seg = room_behind(head, seg)
        if seg == NULL:
            return -ENOBUFS
        n = min(mbuf_tailroom(seg), plan.hdr_len - at)
        seg.data_len += n
        at += n
    while done < k:
        seg = room_behind(head, seg)
        if seg == NULL:
            return -ENOBUFS
        n = min(mbuf_tailroom(seg), k - done)
        if not cursor_read(c, mbuf_data(seg) + seg.data_len, n, &part):
            return -EINVAL
        total += swap16(part) if done & 1 else part
        seg.data_len += n
        done += n
    head.pkt_len = plan.hdr_len + k
    write_header(plan, headers, i, k, fold16(total))
    if plan.hdr_len <= head.data_len:
        memcpy(mbuf_data(head), headers, plan.hdr_len)
    else:
        mbuf_write(head, 0, headers, plan.hdr_len)
    return 0


cdef int refer_chain(mbuf_t *head, uint8_t *headers, const plan_t *plan, uint32_t i,
                     cursor_t *c) noexcept nogil:
    """Fills the empty ``head`` with headers, and appends segments that borrow the payload in its
    place, and no bytes around it; 0, -ENOBUFS, or -EINVAL if the frame has been cut
    meanwhile."""
    cdef uint32_t k = segment_payload(plan, i), done = 0, n, part
    cdef uint64_t total = 0
    cdef mbuf_t *seg = head
    cdef mbuf_t *owner
    cdef uint8_t *start
    while done < k:
        n = min(k - done, cursor_piece(c, &start))
        if n == 0:
            return -EINVAL
        seg = add_segment(head, seg, head.pool)
        if seg == NULL:
            return -ENOBUFS
        owner = c.seg.direct if c.seg.direct != NULL else <mbuf_t *>c.seg
        mbuf_ref(owner)
        seg.direct = owner
        seg.buf = start
        seg.buf_len = seg.data_len = n
        seg.data_off = 0
        part = sum16(start, n)
        total += swap16(part) if done & 1 else part
        c.offset += n
        done += n
    _compat.check(plan.hdr_len <= mbuf_tailroom(head))
    write_header(plan, headers, i, k, fold16(total))
    memcpy(mbuf_data(head), headers, plan.hdr_len)
    head.data_len = plan.hdr_len
    head.pkt_len = plan.hdr_len + k
    return 0


cdef int write_whole(mbuf_t *out, const uint8_t *headers, const plan_t *plan, uint32_t i,
                     cursor_t *c) noexcept nogil:
    """Fills the empty ``out``, whose slot has room for the frame; 0, or -EINVAL if the frame has
    been cut meanwhile."""
    cdef uint32_t k = segment_payload(plan, i), part
    cdef uint8_t *dst = mbuf_data(out)
    _compat.check(plan.hdr_len + k <= mbuf_tailroom(out))
    if not cursor_read(c, dst + plan.hdr_len, k, &part):
        return -EINVAL
    memcpy(dst, headers, plan.hdr_len)
    write_header(plan, dst, i, k, part)
    out.data_len = out.pkt_len = plan.hdr_len + k
    return 0


cdef uint32_t write_some(const mbuf_t *m, const plan_t *plan, uint8_t *headers, bint refer,
                         uint32_t first, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    """Writes ``n`` frames from number ``first`` on into the reset mbufs ``out``; returns how many
    are whole before an ``error``: -ENOBUFS, or -EINVAL if the frame has been cut meanwhile."""
    cdef uint32_t i
    cdef cursor_t c
    c.seg = m
    c.offset = plan.hdr_len + first * plan.gso_size
    for i in range(n):
        take_metadata(out[i], m, plan)
        if refer:
            error[0] = refer_chain(out[i], headers, plan, first + i, &c)
        elif plan.hdr_len + segment_payload(plan, first + i) > mbuf_tailroom(out[i]):
            error[0] = write_chain(out[i], headers, plan, first + i, &c)
        else:
            error[0] = write_whole(out[i], headers, plan, first + i, &c)
        if error[0] != 0:
            return i
        mbuf_guard(out[i])
    return n


cdef bint refers(const mbuf_t *m, const pool_t *pool, const plan_t *plan) noexcept nogil:
    """Whether frames borrow their payloads from ``m``.  A reference costs two more mbufs and a
    second place to send from; by measurement, it pays only above 9000 bytes."""
    return (plan.gso_size >= REFERENCE_MIN and plan.hdr_len <= pool.data_room
            and m.pkt_len / m.nb_segs >= REFERENCE_MIN
            and 2 * plan.count + m.nb_segs <= pool.size)


cdef uint32_t make_some(const mbuf_t *m, pool_t *pool, const plan_t *plan, bint refer,
                        uint32_t first, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    """Makes ``n`` frames from number ``first`` on, in mbufs of ``pool``, or fewer and an ``error``:
    -ENOBUFS if it has too few slots, -EINVAL if the frame has been cut since it was planned.
    """
    cdef uint8_t headers[HEADER_ROOM]
    cdef uint32_t in_one_piece, got, made = 0, i
    cdef const uint8_t *p = headers_of(m, headers, &in_one_piece)
    error[0] = 0
    if in_one_piece < plan.hdr_len:
        error[0] = -EINVAL
        return 0
    if p != headers:
        memcpy(headers, p, plan.hdr_len)
    got = pool_get(pool, out, n)
    for i in range(got):
        mbuf_reset(out[i])
    made = write_some(m, plan, headers, refer, first, out, got, error)
    if made < got:
        mbuf_free_bulk(out + made, got - made)
    elif got < n:
        error[0] = -ENOBUFS
    return made


cdef int finish_one(mbuf_t *m, bint l2, mbuf_t **out) noexcept nogil:
    """Makes a plain frame of one that is too short to be split, and finishes its checksum; returns
    the frame itself, or a copy if others see it."""
    cdef uint64_t asked = m.ol_flags & (RX_LRO | TX_TCP_SEG | TX_UDP_SEG)
    cdef uint64_t flags = m.ol_flags
    cdef mbuf_t *own
    cdef int error = 0
    out[0] = m
    if asked == 0:
        return finish_checksum(out)
    own = private_of(m)
    if own == NULL:
        return -ENOBUFS
    own.ol_flags &= ~(RX_LRO | TX_TCP_SEG | TX_UDP_SEG | TX_L4_MASK)
    if asked & RX_LRO:
        error = finish_checksum(&own)
    else:
        error = fill_frame(own, l2)
    if error != 0:
        own.ol_flags = flags
        if own != m:
            mbuf_free(own)
        return error
    own.gso_type = VIRTIO_NET_HDR_GSO_NONE
    own.vnet_flags = 0
    own.tso_segsz = 0
    if own != m:
        mbuf_free(m)
    out[0] = own
    return 0


cdef misfit_t check_one(const mbuf_t *m, bint l2) noexcept nogil:
    """Whether ``finish_one`` can finish the checksum of a frame that is not split.  ``plan_mbuf``
    does not look: a queue finds out when it finishes the frame."""
    cdef uint64_t asked = m.ol_flags & (RX_LRO | TX_TCP_SEG | TX_UDP_SEG)
    cdef uint32_t start
    if asked != 0 and not asked & RX_LRO:
        return FITS if fillable(m, l2) else MISFIT_CONTRADICTION
    if m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM and not csum_inside(m, &start):
        return MISFIT_OUTSIDE
    return FITS


cdef uint32_t slots_of(const plan_t *plan, uint32_t i, const pool_t *pool) noexcept nogil:
    """Slots of ``pool`` that frame ``i`` takes when its payload is copied."""
    return (plan.hdr_len + segment_payload(plan, i) + pool.data_room - 1) / pool.data_room


cdef bint never_fits(const plan_t *plan, const pool_t *pool) noexcept nogil:
    """Whether all frames together take more slots than there are."""
    return (<uint64_t>(plan.count - 1) * slots_of(plan, 0, pool)
            + slots_of(plan, plan.count - 1, pool) > pool.size)


cdef int plan_split(const mbuf_t *m, bint l2, plan_t *plan) noexcept nogil:
    """0 or -EINVAL."""
    return -EINVAL if plan_mbuf(m, l2, plan) != FITS or plan.hdr_len > HEADER_ROOM else 0


cdef int gso_whole(mbuf_t *m, pool_t *pool, bint l2, bint refer, mbuf_t **out,
                   uint32_t room) noexcept nogil:
    """Splits a super-frame, one received or one with TX_TCP_SEG or TX_UDP_SEG, into mbufs of
    ``pool``.  If a frame need not be split, an unfinished checksum is finished.
    With ``refer`` long payloads stay in place, as long as a frame refers to them.

    Returns the number of frames in ``out``; the frame is then consumed.  Errors leave it unchanged:
    -EINVAL when it does not match its own offload fields or was cut meanwhile, -EMSGSIZE when it
    makes more than ``room`` frames, -ENOBUFS when the pool has too few slots now, -E2BIG when it
    never has enough."""
    cdef plan_t plan
    cdef uint32_t made
    cdef int error = plan_split(m, l2, &plan)
    if error != 0:
        return error
    if plan.count > room:
        return -EMSGSIZE
    if plan.count == 1:
        error = finish_one(m, l2, out)
        return error if error != 0 else 1
    refer = refer and refers(m, pool, &plan)
    made = make_some(m, pool, &plan, refer, 0, out, plan.count, &error)
    if made < plan.count:
        mbuf_free_bulk(out, made)
        return -E2BIG if error == -ENOBUFS and not refer and never_fits(&plan, pool) else error
    mbuf_free(m)
    return <int>plan.count


cdef int gso_part(mbuf_t *m, pool_t *pool, bint l2, bint refer, uint32_t first, mbuf_t **out,
                  uint32_t room, uint32_t *left) noexcept nogil:
    """As gso_whole, but makes only the frames from number ``first`` on, as many as there are room
    and slots for.  ``left`` says how many are still to come; when that is 0 the frame is
    consumed."""
    cdef plan_t plan
    cdef uint32_t want, got, made = 0
    cdef int error = 0
    if plan_split(m, l2, &plan) != 0 or plan.count == 1 or first >= plan.count:
        return -EINVAL          # another thread has cut it since its first frames were made
    refer = refer and refers(m, pool, &plan)
    left[0] = plan.count - first
    room = min(room, left[0])
    while made < room:          # chains one by one: heads alone would use up the slots
        want = room - made if refer or slots_of(&plan, 0, pool) == 1 else 1
        got = make_some(m, pool, &plan, refer, first + made, out + made, want, &error)
        made += got
        if got < want:
            break
    if made == 0:
        return error
    left[0] -= made
    if left[0] == 0:
        mbuf_free(m)
    return <int>made


cdef int gso_check(const mbuf_t *m, const pool_t *pool, bint l2, uint32_t most) noexcept nogil:
    """How many frames a frame makes; -EINVAL when it does not match its own offload fields or makes
    more than ``most``, -E2BIG when one of them needs more slots than the pool has."""
    cdef plan_t plan
    if plan_split(m, l2, &plan) != 0 or plan.count > most:
        return -EINVAL
    if slots_of(&plan, 0, pool) > min(pool.size, <uint32_t>MBUF_SEGS_MAX):
        return -E2BIG
    return <int>plan.count
