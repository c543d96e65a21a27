# SPDX-License-Identifier: BSD-3-Clause
"""The flow table of software receive coalescing, and the rules by which frames merge.

The rules are those of the Linux stack (net/core/gro.c, tcp_offload.c, udp_offload.c); where this
is stricter, docs/offload.md says so and why.  Nothing here writes to a frame or counts a reference.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

cimport rtap._core.compat as _compat
cimport rtap._core.live as _live
from rtap._core.flags cimport RX_L4_CKSUM_GOOD, RX_L4_CKSUM_NONE, RX_LRO, TX_REQUESTS
from rtap._core.linux cimport (
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
)
from rtap._core.pool cimport csum_place, mbuf_read, mbuf_t, mbuf_window
from rtap._frames.checksum cimport chain_sum, fold16, pseudo_sum, sum16
from rtap._frames.headers cimport (
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, IPPROTO_DSTOPTS,
    IPPROTO_HOPOPTS, IPPROTO_ROUTING, IPPROTO_TCP, IPPROTO_UDP, TCP_CSUM_OFFSET, TCP_CWR, TCP_FIN,
    TCP_PSH, TCP_RST, TCP_SYN, TCP_URG, UDP_CSUM_OFFSET,
)
from rtap._frames.parse cimport be16, be32, put_be16
from rtap._frames.vnet cimport keeps_vnet_hdr

cdef enum:
    VLANS_MAX = 4
    EXTENSIONS_MAX = 8

    UDP_COUNT_MAX = 64          # datagrams in a super-frame, as in the kernel

    # results of gro_look
    ALONE = 0                   # the frame belongs to no flow that could be held
    ADDRESSES = 1               # to some flow between two addresses
    FLOW = 2                    # to a flow, but must not be merged
    MERGEABLE = 3


cdef struct view_t:
    # One frame as the rules see it.
    const uint8_t *p
    uint32_t window             # bytes of the first segment
    uint32_t length             # of all
    uint32_t payload
    uint32_t hash
    uint16_t l3
    uint16_t l4
    uint16_t headers
    uint8_t version
    uint8_t protocol
    uint8_t verified


cdef inline uint64_t word64(const uint8_t *p) noexcept nogil:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return v


cdef inline uint32_t word32(const uint8_t *p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return v


cdef inline uint32_t mix(uint64_t addresses, uint32_t ports) noexcept nogil:
    addresses = (addresses ^ <uint64_t>ports << 16) * <uint64_t>0x9e3779b97f4a7c15
    return <uint32_t>(addresses >> 32)


# ---- the table


cdef gro_t *gro_create(uint32_t max_flows, uint32_t max_frames, uint32_t flags,
                       uint32_t max_length) noexcept nogil:
    """A table of up to ``max_flows`` flows holding ``max_frames`` frames together; NULL without
    memory."""
    cdef gro_t *g = <gro_t *>calloc(1, sizeof(gro_t))
    cdef uint32_t buckets = 16, i
    if g == NULL:
        return NULL
    _live.made(_live.GRO_TABLES, 1)
    while buckets < 2 * max_flows:
        buckets *= 2
    g.flags = flags
    g.max_length = max_length
    g.max_flows = max_flows
    g.max_items = max_frames
    g.mask = buckets - 1
    g.oldest = g.newest = GRO_NONE
    g.flows = <gro_flow_t *>calloc(max_flows, sizeof(gro_flow_t))
    g.buckets = <uint32_t *>calloc(buckets, sizeof(uint32_t))
    g.items = <gro_item_t *>calloc(max_frames, sizeof(gro_item_t))
    g.done = <gro_group_t *>calloc(max_frames, sizeof(gro_group_t))
    if g.flows == NULL or g.buckets == NULL or g.items == NULL or g.done == NULL:
        gro_destroy(g)
        return NULL
    for i in range(buckets):
        g.buckets[i] = GRO_NONE
    for i in range(max_flows):
        g.flows[i].chain = i + 1 if i + 1 < max_flows else GRO_NONE
    for i in range(max_frames):
        g.items[i].next = i + 1 if i + 1 < max_frames else GRO_NONE
    return g


cdef void gro_destroy(gro_t *g) noexcept nogil:
    if g != NULL:
        free(g.flows)
        free(g.buckets)
        free(g.items)
        free(g.done)
        free(g)
        _live.gone(_live.GRO_TABLES, 1)


cdef uint32_t gro_room(const gro_t *g) noexcept nogil:
    """How many frames can be added before the table has to be drained."""
    return g.max_items - g.n_items


cdef inline void take_item(gro_t *g, mbuf_t *m, const uint8_t *start, uint32_t length,
                           uint32_t *at) noexcept nogil:
    at[0] = g.free_item
    g.free_item = g.items[at[0]].next
    g.n_items += 1
    g.items[at[0]].m = m
    g.items[at[0]].data_off = <uint32_t>(start - m.buf)
    g.items[at[0]].pkt_len = length
    g.items[at[0]].next = GRO_NONE


cdef void gro_drained(gro_t *g) noexcept nogil:
    """Forgets the groups in ``done``, whose frames no longer belong to the table."""
    cdef uint32_t i
    for i in range(g.n_done):
        g.items[g.done[i].last].next = g.free_item
        g.free_item = g.done[i].first
        g.n_items -= g.done[i].count
    g.n_done = 0


cdef inline void complete(gro_t *g, const gro_group_t *group) noexcept nogil:
    g.done[g.n_done] = group[0]
    g.n_done += 1
    if group.count > 1:
        g.supers += 1
        g.merged += group.count


cdef void release(gro_t *g, uint32_t at) noexcept nogil:
    """A flow's group is complete; the flow leaves the table."""
    cdef gro_flow_t *flow = &g.flows[at]
    cdef uint32_t *link = &g.buckets[flow.hash & g.mask]
    complete(g, &flow.group)
    while link[0] != at:
        link = &g.flows[link[0]].chain
    link[0] = flow.chain
    if flow.older != GRO_NONE:
        g.flows[flow.older].newer = flow.newer
    else:
        g.oldest = flow.newer
    if flow.newer != GRO_NONE:
        g.flows[flow.newer].older = flow.older
    else:
        g.newest = flow.older
    flow.chain = g.free_flow
    g.free_flow = at
    g.n_flows -= 1


cdef void gro_flush(gro_t *g, uint64_t until) noexcept nogil:
    """Completes the groups whose first frame came at ``until`` or earlier."""
    while g.oldest != GRO_NONE and g.flows[g.oldest].born <= until:
        release(g, g.oldest)


cdef void hold(gro_t *g, const gro_group_t *group, uint32_t hash, uint64_t now) noexcept nogil:
    cdef gro_flow_t *flow
    cdef uint32_t at
    if g.n_flows == g.max_flows:
        g.evicted += 1
        release(g, g.oldest)
    at = g.free_flow
    flow = &g.flows[at]
    g.free_flow = flow.chain
    g.n_flows += 1
    flow.group = group[0]
    flow.born = now
    flow.hash = hash
    flow.chain = g.buckets[hash & g.mask]
    g.buckets[hash & g.mask] = at
    flow.newer = GRO_NONE
    flow.older = g.newest
    if g.newest != GRO_NONE:
        g.flows[g.newest].newer = at
    else:
        g.oldest = at
    g.newest = at


# ---- one frame


cdef bint checksum_right(const gro_t *g, const mbuf_t *m, view_t *v,
                         uint32_t l4_len) noexcept nogil:
    """Whether the frame's L4 checksum is right, or does not depend on this frame's bytes."""
    cdef uint32_t total, field, start
    v.verified = True
    if keeps_vnet_hdr(m) and m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        field = UDP_CSUM_OFFSET if v.protocol == IPPROTO_UDP else TCP_CSUM_OFFSET
        return csum_place(m, &start) and start == v.l4 and m.csum_offset == field
    if m.ol_flags & RX_L4_CKSUM_NONE == RX_L4_CKSUM_GOOD and g.flags & GRO_TRUST:
        return True
    total = pseudo_sum(v.p + v.l3, v.version, v.protocol, l4_len)
    if m.next == NULL:
        total += sum16(v.p + v.l4, l4_len)
    else:
        total += chain_sum(m, v.l4, l4_len)
    if fold16(total) == 0xffff:
        return True
    v.verified = False
    return False


cdef int look_l4(gro_t *g, const mbuf_t *m, view_t *v, uint32_t n, uint32_t l4_len,
                 bint whole) noexcept nogil:
    """Examines the ``l4_len`` bytes after the IP headers, of which ``n - v.l4`` can be seen.
    ``whole``: the IP headers allow merging."""
    cdef const uint8_t *h = v.p + v.l4
    cdef uint32_t least = 8 if v.protocol == IPPROTO_UDP else 20
    cdef uint32_t length
    if l4_len < least or v.l4 + least > n:
        return ADDRESSES
    if v.version == 4:
        v.hash = mix(word64(v.p + v.l3 + 12), word32(h))
    else:
        v.hash = mix(word64(v.p + v.l3 + 16) ^ word64(v.p + v.l3 + 32), word32(h))
    if v.protocol == IPPROTO_UDP:
        if not g.flags & GRO_UDP:
            return ALONE
        length = 8
        if be16(h + 4) != l4_len or be16(h + 6) == 0:
            return FLOW
    else:
        length = (h[12] >> 4) * 4
        if length < 20 or length > l4_len:
            return FLOW
    # Excludes super-frames, frames with an offload request, and frames whose VLAN tags are outside
    # their bytes.
    if (not whole or v.l4 + length > n or m.ol_flags & (RX_LRO | TX_REQUESTS) or m.vlan_tci != 0
            or m.vlan_tci_outer != 0):
        return FLOW
    if not checksum_right(g, m, v, l4_len):
        g.bad_checksum += 1
        return FLOW
    v.headers = <uint16_t>(v.l4 + length)
    v.payload = l4_len - length
    if (v.payload == 0 or v.payload > 0xffff or v.headers > v.window
            or v.headers > GRO_HEADERS_MAX or m.nb_segs > GRO_SEGS_MAX):
        return FLOW
    if v.protocol == IPPROTO_TCP and h[13] & (TCP_SYN | TCP_RST | TCP_URG | TCP_CWR):
        return FLOW
    return MERGEABLE


cdef int look_ipv4(gro_t *g, const mbuf_t *m, view_t *v, uint32_t n) noexcept nogil:
    cdef const uint8_t *h = v.p + v.l3
    cdef uint32_t length, ihl
    cdef bint whole
    if v.l3 + 20 > n:
        return ALONE
    ihl = (h[0] & 15) * 4
    length = be16(h + 2)
    if h[0] >> 4 != 4 or ihl < 20 or length < ihl or v.l3 + length > v.length:
        return ALONE
    v.version = 4
    v.protocol = h[9]
    v.l4 = <uint16_t>(v.l3 + ihl)
    if be16(h + 6) & 0x1fff or v.protocol != IPPROTO_TCP and v.protocol != IPPROTO_UDP:
        return ADDRESSES
    whole = (ihl == 20 and v.l3 + length == v.length and be16(h + 6) & 0xbfff == 0
             and sum16(h, 20) == 0xffff)
    return look_l4(g, m, v, n, length - ihl, whole)


cdef int look_ipv6(gro_t *g, const mbuf_t *m, view_t *v, uint32_t n) noexcept nogil:
    cdef const uint8_t *h = v.p + v.l3
    cdef uint32_t end, at = v.l3 + 40, _i
    if at > n or h[0] >> 4 != 6:
        return ALONE
    end = at + be16(h + 4)
    if end > v.length:
        return ALONE
    v.version = 6
    v.protocol = h[6]
    for _i in range(<uint32_t>EXTENSIONS_MAX):
        if (v.protocol != IPPROTO_HOPOPTS and v.protocol != IPPROTO_ROUTING
                and v.protocol != IPPROTO_DSTOPTS):
            break
        if at + 8 > n or at + 8 > end:
            return ADDRESSES
        v.protocol = v.p[at]
        at += (<uint32_t>v.p[at + 1] + 1) * 8
    if at > end or at > n or v.protocol != IPPROTO_TCP and v.protocol != IPPROTO_UDP:
        return ADDRESSES
    v.l4 = <uint16_t>at
    return look_l4(g, m, v, n, end - at, end == v.length)


cdef int gro_look(gro_t *g, const mbuf_t *m, view_t *v, uint32_t n) noexcept nogil:
    """The result of the rules for a frame whose first ``n`` bytes are at ``v.p``."""
    cdef uint32_t ethertype, _i
    v.l3 = 0
    if g.flags & GRO_L3:
        if n == 0:
            return ALONE
        ethertype = ETHERTYPE_IPV4 if v.p[0] >> 4 == 4 else ETHERTYPE_IPV6
    else:
        if n < 14:
            return ALONE
        ethertype = be16(v.p + 12)
        v.l3 = 14
        for _i in range(<uint32_t>VLANS_MAX):
            if ethertype != ETHERTYPE_VLAN and ethertype != ETHERTYPE_QINQ:
                break
            if v.l3 + 4 > n:
                return ALONE
            ethertype = be16(v.p + v.l3 + 2)
            v.l3 += 4
    if ethertype == ETHERTYPE_IPV4:
        return look_ipv4(g, m, v, n)
    if ethertype == ETHERTYPE_IPV6:
        return look_ipv6(g, m, v, n)
    return ALONE


# ---- two frames


cdef inline bint same_addresses(const gro_group_t *d, const view_t *v) noexcept nogil:
    cdef const uint8_t *a = d.head + d.l3
    cdef const uint8_t *b = v.p + v.l3
    if d.version != v.version:
        return False
    if v.version == 4:
        return word64(a + 12) == word64(b + 12)
    return (word64(a + 8) == word64(b + 8) and word64(a + 16) == word64(b + 16)
            and word64(a + 24) == word64(b + 24) and word64(a + 32) == word64(b + 32))


cdef inline bint same_flow(const gro_group_t *d, const view_t *v) noexcept nogil:
    """MACs, ethertypes, VLAN tags, addresses, flow label, protocol, ports."""
    if (d.l3 != v.l3 or d.protocol != v.protocol or not same_addresses(d, v)
            or word32(d.head + d.l4) != word32(v.p + v.l4)
            or memcmp(d.head, v.p, v.l3) != 0):
        return False
    return v.version == 4 or be32(d.head + d.l3) & 0xfffff == be32(v.p + v.l3) & 0xfffff


cdef inline bint continues_ip(const gro_t *g, gro_group_t *d, const view_t *v) noexcept nogil:
    """Whether the IP headers fit the group's next packet."""
    cdef const uint8_t *a = d.head + d.l3
    cdef const uint8_t *b = v.p + v.l3
    cdef uint32_t ip_id
    if v.version == 6:
        return (be32(a) == be32(b) and a[6] == b[6] and a[7] == b[7]
                and memcmp(a + 40, b + 40, v.l4 - v.l3 - 40) == 0)
    if a[1] != b[1] or be16(a + 6) != be16(b + 6) or a[8] != b[8]:
        return False
    ip_id = be16(b + 4)
    if d.count == 1 and g.flags & GRO_FIXED_ID and a[6] & 0x40 and ip_id == be16(a + 4):
        d.fixed_id = True
    return ip_id == (be16(a + 4) if d.fixed_id else d.ip_id)


cdef inline bint continues_group(const gro_t *g, gro_group_t *d, const view_t *v,
                                 uint32_t segs) noexcept nogil:
    """Whether a mergeable frame of the flow is the group's next."""
    cdef const uint8_t *a = d.head + d.l4
    cdef const uint8_t *b = v.p + v.l4
    if (d.l4 != v.l4 or d.headers != v.headers or v.payload > d.size
            or d.length + v.payload > g.max_length or d.segs + segs > GRO_SEGS_MAX
            or not continues_ip(g, d, v)):
        return False
    if v.protocol == IPPROTO_UDP:
        return True
    # Sequence number; acknowledgement; length, reserved bits; flags; window; urgent pointer.
    return (be32(b + 4) == d.seq and word32(a + 8) == word32(b + 8) and a[12] == b[12]
            and (a[13] ^ b[13]) & ~(TCP_FIN | TCP_PSH) & 0xff == 0
            and be16(a + 14) == be16(b + 14) and be16(a + 18) == be16(b + 18)
            and memcmp(a + 20, b + 20, v.headers - v.l4 - 20) == 0)


cdef inline void start_group(gro_group_t *d, const view_t *v, uint32_t item,
                             uint32_t segs) noexcept nogil:
    d.head = v.p
    d.segs = segs
    d.first = d.last = item
    d.count = 1
    d.size = <uint16_t>v.payload
    d.headers = v.headers
    d.l3 = v.l3
    d.l4 = v.l4
    d.version = v.version
    d.protocol = v.protocol
    d.length = v.headers - v.l3 + v.payload
    d.tcp_flags = 0
    d.fixed_id = 0
    d.verified = v.verified
    d.tag = 0
    d.ip_id = 0
    d.seq = 0
    if v.payload == 0:          # not to be merged
        return
    if v.version == 4:
        d.ip_id = <uint16_t>(be16(v.p + v.l3 + 4) + 1)
    if v.protocol == IPPROTO_TCP:
        d.tcp_flags = v.p[v.l4 + 13] & (TCP_FIN | TCP_PSH)
        d.seq = be32(v.p + v.l4 + 4) + v.payload


cdef inline bint grow_group(gro_group_t *d, const view_t *v) noexcept nogil:
    """Adds a frame to the group's figures; returns whether more may follow."""
    d.count += 1
    d.length += v.payload
    d.ip_id += 1
    if v.protocol == IPPROTO_UDP:
        return v.payload == d.size and d.count < UDP_COUNT_MAX
    d.seq += v.payload
    d.tcp_flags |= v.p[v.l4 + 13] & (TCP_FIN | TCP_PSH)
    return v.payload == d.size and d.tcp_flags == 0


cdef void flush_addresses(gro_t *g, const view_t *v) noexcept nogil:
    """Completes all held groups between two addresses."""
    cdef uint32_t at = g.oldest, newer
    while at != GRO_NONE:
        newer = g.flows[at].newer
        if same_addresses(&g.flows[at].group, v):
            release(g, at)
        at = newer


cdef void gro_add(gro_t *g, mbuf_t *m, uint64_t now) noexcept nogil:
    """Takes one frame in; there is room for it.  ``now`` never decreases."""
    cdef uint8_t scratch[GRO_HEADERS_MAX]
    cdef gro_group_t group
    cdef gro_flow_t *flow
    cdef view_t v
    cdef uint8_t *start
    cdef uint32_t n = mbuf_window(m, &start), item, at
    cdef int kind
    g.frames += 1
    v.p = start
    v.window = n
    # Only existing bytes are read: others may resize the frame now and while it is held.
    v.length = n if m.next == NULL else _compat.peek(&m.pkt_len)
    take_item(g, m, start, v.length, &item)
    if m.next != NULL and n < GRO_HEADERS_MAX:
        n = mbuf_read(m, 0, scratch, GRO_HEADERS_MAX)
        v.p = scratch
    v.payload = 0
    v.headers = v.l4 = 0
    v.verified = v.version = v.protocol = 0
    kind = gro_look(g, m, &v, n)
    if kind >= FLOW:
        at = g.buckets[v.hash & g.mask]
        while at != GRO_NONE:
            flow = &g.flows[at]
            if flow.hash == v.hash and same_flow(&flow.group, &v):
                if kind == MERGEABLE and continues_group(g, &flow.group, &v, m.nb_segs):
                    g.items[flow.group.last].next = item
                    flow.group.last = item
                    flow.group.segs += m.nb_segs
                    if not grow_group(&flow.group, &v):
                        release(g, at)
                    return
                release(g, at)
                break
            at = flow.chain
    elif kind == ADDRESSES:
        flush_addresses(g, &v)
    start_group(&group, &v, item, m.nb_segs)
    if kind == MERGEABLE and group.tcp_flags == 0:
        # From now on the frame's own bytes are used, not the examined copy: the headers are there.
        group.head = start
        hold(g, &group, v.hash, now)
    else:
        complete(g, &group)


# ---- what a group becomes


cdef void gro_headers(const gro_group_t *d, uint8_t *out) noexcept nogil:
    """Writes the super-frame's headers for a group of more than one: ``d.headers`` bytes.
    ``out`` may be the place of the first frame's headers."""
    cdef uint8_t *ip = out + d.l3
    cdef uint8_t *l4 = out + d.l4
    cdef uint32_t l4_len = d.length - (d.l4 - d.l3)
    if out != d.head:
        memcpy(out, d.head, d.headers)
    if d.version == 4:
        put_be16(ip + 2, d.length)
        put_be16(ip + 10, 0)
        put_be16(ip + 10, ~sum16(ip, 20) & 0xffff)
    else:
        put_be16(ip + 4, d.length - 40)
    if d.protocol == IPPROTO_UDP:
        put_be16(l4 + 4, l4_len)
        put_be16(l4 + UDP_CSUM_OFFSET, pseudo_sum(ip, d.version, d.protocol, l4_len))
    else:
        l4[13] |= d.tcp_flags
        put_be16(l4 + TCP_CSUM_OFFSET, pseudo_sum(ip, d.version, d.protocol, l4_len))


cdef void gro_describe(const gro_group_t *d, mbuf_t *m) noexcept nogil:
    """Sets the offload fields of a super-frame's first segment, as for one that the kernel made."""
    m.ol_flags = m.ol_flags & ~<uint64_t>RX_L4_CKSUM_NONE | RX_LRO | RX_L4_CKSUM_NONE
    m.vnet_flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
    m.csum_at = m.data_off + d.l4
    m.l2_len = d.l3
    m.l3_len = d.l4 - d.l3
    m.l4_len = d.headers - d.l4
    m.tso_segsz = d.size
    if d.protocol == IPPROTO_UDP:
        m.csum_offset = UDP_CSUM_OFFSET
        m.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
    else:
        m.csum_offset = TCP_CSUM_OFFSET
        m.gso_type = VIRTIO_NET_HDR_GSO_TCPV4 if d.version == 4 else VIRTIO_NET_HDR_GSO_TCPV6


cdef uint32_t gro_length(const gro_t *g, const gro_group_t *d) noexcept nogil:
    """Bytes of the frame that a group becomes."""
    return d.l3 + d.length if d.count > 1 else g.items[d.first].pkt_len


cdef void gro_write(const gro_t *g, const gro_group_t *d, uint8_t *out) noexcept nogil:
    """Writes the frame that a group becomes: ``gro_length`` bytes."""
    cdef uint32_t at = d.first
    cdef mbuf_t *m = g.items[at].m
    if d.count == 1:
        mbuf_read(m, 0, out, g.items[at].pkt_len)
        return
    gro_headers(d, out)
    out += d.headers
    while at != GRO_NONE:
        m = g.items[at].m
        out += mbuf_read(m, d.headers, out, g.items[at].pkt_len - d.headers)
        at = g.items[at].next
