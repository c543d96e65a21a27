# SPDX-License-Identifier: BSD-3-Clause
"""The application's offload requests: the TX_* flags in mbufs of frames to send."""

from libc.errno cimport EINVAL, ENOBUFS
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memmove

cimport rtap._core.compat as _compat
from rtap._core.flags cimport (
    RX_L4_CKSUM_NONE, RX_LRO, TX_CKSUM_REQUESTS, TX_IP_CKSUM, TX_L4_MASK, TX_QINQ, TX_REQUESTS,
    TX_TCP_CKSUM, TX_TCP_SEG, TX_TUNNEL_MASK, TX_UDP_CKSUM, TX_UDP_SEG, TX_VLAN,
)
from rtap._core.linux cimport (
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
)
from rtap._core.pool cimport (
    PKT_LEN_MAX, csum_inside, mbuf_copy, mbuf_data, mbuf_free, mbuf_is_private, mbuf_t,
    mbuf_tailroom, mbuf_write,
)
from rtap._frames.checksum cimport chain_sum, sum16
from rtap._frames.headers cimport (
    ADDRESSES_LEN, ETHERTYPE_QINQ, ETHERTYPE_VLAN, IPPROTO_TCP, IPPROTO_UDP, TCP_CSUM_OFFSET,
    TCP_CWR, UDP_CSUM_OFFSET, VLAN_HDR_LEN,
)
from rtap._frames.parse cimport be16, headers_t, l4_pseudo_sum, parse_outermost, put_be16

cdef mbuf_t *private_of(mbuf_t *m) noexcept nogil:
    """The frame itself if nobody else can see it, else a copy, which the caller has to free; NULL
    when there is no buffer for one."""
    cdef mbuf_t *seg = m
    while seg != NULL and mbuf_is_private(seg):
        seg = seg.next
    return m if seg == NULL else mbuf_copy(m)


cdef int make_private(mbuf_t **frame) noexcept nogil:
    """Replaces a frame that others can see by a copy; -ENOBUFS when there is no buffer for it."""
    cdef mbuf_t *own = private_of(frame[0])
    if own == NULL:
        return -ENOBUFS
    replace(frame, own)
    return 0


cdef inline void replace(mbuf_t **frame, mbuf_t *own) noexcept nogil:
    if own != frame[0]:
        mbuf_free(frame[0])
        frame[0] = own


cdef int insert_tags(mbuf_t *m, uint64_t asked) noexcept nogil:
    """Puts one or two VLAN tags behind the addresses of a private frame; 0, or
    -EINVAL when its first segment does not hold the addresses or has no room for the tags."""
    cdef uint32_t n = 2 * VLAN_HDR_LEN if asked & TX_QINQ else VLAN_HDR_LEN
    cdef uint8_t *h = mbuf_data(m)
    if m.data_len < ADDRESSES_LEN or m.pkt_len > PKT_LEN_MAX:
        return -EINVAL
    if m.data_off >= n:
        _compat.unpoison(h - n, n)
        memmove(h - n, h, ADDRESSES_LEN)
        m.data_off -= n
        h -= n
    elif mbuf_tailroom(m) >= n:
        _compat.unpoison(h + m.data_len, n)
        memmove(h + ADDRESSES_LEN + n, h + ADDRESSES_LEN, m.data_len - ADDRESSES_LEN)
        m.csum_at += n
    else:
        return -EINVAL
    m.data_len += n
    m.pkt_len += n
    h += ADDRESSES_LEN
    if asked & TX_QINQ:
        put_be16(h, ETHERTYPE_QINQ)
        put_be16(h + 2, m.vlan_tci_outer)
        h += VLAN_HDR_LEN
    put_be16(h, ETHERTYPE_VLAN)
    put_be16(h + 2, m.vlan_tci)
    if asked & TX_TUNNEL_MASK:
        m.outer_l2_len += <uint16_t>n
    else:
        m.l2_len += <uint16_t>n
    return 0


cdef int take_requests(mbuf_t **frame, bint l2) noexcept nogil:
    """Does rtap's part of the application's TX_* requests.  It inserts tags, and brings the frame
    into the form of one that came with a header: it writes IP checksum and pseudo-header sum, and
    notes the place of the checksum and the segment size.

    0; -EINVAL when the frame does not match l2_len and l3_len, or has no room for tags; -ENOBUFS
    when it is shared and there is no buffer to copy it to.  Each flag is cleared when its request
    is done, so every later call gives the same result, and nothing is done twice."""
    cdef uint64_t asked = frame[0].ol_flags
    cdef int rc = 0
    if make_private(frame) != 0:
        return -ENOBUFS
    frame[0].ol_flags &= ~TX_REQUESTS
    if asked & (TX_VLAN | TX_QINQ):
        rc = insert_tags(frame[0], asked) if l2 else -EINVAL
        if rc == 0:
            asked &= ~(TX_VLAN | TX_QINQ)
    if rc == 0 and asked & TX_CKSUM_REQUESTS:
        rc = take_checksum(frame[0], asked)
    if rc != 0:
        frame[0].ol_flags |= asked & TX_REQUESTS
    return rc


cdef void cut(mbuf_t *m, uint32_t n) noexcept nogil:
    """Shortens a frame to its first ``n`` bytes, at least one; later segments go back."""
    cdef mbuf_t *seg = m
    cdef uint32_t before = 0
    if m.pkt_len <= n:
        return
    m.pkt_len = n
    m.nb_segs = 1
    while seg.data_len < n - before and seg.next != NULL:
        before += seg.data_len
        seg = seg.next
        m.nb_segs += 1
    seg.data_len = min(seg.data_len, n - before)
    if seg.next != NULL:
        mbuf_free(seg.next)
        seg.next = NULL


cdef int take_checksum(mbuf_t *m, uint64_t asked) noexcept nogil:
    cdef bint udp = asked & TX_UDP_SEG != 0 or asked & TX_L4_MASK == TX_UDP_CKSUM
    cdef bint tcp = asked & TX_TCP_SEG != 0 or asked & TX_L4_MASK == TX_TCP_CKSUM
    cdef uint32_t l3, l4, l4_bytes, least, total
    cdef uint32_t protocol = IPPROTO_UDP if udp else IPPROTO_TCP
    cdef uint8_t *h = mbuf_data(m)
    cdef headers_t ip           # from l3 on
    cdef int version
    cdef bint whole             # not to be split
    l3 = m.l2_len + (m.outer_l2_len + m.outer_l3_len if asked & TX_TUNNEL_MASK else 0)
    l4 = l3 + m.l3_len
    if l4 > m.data_len or m.l3_len < 20 or udp == tcp and asked & ~TX_IP_CKSUM & TX_CKSUM_REQUESTS:
        return -EINVAL
    version = h[l3] >> 4
    if version == 4:
        total = be16(h + l3 + 2)
        if m.l3_len != (h[l3] & 15) * 4 or total < m.l3_len:
            return -EINVAL
        l4_bytes = total - m.l3_len
    elif version == 6 and m.l3_len >= 40:
        if be16(h + l3 + 4) + 40 < m.l3_len:
            return -EINVAL
        l4_bytes = be16(h + l3 + 4) + 40 - m.l3_len
    else:
        return -EINVAL
    if l4 + l4_bytes > m.pkt_len:
        return -EINVAL
    if version == 4 and asked & (TX_IP_CKSUM | TX_TCP_SEG | TX_UDP_SEG):
        put_be16(h + l3 + 10, 0)
        put_be16(h + l3 + 10, ~sum16(h + l3, m.l3_len) & 0xffff)
    if not udp and not tcp:
        return 0
    if (parse_outermost(h + l3, m.data_len - l3, m.pkt_len - l3, False, &ip) != 0
            or ip.l4 != m.l3_len or ip.protocol != protocol or ip.fragment):
        return -EINVAL
    least = 8 if udp else 20
    if l4_bytes < least or l4 + least > m.data_len:
        return -EINVAL
    m.l4_len = 8 if udp else (h[l4 + 12] >> 4) * 4
    if m.l4_len < least or m.l4_len > l4_bytes:
        return -EINVAL
    whole = asked & (TX_TCP_SEG | TX_UDP_SEG) == 0 or l4_bytes <= <uint32_t>m.l4_len + m.tso_segsz
    if not whole and (m.tso_segsz == 0 or asked & TX_TUNNEL_MASK):
        return -EINVAL
    cut(m, l4 + l4_bytes)       # the kernel sums to the end of the frame
    m.csum_offset = UDP_CSUM_OFFSET if udp else TCP_CSUM_OFFSET
    m.csum_at = m.data_off + l4
    m.vnet_flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
    m.ol_flags = m.ol_flags & ~RX_LRO | RX_L4_CKSUM_NONE
    put_be16(h + l4 + m.csum_offset, l4_pseudo_sum(
        h + l3, version, 0, ip.final, protocol, l4_bytes))
    if not whole:
        m.ol_flags |= RX_LRO
        if udp:
            m.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
        else:
            m.gso_type = (VIRTIO_NET_HDR_GSO_TCPV4 if version == 4 else VIRTIO_NET_HDR_GSO_TCPV6)
            if h[l4 + 13] & TCP_CWR:
                m.gso_type |= VIRTIO_NET_HDR_GSO_ECN
    return 0


cdef int finish_checksum(mbuf_t **frame) noexcept nogil:
    """Finishes in software the checksum that a header would leave to the kernel, for a device
    without headers.

    A frame that others see is replaced by a copy.  0; else the frame is unchanged: -EINVAL when
    the checksum lies outside the frame or it is a super-frame, -ENOBUFS when there is no buffer for
    a copy."""
    cdef mbuf_t *m = frame[0]
    cdef uint32_t start, value
    cdef uint8_t field[2]
    if m.ol_flags & RX_LRO:
        return -EINVAL
    if not m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        return 0
    m = private_of(m)
    if m == NULL:
        return -ENOBUFS
    if not csum_inside(m, &start):
        if m != frame[0]:
            mbuf_free(m)
        return -EINVAL
    value = ~chain_sum(m, start, m.pkt_len - start) & 0xffff
    put_be16(field, value if value != 0 else 0xffff)    # for UDP zero says "no checksum"
    mbuf_write(m, start + m.csum_offset, field, 2)
    m.ol_flags &= ~RX_L4_CKSUM_NONE
    m.vnet_flags = 0
    replace(frame, m)
    return 0
