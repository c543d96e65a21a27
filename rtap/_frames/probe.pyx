# SPDX-License-Identifier: BSD-3-Clause
"""Super-frames that reach nobody, and that a kernel takes if it splits that kind at all.

They have two segments of eight bytes.  The Ethernet destination is that of PAUSE frames, which no
bridge forwards (IEEE 802.1D 7.12.6).  Source and destination of the IP packet are loopback
addresses, which no host accepts from outside or routes (RFC 1122 3.2.1.3, RFC 4291 2.5.3).
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from rtap._core.linux cimport (
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
)
from rtap._frames.checksum cimport pseudo_sum, sum16
from rtap._frames.headers cimport (
    IPPROTO_TCP, IPPROTO_UDP, TCP_ACK, TCP_CSUM_OFFSET, TCP_CWR, UDP_CSUM_OFFSET,
)
from rtap._frames.parse cimport put_be16
from rtap._frames.vnet cimport VNET_HDR_LEN

cdef enum:
    SEGMENT = 8
    PAYLOAD = 2 * SEGMENT
    DISCARD_PORT = 9            # RFC 863


cdef uint32_t probe_frame(uint8_t *out, uint8_t gso_type, bint l2) noexcept nogil:
    """Writes a super-frame of that kind behind its virtio-net header; returns the length of
    both."""
    cdef uint32_t kind = gso_type & ~<uint32_t>VIRTIO_NET_HDR_GSO_ECN
    cdef bint udp = kind == VIRTIO_NET_HDR_GSO_UDP_L4
    cdef uint32_t version = 6 if kind == VIRTIO_NET_HDR_GSO_TCPV6 else 4
    cdef uint32_t l3 = 14 if l2 else 0
    cdef uint32_t l4 = l3 + (40 if version == 6 else 20)
    cdef uint32_t l4_len = 8 if udp else 20
    cdef uint32_t at = UDP_CSUM_OFFSET if udp else TCP_CSUM_OFFSET
    cdef uint32_t protocol = IPPROTO_UDP if udp else IPPROTO_TCP
    cdef uint8_t *h = out + VNET_HDR_LEN
    memset(out, 0, PROBE_MAX)
    out[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM
    out[1] = gso_type
    out[2] = <uint8_t>(l4 + l4_len)
    out[4] = SEGMENT
    out[6] = <uint8_t>l4
    out[8] = <uint8_t>at
    if l2:
        memcpy(h, "\x01\x80\xc2\x00\x00\x01\x02", 7)
        put_be16(h + 12, 0x86DD if version == 6 else 0x0800)
    if version == 6:
        h[l3] = 0x60
        put_be16(h + l3 + 4, l4_len + PAYLOAD)
        h[l3 + 6] = <uint8_t>protocol
        h[l3 + 7] = 1           # hop limit
        h[l3 + 23] = 1          # from ::1
        h[l3 + 39] = 1          # to ::1
    else:
        h[l3] = 0x45
        put_be16(h + l3 + 2, 20 + l4_len + PAYLOAD)
        h[l3 + 8] = 1           # time to live
        h[l3 + 9] = <uint8_t>protocol
        memcpy(h + l3 + 12, "\x7f\x00\x00\x01\x7f\x00\x00\x01", 8)
        put_be16(h + l3 + 10, ~sum16(h + l3, 20) & 0xffff)
    put_be16(h + l4, DISCARD_PORT)
    put_be16(h + l4 + 2, DISCARD_PORT)
    if udp:
        put_be16(h + l4 + 4, l4_len + PAYLOAD)
    else:
        h[l4 + 12] = 0x50
        h[l4 + 13] = TCP_ACK | (TCP_CWR if gso_type & VIRTIO_NET_HDR_GSO_ECN else 0)
    put_be16(h + l4 + at, pseudo_sum(h + l3, version, protocol, l4_len + PAYLOAD))
    return VNET_HDR_LEN + l4 + l4_len + PAYLOAD
