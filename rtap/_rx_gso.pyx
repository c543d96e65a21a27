# SPDX-License-Identifier: BSD-3-Clause
"""Splitting on the way in (``rx_gso``): the kernel hands over super-frames, the application gets
frames within the MTU, with checksums.

What was read lies in 64 KiB slots of the queue's own; what is handed out, in the application's
pool.  A super-frame that a burst has no room left for waits here for the next one, and an eventfd
says so to whoever waits for the descriptor.
"""

from libc.errno cimport EINVAL, EMSGSIZE, ENOBUFS
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

cimport rtap._compat as _compat
from rtap._linux cimport EFD_CLOEXEC, EFD_NONBLOCK, close, eventfd, read, write
from rtap._pool cimport (
    mbuf_data, mbuf_free, mbuf_free_bulk, mbuf_read, mbuf_reset, mbuf_t, pool_get, pool_put, pool_t,
)
from rtap._queue cimport rxq_t
from rtap._segment cimport SPLIT_MAX, gso_mbuf
from rtap._vnet cimport keeps_vnet_hdr

cdef enum:
    SEGS_MAX = 64               # slots for one frame that is copied


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
    return t


cdef void rx_gso_drop(rx_gso_t *t) noexcept nogil:
    """Throws away what waits."""
    mbuf_free_bulk(t.read + t.at_read, t.n_read)
    mbuf_free_bulk(t.split + t.at_split, t.n_split)
    t.n_read = t.n_split = t.at_read = t.at_split = 0
    signal(t)


cdef void rx_gso_destroy(rx_gso_t *t) noexcept nogil:
    """After rx_gso_drop, or in a forked child, whose parent has the frames."""
    if t != NULL:
        close(t.wake)
        free(t)


cdef inline void signal(rx_gso_t *t) noexcept nogil:
    """Has the eventfd say whether frames wait here."""
    cdef bint waiting = t.n_read + t.n_split > 0
    cdef uint64_t value = 1
    if waiting == t.awake:
        return
    if waiting:
        write(t.wake, &value, sizeof(value))
    else:
        read(t.wake, &value, sizeof(value))
    t.awake = waiting


cdef mbuf_t *move(mbuf_t *m, pool_t *pool) noexcept nogil:
    """The same frame in slots of ``pool``, the original freed; NULL, and nothing done, when there
    are too few."""
    cdef mbuf_t *segs[SEGS_MAX]
    cdef uint32_t count = (m.pkt_len + pool.data_room - 1) // pool.data_room
    cdef uint32_t got, i, done = 0
    cdef mbuf_t *head
    if count == 0:
        count = 1
    if count > SEGS_MAX:
        return NULL
    got = pool_get(pool, segs, count)
    if got < count:
        pool_put(pool, segs, got)
        return NULL
    for i in range(count):
        mbuf_reset(segs[i])
        segs[i].data_len = min(pool.data_room, m.pkt_len - done)
        mbuf_read(m, done, mbuf_data(segs[i]), segs[i].data_len)
        done += segs[i].data_len
        if i > 0:
            segs[i - 1].next = segs[i]
    head = segs[0]
    memcpy(&head.packet_type, &m.packet_type,
           sizeof(mbuf_t) - (<size_t>&m.packet_type - <size_t>m))
    head.ol_flags = m.ol_flags
    head.csum_at = m.csum_at - m.data_off + head.data_off
    head.pkt_len = m.pkt_len
    head.nb_segs = count
    head.port = m.port
    mbuf_free(m)
    return head


cdef int split_one(rx_gso_t *t, rxq_t *q, mbuf_t **m, mbuf_t **out, uint32_t room) noexcept nogil:
    """Puts what becomes of a frame into ``out``: how many, or -EMSGSIZE or -ENOBUFS as gso_mbuf.

    One that does not fit what it says of itself is dropped and counted, and makes 0."""
    cdef uint16_t port = m[0].port
    cdef int rc, i
    if keeps_vnet_hdr(m[0]):
        rc = gso_mbuf(m[0], t.pool, t.l2, out, room)
        if rc == -EINVAL or rc == -EMSGSIZE and room == SPLIT_MAX:
            _compat.counter_add(&q.bad_vnet_hdr, 1)
            _compat.counter_add(&q.errors, 1)
            mbuf_free(m[0])
            return 0
        if rc > 1:
            _compat.counter_add(&q.gso, rc)
            for i in range(rc):
                out[i].port = port
        if rc != 1:
            return rc
        m[0] = out[0]
    out[0] = move(m[0], t.pool)
    return 1 if out[0] != NULL else -ENOBUFS


cdef inline uint32_t hand_out(rx_gso_t *t, mbuf_t **out, uint32_t n) noexcept nogil:
    cdef uint32_t k = min(n, t.n_split)
    memcpy(out, t.split + t.at_split, k * sizeof(mbuf_t *))
    t.at_split += k
    t.n_split -= k
    return k


cdef uint32_t rx_gso(rx_gso_t *t, rx_read_fn receive, rxq_t *q, mbuf_t **out, uint32_t n,
                     int *error) noexcept nogil:
    """Up to ``n`` frames, read by ``receive`` where none wait here."""
    cdef uint32_t got = hand_out(t, out, n), asked
    cdef bint more = True
    cdef int rc
    while got < n and (more or t.n_read > 0):
        if t.n_read == 0:
            asked = min(n - got, <uint32_t>READS)
            t.at_read = 0
            t.n_read = receive(q, t.read, asked, error)
            more = t.n_read == asked
            continue
        rc = split_one(t, q, &t.read[t.at_read], out + got, min(n - got, <uint32_t>SPLIT_MAX))
        if rc >= 0:
            got += rc
        elif rc == -EMSGSIZE and got > 0:
            break               # one that is cut here would not be merged whole
        elif rc == -EMSGSIZE:   # more than a burst: the rest is for the next one
            rc = split_one(t, q, &t.read[t.at_read], t.split, SPLIT_MAX)
            if rc > 0:
                t.at_split = 0
                t.n_split = rc
                got += hand_out(t, out + got, n - got)
        if rc == -ENOBUFS:      # the frame stays for a burst that finds buffers
            _compat.counter_add(&q.nombuf, 1)
            break
        t.at_read += 1
        t.n_read -= 1
    signal(t)
    return got
