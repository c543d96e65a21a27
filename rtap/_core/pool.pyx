# SPDX-License-Identifier: BSD-3-Clause
"""Slots, headers, reference counts and the free list under :class:`rtap.Mempool`.

The free list is a stack shared under a lock, with a small cache for each thread in
front of it.  Blocks are taken and given back in address order, so that a burst from
a quiet pool lies in regularly spaced slots.  When the shared list runs dry the caches
of other threads are drained, so a free slot is available no matter which thread freed it.
In a pool that processes share, the words of :mod:`rtap._core.shm` take the place of the stack.
"""

from libc.errno cimport EMSGSIZE, ENOMEM, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove

cimport rtap._core.compat as _compat
cimport rtap._core.live as _live
from rtap._core.linux cimport (
    MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, close,
    madvise, mmap, munmap, pthread_atfork, pthread_getspecific, pthread_key_create, pthread_key_t,
    pthread_setspecific,
)
from rtap._core.memfd cimport memfd_make
from rtap._core.shm cimport (
    shm_free_slots, shm_freed, shm_leave, shm_reclaim, shm_release, shm_t, shm_take,
)

cdef enum:
    CACHE_BLOCK = 64            # slots moved between a cache and the shared list at once
    SHARED_CACHES = 32          # a thread's cache keeps at most this fraction of a shared pool
    SLOT_ALIGN = 64
    HUGE_PAGE = 1 << 21
    PAGE = 4096

cdef pool_t *all_pools = NULL
cdef uint32_t pools_lock = 0
cdef uint32_t forks = 0
cdef uint32_t pools_made = 0
cdef uint32_t threads_seen = 0
cdef pool_gone_fn gone_hook = NULL
cdef pthread_key_t thread_key


cdef uint32_t thread_number() noexcept nogil:
    """1 for the first thread that asks, 2 for the second, and so on."""
    cdef size_t number = <size_t>pthread_getspecific(thread_key)
    if number == 0:
        number = _compat.fetch_add(&threads_seen, 1) + 1
        pthread_setspecific(thread_key, <void *>number)
    return <uint32_t>number


cdef inline cache_t *thread_cache(pool_t *p) noexcept nogil:
    return &p.caches[thread_number() % POOL_CACHES]


cdef inline size_t mapped(const pool_t *p) noexcept nogil:
    """Bytes of the arena's mapping: whole pages."""
    return (p.arena_len + PAGE - 1) & ~<size_t>(PAGE - 1)


cdef int pool_create(pool_t **out, uint32_t n, uint32_t data_room, uint32_t headroom,
                     const char *memfd_name, shm_t *shm) noexcept nogil:
    """Maps the arena; ``memfd_name`` puts it in a memfd.  With ``shm``, which it takes over, it is
    the arena there.  0 or -errno."""
    global all_pools
    cdef pool_t *p = <pool_t *>calloc(1, sizeof(pool_t))
    cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS
    cdef int rc
    cdef uint32_t i
    cdef mbuf_t *m
    if p == NULL:
        if shm != NULL:
            shm_leave(shm)
        return -ENOMEM
    _live.made(_live.POOLS, 1)
    p.shm = shm
    p.memfd = -1
    p.size = n
    p.data_room = data_room
    p.headroom = headroom
    p.stride = (<size_t>headroom + data_room + SLOT_ALIGN - 1) & ~<size_t>(SLOT_ALIGN - 1)
    if p.stride > (<size_t>-1 - SLOT_ALIGN) // n:
        pool_destroy(p)
        return -ENOMEM
    # A header is read in one piece, which may reach over the end of the last slot while its window
    # moves.
    p.arena_len = p.stride * n + SLOT_ALIGN
    p.headers = <mbuf_t *>calloc(n, sizeof(mbuf_t))
    p.free_slots = <mbuf_t **>malloc(n * sizeof(mbuf_t *))
    p.caches = <cache_t *>calloc(POOL_CACHES, sizeof(cache_t))
    p.cache_max = POOL_CACHE_SLOTS
    p.cache_block = CACHE_BLOCK
    if p.headers == NULL or p.free_slots == NULL or p.caches == NULL:
        pool_destroy(p)
        return -ENOMEM
    if shm != NULL:
        # Free slots in a cache are out of the reach of other processes.
        p.cache_max = min(p.cache_max, n // SHARED_CACHES)
        p.cache_block = min(p.cache_block, p.cache_max // 2)
        p.memfd = shm.fd
    elif memfd_name != NULL:
        rc = memfd_make(memfd_name, p.arena_len)
        if rc < 0:
            pool_destroy(p)
            return rc
        p.memfd = rc
        flags = MAP_SHARED
    if shm != NULL:
        p.arena = shm.arena
    else:
        p.arena = <uint8_t *>mmap(NULL, p.arena_len, PROT_READ | PROT_WRITE, flags, p.memfd, 0)
    if <void *>p.arena == MAP_FAILED:
        rc = -errno
        p.arena = NULL
        pool_destroy(p)
        return rc
    _live.made(_live.ARENAS, 1)
    if p.arena_len >= HUGE_PAGE and p.memfd < 0:
        madvise(p.arena, p.arena_len, MADV_HUGEPAGE)
    for i in range(n):
        m = &p.headers[i]
        m.pool = p
        m.buf = p.arena + i * p.stride
        m.buf_len = headroom + data_room
        p.free_slots[i] = m
    _compat.poison(p.arena, mapped(p))
    p.n_free = n if shm == NULL else 0
    p.id = _compat.fetch_add(&pools_made, 1) + 1
    _compat.lock(&pools_lock)
    p.next_pool = all_pools
    all_pools = p
    _compat.unlock(&pools_lock)
    out[0] = p
    return 0


cdef void pool_on_gone(pool_gone_fn hook) noexcept nogil:
    """``hook`` runs before an arena is unmapped; every ring then drops its registration of it."""
    global gone_hook
    gone_hook = hook


cdef void pool_unlist(pool_t *p) noexcept nogil:
    cdef pool_t **link = &all_pools
    _compat.lock(&pools_lock)
    while link[0] != NULL and link[0] != p:
        link = &link[0].next_pool
    if link[0] == p:
        link[0] = p.next_pool
    _compat.unlock(&pools_lock)


cdef void pool_unmap(pool_t *p) noexcept nogil:
    """Clears the fields before it gives the memory back, so that a child forked meanwhile does not
    give it back again."""
    cdef uint8_t *arena = p.arena
    cdef mbuf_t *headers = p.headers
    cdef shm_t *shm = p.shm
    cdef int memfd = p.memfd
    if arena != NULL and gone_hook != NULL:
        gone_hook(p.id)
    p.arena = NULL
    p.headers = NULL
    p.shm = NULL
    p.memfd = -1
    if arena != NULL:
        _compat.unpoison(arena, mapped(p))
        if shm == NULL:
            munmap(arena, p.arena_len)
        _live.gone(_live.ARENAS, 1)
    if shm != NULL:
        shm_leave(shm)          # its memory and its descriptor
    elif memfd >= 0:
        close(memfd)
    free(headers)


cdef void pool_destroy(pool_t *p) noexcept nogil:
    pool_unlist(p)
    pool_unmap(p)
    free(p.free_slots)
    free(p.caches)
    free(p)
    _live.gone(_live.POOLS, 1)


cdef bint pool_hold(pool_t *p) noexcept nogil:
    """Keeps the pool open; False when it is closed."""
    cdef bint is_open
    _compat.lock(&p.lock)
    is_open = not p.closed
    p.users += is_open
    _compat.unlock(&p.lock)
    _live.made(_live.POOL_USERS, is_open)
    return is_open


cdef void pool_let_go(pool_t *p) noexcept nogil:
    _compat.lock(&p.lock)
    p.users -= 1
    _compat.unlock(&p.lock)
    _live.gone(_live.POOL_USERS, 1)


cdef bint pool_close(pool_t *p, uint32_t *users, uint32_t *in_use) noexcept nogil:
    """Unmaps the arena unless somebody uses it: then False, and the numbers of users and slots.

    A closed pool stays without slots: threads that ask for some meanwhile get none."""
    cdef bint first, unused
    cdef uint32_t i
    pool_lock_all(p)
    first = not p.closed
    users[0] = p.users
    in_use[0] = slots_used(p) if first else 0
    unused = users[0] == 0 and in_use[0] == 0
    if unused:
        _compat.store(&p.closed, 1)
        p.n_free = 0
        if first and p.shm != NULL:
            for i in range(<uint32_t>POOL_CACHES):
                shm_put(p, p.caches[i].slots, p.caches[i].n)
        for i in range(<uint32_t>POOL_CACHES):
            p.caches[i].n = 0
    pool_unlock_all(p)
    if unused and first:
        pool_unmap(p)
    return unused


cdef void pool_disown(pool_t *p) noexcept nogil:
    """The Python owner is gone: the arena goes with its last slot, now or later."""
    cdef cache_t *c
    cdef uint32_t i
    cdef bint complete
    _compat.store(&p.orphaned, 1)
    for i in range(<uint32_t>POOL_CACHES):
        c = &p.caches[i]
        _compat.lock(&c.lock)
        shared_put(p, c.slots, c.n)
        c.n = 0
        _compat.unlock(&c.lock)
    _compat.lock(&p.lock)
    complete = all_back(p)
    _compat.store(&p.orphaned, 2)
    _compat.unlock(&p.lock)
    if complete or p.closed:
        pool_destroy(p)


cdef void pool_lock_all(pool_t *p) noexcept nogil:
    """Every lock of a pool, in the order in which they nest."""
    cdef uint32_t i
    for i in range(<uint32_t>POOL_CACHES):
        _compat.lock(&p.caches[i].lock)
    _compat.lock(&p.lock)


cdef void pool_unlock_all(pool_t *p) noexcept nogil:
    cdef uint32_t i
    _compat.unlock(&p.lock)
    for i in range(<uint32_t>POOL_CACHES):
        _compat.unlock(&p.caches[i].lock)


cdef uint32_t slots_free(pool_t *p) noexcept nogil:
    cdef uint32_t total = p.n_free, i
    for i in range(<uint32_t>POOL_CACHES):
        total += p.caches[i].n
    return total


cdef uint32_t slots_used(pool_t *p) noexcept nogil:
    """By this process."""
    cdef uint32_t total = p.size if p.shm == NULL else _compat.load(&p.shm.held)
    return total - slots_free(p)


cdef bint all_back(pool_t *p) noexcept nogil:
    """Whether this process has no slot out of the pool, once the caches are empty."""
    return p.n_free == p.size if p.shm == NULL else _compat.load(&p.shm.held) == 0


cdef void shm_put(pool_t *p, mbuf_t **slots, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        shm_release(p.shm, <uint32_t>(slots[i] - p.headers))
    if n > 0:
        shm_freed(p.shm, n)


cdef uint32_t shm_get(pool_t *p, mbuf_t **out, uint32_t n) noexcept nogil:
    cdef uint32_t found[CACHE_BLOCK]
    cdef uint32_t got = 0, wanted, k, i
    _compat.lock(&p.lock)
    while got < n and not p.closed:
        wanted = min(n - got, <uint32_t>CACHE_BLOCK)
        k = shm_take(p.shm, found, wanted)
        for i in range(k):
            out[got + i] = &p.headers[found[i]]
            out[got + i].next = NULL        # the header may be from before it went into a ring
        got += k
        if k < wanted:
            break
    _compat.unlock(&p.lock)
    return got


cdef void before_fork() noexcept nogil:
    """No other thread is half-way through a free list while the child's copy is made."""
    cdef pool_t *p
    _compat.lock(&pools_lock)
    p = all_pools
    while p != NULL:
        pool_lock_all(p)
        p = p.next_pool


cdef void after_fork_in_parent() noexcept nogil:
    cdef pool_t *p = all_pools
    while p != NULL:
        pool_unlock_all(p)
        p = p.next_pool
    _compat.unlock(&pools_lock)


cdef void after_fork_in_child() noexcept nogil:
    global forks
    forks += 1
    after_fork_in_parent()


cdef uint32_t fork_generation() noexcept nogil:
    """Goes up in a forked child: rings, descriptors and threads from before are the parent's."""
    return forks


cdef uint32_t pool_available(pool_t *p) noexcept nogil:
    cdef uint32_t total
    pool_reclaim(p)
    pool_lock_all(p)            # slots move between the lists: lock by lock would count some twice
    total = slots_free(p)
    if p.shm != NULL and not p.closed:
        total += shm_free_slots(p.shm)
    pool_unlock_all(p)
    return total


cdef uint32_t pool_reclaim(pool_t *p) noexcept nogil:
    """Takes back what processes have left that died; returns how many slots."""
    cdef uint32_t n = 0
    _compat.lock(&p.lock)
    if p.shm != NULL and not p.closed:
        n = shm_reclaim(p.shm)
    _compat.unlock(&p.lock)
    return n


cdef inline uint32_t shared_get(pool_t *p, mbuf_t **out, uint32_t n) noexcept nogil:
    cdef uint32_t k
    if p.shm != NULL:
        return shm_get(p, out, n)
    _compat.lock(&p.lock)
    k = n if n <= p.n_free else p.n_free
    p.n_free -= k
    memcpy(out, p.free_slots + p.n_free, k * sizeof(mbuf_t *))
    _compat.unlock(&p.lock)
    return k


cdef inline void shared_put(pool_t *p, mbuf_t **slots, uint32_t n) noexcept nogil:
    cdef bint last
    _compat.lock(&p.lock)
    if p.shm != NULL:
        shm_put(p, slots, n)
    else:
        memcpy(p.free_slots + p.n_free, slots, n * sizeof(mbuf_t *))
        p.n_free += n
    last = n > 0 and p.orphaned == 2 and all_back(p)
    _compat.unlock(&p.lock)
    if last:
        pool_destroy(p)


cdef inline uint32_t cache_take(cache_t *c, mbuf_t **out, uint32_t n) noexcept nogil:
    cdef uint32_t k = n if n <= c.n else c.n
    c.n -= k
    memcpy(out, c.slots + c.n, k * sizeof(mbuf_t *))
    return k


cdef uint32_t pool_get(pool_t *p, mbuf_t **out, uint32_t n) noexcept nogil:
    """Takes up to ``n`` slots; returns how many.  They still need ``mbuf_reset``."""
    cdef cache_t *own = thread_cache(p)
    cdef uint32_t got, i
    _compat.lock(&own.lock)
    if own.n < n and n <= p.cache_block and _compat.load_relaxed(&p.orphaned) == 0:
        own.n += shared_get(p, own.slots + own.n, p.cache_block)
    got = cache_take(own, out, n)
    _compat.unlock(&own.lock)
    if got < n:
        got += shared_get(p, out + got, n - got)
    if got < n:
        for i in range(<uint32_t>POOL_CACHES):
            _compat.lock(&p.caches[i].lock)
            got += cache_take(&p.caches[i], out + got, n - got)
            _compat.unlock(&p.caches[i].lock)
            if got == n:
                break
    for i in range(got):
        slot_open(out[i])
    _live.made(_live.MBUFS, got)
    return got


cdef void pool_put(pool_t *p, mbuf_t **slots, uint32_t n) noexcept nogil:
    """Gives slots back.  Their reference counts are zero and they own their bytes."""
    cdef cache_t *own = thread_cache(p)
    cdef uint32_t surplus, i
    for i in range(n):
        _compat.check(slots[i].pool == p and slots[i].direct == NULL and slots[i].next == NULL)
        slot_shut(slots[i])
    _live.gone(_live.MBUFS, n)
    _compat.lock(&own.lock)
    if n > p.cache_max - p.cache_block or _compat.load_relaxed(&p.orphaned) != 0:
        _compat.unlock(&own.lock)
        shared_put(p, slots, n)
        return
    if own.n + n > p.cache_max:
        # The oldest go; the slots freed last are still in the processor's cache.
        surplus = own.n + n - (p.cache_max - p.cache_block)
        if surplus > own.n:
            surplus = own.n
        shared_put(p, own.slots, surplus)
        own.n -= surplus
        memmove(own.slots, own.slots + surplus, own.n * sizeof(mbuf_t *))
    memcpy(own.slots + own.n, slots, n * sizeof(mbuf_t *))
    own.n += n
    _compat.unlock(&own.lock)


cdef inline bint drop_ref(mbuf_t *m) noexcept nogil:
    """True when the caller held the last reference."""
    if _compat.load(&m.refcnt) == 1:
        m.refcnt = 0
        return True
    return _compat.sub_fetch(&m.refcnt, 1) == 0


cdef mbuf_t *recycle_header(mbuf_t *m) noexcept nogil:
    """Makes a dead segment ready for its pool; returns the owner of borrowed bytes, or NULL."""
    cdef mbuf_t *owner = m.direct
    m.next = NULL
    if owner != NULL:
        m.direct = NULL
        m.buf = m.pool.arena + (m - m.pool.headers) * m.pool.stride
        m.buf_len = m.pool.headroom + m.pool.data_room
    return owner


cdef void mbuf_free(mbuf_t *m) noexcept nogil:
    """Drops one reference on a frame.  NULL is allowed.

    Holders, the preceding segment and clones count in a segment's reference count.  The caller that
    takes it to zero also drops the segment's reference on the next one."""
    cdef mbuf_t *nxt
    cdef mbuf_t *owner
    while m != NULL and drop_ref(m):
        nxt = m.next
        owner = recycle_header(m)
        pool_put(m.pool, &m, 1)
        if owner != NULL:
            mbuf_free(owner)    # an owner never borrows itself: one level deep
        m = nxt


cdef void mbuf_free_bulk(mbuf_t **v, uint32_t n) noexcept nogil:
    """Drops one reference on each of ``n`` frames, giving plain ones back in blocks."""
    cdef mbuf_t *block[CACHE_BLOCK]
    cdef pool_t *p = NULL
    cdef uint32_t held = 0, i
    cdef mbuf_t *m
    for i in range(n):
        m = v[i]
        if m.next != NULL or m.direct != NULL or _compat.load(&m.refcnt) != 1:
            mbuf_free(m)
            continue
        if held == CACHE_BLOCK or (m.pool != p and held > 0):
            pool_put(p, block, held)
            held = 0
        p = m.pool
        m.refcnt = 0
        block[held] = m
        held += 1
    if held > 0:
        pool_put(p, block, held)


cdef uint32_t mbuf_read(const mbuf_t *m, uint32_t offset, uint8_t *dst, uint32_t n) noexcept nogil:
    """Copies up to ``n`` bytes of a frame from ``offset`` on; returns how many there were."""
    cdef uint32_t done = 0, k
    cdef uint8_t *start
    while m != NULL and done < n:
        k = mbuf_window(m, &start)
        if offset >= k:
            offset -= k
        else:
            k -= offset
            if k > n - done:
                k = n - done
            memcpy(dst + done, start + offset, k)
            done += k
            offset = 0
        m = m.next
    return done


cdef uint32_t mbuf_write(mbuf_t *m, uint32_t offset, const uint8_t *src, uint32_t n) noexcept nogil:
    """Overwrites up to ``n`` bytes of a frame from ``offset`` on; returns how many fitted."""
    cdef uint32_t done = 0, k
    cdef uint8_t *start
    while m != NULL and done < n:
        k = mbuf_window(m, &start)
        if offset >= k:
            offset -= k
        else:
            k -= offset
            if k > n - done:
                k = n - done
            memmove(start + offset, src + done, k)      # may be a view of the same frame
            done += k
            offset = 0
        m = m.next
    return done


cdef int mbuf_fill(mbuf_t *first, const uint8_t *src, size_t n) noexcept nogil:
    """Fills an empty frame, adding segments of its pool as needed.

    0; -ENOMEM when the pool has too few slots left, -EMSGSIZE when the bytes are more than
    PKT_LEN_MAX or take more segments than a frame can count.  The caller then frees the
    partly filled frame."""
    cdef mbuf_t *tail = first
    cdef mbuf_t *seg
    cdef uint32_t room, k
    if n > <size_t>PKT_LEN_MAX:
        return -EMSGSIZE
    while True:
        room = mbuf_tailroom(tail)
        k = <uint32_t>n if n < room else room
        memcpy(mbuf_data(tail), src, k)
        tail.data_len = k
        first.pkt_len += k
        src += k
        n -= k
        if n == 0:
            return 0
        if first.nb_segs == MBUF_SEGS_MAX:
            return -EMSGSIZE
        if pool_get(first.pool, &seg, 1) == 0:
            return -ENOMEM
        mbuf_reset(seg)
        tail.next = seg
        tail = seg
        first.nb_segs += 1


cdef mbuf_t *mbuf_clone(mbuf_t *m) noexcept nogil:
    """New headers over the same bytes, one for each segment; NULL when the pool is empty.

    The lengths are those of the new segments, even if the original changes meanwhile."""
    cdef mbuf_t *head = NULL
    cdef mbuf_t *tail = NULL
    cdef mbuf_t *seg
    cdef mbuf_t *owner
    while m != NULL:
        if pool_get(m.pool, &seg, 1) == 0:
            mbuf_free(head)
            return NULL
        owner = m.direct if m.direct != NULL else m
        mbuf_ref(owner)
        _compat.step_lock(&m.step)
        memcpy(seg, m, sizeof(mbuf_t))
        _compat.step_unlock(&m.step)
        seg.data_len = min(seg.data_len, seg.buf_len - seg.data_off)
        seg.step = 0
        seg.refcnt = 1
        seg.next = NULL
        seg.direct = owner
        if tail == NULL:
            head = seg
            head.pkt_len = 0
            head.nb_segs = 0
        else:
            tail.next = seg
        tail = seg
        head.pkt_len += seg.data_len
        head.nb_segs += 1
        m = m.next
    return head


cdef inline uint32_t copy_in(mbuf_t *m, const uint8_t *src, uint32_t n) noexcept nogil:
    """Fills a fresh slot with as many of ``n`` bytes as it holds, leaving the headroom free if it
    can; returns how many."""
    cdef uint32_t k = n if n <= m.buf_len else m.buf_len - m.data_off
    m.data_off = min(m.data_off, m.buf_len - k)
    m.data_len = k
    _compat.check(m.direct == NULL and m.data_off + k <= m.buf_len)
    memcpy(mbuf_data(m), src, k)
    return k


cdef mbuf_t *mbuf_copy(const mbuf_t *m) noexcept nogil:
    """An independent frame with the same bytes and metadata; NULL when the pool is empty or the
    frame would have more segments than it can count."""
    return mbuf_copy_into(NULL, m)


cdef mbuf_t *mbuf_copy_into(pool_t *p, const mbuf_t *m) noexcept nogil:
    """The same, with its slots from another pool; NULL is the pool of each segment.

    A segment that borrows more bytes than a slot of its own pool holds takes several."""
    cdef const mbuf_t *first = m
    cdef mbuf_t *head = NULL
    cdef mbuf_t *tail = NULL
    cdef mbuf_t *seg
    cdef uint8_t *start
    cdef uint32_t n, k
    while m != NULL:
        n = mbuf_window(m, &start)
        while True:
            if (head != NULL and head.nb_segs == MBUF_SEGS_MAX
                    or pool_get(p if p != NULL else m.pool, &seg, 1) == 0):
                mbuf_free(head)
                return NULL
            mbuf_reset(seg)
            k = copy_in(seg, start, n)
            if head == NULL:
                head = seg
                memcpy(&head.packet_type, &first.packet_type,
                       sizeof(mbuf_t) - (<size_t>&first.packet_type - <size_t>first))
                head.step = 0
                head.ol_flags = first.ol_flags
                head.csum_at = first.csum_at - <uint32_t>(start - first.buf) + head.data_off
                head.port = first.port
            else:
                tail.next = seg
                head.nb_segs += 1
            tail = seg
            head.pkt_len += k       # not the original's: its windows may move meanwhile
            start += k
            n -= k
            if n == 0:
                break
        m = m.next
    return head


if pthread_key_create(&thread_key, NULL) != 0:
    raise MemoryError("no pthread key left for the mbuf caches")
if pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) != 0:
    raise MemoryError("cannot watch for fork")
