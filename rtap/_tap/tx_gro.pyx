# SPDX-License-Identifier: BSD-3-Clause
"""Coalescing on the way out (``tx_gro``): frames of a flow enter the kernel in one write.

The frames themselves do not change.  A super-frame consists of its own headers and of segments that
borrow the frames' payload.  So nothing has to be undone for frames that others see, or that the
kernel does not take now.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memmove, memset

cimport rtap._core.live as _live
from rtap._core.pool cimport mbuf_free_bulk, mbuf_t, mbuf_window
from rtap._core.queue cimport txq_t
from rtap._frames.gro cimport (
    GRO_HEADERS_MAX, GRO_L3, GRO_NONE, GRO_UDP, gro_add, gro_create, gro_describe, gro_destroy,
    gro_drained, gro_flush, gro_group_t, gro_headers, gro_t,
)

cdef enum:
    PASS_FRAMES = 256           # merged together
    PASS_SEGS = 1024            # a frame of more segments is sent unchanged
    PASS_FLOWS = 64
    GROUPS = PASS_FRAMES // 2   # of more than one frame
    MAX_LENGTH = 65535
    HEADROOM = 16               # in front of a super-frame's headers
    UNSENT = 1                  # gro_group_t.tag


cdef tx_gro_t *tx_gro_create(bint udp, bint l2) noexcept nogil:
    """NULL without memory."""
    cdef uint32_t flags = (GRO_UDP if udp else 0) | (0 if l2 else GRO_L3)
    cdef tx_gro_t *t = <tx_gro_t *>calloc(1, sizeof(tx_gro_t))
    if t == NULL:
        return NULL
    _live.made(_live.MERGERS, 1)
    t.table = gro_create(PASS_FLOWS, PASS_FRAMES, flags, MAX_LENGTH)
    t.segs = <mbuf_t *>calloc(PASS_SEGS + GROUPS, sizeof(mbuf_t))
    t.headers = <uint8_t *>calloc(GROUPS, HEADROOM + GRO_HEADERS_MAX)
    t.out = <mbuf_t **>calloc(PASS_FRAMES, sizeof(mbuf_t *))
    t.unsent = <mbuf_t **>calloc(PASS_FRAMES, sizeof(mbuf_t *))
    if (t.table == NULL or t.segs == NULL or t.headers == NULL or t.out == NULL
            or t.unsent == NULL):
        tx_gro_destroy(t)
        return NULL
    return t


cdef void tx_gro_destroy(tx_gro_t *t) noexcept nogil:
    if t != NULL:
        gro_destroy(t.table)
        free(t.segs)
        free(t.headers)
        free(t.out)
        free(t.unsent)
        free(t)
        _live.gone(_live.MERGERS, 1)


cdef uint32_t borrow(mbuf_t *seg, const gro_group_t *d, mbuf_t *m) noexcept nogil:
    """Describes a frame's payload with segments from ``seg`` on; returns how many.

    Like a clone's segments they name the owner of the bytes, so that a clone of one holds the right
    slot."""
    cdef uint32_t skip = d.headers, n = 0, length
    cdef uint8_t *start
    while m != NULL:
        length = mbuf_window(m, &start)
        if length > skip:
            memset(&seg[n], 0, sizeof(mbuf_t))
            seg[n].buf = start + skip
            seg[n].buf_len = seg[n].data_len = length - skip
            seg[n].pool = m.pool
            seg[n].direct = m.direct if m.direct != NULL else m
            seg[n].refcnt = 2           # never the last reference: no pool gets it back
            seg[n].nb_segs = 1
            n += 1
            skip = 0
        else:
            skip -= length
        m = m.next
    return n


cdef uint32_t describe(tx_gro_t *t, const gro_group_t *d, uint32_t number, mbuf_t *head,
                       uint8_t *room) noexcept nogil:
    """Makes ``head`` and the segments after it the super-frame of a group; returns how many."""
    cdef const mbuf_t *first = t.table.items[d.first].m
    cdef mbuf_t *tail = head
    cdef uint32_t at = d.first, used = 1, added, i
    memset(head, 0, sizeof(mbuf_t))
    head.buf = room
    head.buf_len = HEADROOM + GRO_HEADERS_MAX
    head.data_off = HEADROOM
    head.data_len = d.headers
    head.pkt_len = d.headers
    head.pool = first.pool
    head.port = first.port
    head.packet_type = number
    head.refcnt = 2
    gro_headers(d, room + HEADROOM)
    gro_describe(d, head)
    while at != GRO_NONE:
        added = borrow(head + used, d, t.table.items[at].m)
        for i in range(added):
            tail.next = head + used + i
            tail = tail.next
            head.pkt_len += tail.data_len
        used += added
        at = t.table.items[at].next
    head.nb_segs = used
    return used


cdef inline bint ours(const tx_gro_t *t, const mbuf_t *m) noexcept nogil:
    return t.segs <= m < t.segs + PASS_SEGS + GROUPS


cdef uint32_t tx_gro_frames(const tx_gro_t *t, const mbuf_t *m) noexcept nogil:
    """How many original frames are in a frame that ``tx_gro`` gives to its ``send`` function."""
    return t.table.done[m.packet_type].count if ours(t, m) else 1


cdef void settle(tx_gro_t *t, uint32_t n, uint32_t sent, uint32_t *left) noexcept nogil:
    """After ``sent`` of the ``n`` in ``out`` were consumed: frees the original frames of
    super-frames among these, and puts the frames of all others into ``unsent``."""
    cdef gro_t *g = t.table
    cdef gro_group_t *d
    cdef mbuf_t *m
    cdef uint32_t gone = 0, i, at
    left[0] = 0
    for i in range(sent, n):
        m = t.out[i]
        if not ours(t, m):
            t.unsent[left[0]] = m
            left[0] += 1
            continue
        d = &g.done[m.packet_type]
        at = d.first
        while at != GRO_NONE:
            t.unsent[left[0]] = g.items[at].m
            left[0] += 1
            at = g.items[at].next
        d.tag = UNSENT
    for i in range(g.n_done):
        d = &g.done[i]
        if d.count == 1 or d.tag == UNSENT:
            continue
        at = d.first
        while at != GRO_NONE:
            t.out[gone] = g.items[at].m     # consumed: unsent frames are elsewhere
            gone += 1
            at = g.items[at].next
    mbuf_free_bulk(t.out, gone)


cdef uint32_t one_pass(tx_gro_t *t, tx_send_fn send, txq_t *q, mbuf_t **v, uint32_t n,
                       int *error) noexcept nogil:
    """Sends ``n`` frames, at most PASS_FRAMES, which have at most PASS_SEGS relevant segments;
    returns how many were consumed.  The others are then in front in ``v``."""
    cdef gro_t *g = t.table
    cdef uint64_t supers = g.supers
    cdef gro_group_t *d
    cdef uint32_t i, sent, left = 0, used = 0, groups = 0
    for i in range(n):
        gro_add(g, v[i], 0)
    gro_flush(g, 0)
    if g.supers == supers:              # nothing to merge: sent in the order of arrival
        gro_drained(g)
        return send(q, v, n, error)
    for i in range(g.n_done):
        d = &g.done[i]
        if d.count == 1:
            t.out[i] = g.items[d.first].m
        else:
            t.out[i] = &t.segs[used]
            used += describe(t, d, i, t.out[i],
                             t.headers + groups * <uint32_t>(HEADROOM + GRO_HEADERS_MAX))
            groups += 1
    sent = send(q, t.out, g.n_done, error)
    # The frames that it did not consume are in front now.
    for i in range(g.n_done - sent):
        t.out[g.n_done - 1 - i] = t.out[g.n_done - sent - 1 - i]
    settle(t, g.n_done, sent, &left)
    for i in range(left):
        v[i] = t.unsent[i]
    gro_drained(g)
    return n - left


cdef uint32_t tx_gro(tx_gro_t *t, tx_send_fn send, txq_t *q, mbuf_t **v, uint32_t n,
                     int *error) noexcept nogil:
    """Merges frames from the front of ``v`` where possible and sends them by ``send``.  Works like
    a queue's burst function, but frames of different flows may change places."""
    cdef uint32_t done = 0, take = 0, sent = 0, segs
    while done < n:
        take = segs = 0
        while (take < <uint32_t>PASS_FRAMES and done + take < n
               and (take == 0 or segs + v[done + take].nb_segs <= PASS_SEGS)):
            segs += v[done + take].nb_segs
            take += 1
        if take == 1:
            sent = send(q, v + done, 1, error)
        else:
            sent = one_pass(t, send, q, v + done, take, error)
        done += sent
        if sent < take:
            break
    if done < n:                        # the rest of the last pass, then the untried frames
        memmove(v, v + done - sent, (take - sent) * sizeof(mbuf_t *))
        memmove(v + take - sent, v + done - sent + take,
                (n - done + sent - take) * sizeof(mbuf_t *))
    return done
