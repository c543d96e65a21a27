# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One input for the offload kernels, from libFuzzer (see main.c).

The first byte says what is done with the rest, see ``fuzz_one``.  Frames lie in heap buffers of
exactly their size, so that AddressSanitizer sees a read or a write next to them; what the kernels
say of their results is checked as well, and a contradiction ends the process.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from rtap._core.flags cimport (
    RX_IP_CKSUM_BAD, RX_L4_CKSUM_BAD, RX_L4_CKSUM_GOOD, RX_L4_CKSUM_NONE, RX_OUTER_IP_CKSUM_BAD,
    RX_OUTER_L4_CKSUM_BAD,
)
from rtap._core.pool cimport mbuf_free, mbuf_free_bulk, mbuf_t, pool_available, pool_create, pool_t
from rtap._frames.checksum cimport chain_sum, copy_sum16, sum16
from rtap._frames.gro cimport (
    GRO_L3, GRO_UDP, gro_add, gro_create, gro_describe, gro_drained, gro_flush, gro_group_t,
    gro_length, gro_room, gro_t, gro_write,
)
from rtap._frames.headers cimport IPPROTO_UDP
from rtap._frames.parse cimport be16, headers_of, headers_t, parse_headers, parse_outermost
from rtap._frames.request cimport finish_checksum, take_requests
from rtap._frames.segment cimport (
    FITS, complete, gso_mbuf, plan_segments, plan_t, segment_payload, vnet_t, write_segment,
)
from rtap._frames.verify cimport fill_frame, verify_frame
from rtap._frames.vnet cimport vnet_hdr_fits, vnet_hdr_from_mbuf, vnet_hdr_to_mbuf

cdef enum:
    # the first byte of an input: its low three bits, and flags
    PARSE = 0
    SEGMENT = 1
    COMPLETE = 2
    COALESCE = 3
    CHAIN = 4                   # gso_mbuf over segments
    RECEIVE = 5                 # vnet_hdr_to_mbuf and back
    REQUEST = 6                 # take_requests
    WITHOUT_L2 = 0x08
    FITTING = 0x10              # headers and checksums made right first, to get deeper
    WITH_UDP = 0x20
    VNET_LEN = 10
    HEADROOM = 16
    FRAMES_MAX = 64
    SEGMENTS_MAX = 12           # of a chain: more only take time
    SMALL = 2048                # slots of 100 bytes
    LARGE = 512
    WRITTEN = 6                 # segments written at either end of a long list


cdef pool_t *small_slots = NULL
cdef pool_t *large_slots = NULL
cdef gro_t *tables[4]


cdef void claim(bint what, const char *text) noexcept nogil:
    if not what:
        fprintf(stderr, "contradiction: %s\n", text)
        abort()


cdef uint8_t *exact(const uint8_t *p, size_t n) noexcept nogil:
    cdef uint8_t *out = <uint8_t *>malloc(n)
    memcpy(out, p, n)
    return out


cdef vnet_t vnet_of(const uint8_t *p) noexcept nogil:
    cdef vnet_t hdr
    hdr.flags = p[0]
    hdr.gso_type = p[1]
    hdr.hdr_len = p[2] | <uint16_t>p[3] << 8
    hdr.gso_size = p[4] | <uint16_t>p[5] << 8
    hdr.csum_start = p[6] | <uint16_t>p[7] << 8
    hdr.csum_offset = p[8] | <uint16_t>p[9] << 8
    return hdr


cdef void fit(vnet_t *hdr, const uint8_t *p, uint32_t n, bint l2) noexcept nogil:
    """Leaves only gso_size and the ECN bit as they are."""
    cdef headers_t h
    parse_outermost(p, n, n, l2, &h)
    hdr.flags = 1
    hdr.hdr_len = 0
    hdr.csum_start = <uint16_t>h.l4
    if h.protocol == IPPROTO_UDP:
        hdr.gso_type = 5
        hdr.csum_offset = 6
    else:
        hdr.gso_type = (1 if h.version == 4 else 4) | hdr.gso_type & 0x80
        hdr.csum_offset = 16


cdef void one_segment(mbuf_t *m, const uint8_t *p, uint32_t n) noexcept nogil:
    m.buf = <uint8_t *>p
    m.buf_len = m.data_len = m.pkt_len = n
    m.nb_segs = 1
    m.refcnt = 1


cdef mbuf_t *chain_of(const uint8_t *p, uint32_t n, uint32_t piece) noexcept nogil:
    """A frame in segments of ``piece`` bytes or as many more as it takes, each in a buffer of its
    own.  A second reference keeps the kernels from giving them to the pool, which is there for
    copies."""
    cdef mbuf_t *head = NULL
    cdef mbuf_t *tail = NULL
    cdef mbuf_t *m
    cdef uint32_t k, at = 0
    piece = max(piece, n // SEGMENTS_MAX + 1)
    while head == NULL or at < n:
        k = min(n - at, piece)
        m = <mbuf_t *>calloc(1, sizeof(mbuf_t))
        m.buf = exact(p + at, k)
        m.buf_len = m.data_len = k
        m.refcnt = 2
        m.pool = large_slots
        if head == NULL:
            head = m
            head.pkt_len = n
        else:
            tail.next = m
        head.nb_segs += 1
        tail = m
        at += k
    return head


cdef void free_chain(mbuf_t *m) noexcept nogil:
    cdef mbuf_t *after
    while m != NULL:
        after = m.next
        free(m.buf)
        free(m)
        m = after


cdef void claim_right(const mbuf_t *m, bint l2) noexcept nogil:
    """A frame that was written has right checksums; what it carries in a tunnel is not ours."""
    cdef uint64_t flags = verify_frame(m, l2)
    cdef uint8_t headers[256]
    cdef headers_t h
    cdef uint32_t n
    cdef const uint8_t *p = headers_of(m, headers, &n)
    parse_headers(p, n, m.pkt_len, l2, &h)
    claim(flags & (RX_OUTER_IP_CKSUM_BAD | RX_OUTER_L4_CKSUM_BAD) == 0, b"a wrong outer checksum")
    if h.outer_version == 0 and h.l4_len != 0:
        claim(flags & RX_IP_CKSUM_BAD == 0, b"a wrong IP checksum")
        claim(flags & RX_L4_CKSUM_NONE == RX_L4_CKSUM_GOOD, b"a wrong checksum")


# ---- what is done with an input


cdef void check_parse(const uint8_t *p, uint32_t n, bint l2) noexcept nogil:
    cdef headers_t h
    cdef mbuf_t m, copy
    cdef uint8_t *again
    cdef uint64_t flags
    cdef mbuf_t *chain
    cdef uint32_t cut = n // 2
    memset(&m, 0, sizeof(mbuf_t))
    memset(&copy, 0, sizeof(mbuf_t))
    one_segment(&m, p, n)
    if parse_headers(p, n, n, l2, &h) == 0:
        claim(h.outer_l2_len + h.outer_l3_len + h.l2_len + h.l3_len + h.l4_len <= <int>n,
              b"headers longer than the frame")
        claim(h.end <= n, b"an IP packet longer than the frame")
    parse_headers(p, cut, n, l2, &h)
    claim(h.l4_len == 0 or h.l4 + 8 <= cut, b"headers that could not be seen")
    flags = verify_frame(&m, l2)
    chain = chain_of(p, n, 1 + n // 3)
    claim(chain_sum(chain, 0, n) == sum16(p, n), b"sums of a chain and of the bytes")
    if n > 0:
        claim(chain_sum(chain, 1, n) == sum16(p + 1, n - 1), b"sums from an odd place")
    free_chain(chain)
    again = exact(p, n)
    claim(copy_sum16(again, p, n) == sum16(p, n), b"sum while copying")
    one_segment(&copy, again, n)
    if fill_frame(&copy, l2) == 0:
        flags = verify_frame(&copy, l2)
        claim(flags & RX_IP_CKSUM_BAD == 0, b"a wrong IP checksum was written")
        claim(flags & RX_L4_CKSUM_NONE != RX_L4_CKSUM_BAD, b"a wrong checksum was written")
    free(again)


cdef void check_segment(const uint8_t *p, uint32_t n, bint l2, vnet_t *hdr) noexcept nogil:
    cdef plan_t plan
    cdef uint8_t *out
    cdef uint32_t i, length
    cdef uint64_t total = 0
    cdef mbuf_t m
    if plan_segments(p, n, n, l2, hdr, &plan) != FITS:
        return
    claim(plan.count > 0, b"no segments")
    for i in range(plan.count):
        total += segment_payload(&plan, i)
    claim(total == plan.payload and plan.hdr_len + plan.payload <= n, b"payload that is not there")
    if plan.count == 1:
        return
    for i in range(plan.count):
        if WRITTEN <= i < plan.count - WRITTEN:
            continue
        length = plan.hdr_len + segment_payload(&plan, i)
        out = <uint8_t *>malloc(length)
        write_segment(&plan, p, i, out)
        memset(&m, 0, sizeof(mbuf_t))
        one_segment(&m, out, length)
        claim_right(&m, l2)
        free(out)


cdef bint same_frame(const uint8_t *a, const uint8_t *b, uint32_t n,
                     const plan_t *plan) noexcept nogil:
    """But for zero in its two forms in a checksum."""
    cdef uint32_t ip = plan.h.l3 + 10 if plan.h.version == 4 else plan.h.l3
    cdef uint32_t l4 = plan.h.l4 + (6 if plan.udp else 16)
    if plan.h.version == 4:
        if memcmp(a, b, ip) != 0 or be16(a + ip) % 0xffff != be16(b + ip) % 0xffff:
            return False
        ip += 2
        return (memcmp(a + ip, b + ip, l4 - ip) == 0
                and be16(a + l4) % 0xffff == be16(b + l4) % 0xffff
                and memcmp(a + l4 + 2, b + l4 + 2, n - l4 - 2) == 0)
    return (memcmp(a, b, l4) == 0 and be16(a + l4) % 0xffff == be16(b + l4) % 0xffff
            and memcmp(a + l4 + 2, b + l4 + 2, n - l4 - 2) == 0)


cdef void check_group(gro_t *g, gro_group_t *d, bint l2) noexcept nogil:
    """What was merged splits into what it was made of."""
    cdef uint32_t n = gro_length(g, d), at = d.first, i, length
    cdef uint8_t *whole = <uint8_t *>malloc(n)
    cdef uint8_t *out
    cdef mbuf_t said
    cdef vnet_t hdr
    cdef plan_t plan
    cdef mbuf_t *m
    gro_write(g, d, whole)
    if d.count > 1:
        said.ol_flags = 0
        said.data_off = 0
        gro_describe(d, &said)
        hdr.flags = said.vnet_flags
        hdr.gso_type = said.gso_type
        hdr.hdr_len = d.headers
        hdr.gso_size = said.tso_segsz
        hdr.csum_start = <uint16_t>said.csum_at
        hdr.csum_offset = said.csum_offset
        claim(plan_segments(whole, n, n, l2, &hdr, &plan) == FITS, b"a misfit made of frames")
        claim(plan.count == d.count, b"a super-frame of another number of frames")
        for i in range(plan.count):
            m = g.items[at].m
            length = plan.hdr_len + segment_payload(&plan, i)
            claim(length == m.pkt_len, b"a frame of another length")
            out = <uint8_t *>malloc(length)
            write_segment(&plan, whole, i, out)
            claim(same_frame(out, m.buf, length, &plan), b"another frame than was merged")
            free(out)
            at = g.items[at].next
    free(whole)


cdef void check_coalesce(const uint8_t *p, size_t n, uint32_t mode) noexcept nogil:
    cdef mbuf_t frames[FRAMES_MAX]
    cdef uint32_t count = 0, length, i
    cdef bint l2 = not mode & WITHOUT_L2
    cdef gro_t *g = tables[(1 if mode & WITH_UDP else 0) + (0 if l2 else 2)]
    while n >= 2 and count < FRAMES_MAX:
        length = <uint32_t>(p[0] | p[1] << 8)
        p += 2
        n -= 2
        if length > n:
            length = <uint32_t>n
        memset(&frames[count], 0, sizeof(mbuf_t))
        one_segment(&frames[count], exact(p, length), length)
        if mode & FITTING:
            fill_frame(&frames[count], l2)
        p += length
        n -= length
        count += 1
    for i in range(count):
        claim(gro_room(g) > 0, b"no room for a frame")
        gro_add(g, &frames[i], 0)
    gro_flush(g, <uint64_t>-1)
    length = 0
    for i in range(g.n_done):
        check_group(g, &g.done[i], l2)
        length += g.done[i].count
    claim(length == count, b"frames were lost")
    gro_drained(g)
    for i in range(count):
        free(frames[i].buf)


cdef void check_chain(const uint8_t *p, uint32_t n, bint l2, const vnet_t *hdr,
                      uint32_t piece) noexcept nogil:
    cdef mbuf_t *chain = chain_of(p, n, piece)
    cdef mbuf_t *out[256]
    cdef int got
    chain.ol_flags = <uint64_t>1 << 16 | RX_L4_CKSUM_NONE       # RX_LRO
    chain.vnet_flags = hdr.flags
    chain.gso_type = hdr.gso_type
    chain.tso_segsz = hdr.gso_size
    chain.csum_at = hdr.csum_start
    chain.csum_offset = hdr.csum_offset
    if hdr.gso_size >= 16 and hdr.gso_type != 0:
        got = gso_mbuf(chain, small_slots if piece & 1 else large_slots, l2, out, 256)
        claim(got != 0, b"no frames")
        if got > 1:             # one: from the sum that it carried
            claim_right(out[0], l2)
            claim_right(out[got - 1], l2)
        if got > 0:
            mbuf_free_bulk(out, <uint32_t>got)
    claim(pool_available(small_slots) == SMALL and pool_available(large_slots) == LARGE,
          b"slots were lost")
    free_chain(chain)


cdef void check_receive(const uint8_t *p, uint32_t n, bint l2, const uint8_t *header,
                        uint32_t piece) noexcept nogil:
    cdef mbuf_t *chain = chain_of(p, n, piece)
    cdef mbuf_t *frame = chain
    cdef uint8_t *back = <uint8_t *>malloc(VNET_LEN)
    if vnet_hdr_to_mbuf(chain, header, l2, <uint64_t>-1) == 0:
        vnet_hdr_fits(chain)
        vnet_hdr_from_mbuf(chain, back)
        if finish_checksum(&frame) == 0 and frame != chain:
            mbuf_free(frame)
    free(back)
    free_chain(chain)


cdef void check_request(const uint8_t *p, uint32_t n, bint l2, const uint8_t *asked) noexcept nogil:
    """The application's lengths and flags are any; tags go into the headroom."""
    cdef mbuf_t m
    cdef mbuf_t *frame = &m
    cdef uint8_t *buf = <uint8_t *>malloc(HEADROOM + n)
    memset(&m, 0, sizeof(mbuf_t))
    memcpy(buf + HEADROOM, p, n)
    one_segment(&m, buf, n)
    m.buf_len = HEADROOM + n
    m.data_off = HEADROOM
    m.l2_len = asked[0]
    m.l3_len = asked[1]
    m.outer_l2_len = asked[2] & 0x1f
    m.outer_l3_len = asked[3] & 0x3f
    m.tso_segsz = asked[4] | <uint16_t>asked[5] << 8
    m.ol_flags = (<uint64_t>asked[6] << 50) | (<uint64_t>(asked[7] & 1) << 42) | (
        <uint64_t>(asked[8] & 0xf) << 45) | (<uint64_t>(asked[9] & 3) << 57)
    if take_requests(&frame, l2) == 0:
        vnet_hdr_fits(frame)
        vnet_hdr_from_mbuf(frame, buf)
        finish_checksum(&frame)
    free(buf)


cdef int fuzz_one(const uint8_t *data, size_t size) noexcept nogil:
    cdef uint32_t mode, n, what
    cdef uint8_t *p
    cdef uint8_t *header
    cdef vnet_t hdr
    cdef bint l2
    if size == 0:
        return 0
    mode = data[0]
    what = mode & 7
    l2 = not mode & WITHOUT_L2
    data += 1
    size -= 1
    if what == COALESCE:
        check_coalesce(data, size, mode)
        return 0
    if what == PARSE:
        p = exact(data, size)
        check_parse(p, <uint32_t>size, l2)
        free(p)
        return 0
    if size < VNET_LEN:
        return 0
    header = exact(data, VNET_LEN)
    hdr = vnet_of(header)
    n = <uint32_t>size - VNET_LEN
    p = exact(data + VNET_LEN, n)
    if mode & FITTING and (what == SEGMENT or what == CHAIN):
        fit(&hdr, p, n, l2)
    if what == SEGMENT:
        check_segment(p, n, l2, &hdr)
    elif what == COMPLETE:
        complete(p, n, l2, &hdr)
    elif what == CHAIN:
        check_chain(p, n, l2, &hdr, 1 + hdr.hdr_len % 300)
    elif what == RECEIVE:
        check_receive(p, n, l2, header, 1 + header[2])
    elif what == REQUEST:
        check_request(p, n, l2, header)
    free(p)
    free(header)
    return 0


def address():
    """Where ``int fuzz_one(const uint8_t *, size_t)`` is, with its tables made."""
    global small_slots, large_slots
    cdef uint32_t i
    if pool_create(&small_slots, SMALL, 100, 64, NULL, NULL) != 0 or (
            pool_create(&large_slots, LARGE, 4096, 64, NULL, NULL) != 0):
        raise MemoryError
    for i in range(4):
        tables[i] = gro_create(8, FRAMES_MAX, (GRO_UDP if i & 1 else 0) | (
            GRO_L3 if i & 2 else 0), 65535)
        if tables[i] == NULL:
            raise MemoryError
    return <size_t>&fuzz_one
