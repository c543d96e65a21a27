# SPDX-License-Identifier: BSD-3-Clause
"""The virtio-net header and the mbuf's offload fields, one into the other.

The header (linux/virtio_net.h, little-endian) says of a received frame that its checksum is
still to be finished, or that it is a super-frame to be split at ``gso_size``.  Both facts are
kept in the mbuf, so that a frame sent on as it came goes out under the same header.
"""

from libc.errno cimport EINVAL, ENOBUFS
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from rtap._linux cimport (
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
)
from rtap._pool cimport (
    mbuf_copy, mbuf_data, mbuf_free, mbuf_is_private, mbuf_read, mbuf_t, mbuf_write,
)

cdef enum:
    HEADERS_MAX = 256           # bytes of headers looked at
    ETHER_HDR_LEN = 14
    VLAN_HDR_LEN = 4
    ETHERTYPE_IPV4 = 0x0800
    ETHERTYPE_VLAN = 0x8100
    ETHERTYPE_IPV6 = 0x86DD
    ETHERTYPE_QINQ = 0x88A8
    IPPROTO_TCP = 6
    IPPROTO_UDP = 17
    IPV4_FRAGMENT = 0x3fff      # offset and "more fragments"
    TCP_CSUM_OFFSET = 16
    UDP_CSUM_OFFSET = 6
    TCP_CWR = 0x80              # in the fourteenth byte of the TCP header


cdef inline uint16_t le16(const uint8_t *p) noexcept nogil:
    return <uint16_t>(p[0] | (p[1] << 8))


cdef inline void put_le16(uint8_t *p, uint32_t v) noexcept nogil:
    p[0] = <uint8_t>(v & 0xff)
    p[1] = <uint8_t>(v >> 8 & 0xff)


cdef inline uint32_t be16(const uint8_t *p) noexcept nogil:
    return <uint32_t>((p[0] << 8) | p[1])


cdef int ip_offset(const uint8_t *h, uint32_t n, bint l2, uint32_t *l2_len) noexcept nogil:
    """Where the IP header starts: 4, 6, or 0 when there is none within ``n`` bytes."""
    cdef uint32_t offset = 0, ethertype
    l2_len[0] = 0
    if l2:
        if n < ETHER_HDR_LEN:
            return 0
        offset = ETHER_HDR_LEN
        ethertype = be16(h + 12)
        while ethertype == ETHERTYPE_VLAN or ethertype == ETHERTYPE_QINQ:
            if offset + VLAN_HDR_LEN > n:
                return 0
            ethertype = be16(h + offset + 2)
            offset += VLAN_HDR_LEN
        l2_len[0] = offset
        if ethertype != ETHERTYPE_IPV4 and ethertype != ETHERTYPE_IPV6:
            return 0
    if offset >= n:
        return 0
    if h[offset] >> 4 == 4:
        return 4
    if h[offset] >> 4 == 6:
        return 6
    return 0


cdef int check_gso(uint32_t gso_type, uint32_t gso_size, uint32_t csum_offset, int version,
                   uint32_t protocol) noexcept nogil:
    """Whether a super-frame's kind fits its IP version and protocol; 0 or -EINVAL."""
    cdef uint32_t kind = gso_type & ~<uint32_t>VIRTIO_NET_HDR_GSO_ECN
    cdef bint udp = kind == VIRTIO_NET_HDR_GSO_UDP_L4
    if gso_size == 0 or gso_size == 0xffff:
        return -EINVAL
    if udp:
        if gso_type != kind or version == 0:
            return -EINVAL
    elif (kind != VIRTIO_NET_HDR_GSO_TCPV4 or version != 4) and (
            kind != VIRTIO_NET_HDR_GSO_TCPV6 or version != 6):
        return -EINVAL
    if csum_offset != (UDP_CSUM_OFFSET if udp else TCP_CSUM_OFFSET):
        return -EINVAL
    if version == 4 and protocol != (IPPROTO_UDP if udp else IPPROTO_TCP):
        return -EINVAL
    return 0


cdef int vnet_hdr_to_mbuf(mbuf_t *m, const uint8_t *hdr, bint l2) noexcept nogil:
    """Takes a received header into the mbuf; ``l2`` is false on a TUN device.

    0, or -EINVAL when the header does not fit the frame it came with.  Its hdr_len is not looked
    at: the kernel's own says the whole frame, or leaves VLAN tags out."""
    cdef uint8_t headers[HEADERS_MAX]
    cdef const uint8_t *h = m.buf + m.data_off
    cdef uint32_t n = m.data_len
    cdef uint32_t flags = hdr[0]
    cdef uint32_t gso_type = hdr[1]
    cdef uint32_t gso_size = le16(hdr + 4)
    cdef uint32_t csum_start = le16(hdr + 6)
    cdef uint32_t csum_offset = le16(hdr + 8)
    cdef bint needs_csum = flags & VIRTIO_NET_HDR_F_NEEDS_CSUM
    cdef uint32_t l2_len, l3_least = 0, protocol = 0
    cdef int version
    if m.next != NULL and n < HEADERS_MAX:
        n = mbuf_read(m, 0, headers, HEADERS_MAX)
        h = headers
    version = ip_offset(h, n, l2, &l2_len)
    m.l2_len = <uint16_t>l2_len
    if version == 4:
        if l2_len + 20 > n:
            return -EINVAL
        l3_least = (h[l2_len] & 15) * 4
        protocol = h[l2_len + 9]
    elif version == 6:
        l3_least = 40
    if gso_type != VIRTIO_NET_HDR_GSO_NONE:
        if not needs_csum or check_gso(gso_type, gso_size, csum_offset, version, protocol) != 0:
            return -EINVAL
        if version == 4 and be16(h + l2_len + 6) & IPV4_FRAGMENT:
            return -EINVAL
        m.ol_flags |= RX_LRO
        m.gso_type = <uint8_t>gso_type
        m.tso_segsz = <uint16_t>gso_size
    if needs_csum:
        if csum_start < l2_len + l3_least or csum_start + csum_offset + 2 > m.pkt_len:
            return -EINVAL
        if version != 0:
            m.l3_len = <uint16_t>(csum_start - l2_len)
            if csum_offset == TCP_CSUM_OFFSET and csum_start + 20 <= n:
                m.l4_len = (h[csum_start + 12] >> 4) * 4
                if m.l4_len < 20 or csum_start + m.l4_len > m.pkt_len:
                    return -EINVAL
            elif csum_offset == UDP_CSUM_OFFSET and csum_start + 8 <= n:
                m.l4_len = 8
        m.ol_flags |= RX_L4_CKSUM_NONE
        m.csum_at = m.data_off + csum_start
        m.csum_offset = <uint16_t>csum_offset
    elif flags & VIRTIO_NET_HDR_F_DATA_VALID:
        m.ol_flags |= RX_L4_CKSUM_GOOD
    m.vnet_flags = <uint8_t>flags
    return 0


cdef void vnet_hdr_from_mbuf(const mbuf_t *m, uint8_t *hdr) noexcept nogil:
    """Writes the ten header bytes a frame is sent under: those it came with, if it still says
    that they apply and its checksum still starts inside it, else "nothing to do"."""
    cdef uint32_t csum_start = 0
    memset(hdr, 0, VNET_HDR_LEN)
    if not keeps_vnet_hdr(m):
        return
    if m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        if m.csum_at < m.data_off or m.csum_at - m.data_off > 0xffff:
            return
        csum_start = m.csum_at - m.data_off
        hdr[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM
        put_le16(hdr + 6, csum_start)
        put_le16(hdr + 8, m.csum_offset)
    if m.ol_flags & RX_LRO and m.gso_type != VIRTIO_NET_HDR_GSO_NONE:
        hdr[1] = m.gso_type
        put_le16(hdr + 2, csum_start + m.l4_len)
        put_le16(hdr + 4, m.tso_segsz)


cdef uint64_t sum_be16(const uint8_t *p, uint32_t n) noexcept nogil:
    """Sum of big-endian 16-bit words; an odd last byte is the high half of one."""
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(0, n & ~<uint32_t>1, 2):
        total += be16(p + i)
    if n & 1:
        total += <uint32_t>p[n - 1] << 8
    return total


cdef uint32_t fold16(uint64_t total) noexcept nogil:
    while total >> 16 != 0:
        total = (total & 0xffff) + (total >> 16)
    return <uint32_t>total


cdef uint32_t frame_sum(const mbuf_t *m, uint32_t start) noexcept nogil:
    """RFC 1071 sum, folded and not complemented, of a frame's bytes from ``start`` to its end."""
    cdef uint64_t total = 0
    cdef uint32_t part, done = 0
    while m != NULL:
        if start >= m.data_len:
            start -= m.data_len
        else:
            part = fold16(sum_be16(mbuf_data(m) + start, m.data_len - start))
            if done & 1:        # this segment starts in the middle of a word
                part = (part & 0xff) << 8 | part >> 8
            total += part
            done += m.data_len - start
            start = 0
        m = m.next
    return fold16(total)


cdef int make_private(mbuf_t **frame) noexcept nogil:
    """Replaces a frame that others can see by a copy; -ENOBUFS when there is no buffer for it."""
    cdef mbuf_t *seg = frame[0]
    cdef mbuf_t *copy
    while seg != NULL and mbuf_is_private(seg):
        seg = seg.next
    if seg == NULL:
        return 0
    copy = mbuf_copy(frame[0])
    if copy == NULL:
        return -ENOBUFS
    mbuf_free(frame[0])
    frame[0] = copy
    return 0


cdef void put_be16(uint8_t *p, uint32_t v) noexcept nogil:
    p[0] = <uint8_t>(v >> 8 & 0xff)
    p[1] = <uint8_t>(v & 0xff)


cdef int take_requests(mbuf_t **frame) noexcept nogil:
    """Turns the application's TX_* flags into the form of a frame that came with a header:
    IP checksum and pseudo-header sum written, checksum place and segment size noted.

    0; -EINVAL when l2_len and l3_len do not describe the frame; -ENOBUFS when it is shared and
    there is no buffer to copy it to."""
    cdef uint64_t asked = frame[0].ol_flags
    cdef bint udp = asked & TX_UDP_SEG != 0 or asked & TX_L4_MASK == TX_UDP_CKSUM
    cdef bint tcp = asked & TX_TCP_SEG != 0 or asked & TX_L4_MASK == TX_TCP_CKSUM
    cdef uint32_t l3, l4, l4_bytes, least, total, padding
    cdef mbuf_t *m
    cdef mbuf_t *last
    cdef uint8_t *h
    cdef int version
    if make_private(frame) != 0:
        return -ENOBUFS
    m = last = frame[0]
    h = mbuf_data(m)
    l3 = m.l2_len + (m.outer_l2_len + m.outer_l3_len if asked & TX_TUNNEL_MASK else 0)
    l4 = l3 + m.l3_len
    if l4 > m.data_len or m.l3_len < 20 or udp == tcp and asked & ~TX_IP_CKSUM & TX_REQUESTS:
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
        put_be16(h + l3 + 10, ~fold16(sum_be16(h + l3, m.l3_len)) & 0xffff)
    m.ol_flags &= ~TX_REQUESTS
    if not udp and not tcp:
        return 0
    least = 8 if udp else 20
    if l4_bytes < least or l4 + least > m.data_len:
        return -EINVAL
    m.l4_len = 8 if udp else (h[l4 + 12] >> 4) * 4
    if m.l4_len < least or m.l4_len > l4_bytes:
        return -EINVAL
    padding = m.pkt_len - l4 - l4_bytes
    if padding > 0:             # the kernel sums to the end of what it is given
        while last.next != NULL:
            last = last.next
        if last.data_len < padding:
            return -EINVAL
        last.data_len -= padding
        m.pkt_len -= padding
    m.csum_offset = UDP_CSUM_OFFSET if udp else TCP_CSUM_OFFSET
    m.csum_at = m.data_off + l4
    m.vnet_flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
    m.ol_flags = m.ol_flags & ~RX_LRO | RX_L4_CKSUM_NONE
    put_be16(h + l4 + m.csum_offset, fold16(
        sum_be16(h + l3 + (12 if version == 4 else 8), 8 if version == 4 else 32)
        + (IPPROTO_UDP if udp else IPPROTO_TCP) + l4_bytes))
    if asked & (TX_TCP_SEG | TX_UDP_SEG) and l4_bytes > <uint32_t>m.l4_len + m.tso_segsz:
        if m.tso_segsz == 0 or asked & TX_TUNNEL_MASK:
            return -EINVAL
        m.ol_flags |= RX_LRO
        if udp:
            m.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
        else:
            m.gso_type = (VIRTIO_NET_HDR_GSO_TCPV4 if version == 4 else VIRTIO_NET_HDR_GSO_TCPV6)
            if h[l4 + 13] & TCP_CWR:
                m.gso_type |= VIRTIO_NET_HDR_GSO_ECN
    return 0


cdef int finish_checksum(mbuf_t **frame) noexcept nogil:
    """Does in software what the header would have asked of the kernel, for a device without one.

    A frame that others see is replaced by a copy first.  0; -EINVAL when the checksum lies
    outside the frame or the frame is a super-frame; -ENOBUFS when there is no buffer to copy to."""
    cdef mbuf_t *m = frame[0]
    cdef uint32_t start, value
    cdef uint8_t field[2]
    if m.ol_flags & RX_LRO:
        return -EINVAL
    if not m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        return 0
    if m.csum_at < m.data_off or m.csum_at - m.data_off + m.csum_offset + 2 > m.pkt_len:
        return -EINVAL
    if make_private(frame) != 0:
        return -ENOBUFS
    m = frame[0]
    start = m.csum_at - m.data_off
    value = ~frame_sum(m, start) & 0xffff
    put_be16(field, value if value != 0 else 0xffff)    # for UDP zero says "no checksum"
    mbuf_write(m, start + m.csum_offset, field, 2)
    m.ol_flags &= ~RX_L4_CKSUM_NONE
    m.vnet_flags = 0
    return 0
