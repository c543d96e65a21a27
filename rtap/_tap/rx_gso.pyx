# SPDX-License-Identifier: BSD-3-Clause
"""Splitting on the way in (``rx_gso``): the kernel hands over super-frames, the application gets
frames within the MTU, with checksums.

Frames are read into 64 KiB slots of the queue's own, and handed out in mbufs of the application's
pool.  When a burst has no room left for a super-frame, the super-frame waits here for the next one;
an eventfd tells threads that wait for the descriptor.

No frame can block its queue.  A super-frame waits for one burst until there are mbufs for all of
it; then it is handed out in parts, as mbufs become free.  A frame that never fits is dropped.
Long payloads are referred to, not copied; they never take more than half of the queue's own slots.
"""

from libc.errno cimport E2BIG, EMSGSIZE, ENOBUFS
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

cimport rtap._core.compat as _compat
cimport rtap._core.live as _live
from rtap._core.flags cimport RX_LRO
from rtap._core.linux cimport EFD_CLOEXEC, EFD_NONBLOCK, close, eventfd, read, write
from rtap._core.pool cimport (
    MBUF_SEGS_MAX, mbuf_data, mbuf_free, mbuf_free_bulk, mbuf_read, mbuf_reset, mbuf_t,
    pool_available, pool_get, pool_t,
)
from rtap._core.queue cimport rxq_t
from rtap._core.traffic cimport count_frames
from rtap._frames.segment cimport (
    FITS, REFERENCE_MIN, SPLIT_MAX, gso_check, gso_part, gso_whole, plan_mbuf, plan_t,
)
from rtap._frames.vnet cimport keeps_vnet_hdr


cdef rx_gso_t *rx_gso_create(pool_t *pool, bint l2) noexcept nogil:
    """NULL without memory or descriptors."""
    cdef rx_gso_t *t = <rx_gso_t *>calloc(1, sizeof(rx_gso_t))
    if t == NULL:
        return NULL
    t.pool = pool
    t.l2 = l2
    t.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if t.wake < 0:
        free(t)
        return NULL
    _live.made(_live.SPLITTERS, 1)
    return t


cdef void rx_gso_drop(rx_gso_t *t, rxq_t *q) noexcept nogil:
    """Throws away the waiting frames, and counts them; for the queue's owner."""
    cdef plan_t plan
    cdef uint32_t lost = t.n_read + t.n_split, rest
    _compat.store(&t.stale, 0)
    if t.n_made > 0 and plan_mbuf(t.read[t.at_read], t.l2, &plan) == FITS:
        rest = plan.count - t.n_made    # counted as if they had been made
        _compat.counter_add(&q.gso, rest)
        lost += rest - 1
    mbuf_free_bulk(t.read + t.at_read, t.n_read)
    mbuf_free_bulk(t.split + t.at_split, t.n_split)
    t.n_read = t.n_split = t.at_read = t.at_split = t.n_made = 0
    t.waited = False
    _compat.counter_add(&q.stopped, lost)
    signal(t)


cdef void rx_gso_destroy(rx_gso_t *t) noexcept nogil:
    """Frees everything; after rx_gso_drop, or in a forked child, where the parent has the
    frames."""
    if t != NULL:
        close(t.wake)
        free(t)
        _live.gone(_live.SPLITTERS, 1)


cdef inline void signal(rx_gso_t *t) noexcept nogil:
    """Makes the eventfd show whether frames wait here."""
    cdef bint waiting = t.n_read + t.n_split > 0
    cdef uint64_t value = 1
    if waiting == t.awake:
        return
    if waiting:
        write(t.wake, &value, sizeof(value))
    else:
        read(t.wake, &value, sizeof(value))
    t.awake = waiting


cdef int move(mbuf_t *m, pool_t *pool, mbuf_t **out) noexcept nogil:
    """Moves a finished frame into slots of ``pool`` and frees the original: 1;
    or -ENOBUFS, and no change, when there are too few slots."""
    cdef mbuf_t *head = NULL
    cdef mbuf_t *tail = NULL
    cdef mbuf_t *seg
    cdef uint32_t room = pool.data_room, done = 0, count = 0
    _compat.check(not keeps_vnet_hdr(m))        # or the place of its checksum would move too
    while head == NULL or done < m.pkt_len:
        if pool_get(pool, &seg, 1) == 0:
            mbuf_free(head)
            return -ENOBUFS
        mbuf_reset(seg)
        seg.data_len = min(room, m.pkt_len - done)
        mbuf_read(m, done, mbuf_data(seg), seg.data_len)
        done += seg.data_len
        count += 1
        if head == NULL:
            head = seg
        else:
            tail.next = seg
        tail = seg
    memcpy(&head.packet_type, &m.packet_type,
           sizeof(mbuf_t) - (<size_t>&m.packet_type - <size_t>m))
    head.ol_flags = m.ol_flags
    head.pkt_len = m.pkt_len
    head.nb_segs = <uint16_t>count
    head.port = m.port
    mbuf_free(m)
    out[0] = head
    return 1


cdef inline bint lends(const mbuf_t *m) noexcept nogil:
    """Whether the application may keep a slot that was read into.  It may not when half of them are
    in use, or it could stop the queue by keeping frames."""
    return (m.tso_segsz >= REFERENCE_MIN
            and pool_available(m.pool) >= m.pool.size - m.pool.size // 2)


cdef inline uint32_t hand_out(rx_gso_t *t, mbuf_t **out, uint32_t n) noexcept nogil:
    cdef uint32_t k = min(n, t.n_split)
    memcpy(out, t.split + t.at_split, k * sizeof(mbuf_t *))
    t.at_split += k
    t.n_split -= k
    return k


cdef inline void next_read(rx_gso_t *t) noexcept nogil:
    t.at_read += 1
    t.n_read -= 1
    t.n_made = 0
    t.waited = False


cdef int prepare(rx_gso_t *t, mbuf_t **m) noexcept nogil:
    """Finishes a frame that need not be split.  -EINVAL or -E2BIG when it cannot be handed out,
    as gso_check."""
    cdef int rc = 1
    if keeps_vnet_hdr(m[0]):
        rc = gso_check(m[0], t.pool, t.l2, SPLIT_MAX)
        if rc == 1:
            rc = gso_whole(m[0], t.pool, t.l2, False, m, 1)
    if rc == 1 and m[0].pkt_len > (<uint64_t>t.pool.data_room
                                   * min(t.pool.size, <uint32_t>MBUF_SEGS_MAX)):
        rc = -E2BIG
    return rc


cdef void screen(rx_gso_t *t, rxq_t *q) noexcept nogil:
    """Counts the frames that were read, and drops those that can never be handed out.  The others
    are super-frames of several frames, or finished frames."""
    cdef uint32_t kept = 0, i
    cdef int rc
    for i in range(t.n_read):
        rc = prepare(t, &t.read[i])
        if rc > 0:
            t.read[kept] = t.read[i]
            kept += 1
            continue
        _compat.counter_add(&q.gso_too_long if rc == -E2BIG else &q.bad_vnet_hdr, 1)
        _compat.counter_add(&q.errors, 1)
        mbuf_free(t.read[i])
    t.at_read = 0
    t.n_read = kept
    if kept > 0:
        _compat.counter_add(&q.packets, kept)
        _compat.counter_add(&q.bytes, count_frames(&q.traffic, t.read, kept, t.l2))


cdef int split_whole(rx_gso_t *t, mbuf_t *m, bint refer, mbuf_t **out, uint32_t n,
                     bint first) noexcept nogil:
    """Makes all frames of a super-frame and returns how many.  They are in ``out``; if it has too
    little room they are in ``t.split``, for this burst and the next ones.  The latter only for the
    ``first`` super-frame of a burst, else -EMSGSIZE: one that two bursts share would not be merged
    whole again."""
    cdef int rc = gso_whole(m, t.pool, t.l2, refer, out, min(n, <uint32_t>SPLIT_MAX))
    if rc == -EMSGSIZE and first:
        rc = gso_whole(m, t.pool, t.l2, refer, t.split, SPLIT_MAX)
        if rc > 0:
            t.at_split = 0
            t.n_split = rc
    return rc


cdef int split_first(rx_gso_t *t, rxq_t *q, mbuf_t **out, uint32_t n, bint first) noexcept nogil:
    """Splits the super-frame that was read first; returns how many frames are in ``out``.
    -EMSGSIZE as split_whole, -ENOBUFS without mbufs."""
    cdef mbuf_t *m = t.read[t.at_read]
    cdef bint refer = lends(m)
    cdef uint32_t left = 0
    cdef int rc = -E2BIG
    if not t.waited and t.n_made == 0:
        rc = split_whole(t, m, refer, out, n, first)
    if rc == -E2BIG:            # too few mbufs for all at once
        rc = gso_part(m, t.pool, t.l2, refer, t.n_made, out, n, &left)
    if rc > 0:
        if t.n_made == 0:
            _compat.counter_add(&q.gso_super, 1)
        _compat.counter_add(&q.gso, rc)
        t.n_made += rc
        if left == 0:
            next_read(t)
        if t.n_split > 0:
            rc = hand_out(t, out, n)
    return rc


cdef uint32_t rx_gso(rx_gso_t *t, rx_read_fn receive, rxq_t *q, mbuf_t **out, uint32_t n,
                     int *error) noexcept nogil:
    """Hands out up to ``n`` frames; if none wait here, ``receive`` reads more."""
    cdef uint32_t got, asked, total = 0
    cdef bint more = True
    cdef int rc
    if _compat.load_relaxed(&t.stale) != 0:
        rx_gso_drop(t, q)
    got = hand_out(t, out, n)
    while got < n and (more or t.n_read > 0):
        if t.n_read == 0:
            asked = min(n - got, <uint32_t>READS)
            t.n_read = receive(q, t.read, asked, error)
            total += asked      # frames that are dropped must not prolong a burst
            more = t.n_read == asked and total < n
            screen(t, q)
            continue
        if t.read[t.at_read].ol_flags & RX_LRO:
            rc = split_first(t, q, out + got, n - got, got == 0)
        else:
            rc = move(t.read[t.at_read], t.pool, out + got)
            if rc > 0:
                next_read(t)
        if rc == -ENOBUFS:      # the frame stays for a burst that finds buffers
            _compat.counter_add(&q.nombuf, 1)
            t.waited = t.waited or got == 0
        if rc < 0:
            break
        got += rc
    signal(t)
    return got
