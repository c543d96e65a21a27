# SPDX-License-Identifier: BSD-3-Clause
"""Ethernet, VLAN, IP, its extension headers, TCP, UDP, and one level of tunnels.

Packet types are the same as those of DPDK's software parser (``rte_net_get_ptype``).  When only the
first bytes of a frame can be seen, they alone are parsed.  A field that contradicts another one
gives -EINVAL.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from rtap._frames.checksum cimport fold16, pseudo_sum, sum16
from rtap._frames.headers cimport (
    ETHERTYPE_1588, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_LLDP, ETHERTYPE_QINQ,
    ETHERTYPE_TEB, ETHERTYPE_VLAN, ETHER_HDR_LEN, IPPROTO_AH, IPPROTO_DSTOPTS, IPPROTO_FRAGMENT,
    IPPROTO_GRE, IPPROTO_HOPOPTS, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_IGMP, IPPROTO_IPIP,
    IPPROTO_IPV6, IPPROTO_MH, IPPROTO_ROUTING, IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP,
    IPV4_FRAGMENT, VLAN_HDR_LEN, VXLAN_LEN, VXLAN_PORT,
)

cdef enum:
    VLANS_MAX = 8
    EXTENSIONS_MAX = 16         # a header chain longer than that is not followed

    # rte_mbuf_ptype.h; the inner types are the outer ones, shifted
    L2_ETHER = 0x1
    L2_TIMESYNC = 0x2
    L2_ARP = 0x3
    L2_LLDP = 0x4
    L2_VLAN = 0x6
    L2_QINQ = 0x7
    L3_IPV4 = 0x10
    L3_IPV4_EXT = 0x30
    L3_IPV6 = 0x40
    L3_IPV6_EXT = 0xc0
    L4_TCP = 0x100
    L4_UDP = 0x200
    L4_FRAG = 0x300
    L4_SCTP = 0x400
    L4_ICMP = 0x500
    L4_IGMP = 0x700
    TUNNEL_IP = 0x1000
    TUNNEL_GRE = 0x2000
    TUNNEL_VXLAN = 0x3000
    TUNNEL_NVGRE = 0x4000
    INNER_L2_ETHER = 0x10000
    INNER_L2_VLAN = 0x20000
    INNER_L2_QINQ = 0x30000
    INNER_L3_IPV4 = 0x100000
    INNER_L3_IPV4_EXT = 0x200000
    INNER_L3_IPV6 = 0x300000
    INNER_L3_IPV6_EXT = 0x500000
    INNER_L4_SHIFT = 16         # L4_TCP << 16 is the inner TCP


cdef struct layer_t:            # one IP packet
    uint32_t l3, l4, end, final
    uint32_t l3_type, l4_type
    uint16_t l4_len
    uint8_t version, protocol, fragment, auth


cdef int parse_ether(const uint8_t *p, uint32_t n, uint32_t *offset, uint32_t *ethertype,
                     uint32_t *kind) noexcept nogil:
    """Moves ``offset`` past an Ethernet header and its tags; -EINVAL when they are cut off."""
    cdef uint32_t at = offset[0], tags = 0, tag
    if at + ETHER_HDR_LEN > n:
        return -EINVAL
    tag = be16(p + at + 12)
    at += ETHER_HDR_LEN
    kind[0] = L2_ETHER
    while (tag == ETHERTYPE_VLAN or tag == ETHERTYPE_QINQ) and tags < VLANS_MAX:
        if at + VLAN_HDR_LEN > n:
            return -EINVAL
        kind[0] = L2_VLAN if tags == 0 and tag == ETHERTYPE_VLAN else L2_QINQ
        tag = be16(p + at + 2)
        at += VLAN_HDR_LEN
        tags += 1
    if tags == 0:
        if tag == ETHERTYPE_ARP:
            kind[0] = L2_ARP
        elif tag == ETHERTYPE_LLDP:
            kind[0] = L2_LLDP
        elif tag == ETHERTYPE_1588:
            kind[0] = L2_TIMESYNC
    offset[0] = at
    ethertype[0] = tag
    return 0


cdef uint32_t final_destination(const uint8_t *ext, uint32_t length, uint32_t at) noexcept nogil:
    """Offset of the final destination in a routing header at ``at``, 0 for none
    (RFC 8200 8.1): the last address of types 0 and 2, the first of a segment list (RFC 8754)."""
    if length < 24 or ext[3] == 0:
        return 0
    if ext[2] == 0 or ext[2] == 2:
        return at + 8 + (length - 8) / 16 * 16 - 16
    return at + 8 if ext[2] == 4 else 0


cdef int parse_extensions(const uint8_t *p, uint32_t n, uint32_t bound,
                          layer_t *q) noexcept nogil:
    """Follows IPv6 extension headers from ``q.l4`` on."""
    cdef uint32_t length, final, count = 0
    while (q.protocol == IPPROTO_HOPOPTS or q.protocol == IPPROTO_ROUTING
            or q.protocol == IPPROTO_DSTOPTS or q.protocol == IPPROTO_FRAGMENT
            or q.protocol == IPPROTO_AH or q.protocol == IPPROTO_MH):
        q.l3_type = L3_IPV6_EXT
        if q.l4 + 8 > bound:
            return -EINVAL
        if q.l4 + 8 > n or count == EXTENSIONS_MAX:
            return 0
        if q.protocol == IPPROTO_FRAGMENT:
            length = 8
            q.fragment = 1
        elif q.protocol == IPPROTO_AH:
            length = (p[q.l4 + 1] + 2) * 4
            q.auth = 1
        else:
            length = (p[q.l4 + 1] + 1) * 8
        if q.l4 + length > bound:
            return -EINVAL
        if q.l4 + length > n:
            return 0
        if q.protocol == IPPROTO_ROUTING:
            final = final_destination(p + q.l4, length, q.l4)
            if final != 0:
                q.final = final
        q.protocol = p[q.l4]
        q.l4 += length
        count += 1
        if q.fragment:
            return 0            # the next bytes may be from anywhere in the packet
    return 0


cdef int parse_l4(const uint8_t *p, uint32_t n, uint32_t bound, layer_t *q) noexcept nogil:
    cdef uint32_t seen = min(n, bound)
    if q.fragment:
        q.l4_type = L4_FRAG
    elif q.protocol == IPPROTO_TCP:
        if q.l4 + 20 > seen:
            return 0
        q.l4_type = L4_TCP
        q.l4_len = (p[q.l4 + 12] >> 4) * 4
        if q.l4_len < 20 or q.l4 + q.l4_len > bound:
            q.l4_len = 0
            return -EINVAL
    elif q.protocol == IPPROTO_UDP:
        if q.l4 + 8 > seen:
            return 0
        q.l4_type = L4_UDP
        q.l4_len = 8
    elif q.protocol == IPPROTO_SCTP:
        if q.l4 + 12 > seen:
            return 0
        q.l4_type = L4_SCTP
        q.l4_len = 12
    elif q.protocol == IPPROTO_ICMP and q.version == 4 or (
            q.protocol == IPPROTO_ICMPV6 and q.version == 6):
        if q.l4 + 8 > seen:
            return 0
        q.l4_type = L4_ICMP
        q.l4_len = 8
    elif q.protocol == IPPROTO_IGMP and q.version == 4:
        q.l4_type = L4_IGMP
    return 0


cdef int parse_ip(const uint8_t *p, uint32_t n, uint32_t limit, uint32_t at, uint32_t version,
                  layer_t *q) noexcept nogil:
    """Parses the IP packet at ``at``, which ends at ``limit`` at the latest."""
    cdef uint32_t length, bound
    memset(q, 0, sizeof(layer_t))
    n = min(n, limit)
    if at + 20 > n:
        return -EINVAL if n == limit else 0
    if p[at] >> 4 != version:
        return -EINVAL
    if version == 4:
        length = (p[at] & 15) * 4
        q.end = at + be16(p + at + 2)
        if length < 20 or q.end < at + length or at + length > limit:
            return -EINVAL
        if at + length > n:
            return 0
        q.l3_type = L3_IPV4 if length == 20 else L3_IPV4_EXT
        q.protocol = p[at + 9]
        q.fragment = be16(p + at + 6) & IPV4_FRAGMENT != 0
    else:
        length = 40
        if at + length > limit:
            return -EINVAL
        if at + length > n:
            return 0
        q.end = at + length + be16(p + at + 4)
        q.l3_type = L3_IPV6
        q.protocol = p[at + 6]
        q.final = at + 24
    q.version = <uint8_t>version
    q.l3 = at
    q.l4 = at + length
    if q.end > limit:
        q.end = 0
    bound = q.end if q.end != 0 else limit
    if version == 6 and parse_extensions(p, n, bound, q) != 0:
        return -EINVAL
    return parse_l4(p, n, bound, q)


cdef void to_headers(const layer_t *q, uint32_t l2, headers_t *out) noexcept nogil:
    out.l2_len = <uint16_t>(q.l3 - l2)
    out.l3_len = <uint16_t>(q.l4 - q.l3)
    out.l4_len = q.l4_len
    out.version = q.version
    out.protocol = q.protocol
    out.fragment |= q.fragment
    out.auth |= q.auth
    out.l3 = q.l3
    out.l4 = q.l4
    out.end = q.end
    out.final = q.final


cdef void to_outer(headers_t *out) noexcept nogil:
    """Moves the fields found so far to the outer packet of a tunnel."""
    out.outer_l2_len = out.l2_len
    out.outer_l3_len = out.l3_len
    out.outer_version = out.version
    out.outer_protocol = out.protocol
    out.outer_l3 = out.l3
    out.outer_l4 = out.l4
    out.outer_end = out.end
    out.outer_final = out.final
    out.version = out.protocol = 0
    out.l2_len = out.l3_len = out.l4_len = 0
    out.l3 = out.l4 = out.end = out.final = 0


cdef uint32_t find_tunnel(const uint8_t *p, uint32_t n, const layer_t *q, uint32_t *at,
                          uint32_t *ethertype) noexcept nogil:
    """The tunnel type behind an IP header, 0 for none.  Sets ``at`` to the start of its payload,
    and ``ethertype`` to the payload's type, ETHERTYPE_TEB for Ethernet."""
    cdef uint32_t l4 = q.l4, flags
    if q.protocol == IPPROTO_IPIP or q.protocol == IPPROTO_IPV6:
        at[0] = l4
        ethertype[0] = ETHERTYPE_IPV4 if q.protocol == IPPROTO_IPIP else ETHERTYPE_IPV6
        return TUNNEL_IP
    if q.protocol == IPPROTO_GRE:
        if l4 + 4 > n:
            return 0
        flags = be16(p + l4)
        if flags & 0x4007:      # source routes (RFC 1701), or not version 0
            return 0
        at[0] = l4 + 4
        if flags & 0x8000:
            at[0] += 4
        if flags & 0x2000:
            at[0] += 4
        if flags & 0x1000:
            at[0] += 4
        if at[0] > n:
            return 0
        ethertype[0] = be16(p + l4 + 2)
        return TUNNEL_NVGRE if ethertype[0] == ETHERTYPE_TEB else TUNNEL_GRE
    if (q.l4_type == L4_UDP and l4 + VXLAN_LEN <= n and be16(p + l4 + 2) == VXLAN_PORT
            and p[l4 + 8] & 0x08):
        at[0] = l4 + VXLAN_LEN
        ethertype[0] = ETHERTYPE_TEB
        return TUNNEL_VXLAN
    return 0


cdef int parse_tunnel(const uint8_t *p, uint32_t n, uint32_t pkt_len, const layer_t *outer,
                      headers_t *out) noexcept nogil:
    cdef uint32_t at = 0, ethertype = 0, kind = 0, start
    cdef uint32_t limit = outer.end if outer.end != 0 else pkt_len
    cdef uint32_t tunnel = find_tunnel(p, n, outer, &at, &ethertype)
    cdef layer_t q
    cdef int result
    if tunnel == 0 or at > limit:
        return 0
    start = outer.l4
    if ethertype == ETHERTYPE_TEB:
        if parse_ether(p, min(n, limit), &at, &ethertype, &kind) != 0:
            return 0
        out.packet_type |= (INNER_L2_VLAN if kind == L2_VLAN else
                            INNER_L2_QINQ if kind == L2_QINQ else INNER_L2_ETHER)
    out.packet_type |= tunnel
    to_outer(out)
    out.l2_len = <uint16_t>(at - start)
    if ethertype != ETHERTYPE_IPV4 and ethertype != ETHERTYPE_IPV6:
        return 0
    result = parse_ip(p, n, limit, at, 4 if ethertype == ETHERTYPE_IPV4 else 6, &q)
    if q.version == 0:
        return result
    to_headers(&q, start, out)
    out.packet_type |= (
        INNER_L3_IPV4 if q.l3_type == L3_IPV4 else INNER_L3_IPV4_EXT if q.version == 4 else
        INNER_L3_IPV6 if q.l3_type == L3_IPV6 else INNER_L3_IPV6_EXT)
    out.packet_type |= q.l4_type << INNER_L4_SHIFT & 0xf000000
    return result


cdef int parse(const uint8_t *p, uint32_t n, uint32_t pkt_len, bint l2, bint tunnels,
               headers_t *out) noexcept nogil:
    cdef uint32_t at = 0, kind = 0, ethertype = 0
    cdef layer_t q
    cdef int result
    memset(out, 0, sizeof(headers_t))
    n = min(n, pkt_len)
    if l2:
        if parse_ether(p, n, &at, &ethertype, &kind) != 0:
            return -EINVAL if n >= pkt_len else 0
        out.packet_type = kind
        out.l2_len = <uint16_t>at
    elif n > 0:
        ethertype = (ETHERTYPE_IPV4 if p[0] >> 4 == 4 else
                     ETHERTYPE_IPV6 if p[0] >> 4 == 6 else 0)
    if ethertype != ETHERTYPE_IPV4 and ethertype != ETHERTYPE_IPV6:
        return 0
    result = parse_ip(p, n, pkt_len, at, 4 if ethertype == ETHERTYPE_IPV4 else 6, &q)
    if q.version == 0:
        return result
    out.packet_type |= q.l3_type | q.l4_type
    to_headers(&q, 0, out)
    if result != 0 or q.fragment or not tunnels:
        return result
    return parse_tunnel(p, n, pkt_len, &q, out)


cdef int parse_headers(const uint8_t *p, uint32_t n, uint32_t pkt_len, bint l2,
                       headers_t *out) noexcept nogil:
    """Fills ``out`` from the first ``n`` bytes of a frame of ``pkt_len``; without ``l2`` it starts
    with the IP header, as on a TUN device.

    0, or -EINVAL when lengths or versions contradict each other; ``out`` then has the fields found
    before."""
    return parse(p, n, pkt_len, l2, True, out)


cdef int parse_outermost(const uint8_t *p, uint32_t n, uint32_t pkt_len, bint l2,
                         headers_t *out) noexcept nogil:
    """The same, without looking into tunnels."""
    return parse(p, n, pkt_len, l2, False, out)


cdef uint32_t l4_pseudo_sum(const uint8_t *p, uint32_t version, uint32_t l3, uint32_t final,
                            uint32_t protocol, uint32_t l4_len) noexcept nogil:
    """Sum of the pseudo-header of a parsed packet; with a routing header it has the final
    destination."""
    if version == 4 or final == l3 + 24:
        return pseudo_sum(p + l3, version, protocol, l4_len)
    return fold16(<uint32_t>sum16(p + l3 + 8, 16) + sum16(p + final, 16) + protocol
                  + (l4_len >> 16) + (l4_len & 0xffff))
