# SPDX-License-Identifier: BSD-3-Clause
"""The native arena: fixed slots, their headers, the free list.

All functions run with or without the GIL, from any thread.  The reference count in its header
owns a slot; ``pool_put`` is called only when the count is zero.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

cimport rtap._core.compat as _compat
from rtap._core.shm cimport shm_t


cdef enum:
    POOL_CACHE_SLOTS = 256      # most slots one thread's cache keeps
    POOL_CACHES = 16            # more threads share caches; each cache has a lock
    MIN_HEADROOM = 16           # a virtio-net header (10 bytes) goes in front of every frame
    MAX_DATA_ROOM = 1 << 24
    MBUF_SEGS_MAX = 0xffff
    PKT_LEN_MAX = 1 << 30       # of a frame when it is filled: no sum of lengths wraps


cdef struct mbuf_t:
    # First cache line: the fields that every frame needs.
    uint8_t *buf                # the bytes it may use: its slot, headroom first, or what it borrows
    mbuf_t *next                # next segment, holding one reference on it
    mbuf_t *direct              # owner of the bytes when this header borrows another slot's
    pool_t *pool
    uint64_t ol_flags
    uint32_t refcnt             # atomic
    uint32_t data_off
    uint32_t data_len
    uint32_t pkt_len            # valid in the first segment
    uint32_t buf_len
    uint16_t nb_segs            # valid in the first segment
    uint16_t port
    # Second: offloads.  csum_at counts from `buf`, so that it survives adj and prepend; see
    # csum_place.
    uint32_t packet_type
    uint32_t csum_at
    uint16_t csum_offset
    uint16_t tso_segsz
    uint16_t l2_len
    uint16_t l3_len
    uint16_t l4_len
    uint16_t vlan_tci
    uint16_t vlan_tci_outer
    uint16_t outer_l2_len
    uint16_t outer_l3_len
    uint8_t vnet_flags          # the received virtio header's flags and gso_type; a frame
    uint8_t gso_type            # forwarded as it came goes out with the same ones
    uint32_t peer               # of a datagram: its number in the table of its device; 0 is none
    uint16_t outer_back         # of a tunnel super-frame: how far in front of csum_at the outer
    uint16_t inner_back         # transport header and the inner network header begin
    uint32_t step               # held, without a GIL, while data_off and data_len move together


cdef struct cache_t:
    uint32_t lock
    uint32_t n
    mbuf_t *slots[POOL_CACHE_SLOTS]


cdef struct pool_t:
    uint64_t id                 # never reused, unlike addresses
    uint8_t *arena
    size_t arena_len
    int memfd                   # -1 when the arena is anonymous
    uint32_t size
    uint32_t data_room
    uint32_t headroom
    size_t stride
    mbuf_t *headers
    uint32_t lock               # guards n_free, free_slots, users
    uint32_t n_free
    uint32_t users              # rx queues, rings and stages that keep it open
    uint32_t closed             # no arena any more; set under all its locks
    uint32_t orphaned           # 0 owned, 1 caches closed, 2 the last slot frees the arena
    mbuf_t **free_slots
    cache_t *caches
    uint32_t cache_max          # most slots that a thread's cache keeps, and
    uint32_t cache_block        # how many move between it and the shared list at once
    shm_t *shm                  # of a shared pool, whose owner words are the shared list; or NULL
    pool_t *next_pool           # all pools of the process


cdef inline void mbuf_reset(mbuf_t *m) noexcept nogil:
    """A slot fresh from the pool becomes an empty frame with one reference."""
    m.next = NULL
    m.ol_flags = 0
    m.refcnt = 1
    m.data_off = m.pool.headroom
    m.data_len = 0
    m.pkt_len = 0
    m.nb_segs = 1
    m.port = 0xffff
    memset(&m.packet_type, 0, sizeof(mbuf_t) - (<size_t>&m.packet_type - <size_t>m))


cdef inline uint8_t *mbuf_data(const mbuf_t *m) noexcept nogil:
    return m.buf + m.data_off


cdef inline uint32_t mbuf_tailroom(const mbuf_t *m) noexcept nogil:
    return m.buf_len - m.data_off - m.data_len


cdef inline uint32_t mbuf_window(const mbuf_t *m, uint8_t **start) noexcept nogil:
    """Where a segment's data starts, and its length.  Both stay within the slot, even while another
    thread moves the window."""
    cdef uint32_t offset = _compat.load_relaxed(&m.data_off)
    cdef uint32_t n = _compat.load_relaxed(&m.data_len)
    start[0] = m.buf + offset
    return n if n <= m.buf_len - offset else m.buf_len - offset


cdef inline uint32_t mbuf_bytes(const mbuf_t *m) noexcept nogil:
    """Bytes in a segment and in those after it."""
    cdef uint8_t *start
    cdef uint32_t n = 0
    while m != NULL:
        n += mbuf_window(m, &start)
        m = m.next
    return n


cdef inline bint csum_place(const mbuf_t *m, uint32_t *start) noexcept nogil:
    """Where in the frame the bytes of its unfinished checksum begin; False when they were cut off
    in front."""
    start[0] = m.csum_at - m.data_off
    return <int32_t>start[0] >= 0


cdef inline bint csum_inside(const mbuf_t *m, uint32_t *start) noexcept nogil:
    """The same, and the checksum itself ends inside the frame."""
    return csum_place(m, start) and start[0] + m.csum_offset + 2 <= m.pkt_len


cdef inline bint mbuf_is_private(const mbuf_t *m) noexcept nogil:
    """Nobody else can see the bytes around this segment's data."""
    return m.direct == NULL and _compat.load(&m.refcnt) == 1


# In the sanitizer build nobody may touch free slots, bytes between slots, and bytes outside the
# window of a slot that only one frame can see.  In other builds these functions do nothing.

cdef inline void slot_shut(const mbuf_t *m) noexcept nogil:
    _compat.poison(m.buf, m.buf_len)


cdef inline void slot_open(const mbuf_t *m) noexcept nogil:
    _compat.unpoison(m.buf, m.buf_len)


cdef inline void mbuf_guard(const mbuf_t *m) noexcept nogil:
    """From here on only the bytes inside a frame's segments may be touched.  Code that widens a
    window opens the bytes that it gains."""
    while _compat.POISONS and m != NULL:
        if mbuf_is_private(m):
            slot_shut(m)
            _compat.unpoison(mbuf_data(m), m.data_len)
        m = m.next


cdef inline void mbuf_ref(mbuf_t *m) noexcept nogil:
    _compat.fetch_add(&m.refcnt, 1)


ctypedef void (*pool_gone_fn)(uint64_t pool_id) noexcept nogil

cdef uint32_t thread_number() noexcept nogil
cdef uint32_t fork_generation() noexcept nogil
cdef void pool_on_gone(pool_gone_fn hook) noexcept nogil
cdef int pool_create(pool_t **out, uint32_t n, uint32_t data_room, uint32_t headroom,
                     const char *memfd_name, shm_t *shm) noexcept nogil
cdef bint pool_hold(pool_t *p) noexcept nogil
cdef void pool_let_go(pool_t *p) noexcept nogil
cdef bint pool_close(pool_t *p, uint32_t *users, uint32_t *in_use) noexcept nogil
cdef void pool_disown(pool_t *p) noexcept nogil
cdef uint32_t pool_available(pool_t *p) noexcept nogil
cdef uint32_t pool_reclaim(pool_t *p) noexcept nogil
cdef uint32_t pool_get(pool_t *p, mbuf_t **out, uint32_t n) noexcept nogil
cdef void pool_put(pool_t *p, mbuf_t **slots, uint32_t n) noexcept nogil

cdef void mbuf_free(mbuf_t *m) noexcept nogil
cdef void mbuf_free_bulk(mbuf_t **v, uint32_t n) noexcept nogil
cdef uint32_t mbuf_read(const mbuf_t *m, uint32_t offset, uint8_t *dst, uint32_t n) noexcept nogil
cdef uint32_t mbuf_write(mbuf_t *m, uint32_t offset, const uint8_t *src, uint32_t n) noexcept nogil
cdef int mbuf_fill(mbuf_t *first, const uint8_t *src, size_t n) noexcept nogil
cdef mbuf_t *mbuf_clone(mbuf_t *m) noexcept nogil
cdef mbuf_t *mbuf_copy(const mbuf_t *m) noexcept nogil
cdef mbuf_t *mbuf_copy_into(pool_t *p, const mbuf_t *m) noexcept nogil
