# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A model of frames, independent of the code under test.

For each slot of each pool there is a copy of its bytes, and a note of the window, of the next
segment and of whose bytes it shows.  From the handles that the harness has follow the references to
each slot, and which slots are in use.  ``settle`` compares all of it with the real headers and
bytes.

Where an operation makes new frames, the harness says what they contain; how that is laid out in
slots is taken from the real ones (``adopt``), after a look at whether it is possible.  What others
see never changes that way.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, calloc, malloc
from libc.string cimport memcmp, memcpy

from rtap._core.pool cimport mbuf_t, pool_available, pool_t

cdef pool_t *pools[POOLS_MAX]
cdef slot_t *slots[POOLS_MAX]
cdef uint32_t n_pools = 0


cdef void claim(bint what, const char *text) noexcept nogil:
    if not what:
        fprintf(stderr, "contradiction: %s\n", text)
        abort()


cdef int model_pool(pool_t *p) noexcept nogil:
    """Has a model of this pool, whose slots are all free; -1 without memory."""
    global n_pools
    cdef uint32_t i
    cdef slot_t *s = <slot_t *>calloc(p.size, sizeof(slot_t))
    claim(n_pools < POOLS_MAX and p.size <= SLOTS_MAX, b"a pool that the model has no room for")
    if s == NULL:
        return -1
    for i in range(p.size):
        s[i].m = &p.headers[i]
        s[i].pool = n_pools
        s[i].bytes = <uint8_t *>malloc(p.headroom + p.data_room)
        if s[i].bytes == NULL:
            return -1
    pools[n_pools] = p
    slots[n_pools] = s
    n_pools += 1
    return 0


cdef slot_t *slot_of(const mbuf_t *m) noexcept nogil:
    cdef uint32_t k
    for k in range(n_pools):
        if pools[k] == m.pool:
            claim(m >= pools[k].headers and m < pools[k].headers + pools[k].size,
                  b"a header outside its pool")
            return &slots[k][m - pools[k].headers]
    claim(False, b"a frame of an unknown pool")
    return NULL


cdef slot_t *base_of(slot_t *s) noexcept nogil:
    """Whose bytes a slot shows."""
    return s if s.owner == NULL else s.owner


cdef inline uint8_t *window(const slot_t *s) noexcept nogil:
    return (s.bytes if s.owner == NULL else s.owner.bytes) + s.shift + s.off


cdef uint32_t length_of(const slot_t *s) noexcept nogil:
    cdef uint32_t n = 0
    while s != NULL:
        n += s.n
        s = s.next
    return n


cdef uint32_t segments_of(const slot_t *s) noexcept nogil:
    cdef uint32_t n = 0
    while s != NULL:
        n += 1
        s = s.next
    return n


cdef uint32_t content_of(const slot_t *s, uint8_t *out) noexcept nogil:
    """Writes a frame's bytes; how many."""
    cdef uint32_t n = 0
    while s != NULL:
        memcpy(out + n, window(s), s.n)
        n += s.n
        s = s.next
    return n


cdef void store(slot_t *s, uint32_t offset, const uint8_t *src, uint32_t n) noexcept nogil:
    """Overwrites bytes of a frame, as far as it has them."""
    cdef uint32_t k
    while s != NULL and n > 0:
        if offset < s.n:
            k = min(n, s.n - offset)
            memcpy(window(s) + offset, src, k)
            src += k
            n -= k
            offset = 0
        else:
            offset -= s.n
        s = s.next


cdef bint is_private(const slot_t *s) noexcept nogil:
    """Whether nobody else sees any of the frame."""
    while s != NULL:
        if s.owner != NULL or s.refs != 1:
            return False
        s = s.next
    return True


cdef bint in_table(slot_t *head) noexcept nogil:
    """Whether a GRO table has a frame that shows bytes of the same slots."""
    cdef uint32_t i
    cdef slot_t *a
    cdef slot_t *b
    for i in range(<uint32_t>HANDLES):
        if handles[i].head == NULL or handles[i].table == 0:
            continue
        a = head
        while a != NULL:
            b = handles[i].head
            while b != NULL:
                if base_of(a) == base_of(b):
                    return True
                b = b.next
            a = a.next
    return False


cdef uint32_t slots_used(uint32_t pool) noexcept nogil:
    """As of the last count."""
    cdef uint32_t n = 0, i
    for i in range(pools[pool].size):
        n += slots[pool][i].refs > 0
    return n


cdef handle_t *new_handle(slot_t *head) noexcept nogil:
    """Notes a reference; NULL when there are enough."""
    cdef uint32_t i
    for i in range(<uint32_t>HANDLES):
        if handles[i].head == NULL:
            handles[i].head = head
            handles[i].part = False
            handles[i].table = 0
            return &handles[i]
    return NULL


cdef void refer(slot_t *s) noexcept nogil:
    while s != NULL:
        s.refs += 1
        if s.refs > 1:
            return
        if s.owner != NULL:
            refer(s.owner)
        s = s.next


cdef void count() noexcept nogil:
    """Counts the references that there are to each slot."""
    cdef uint32_t k, i
    for k in range(n_pools):
        for i in range(pools[k].size):
            slots[k][i].refs = 0
    for i in range(<uint32_t>HANDLES):
        refer(handles[i].head)


cdef void follow(slot_t *s) noexcept nogil:
    """Takes what nobody holds in the model from the real headers, from ``s`` on: the layout, and
    those bytes that nobody else sees."""
    cdef const mbuf_t *m
    cdef const pool_t *p
    cdef uint32_t steps = 0
    while s != NULL and s.refs == 0:
        m = s.m
        p = m.pool
        steps += 1
        claim(steps <= POOLS_MAX * SLOTS_MAX, b"a frame without an end")
        if m.direct == NULL:
            claim(m.buf == p.arena + (m - p.headers) * p.stride, b"bytes of another slot")
            claim(m.buf_len == p.headroom + p.data_room, b"another size than the slot's")
            s.owner = NULL
            s.shift = 0
        else:
            s.owner = slot_of(m.direct)
            claim(m.direct.direct == NULL, b"an owner that borrows")
            claim(m.buf >= m.direct.buf and
                  m.buf + m.buf_len <= m.direct.buf + m.direct.buf_len, b"more than was lent")
            s.shift = <uint32_t>(m.buf - m.direct.buf)
        s.room = m.buf_len
        s.off = m.data_off
        s.n = m.data_len
        claim(s.off <= s.room and s.n <= s.room - s.off, b"a window outside of its slot")
        s.next = NULL if m.next == NULL else slot_of(m.next)
        if base_of(s).refs == 0:
            memcpy(window(s), m.buf + m.data_off, s.n)
        if s.owner != NULL:
            follow(s.owner)
        s = s.next


cdef slot_t *adopt(mbuf_t *m, const uint8_t *expected, uint32_t n) noexcept nogil:
    """A frame that came of an operation, with the bytes that it has to have.  The model no longer
    has the handles that the operation consumed, and has counted since."""
    cdef slot_t *head = slot_of(m)
    cdef slot_t *s = head
    follow(head)
    claim(length_of(head) == n, b"a frame of another length")
    while s != NULL:
        claim(memcmp(window(s), expected, s.n) == 0, b"bytes that are not the frame's")
        expected += s.n
        s = s.next
    return head


cdef void compare(const slot_t *s) noexcept nogil:
    cdef const mbuf_t *m = s.m
    claim(m.refcnt == s.refs, b"another number of references")
    if s.refs == 0:
        return
    claim(m.direct == (NULL if s.owner == NULL else s.owner.m), b"another owner")
    claim(m.next == (NULL if s.next == NULL else s.next.m), b"another next segment")
    claim(m.buf == (m.pool.arena + (m - m.pool.headers) * m.pool.stride if s.owner == NULL else
                    m.direct.buf + s.shift), b"bytes that were moved")
    claim(m.buf_len == s.room, b"another room")
    claim(m.data_off == s.off and m.data_len == s.n, b"another window")
    claim(m.step == 0, b"a window that is still held")
    claim(memcmp(m.buf + m.data_off, window(s), s.n) == 0, b"other bytes")


cdef void settle() noexcept nogil:
    """Compares all that there is."""
    cdef uint32_t k, i
    cdef const handle_t *h
    count()
    for k in range(n_pools):
        for i in range(pools[k].size):
            compare(&slots[k][i])
        claim(pool_available(pools[k]) == pools[k].size - slots_used(k), b"slots lost or made up")
    for i in range(<uint32_t>HANDLES):
        h = &handles[i]
        if h.head != NULL and not h.part:
            claim(h.head.m.pkt_len == length_of(h.head), b"another pkt_len")
            claim(h.head.m.nb_segs == segments_of(h.head), b"another nb_segs")
