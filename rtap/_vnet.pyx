# SPDX-License-Identifier: BSD-3-Clause
"""The virtio-net header and the mbuf's offload fields, one into the other.

The header (linux/virtio_net.h, little-endian) says of a received frame that its checksum is
still to be finished, or that it is a super-frame to be split at ``gso_size``.  Both facts are
kept in the mbuf, so that a frame sent on as it came goes out under the same header.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from rtap._linux cimport (
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
)
from rtap._pool cimport mbuf_read, mbuf_t

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


cdef bint vnet_hdr_fits(const mbuf_t *m) noexcept nogil:
    """Whether a frame is still what the header that it keeps says of it.

    A checksum whose place was cut off in front, with headers that the frame had, is no longer
    anybody's; a super-frame cannot lose its headers and still be one."""
    cdef bint super_frame = m.ol_flags & RX_LRO and m.gso_type != VIRTIO_NET_HDR_GSO_NONE
    cdef uint32_t start
    if not m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        return not super_frame
    if m.csum_at < m.data_off:
        return not super_frame
    start = m.csum_at - m.data_off
    if start > 0xffff or start + m.csum_offset + 2 > m.pkt_len:
        return False
    if super_frame:
        return 0 < m.tso_segsz < 0xffff and 8 <= m.l4_len and start + m.l4_len <= m.pkt_len
    return True


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
