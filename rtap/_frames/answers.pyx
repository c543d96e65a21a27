# SPDX-License-Identifier: BSD-3-Clause
"""Turns ARP requests, neighbour solicitations and echo requests, for any address, into their
answers, in place; every read is inside the first segment.

A request to a group, or from a host without an address (a probe for duplicates), gets no answer.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp, memcpy, memmove

cimport rtap._core.compat as _compat
from rtap._core.flags cimport RX_L4_CKSUM_NONE
from rtap._core.linux cimport VIRTIO_NET_HDR_F_NEEDS_CSUM
from rtap._core.pool cimport mbuf_data, mbuf_t, mbuf_tailroom
from rtap._frames.checksum cimport fold16, pseudo_sum, sum16, update16
from rtap._frames.headers cimport (
    ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, ETHER_HDR_LEN,
    IPPROTO_ICMP, IPPROTO_ICMPV6, IPV4_FRAGMENT, IPV4_HDR_LEN, IPV6_HDR_LEN, MAC_LEN, VLAN_HDR_LEN,
)
from rtap._frames.parse cimport be16, put_be16

cdef enum:
    VLANS_MAX = 2
    ARP_LEN = 28                # Ethernet and IPv4, RFC 826
    ARP_REQUEST = 1
    ARP_REPLY = 2
    ICMP_LEN = 8
    ICMP_REQUEST = 8
    ICMP_REPLY = 0
    ICMPV6_REQUEST = 128
    ICMPV6_REPLY = 129
    SOLICITATION = 135          # RFC 4861 4.3
    SOLICITATION_LEN = 24
    ADVERTISEMENT = 136         # RFC 4861 4.4
    ADVERTISEMENT_LEN = 32      # with the link-layer address option
    SOLICITED_OVERRIDE = 0x60
    TARGET_ADDRESS = 2


cdef inline bint nobody(const uint8_t *address, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        if address[i] != 0:
            return False
    return True


cdef inline void swap(uint8_t *a, uint8_t *b, uint32_t n) noexcept nogil:
    cdef uint8_t kept[16]
    memcpy(kept, a, n)
    memcpy(a, b, n)
    memcpy(b, kept, n)


cdef inline void answer_ether(uint8_t *p, const uint8_t *mac) noexcept nogil:
    memcpy(p, p + MAC_LEN, MAC_LEN)
    memcpy(p + MAC_LEN, mac, MAC_LEN)


cdef inline void retype(const mbuf_t *m, uint8_t *icmp, uint32_t kind) noexcept nogil:
    """Writes another type, and updates the checksum (RFC 1624).  A checksum that is left to the
    kernel covers only the pseudo-header so far, and stays."""
    cdef uint32_t old = be16(icmp)
    icmp[0] = <uint8_t>kind
    if not m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        put_be16(icmp + 2, update16(be16(icmp + 2), old, be16(icmp)))


cdef bint answer_arp(uint8_t *p, uint32_t at, uint32_t n, const uint8_t *mac) noexcept nogil:
    cdef uint8_t *arp = p + at
    if (at + ARP_LEN > n or be16(arp) != 1 or be16(arp + 2) != ETHERTYPE_IPV4
            or arp[4] != MAC_LEN or arp[5] != 4 or be16(arp + 6) != ARP_REQUEST
            or nobody(arp + 14, 4) or memcmp(arp + 14, arp + 24, 4) == 0):
        return False
    put_be16(arp + 6, ARP_REPLY)
    memcpy(arp + 18, arp + 8, MAC_LEN)
    memcpy(arp + 8, mac, MAC_LEN)
    swap(arp + 14, arp + 24, 4)
    return True


cdef bint answer_ipv4(mbuf_t *m, uint8_t *p, uint32_t at, uint32_t n) noexcept nogil:
    cdef uint8_t *ip = p + at
    cdef uint32_t length
    if at + IPV4_HDR_LEN > n:
        return False
    length = (ip[0] & 15) * 4
    if (ip[0] >> 4 != 4 or length < IPV4_HDR_LEN or at + length + ICMP_LEN > n
            or ip[9] != IPPROTO_ICMP or be16(ip + 6) & IPV4_FRAGMENT
            or ip[16] >= 224 or nobody(ip + 12, 4)
            or ip[length] != ICMP_REQUEST or ip[length + 1] != 0):
        return False
    swap(ip + 12, ip + 16, 4)
    retype(m, ip + length, ICMP_REPLY)
    return True


cdef bint answer_ipv6(mbuf_t *m, uint8_t *p, uint32_t at, uint32_t n,
                      const uint8_t *mac) noexcept nogil:
    cdef uint8_t *ip = p + at
    cdef uint8_t *icmp = ip + IPV6_HDR_LEN
    if (at + IPV6_HDR_LEN + ICMP_LEN > n or ip[0] >> 4 != 6 or ip[6] != IPPROTO_ICMPV6
            or nobody(ip + 8, 16) or icmp[1] != 0):
        return False
    if icmp[0] == ICMPV6_REQUEST and ip[24] != 0xff:
        swap(ip + 8, ip + 24, 16)
        retype(m, icmp, ICMPV6_REPLY)
        return True
    if icmp[0] == SOLICITATION:
        return advertise(m, at, mac)
    return False


cdef bint advertise(mbuf_t *m, uint32_t at, const uint8_t *mac) noexcept nogil:
    """Turns a solicitation, whose first bytes have been checked, into an advertisement."""
    cdef uint8_t *ip = mbuf_data(m) + at
    cdef uint8_t *icmp = ip + IPV6_HDR_LEN
    cdef uint32_t length = at + IPV6_HDR_LEN + ADVERTISEMENT_LEN
    if (at + IPV6_HDR_LEN + SOLICITATION_LEN > m.data_len or m.next != NULL or ip[7] != 255
            or be16(ip + 4) < SOLICITATION_LEN or icmp[8] == 0xff):
        return False
    if m.data_len < length and mbuf_tailroom(m) < length - m.data_len:
        return False
    _compat.unpoison(ip, length - at)
    m.data_len = m.pkt_len = length
    put_be16(ip + 4, ADVERTISEMENT_LEN)
    memcpy(ip + 24, ip + 8, 16)
    memmove(ip + 8, icmp + 8, 16)
    icmp[0] = ADVERTISEMENT
    icmp[4] = SOLICITED_OVERRIDE
    icmp[5] = icmp[6] = icmp[7] = 0
    icmp[24] = TARGET_ADDRESS
    icmp[25] = 1                # in units of 8 bytes
    memcpy(icmp + 26, mac, MAC_LEN)
    put_be16(icmp + 2, 0)
    put_be16(icmp + 2, ~fold16(pseudo_sum(ip, 6, IPPROTO_ICMPV6, ADVERTISEMENT_LEN)
                               + sum16(icmp, ADVERTISEMENT_LEN)) & 0xffff)
    if m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        m.vnet_flags = 0
        m.ol_flags &= ~RX_L4_CKSUM_NONE
    return True


cdef bint make_answer(mbuf_t *m, const uint8_t *mac) noexcept nogil:
    """True if the frame is a request that ``mac`` answers; the frame is then the answer.

    The caller must be allowed to write to it.  The answer leaves where the request came from."""
    cdef uint8_t *p = mbuf_data(m)
    cdef uint32_t n = m.data_len, at = ETHER_HDR_LEN, tags = 0, kind
    cdef bint answered = False
    if n < ETHER_HDR_LEN:
        return False
    kind = be16(p + 12)
    while (kind == ETHERTYPE_VLAN or kind == ETHERTYPE_QINQ) and tags < VLANS_MAX:
        if at + VLAN_HDR_LEN > n:
            return False
        kind = be16(p + at + 2)
        at += VLAN_HDR_LEN
        tags += 1
    if kind == ETHERTYPE_ARP:
        answered = answer_arp(p, at, n, mac)
    elif kind == ETHERTYPE_IPV4:
        answered = answer_ipv4(m, p, at, n)
    elif kind == ETHERTYPE_IPV6:
        answered = answer_ipv6(m, p, at, n, mac)
    if answered:
        answer_ether(p, mac)
    return answered
