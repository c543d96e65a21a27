# SPDX-License-Identifier: BSD-3-Clause
"""Converts the virtio-net header to the mbuf's offload fields and back.

The header (linux/virtio_net.h, little-endian) of a received frame says that its checksum is
unfinished, or that it is a super-frame to be split at ``gso_size``.  The mbuf keeps both facts, so
that a frame sent on unchanged goes out under the same header.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from rtap._core.flags cimport (
    RX_IP_CKSUM_MASK, RX_L4_CKSUM_GOOD, RX_L4_CKSUM_NONE, RX_LRO, RX_OFFLOAD_CKSUM,
    RX_OFFLOAD_IPV4_CKSUM, RX_OFFLOAD_TCP_CKSUM, RX_OFFLOAD_UDP_CKSUM,
)
from rtap._core.linux cimport (
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
)
from rtap._core.pool cimport csum_place, mbuf_t
from rtap._frames.headers cimport IPPROTO_TCP, IPPROTO_UDP, TCP_CSUM_OFFSET, UDP_CSUM_OFFSET
from rtap._frames.parse cimport HEADERS_MAX, headers_of, headers_t, parse_headers, parse_outermost
from rtap._frames.verify cimport verify_parsed


cdef inline uint16_t le16(const uint8_t *p) noexcept nogil:
    return <uint16_t>(p[0] | (p[1] << 8))


cdef inline void put_le16(uint8_t *p, uint32_t v) noexcept nogil:
    p[0] = <uint8_t>(v & 0xff)
    p[1] = <uint8_t>(v >> 8 & 0xff)


cdef int take_gso(mbuf_t *m, const uint8_t *hdr, const headers_t *h) noexcept nogil:
    """Takes the segmentation fields of a super-frame whose own headers are ``h``; 0, or -EINVAL
    when these are of another kind or the sizes cannot be right."""
    cdef uint32_t kind = hdr[1] & ~<uint32_t>VIRTIO_NET_HDR_GSO_ECN
    cdef bint udp = kind == VIRTIO_NET_HDR_GSO_UDP_L4
    cdef uint32_t gso_size = le16(hdr + 4)
    if gso_size == 0 or gso_size == 0xffff or not hdr[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        return -EINVAL
    if udp:
        if hdr[1] != kind or h.version == 0 or le16(hdr + 8) != UDP_CSUM_OFFSET:
            return -EINVAL
    elif (kind != VIRTIO_NET_HDR_GSO_TCPV4 or h.version != 4) and (
            kind != VIRTIO_NET_HDR_GSO_TCPV6 or h.version != 6):
        return -EINVAL
    elif le16(hdr + 8) != TCP_CSUM_OFFSET:
        return -EINVAL
    if h.protocol != (IPPROTO_UDP if udp else IPPROTO_TCP) or h.fragment or h.l4_len == 0:
        return -EINVAL
    if le16(hdr + 6) != h.l4 or h.end == 0:
        return -EINVAL
    m.ol_flags |= RX_LRO
    m.gso_type = hdr[1]
    m.tso_segsz = <uint16_t>gso_size
    return 0


cdef int take_checksum_place(mbuf_t *m, const uint8_t *hdr, const headers_t *h) noexcept nogil:
    """Takes the place of the unfinished checksum.  It must lie behind the outermost IP header, and
    in TCP and UDP it must be their checksum field; 0 or -EINVAL.

    In an unknown tunnel it may lie deeper than all parsed headers."""
    cdef uint32_t start = le16(hdr + 6)
    cdef uint32_t offset = le16(hdr + 8)
    cdef uint32_t first = h.outer_l4 if h.outer_version != 0 else h.l4
    if h.version == 0 and h.outer_version == 0:
        first = h.l2_len
    if start < first or start == 0 or start + offset + 2 > m.pkt_len:
        return -EINVAL
    if h.version != 0 and not h.fragment and h.l4_len != 0:
        if h.protocol == IPPROTO_TCP and h.outer_version == 0 and start != h.l4:
            return -EINVAL
        if start == h.l4 and offset != (
                TCP_CSUM_OFFSET if h.protocol == IPPROTO_TCP else
                UDP_CSUM_OFFSET if h.protocol == IPPROTO_UDP else offset):
            return -EINVAL
    m.ol_flags |= RX_L4_CKSUM_NONE
    m.csum_at = m.data_off + start
    m.csum_offset = <uint16_t>offset
    return 0


cdef inline bint has_checksum(const headers_t *h) noexcept nogil:
    """Whether a frame has one TCP or UDP checksum, about which the header's flags speak."""
    return h.outer_version == 0 and not h.fragment and h.l4_len != 0 and (
        h.protocol == IPPROTO_TCP or h.protocol == IPPROTO_UDP)


cdef uint64_t checked(const mbuf_t *m, const uint8_t *p, uint32_t n, const headers_t *h,
                      bint whole, uint64_t offloads) noexcept nogil:
    """Checksum flags that the queue was asked for and that the header does not give."""
    cdef bint layer4 = m.ol_flags & RX_L4_CKSUM_NONE == 0 and (
        h.protocol == IPPROTO_TCP and offloads & RX_OFFLOAD_TCP_CKSUM
        or h.protocol == IPPROTO_UDP and offloads & RX_OFFLOAD_UDP_CKSUM)
    cdef uint64_t flags
    if not layer4 and not offloads & RX_OFFLOAD_IPV4_CKSUM:
        return 0
    flags = verify_parsed(m, p, n, h, whole, layer4)
    return flags if offloads & RX_OFFLOAD_IPV4_CKSUM else flags & ~RX_IP_CKSUM_MASK


cdef int vnet_hdr_to_mbuf(mbuf_t *m, const uint8_t *hdr, bint l2, uint64_t offloads) noexcept nogil:
    """Sets the mbuf's fields from a received header, from the frame's own headers and, with the
    checksum bits in ``offloads`` (RxOffload), from its checksums; ``l2`` is false on a TUN device.

    0, or -EINVAL when the header does not fit its frame.  The header's hdr_len is only a
    hint: the kernel sets it to the whole frame, or leaves VLAN tags out."""
    cdef uint8_t copy[HEADERS_MAX]
    cdef uint32_t n
    cdef const uint8_t *p = headers_of(m, copy, &n)
    cdef headers_t h
    cdef bint whole
    if hdr[1] == VIRTIO_NET_HDR_GSO_NONE:
        whole = parse_headers(p, n, m.pkt_len, l2, &h) == 0
    else:                       # split datagrams of a tunnel are datagrams of a tunnel
        whole = parse_outermost(p, n, m.pkt_len, l2, &h) == 0
    m.packet_type = h.packet_type
    m.outer_l2_len = h.outer_l2_len
    m.outer_l3_len = h.outer_l3_len
    m.l2_len = h.l2_len
    m.l3_len = h.l3_len
    m.l4_len = h.l4_len
    if hdr[0] | hdr[1]:
        if le16(hdr + 2) > m.pkt_len:
            return -EINVAL
        if hdr[1] != VIRTIO_NET_HDR_GSO_NONE and not (whole and take_gso(m, hdr, &h) == 0):
            return -EINVAL
        if hdr[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM:
            if take_checksum_place(m, hdr, &h) != 0:
                return -EINVAL
        elif hdr[0] & VIRTIO_NET_HDR_F_DATA_VALID and has_checksum(&h):
            m.ol_flags |= RX_L4_CKSUM_GOOD
        m.vnet_flags = hdr[0]
    if offloads & RX_OFFLOAD_CKSUM:
        m.ol_flags |= checked(m, p, n, &h, whole, offloads)
    return 0


cdef bint vnet_hdr_fits(const mbuf_t *m) noexcept nogil:
    """Whether a frame still matches the header that it keeps.

    If headers were cut off in front, and the place of the checksum with them, nobody can finish
    that checksum; a super-frame without its headers is no longer a super-frame."""
    cdef bint super_frame = m.ol_flags & RX_LRO and m.gso_type != VIRTIO_NET_HDR_GSO_NONE
    cdef uint32_t start
    if not m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        return not super_frame
    if not csum_place(m, &start):
        return not super_frame
    if start > 0xffff or start + m.csum_offset + 2 > m.pkt_len:
        return False
    if super_frame:
        return 0 < m.tso_segsz < 0xffff and 8 <= m.l4_len and start + m.l4_len <= m.pkt_len
    return True


cdef void vnet_hdr_from_mbuf(const mbuf_t *m, uint8_t *hdr) noexcept nogil:
    """Writes the ten header bytes for sending a frame: those it came with, if its flags still say
    so and its checksum still starts inside it, else "nothing to do"."""
    cdef uint32_t csum_start = 0
    memset(hdr, 0, VNET_HDR_LEN)
    if not keeps_vnet_hdr(m):
        return
    if m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        if not csum_place(m, &csum_start) or csum_start > 0xffff:
            return
        hdr[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM
        put_le16(hdr + 6, csum_start)
        put_le16(hdr + 8, m.csum_offset)
    if m.ol_flags & RX_LRO and m.gso_type != VIRTIO_NET_HDR_GSO_NONE:
        hdr[1] = m.gso_type
        put_le16(hdr + 2, csum_start + m.l4_len)
        put_le16(hdr + 4, m.tso_segsz)
