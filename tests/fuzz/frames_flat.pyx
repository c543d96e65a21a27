# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What frames have to become, on copies in one piece of heap memory.

What a kernel makes of the bytes of one plain frame is looked at elsewhere (offload_fuzz, and the
oracles of the suite).  Here it is taken for granted for a frame in one piece that nobody else
has, and asked whether the same becomes of it in segments, shared, borrowed, and short of slots.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from rtap._core.flags cimport (
    RX_CKSUM_MASK, RX_IP_CKSUM_GOOD, RX_L4_CKSUM_GOOD, RX_L4_CKSUM_NONE, RX_LRO, TX_CKSUM_REQUESTS,
    TX_TCP_SEG, TX_UDP_SEG,
)
from rtap.stages._runner cimport STAGE_ABI, rtap_burst, stage_burst_t, stage_t
from rtap._frames.checksum cimport sum16
from rtap._frames.parse cimport (
    HEADERS_MAX, be16, headers_t, l4_pseudo_sum, parse_headers, parse_outermost, put_be16,
)
from rtap._core.pool cimport mbuf_data, mbuf_t
from rtap._frames.segment cimport (
    FITS, gso_whole, plan_mbuf, plan_split, plan_t, segment_payload, write_segment,
)
from rtap._frames.vnet cimport keeps_vnet_hdr

from frames_model cimport claim, content_of, length_of, slot_t

cdef enum:
    AHEAD = 64                  # headroom of a flat frame


cdef uint32_t build(build_t *b, uint8_t *out) noexcept nogil:
    """Writes a frame of TCP or UDP with right lengths and checksums; how long it is."""
    cdef bint udp = b.kind & KIND_UDP != 0
    cdef uint32_t l4_len = 8 if udp else 20
    cdef uint32_t version = 6 if b.kind & KIND_IPV6 else 4
    cdef uint32_t field, total, length, i
    cdef uint8_t *ip
    cdef uint8_t *l4
    b.l3 = 18 if b.kind & KIND_VLAN else 14
    b.l4 = b.l3 + (40 if version == 6 else 20)
    b.headers = b.l4 + l4_len
    length = l4_len + b.payload
    memset(out, 0, b.headers)
    out[5] = 1
    out[11] = 2
    if b.kind & KIND_VLAN:
        put_be16(out + 12, 0x8100)
        put_be16(out + 14, b.flow)
    put_be16(out + b.l3 - 2, 0x86dd if version == 6 else 0x0800)
    ip = out + b.l3
    l4 = out + b.l4
    if version == 6:
        ip[0] = 0x60
        put_be16(ip + 4, length)
        ip[6] = 17 if udp else 6
        ip[7] = 64
        ip[23] = 1
        ip[39] = <uint8_t>(2 + b.flow)
    else:
        ip[0] = 0x45
        put_be16(ip + 2, 20 + length)
        put_be16(ip + 4, b.ip_id)
        ip[8] = 64
        ip[9] = 17 if udp else 6
        ip[12] = ip[16] = 10
        ip[15] = 1
        ip[19] = <uint8_t>(2 + b.flow)
        put_be16(ip + 10, ~sum16(ip, 20) & 0xffff)
    put_be16(l4, 1000 + b.flow)
    put_be16(l4 + 2, 2000)
    if udp:
        put_be16(l4 + 4, length)
        field = b.l4 + 6
    else:
        put_be16(l4 + 4, b.seq >> 16)
        put_be16(l4 + 6, b.seq & 0xffff)
        l4[12] = 0x50
        l4[13] = 0x18 if b.kind & KIND_PUSH else 0x10
        put_be16(l4 + 14, 500)
        field = b.l4 + 16
    for i in range(b.payload):
        out[b.headers + i] = <uint8_t>(b.seq + i * 7 + (i >> 8))
    total = l4_pseudo_sum(ip - b.l3, version, b.l3, b.l3 + (24 if version == 6 else 16),
                          17 if udp else 6, length)
    if not b.kind & KIND_UNFINISHED:
        put_be16(out + field, 0)
        total += sum16(l4, length)
        total = (total & 0xffff) + (total >> 16)
        total = ~((total & 0xffff) + (total >> 16)) & 0xffff
        if udp and total == 0:
            total = 0xffff
    put_be16(out + field, total)
    if b.kind & KIND_WRONG:
        out[field] ^= 0x55
    return b.headers + b.payload


# ---- flat frames


cdef mbuf_t *flat(const mbuf_t *like, const uint8_t *data, uint32_t n) noexcept nogil:
    """A frame with these bytes, and what ``like`` says of it."""
    cdef mbuf_t *m = <mbuf_t *>calloc(1, sizeof(mbuf_t))
    memcpy(m, like, sizeof(mbuf_t))
    m.buf = <uint8_t *>malloc(AHEAD + n)
    m.next = m.direct = NULL
    m.pool = NULL
    m.refcnt = m.nb_segs = 1
    m.step = 0
    m.csum_at = m.csum_at - m.data_off + AHEAD
    m.data_off = AHEAD
    m.data_len = m.pkt_len = n
    m.buf_len = AHEAD + n
    if data != NULL:
        memcpy(m.buf + AHEAD, data, n)
    return m


cdef mbuf_t *flat_of(const slot_t *head) noexcept nogil:
    """A copy of what the model has.  Its ``port`` is the target that stages name."""
    cdef mbuf_t *m = flat(head.m, NULL, length_of(head))
    m.port = 0
    content_of(head, m.buf + AHEAD)
    return m


cdef void flat_free(mbuf_t *m) noexcept nogil:
    if m != NULL:
        free(m.buf)
        free(m)


cdef bint deep(const mbuf_t *m) noexcept nogil:
    """Whether its headers are longer than what is looked at of a frame in segments."""
    cdef headers_t a, b
    cdef const uint8_t *p = mbuf_data(m)
    cdef uint32_t n = m.data_len
    cdef int first, second
    if n <= HEADERS_MAX:
        return False
    memset(&a, 0, sizeof(a))
    memset(&b, 0, sizeof(b))
    first = parse_headers(p, n, n, True, &a)
    second = parse_headers(p, HEADERS_MAX, n, True, &b)
    if first != second or memcmp(&a, &b, sizeof(a)) != 0 or a.l4 + 60 > HEADERS_MAX:
        return True
    memset(&a, 0, sizeof(a))
    memset(&b, 0, sizeof(b))
    first = parse_outermost(p, n, n, True, &a)
    second = parse_outermost(p, HEADERS_MAX, n, True, &b)
    return first != second or memcmp(&a, &b, sizeof(a)) != 0 or a.l4 + 60 > HEADERS_MAX


cdef void pieces_add(pieces_t *p, mbuf_t *m) noexcept nogil:
    if p.n == PIECES_MAX:
        p.unsure = True
        flat_free(m)
        return
    p.unsure |= deep(m)
    p.v[p.n] = m
    p.n += 1


cdef void pieces_free(pieces_t *p) noexcept nogil:
    cdef uint32_t i
    for i in range(p.n):
        flat_free(p.v[i])
    p.n = p.dropped = 0
    p.unsure = False


# ---- what becomes of them


cdef int split_flat(mbuf_t *m, pieces_t *out) noexcept nogil:
    """Makes plain frames of one that says it is more, and takes it: how many, or -errno."""
    cdef plan_t plan
    cdef uint8_t *data
    cdef mbuf_t *piece
    cdef mbuf_t *own
    cdef uint32_t i, k
    cdef int rc = plan_split(m, True, &plan)
    out.unsure |= deep(m)
    if rc == 0 and plan.count > PIECES_MAX:
        out.unsure = True
        flat_free(m)
        return <int>plan.count
    if rc == 0 and plan.count == 1:
        rc = gso_whole(m, NULL, True, False, &own, 1)
        if rc == 1:
            pieces_add(out, own)
            return 1
    if rc < 0:
        flat_free(m)
        return rc
    data = <uint8_t *>malloc(plan.hdr_len + plan.gso_size)
    for i in range(plan.count):
        k = plan.hdr_len + segment_payload(&plan, i)
        write_segment(&plan, mbuf_data(m), i, data)
        piece = flat(m, data, k)
        piece.ol_flags = (m.ol_flags & ~(RX_LRO | TX_CKSUM_REQUESTS | RX_CKSUM_MASK)
                          | RX_L4_CKSUM_GOOD | (RX_IP_CKSUM_GOOD if plan.h.version == 4 else 0))
        piece.vnet_flags = piece.gso_type = 0
        piece.tso_segsz = 0
        pieces_add(out, piece)
    free(data)
    flat_free(m)
    return <int>plan.count


cdef bint through(stage_t *stage, mbuf_t *m, uint32_t n_targets) noexcept nogil:
    """Has a stage's function look at one frame; whether that stays."""
    cdef stage_burst_t b
    cdef rtap_burst *burst = &b.burst
    cdef uint8_t *data = mbuf_data(m)
    cdef uint32_t length = m.data_len, verdict = m.port
    cdef uint64_t flags = m.ol_flags
    cdef void *frame = m
    memset(&b, 0, sizeof(b))
    b.stage = stage
    burst.abi = STAGE_ABI
    burst.n = 1
    burst.n_targets = n_targets
    burst.data = &data
    burst.len = &length
    burst.ol_flags = &flags
    burst.verdict = &verdict
    burst.frames = <void *const *>&frame
    if stage.fn(stage.ctx, burst) != 0 or verdict >= n_targets:
        return False
    m.port = <uint16_t>verdict
    return True


cdef void through_stage(stage_t *stage, pieces_t *p, uint32_t n_targets,
                        bint splits) noexcept nogil:
    """All of them through a stage that does not merge."""
    cdef pieces_t was = p[0]
    cdef mbuf_t *m
    cdef uint32_t i
    p.n = 0
    for i in range(was.n):
        m = was.v[i]
        if splits:
            if keeps_vnet_hdr(m) or m.ol_flags & (TX_TCP_SEG | TX_UDP_SEG):
                p.dropped += split_flat(m, p) < 0
            else:
                pieces_add(p, m)
        elif through(stage, m, n_targets):
            pieces_add(p, m)
        else:
            p.dropped += 1
            flat_free(m)


# ---- which of them are there


cdef void take(pieces_t *p, uint32_t at) noexcept nogil:
    flat_free(p.v[at])
    p.v[at] = NULL


cdef bint take_next(pieces_t *p, uint32_t *at, const uint8_t *data, uint32_t n,
                    uint32_t target) noexcept nogil:
    """The next one with these bytes for that target, from ``at`` on.  Those before it are lost: one
    of the same bytes for another target may be among them."""
    cdef mbuf_t *m
    while at[0] < p.n:
        m = p.v[at[0]]
        at[0] += 1
        if m.port == target and m.data_len == n and memcmp(mbuf_data(m), data, n) == 0:
            return True
    return False


cdef bint take_equal(pieces_t *p, const uint8_t *data, uint32_t n, uint32_t *at) noexcept nogil:
    """The first one with these bytes, which is then taken."""
    cdef uint32_t i
    for i in range(p.n):
        if p.v[i] != NULL and p.v[i].data_len == n and memcmp(mbuf_data(p.v[i]), data, n) == 0:
            at[0] = i
            take(p, i)
            return True
    return False


cdef inline bint same_sum(const uint8_t *a, const uint8_t *b) noexcept nogil:
    return be16(a) % 0xffff == be16(b) % 0xffff


cdef bint was_merged(const mbuf_t *m, const uint8_t *data, uint32_t n,
                     const plan_t *plan) noexcept nogil:
    """Whether a frame is one that ``data`` stands for: it may have had no finished checksum, or one
    that somebody vouched for."""
    cdef const uint8_t *p = mbuf_data(m)
    cdef uint32_t ip = plan.h.l3 + 10
    cdef uint32_t l4 = plan.h.l4 + (6 if plan.udp else 16)
    cdef uint32_t at = 0
    if m.data_len != n:
        return False
    if plan.h.version == 4:
        if memcmp(p, data, ip) != 0 or not same_sum(p + ip, data + ip):
            return False
        at = ip + 2
    return (memcmp(p + at, data + at, l4 - at) == 0
            and (same_sum(p + l4, data + l4) or m.ol_flags & RX_L4_CKSUM_NONE != 0)
            and memcmp(p + l4 + 2, data + l4 + 2, n - l4 - 2) == 0)


cdef bint take_merged(pieces_t *p, const mbuf_t *super_frame, const uint8_t *data,
                      uint32_t n) noexcept nogil:
    """The frames that a super-frame was made of, the earliest of those that look the same."""
    cdef mbuf_t *m = flat(super_frame, data, n)
    cdef uint8_t *out
    cdef plan_t plan
    cdef uint32_t i, k, length
    claim(plan_mbuf(m, True, &plan) == FITS and plan.count > 1, b"a misfit made of frames")
    out = <uint8_t *>malloc(plan.hdr_len + plan.gso_size)
    for i in range(plan.count):
        length = plan.hdr_len + segment_payload(&plan, i)
        write_segment(&plan, data, i, out)
        k = 0
        while k < p.n and (p.v[k] == NULL or not was_merged(p.v[k], out, length, &plan)):
            k += 1
        if k == p.n:
            free(out)
            flat_free(m)
            return False
        take(p, k)
    free(out)
    flat_free(m)
    return True
