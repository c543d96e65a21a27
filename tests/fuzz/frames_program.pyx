# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The operations of a program on mbufs: made, resized, shared, written to, copied.

Operands are read from the input; what is not there any more is 0.  Which operations succeed is
said by the model, for those that take slots by how many are free.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memset

from rtap._core.mbuf cimport frame_adj, frame_append, frame_prepend, frame_trim
from rtap._core.pool cimport (
    mbuf_clone, mbuf_copy, mbuf_fill, mbuf_free, mbuf_guard, mbuf_read, mbuf_ref, mbuf_reset,
    mbuf_t, mbuf_write, pool_get, pool_t,
)
from rtap._frames.request cimport make_private
from rtap._core.flags cimport (
    RX_L4_CKSUM_NONE, RX_LRO, TX_TCP_CKSUM, TX_TCP_SEG, TX_UDP_CKSUM, TX_UDP_SEG,
)

from frames_flat cimport KIND_IPV6, KIND_UDP, KIND_UNFINISHED, build, build_t
from frames_model cimport (
    HANDLES, LONGEST_FRAME, adopt, claim, content_of, count, handle_t, handles, in_table,
    is_private, length_of, new_handle, slot_t, slots_used, store,
)


cdef int buffers() noexcept nogil:
    """Memory for frames of any length; -1 without."""
    global bytes_a, bytes_b
    bytes_a = <uint8_t *>malloc(LONGEST_FRAME)
    bytes_b = <uint8_t *>malloc(LONGEST_FRAME)
    return -1 if bytes_a == NULL or bytes_b == NULL else 0


cdef uint32_t byte() noexcept nogil:
    if program.left == 0:
        return 0
    program.left -= 1
    program.data += 1
    return (program.data - 1)[0]


cdef uint32_t word() noexcept nogil:
    cdef uint32_t low = byte()
    return low | byte() << 8


cdef uint32_t size() noexcept nogil:
    """Small ones are more likely."""
    cdef uint32_t n = byte()
    return n if n < 0xc0 else (n - 0xc0) << 8 | byte() if n < 0xf0 else word()


cdef void fresh(uint8_t *p, uint32_t n) noexcept nogil:
    cdef uint32_t i
    program.filling += 1
    for i in range(n):
        p[i] = <uint8_t>(program.filling * 31 + i * 13 + (i >> 8))


cdef handle_t *pick() noexcept nogil:
    """A frame that the program holds, or NULL."""
    cdef uint32_t at = byte(), i
    for i in range(<uint32_t>HANDLES):
        if handles[(at + i) % HANDLES].head != NULL and handles[(at + i) % HANDLES].table == 0:
            return &handles[(at + i) % HANDLES]
    return NULL


cdef handle_t *pick_frame() noexcept nogil:
    """As ``pick``, and from its first segment on."""
    cdef handle_t *h = pick()
    return NULL if h == NULL or h.part else h


cdef bint is_full() noexcept nogil:
    cdef uint32_t i
    for i in range(<uint32_t>HANDLES):
        if handles[i].head == NULL:
            return False
    return True


cdef void keep(mbuf_t *m, const uint8_t *data, uint32_t n) noexcept nogil:
    """A frame that came of an operation: held if there is room for one more."""
    cdef slot_t *head
    cdef uint32_t got
    if is_full():
        got = mbuf_read(m, 0, bytes_b, LONGEST_FRAME)
        claim(got == n and m.pkt_len == n, b"a frame of another length")
        mbuf_free(m)
        return
    head = adopt(m, data, n)
    new_handle(head)


cdef uint32_t free_in(uint32_t pool) noexcept nogil:
    return pools[pool].size - slots_used(pool)


cdef uint32_t copies_of(slot_t *s, uint32_t *need) noexcept nogil:
    """How many slots of each pool a copy takes."""
    cdef uint32_t n, room, total
    memset(need, 0, N_POOLS * sizeof(uint32_t))
    while s != NULL:
        n = s.n
        room = pools[s.pool].data_room
        total = room + pools[s.pool].headroom
        while True:
            need[s.pool] += 1
            if n <= total:
                break
            n -= room
        s = s.next
    return 0


cdef bint copy_fits(slot_t *s) noexcept nogil:
    cdef uint32_t need[N_POOLS]
    cdef uint32_t k
    copies_of(s, need)
    for k in range(<uint32_t>N_POOLS):
        if need[k] > free_in(k):
            return False
    return True


# ---- frames come and go


cdef mbuf_t *filled(pool_t *p, const uint8_t *data, uint32_t n) noexcept nogil:
    cdef mbuf_t *m
    if pool_get(p, &m, 1) == 0:
        return NULL
    mbuf_reset(m)
    if mbuf_fill(m, data, n) != 0:
        mbuf_free(m)
        return NULL
    mbuf_guard(m)
    return m


cdef void alloc(uint32_t pool, uint32_t n) noexcept nogil:
    """bytes_a becomes a frame."""
    cdef uint32_t room = pools[pool].data_room
    cdef bint fits = max((n + room - 1) // room, 1) <= free_in(pool)
    cdef mbuf_t *m
    if is_full():
        return
    m = filled(pools[pool], bytes_a, n)
    claim((m != NULL) == fits, b"a frame where there is no room, or none where there is some")
    if m != NULL:
        keep(m, bytes_a, n)


cdef void op_alloc() noexcept nogil:
    cdef uint32_t pool = byte() % N_POOLS, n = size()
    fresh(bytes_a, n)
    alloc(pool, n)


cdef void op_build() noexcept nogil:
    """A few frames of a flow, one behind the other."""
    cdef uint32_t pool = byte(), many = 1 + (pool >> 5), before, _i
    cdef build_t b
    cdef mbuf_t *m
    cdef uint32_t asked
    pool = (pool & 31) % N_POOLS
    b.kind = byte()
    b.flow = byte() % N_FLOWS
    b.payload = size()
    asked = max(size(), b.payload // PARTS_MAX + 1) if b.kind & 64 else 0
    if b.payload > 65000 or b.payload // pools[pool].data_room > free_in(pool):
        return
    for _i in range(many):
        b.seq = program.seq[b.flow]
        b.ip_id = program.ip_id[b.flow]
        program.seq[b.flow] += b.payload
        program.ip_id[b.flow] += 1
        before = build(&b, bytes_a)
        if is_full():
            return
        m = filled(pools[pool], bytes_a, before)
        if m == NULL:
            return
        if b.kind & KIND_UNFINISHED:
            m.ol_flags = RX_L4_CKSUM_NONE
            m.vnet_flags = 1
            m.csum_at = m.data_off + b.l4
            m.csum_offset = 6 if b.kind & KIND_UDP else 16
            m.l2_len = <uint16_t>b.l3
            m.l3_len = <uint16_t>(b.l4 - b.l3)
            m.l4_len = <uint16_t>(b.headers - b.l4)
            if asked != 0:
                m.ol_flags |= RX_LRO
                m.tso_segsz = <uint16_t>asked
                m.gso_type = 5 if b.kind & KIND_UDP else 4 if b.kind & KIND_IPV6 else 1
        elif asked != 0:
            m.l2_len = <uint16_t>b.l3
            m.l3_len = <uint16_t>(b.l4 - b.l3)
            m.tso_segsz = <uint16_t>asked
            m.ol_flags = (TX_UDP_SEG | TX_UDP_CKSUM if b.kind & KIND_UDP else
                          TX_TCP_SEG | TX_TCP_CKSUM)
        keep(m, bytes_a, before)


cdef void op_free() noexcept nogil:
    cdef handle_t *h = pick()
    if h != NULL:
        mbuf_free(h.head.m)
        h.head = NULL


cdef void op_clone() noexcept nogil:
    """Of a later segment too."""
    cdef handle_t *h = pick()
    cdef uint32_t need[N_POOLS]
    cdef bint fits = True
    cdef slot_t *s
    cdef uint32_t k, n
    cdef mbuf_t *m
    if h == NULL or is_full():
        return
    memset(need, 0, sizeof(need))
    s = h.head
    while s != NULL:
        need[s.pool] += 1
        s = s.next
    for k in range(<uint32_t>N_POOLS):
        fits &= need[k] <= free_in(k)
    n = content_of(h.head, bytes_a)
    m = mbuf_clone(h.head.m)
    claim((m != NULL) == fits, b"a clone without slots, or none with them")
    if m != NULL:
        keep(m, bytes_a, n)


cdef void op_again() noexcept nogil:
    """One more reference, on the frame or on the rest of it."""
    cdef handle_t *h = pick()
    cdef slot_t *s
    cdef bint rest = byte() & 1
    if h == NULL or is_full():
        return
    s = h.head.next if rest else h.head
    if s != NULL:
        rest |= h.part
        mbuf_ref(s.m)
        new_handle(s).part = rest


cdef void op_resize() noexcept nogil:
    """As an Mbuf's prepend, append, adj and trim, within the bounds and outside."""
    cdef handle_t *h = pick_frame()
    cdef uint32_t what = byte() & 3, n = size(), room
    cdef uint8_t *start = NULL
    cdef slot_t *first
    cdef slot_t *last
    if h == NULL or what < 2 and in_table(h.head):
        return                  # bytes that a table has looked at
    first = last = h.head
    while last.next != NULL:
        last = last.next
    if what == 0:
        room = first.off
        claim(frame_prepend(first.m, n, &start) == room, b"another headroom")
        if n <= room:
            first.off -= n
            first.n += n
            fresh(start, n)
            memcpy(bytes_a, start, n)
            store(first, 0, bytes_a, n)
    elif what == 1:
        room = last.room - last.off - last.n
        claim(frame_append(first.m, n, &start) == room, b"another tailroom")
        if n <= room:
            last.n += n
            fresh(start, n)
            memcpy(bytes_a, start, n)
            store(last, last.n - n, bytes_a, n)
    elif what == 2:
        room = first.n
        claim(frame_adj(first.m, n) == room, b"another length to cut off")
        if n <= room:
            first.off += n
            first.n -= n
    else:
        room = last.n
        claim(frame_trim(first.m, n) == room, b"another length to cut off")
        if n <= room:
            last.n -= n
    if what >= 2 and n <= room:
        mbuf_guard(first.m)


cdef void op_write() noexcept nogil:
    """Any bytes, or one of the program's own."""
    cdef handle_t *h = pick()
    cdef uint32_t offset = size(), n = size(), length
    if h == NULL or in_table(h.head):
        return
    length = length_of(h.head)
    if n == 0:
        bytes_a[0] = <uint8_t>byte()
        n = 1
    else:
        fresh(bytes_a, n)
    length = min(n, length - offset) if offset < length else 0
    claim(mbuf_write(h.head.m, offset, bytes_a, n) == length, b"another number of bytes written")
    store(h.head, offset, bytes_a, n)


cdef void op_chain() noexcept nogil:
    """Hangs a frame behind another, as an application in C may."""
    cdef handle_t *a = pick_frame()
    cdef handle_t *b = pick_frame()
    cdef slot_t *last
    if (a == NULL or b == NULL or a == b or not is_private(a.head) or b.head.refs != 1
            or in_table(b.head) or length_of(a.head) + length_of(b.head) > LONGEST_FRAME // 2):
        return
    last = a.head
    while last.next != NULL:
        last = last.next
    last.m.next = b.head.m
    a.head.m.nb_segs += b.head.m.nb_segs
    a.head.m.pkt_len += b.head.m.pkt_len
    last.next = b.head
    b.head = NULL


# ---- one frame into another


cdef void replaced(handle_t *h, mbuf_t *m, const uint8_t *data, uint32_t n) noexcept nogil:
    """The frame became another one, or has other bytes."""
    h.head = NULL
    count()
    keep(m, data, n)


cdef void op_private() noexcept nogil:
    cdef handle_t *h = pick_frame()
    cdef bint copies = byte() & 1
    cdef bint fits
    cdef uint32_t n
    cdef mbuf_t *m
    if h == NULL:
        return
    m = h.head.m
    n = content_of(h.head, bytes_a)
    fits = copy_fits(h.head)
    if copies:
        m = mbuf_copy(m)
        claim((m != NULL) == fits, b"a copy without slots, or none with them")
        if m != NULL:
            keep(m, bytes_a, n)
        return
    fits |= is_private(h.head)
    claim((make_private(&m) == 0) == fits, b"a copy without slots, or none with them")
    replaced(h, m, bytes_a, n)
