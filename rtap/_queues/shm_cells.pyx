# SPDX-License-Identifier: BSD-3-Clause
"""The cells of a ring in shared memory: how frames go from process to process, with no byte copied.

A ring has a power of two of **cells**, one word each, and positions that count up for ever; the
cell and the lap of a position are its lower and its upper bits.  A cell is empty for a position, or
it is full: then it names a slot, the slot's version, and the lap.

* A sender writes what travels with the frame into the slot's entry in the pool, and then changes
  the cell from empty to full: from that step on the frame is in the ring.  Then it makes the ring
  the owner of the slot, so that the frame stays there if the sender dies.
* A receiver makes itself the owner of the slot, if that still has the cell's version: from that
  step on the frame is its own.  Then it makes the cell empty for the next lap.

Whoever finds a cell that somebody else has not finished does it himself: a full cell whose slot has
another version only has to be made empty, and positions whose cells say that they are over are
passed.  So a process that dies or stops between any two steps holds nobody up.  Head and tail are
no more than places to begin at.

A processor fetches whole cache lines, with eight cells or owners in each.  If a sender and a
receiver work on the same line, every step waits for the other core.  So head and tail move once a
burst, and each side goes as far as the other one has said that it is.  Where that is nowhere, it
waits about as long as a burst takes, and then goes by what the cells say: whoever should have moved
head or tail may be dead.

A frame of several segments is one cell.  Its later segments name the first one's slot as their
owner, and so move with it, all at once.

No other process is trusted, see :mod:`rtap._core.shm`: each burst takes a limited number of steps,
whatever the words say.
"""

from libc.errno cimport EIO
from libc.stdint cimport int16_t, int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, memset

cimport rtap._core.compat as _compat
cimport rtap._core.live as _live
from rtap._core.linux cimport (
    POLLOUT, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4, iovec, poll, pollfd, readv_now, write,
)
from rtap._core.pool cimport (
    MBUF_SEGS_MAX, PKT_LEN_MAX, mbuf_copy_into, mbuf_free, mbuf_guard, mbuf_t, pool_put, slot_open,
    slot_shut,
)
from rtap._core.queue cimport rxq_t, txq_t
from rtap._core.shm cimport (
    OWNER_RING, OWNER_SEG, SHM_REST, owner_kind, owner_version, owner_word, shm_claim, shm_holds,
    shm_t, slot_t,
)
from rtap._core.traffic cimport SIZE_BUCKETS, count_frames, traffic_t
from rtap._core.tx_queue cimport tx_lost

cdef enum:
    # A full cell: bit 0 set, then 16 bits of the lap, 22 of the slot, 24 of its version
    LAP_AT = 1
    SLOT_AT = 17
    VERSION_AT = 39
    LAP_MASK = 0xffff
    SLOT_MASK = 0x3fffff
    VERSION_MASK = 0xffffff

    WAIT_EVENT = 1              # polls the eventfd
    WAIT_FUTEX = 2              # sleeps on the word itself

    CLAIM_TRIES = 4
    PAUSES = 100                # some microseconds
    AHEAD = 4                   # frames whose memory is fetched early
    SPARE_STEPS = 64            # of a burst, for cells that others change meanwhile


cdef inline uint32_t rest_size(const mbuf_t *m) noexcept nogil:
    return <uint32_t>(<size_t>&m.step - <size_t>&m.packet_type)


# ---- cells

cdef inline uint64_t cell_full(const ring_t *r, uint64_t position, uint32_t slot,
                               uint32_t version) noexcept nogil:
    return (1 | ((position >> r.shift) & LAP_MASK) << LAP_AT | <uint64_t>slot << SLOT_AT
            | <uint64_t>(version & VERSION_MASK) << VERSION_AT)


cdef inline int64_t ahead(const ring_t *r, uint64_t cell, uint64_t position) noexcept nogil:
    """What a cell says about a position.  A full one: 0 when it has that position's frame.  An
    empty one: 0 when it waits for it.  Both: more when that position is over, less when its turn
    has not come."""
    if cell & 1:
        return <int16_t>((cell >> LAP_AT) - (position >> r.shift))
    return <int64_t>(cell - cell_empty(position))


cdef inline void advance(uint64_t *end, uint64_t position) noexcept nogil:
    """Head or tail goes up to ``position``, unless somebody has moved it further."""
    cdef uint64_t before = _compat.load64(end)
    cdef int _turn
    for _turn in range(SPARE_STEPS):
        if <int64_t>(position - before) <= 0 or _compat.cas64(end, before, position):
            return
        before = _compat.load64(end)


cdef uint64_t room_until(const ring_t *r, uint64_t tail, uint32_t n) noexcept nogil:
    """How far a sender with ``n`` frames goes: the position behind its last one at most."""
    cdef uint64_t wanted = tail + min(n, r.size >> 2)
    cdef uint64_t end = _compat.load64(r.head) + r.size
    cdef int _turn
    for _turn in range(PAUSES):
        if <int64_t>(end - wanted) >= 0:
            break
        _compat.pause()
        end = _compat.load64(r.head) + r.size
    return end if <int64_t>(end - tail) > 0 else tail + 2 * r.size


cdef uint64_t frames_until(const ring_t *r, uint64_t head) noexcept nogil:
    """How far a receiver goes; ``head`` itself when there is nothing."""
    cdef uint64_t end = _compat.load64(r.tail), cell
    cdef int _turn
    if <int64_t>(end - head) > 0:
        return end
    cell = _compat.load64(&r.cells[head & r.mask])
    if ahead(r, cell, head) <= 0 and not cell & 1:
        return head
    for _turn in range(PAUSES):
        _compat.pause()
        end = _compat.load64(r.tail)
        if <int64_t>(end - head) > 0:
            return end
    return head + 2 * r.size


cdef uint64_t ring_count(const ring_t *r) noexcept nogil:
    cdef uint64_t head = _compat.load64(r.head), tail = _compat.load64(r.tail)
    if <int64_t>(tail - head) <= 0:
        return 0
    return tail - head if tail - head < r.size else r.size


cdef bint ring_has(const ring_t *r) noexcept nogil:
    """Whether a receiver would find something."""
    cdef uint64_t head = _compat.load64(r.head), cell
    cdef uint32_t _step
    cdef int64_t d
    for _step in range(2 * r.size):
        cell = _compat.load64(&r.cells[head & r.mask])
        d = ahead(r, cell, head)
        if d <= 0:
            return d == 0 and cell & 1
        head += 1
    return False


# ---- sleeping receivers

cdef void wake(ring_t *r) noexcept nogil:
    cdef uint64_t one = 1
    cdef uint32_t who
    cdef pollfd p
    if r.event_fd < 0:
        who = _compat.fetch_and(r.waiters, ~<uint32_t>WAIT_FUTEX)
    else:
        who = _compat.exchange(r.waiters, 0)
    if who & WAIT_FUTEX:
        _compat.futex_wake(r.waiters)
    if who & WAIT_EVENT and r.event_fd >= 0:
        p.fd = r.event_fd
        p.events = POLLOUT
        p.revents = 0
        if poll(&p, 1, 0) > 0:          # another holder may have made it blocking, and full
            write(r.event_fd, &one, sizeof(one))


cdef bint ring_idle(rxq_t *base, int ms) noexcept nogil:
    """See ``rxq_t``.  Says that somebody sleeps, then looks once more; a sender does it the other
    way round."""
    cdef ring_t *r = (<ring_rxq_t *>base).ring
    cdef uint64_t events
    cdef uint32_t word
    cdef iovec iov
    if r.event_fd >= 0:
        iov.iov_base = &events
        iov.iov_len = sizeof(events)
        readv_now(r.event_fd, &iov, 1)
        _compat.fetch_or(r.waiters, WAIT_EVENT)
        _compat.fence()
        return ring_has(r)
    word = _compat.fetch_or(r.waiters, WAIT_FUTEX) | <uint32_t>WAIT_FUTEX
    _compat.fence()
    if ring_has(r):
        return True
    _compat.futex_wait(r.waiters, word, ms)
    return ring_has(r)


# ---- sending

cdef bint alone(const ring_t *r, const mbuf_t *m) noexcept nogil:
    """Whether all of a frame's slots are of the pool, and only this frame has them."""
    cdef uint32_t i
    while m != NULL:
        if m.pool != r.pool or m.direct != NULL or _compat.load(&m.refcnt) != 1:
            return False
        i = <uint32_t>(m - r.pool.headers)
        if not shm_holds(r.shm, _compat.load64(&r.shm.owners[i])):
            return False
        m = m.next
    return True


cdef void add_traffic(traffic_t *total, const traffic_t *t) noexcept nogil:
    cdef uint32_t i
    for i in range(<uint32_t>SIZE_BUCKETS):
        _compat.counter_add(&total.sizes[i], t.sizes[i])
    _compat.counter_add(&total.unicast, t.unicast)
    _compat.counter_add(&total.multicast, t.multicast)
    _compat.counter_add(&total.broadcast, t.broadcast)


cdef void describe(slot_t *slot, const mbuf_t *m) noexcept nogil:
    slot.ol_flags = m.ol_flags
    slot.data_off = m.data_off
    slot.data_len = m.data_len
    slot.next = 0
    slot.nb_segs = m.nb_segs
    slot.port = m.port
    memcpy(slot.rest, &m.packet_type, SHM_REST)


cdef uint32_t offer(ring_t *r, mbuf_t *m, uint64_t *owner) noexcept nogil:
    """Makes a frame ready for the ring; from here on this process does not touch its headers.
    Returns the number of its segments, and the word of its first slot."""
    cdef shm_t *s = r.shm
    cdef uint32_t first = <uint32_t>(m - r.pool.headers), segments = 1, i
    cdef slot_t *slot = &s.slots[first]
    cdef mbuf_t *seg = m.next
    cdef uint64_t word
    owner[0] = _compat.load64(&s.owners[first])
    describe(slot, m)
    while seg != NULL:
        i = <uint32_t>(seg - r.pool.headers)
        slot.next = i + 1
        slot = &s.slots[i]
        describe(slot, seg)
        word = _compat.load64(&s.owners[i])
        slot.version = owner_version(word)
        slot_shut(seg)
        _compat.store8(&s.mine[i], 0)
        _compat.store64(&s.owners[i], owner_word(OWNER_SEG, first, owner_version(owner[0])))
        segments += 1
        seg = seg.next
    slot_shut(m)
    _compat.store8(&s.mine[first], 0)
    return segments


cdef uint32_t withdraw(ring_t *r, mbuf_t *m, uint64_t owner, uint32_t segments) noexcept nogil:
    """Takes back a frame that was offered; returns how many of its segments are lost.

    That happens only if a wrong word in shared memory has made another thread of this process take
    one of its slots; then the whole frame is gone."""
    cdef shm_t *s = r.shm
    cdef uint32_t first = <uint32_t>(m - r.pool.headers), back = 0, i, _i
    cdef uint64_t segment = owner_word(OWNER_SEG, first, owner_version(owner))
    cdef mbuf_t *seg = m
    cdef mbuf_t *nxt
    while seg != NULL:
        i = <uint32_t>(seg - r.pool.headers)
        nxt = seg.next
        if _compat.exchange8(&s.mine[i], 1) != 0:
            break
        if i != first:
            _compat.cas64(&s.owners[i], segment,
                          s.word | <uint64_t>_compat.load_relaxed(&s.slots[i].version) << 32)
        slot_open(seg)
        back += 1
        seg = nxt
    if back == segments:
        mbuf_guard(m)
        return 0
    seg = m
    for _i in range(back):
        nxt = seg.next
        seg.next = NULL
        seg.refcnt = 0
        pool_put(r.pool, &seg, 1)
        seg = nxt
    return segments - back


cdef inline void fetch_early(const ring_t *r, uint32_t slot) noexcept nogil:
    """Has the processor fetch what belongs to a slot, if it is one."""
    if slot < r.shm.size:
        _compat.prefetch(&r.shm.slots[slot])
        _compat.prefetch(&r.shm.owners[slot])
        _compat.prefetch(&r.pool.headers[slot])


cdef uint32_t ring_tx(txq_t *base, mbuf_t **v, uint32_t n, int *error) noexcept nogil:
    cdef ring_txq_t *q = <ring_txq_t *>base
    cdef ring_t *r = q.ring
    cdef shm_t *s = r.shm
    cdef uint32_t steps = n + 2 * r.size + SPARE_STEPS
    cdef uint32_t sent = 0, gone = 0, segments = 0, several = 0, wrong = 0, lost, slot
    cdef uint64_t tail = _compat.load64(r.tail), bytes = 0, length = 0, owner = 0, cell, end
    cdef mbuf_t *m = NULL       # offered, and not in the ring yet
    cdef traffic_t traffic, before
    cdef int64_t d
    if _compat.load_relaxed(&base.unplugged) != 0:
        return tx_lost(base, v, n)
    memset(&traffic, 0, sizeof(traffic))
    end = tail
    while sent < n and steps > 0:
        steps -= 1
        if <int64_t>(end - tail) <= 0:
            end = room_until(r, tail, n - sent)
        if m == NULL and sent + AHEAD < n and v[sent + AHEAD].pool == r.pool:
            fetch_early(r, <uint32_t>(v[sent + AHEAD] - r.pool.headers))
        cell = _compat.load64(&r.cells[tail & r.mask])
        d = ahead(r, cell, tail)
        if d < 0:
            break               # the frame of the last lap is still there: full
        if d > 0 or cell & 1:
            tail += 1
            continue
        if m == NULL:
            m = v[sent]
            if not alone(r, m):
                m = mbuf_copy_into(r.pool, m)
                if m == NULL:
                    _compat.counter_add(&q.no_buffer, 1)
                    break
            length = m.pkt_len
            before = traffic
            count_frames(&traffic, &m, 1, True)
            segments = offer(r, m, &owner)
        slot = <uint32_t>(m - r.pool.headers)
        if not _compat.cas64(&r.cells[tail & r.mask], cell,
                             cell_full(r, tail, slot, owner_version(owner))):
            continue
        # A receiver may have it already.
        _compat.cas64(&s.owners[slot], owner,
                      owner_word(OWNER_RING, r.number, owner_version(owner)))
        if m != v[sent]:
            _compat.counter_add(&q.copied, 1)
            mbuf_free(v[sent])
        gone += segments
        several += segments > 1
        bytes += length
        sent += 1
        tail += 1
        m = NULL
    advance(r.tail, tail)
    _compat.fence()
    if sent > 0 and _compat.load_relaxed(r.waiters) != 0:
        wake(r)
    if m != NULL:
        lost = withdraw(r, m, owner, segments)
        traffic = before
        gone += lost
        if m != v[sent]:
            if lost == 0:
                mbuf_free(m)
        elif lost > 0:
            wrong = 1
    _compat.sub_fetch(&s.held, gone)
    _live.gone(_live.MBUFS, gone)
    _compat.counter_add(&base.packets, sent)
    _compat.counter_add(&base.bytes, bytes)
    _compat.counter_add(&base.multiseg, several)
    add_traffic(&base.traffic, &traffic)
    if wrong > 0:
        base.why = EIO
        _compat.counter_add(&base.refused, wrong)
        _compat.counter_add(&base.errors, wrong)
    elif sent < n:
        _compat.counter_add(&base.full, 1)
    sent += wrong
    memmove(v, v + sent, (n - sent) * sizeof(mbuf_t *))
    return sent


# ---- receiving

cdef mbuf_t *received(ring_rxq_t *q, uint32_t i, uint32_t *next, bint *good) noexcept nogil:
    """The header of a slot that was just claimed, with what travelled with it.  Not good, but safe
    to free, when that cannot be right."""
    cdef mbuf_t *m = &q.ring.pool.headers[i]
    cdef slot_t slot            # a copy, which nobody changes any more
    cdef uint32_t kind
    _compat.snapshot(<uint64_t *>&slot, <const uint64_t *>&q.ring.shm.slots[i],
                     sizeof(slot_t) // sizeof(uint64_t))
    slot_open(m)
    _live.made(_live.MBUFS, 1)
    m.next = NULL
    m.ol_flags = slot.ol_flags
    m.refcnt = 1
    m.data_off = min(slot.data_off, m.buf_len)
    m.data_len = min(slot.data_len, m.buf_len - m.data_off)
    m.pkt_len = m.data_len
    m.nb_segs = 1
    m.port = slot.port
    memcpy(&m.packet_type, slot.rest, SHM_REST)
    m.step = 0
    next[0] = slot.next
    kind = m.gso_type & ~<uint32_t>VIRTIO_NET_HDR_GSO_ECN
    good[0] = m.data_off == slot.data_off and m.data_len == slot.data_len and (
        kind == VIRTIO_NET_HDR_GSO_NONE or kind == VIRTIO_NET_HDR_GSO_TCPV4
        or kind == VIRTIO_NET_HDR_GSO_TCPV6 or kind == VIRTIO_NET_HDR_GSO_UDP_L4)
    return m


cdef bint claim_segment(shm_t *s, uint32_t i, uint64_t word) noexcept nogil:
    """Takes a later segment, if its word names its frame."""
    cdef uint32_t version = _compat.load_relaxed(&s.slots[i].version) + 1
    return (_compat.cas64(&s.owners[i], word, s.word | <uint64_t>version << 32)
            and _compat.exchange8(&s.mine[i], 1) == 0)


cdef mbuf_t *take(ring_rxq_t *q, uint64_t cell, uint32_t *taken) noexcept nogil:
    """The frame of a full cell.  NULL when another receiver has it, or had it and died; and when
    the cell or what travelled with the frame cannot be right."""
    cdef shm_t *s = q.ring.shm
    cdef uint32_t first = <uint32_t>(cell >> SLOT_AT) & SLOT_MASK, next = 0, claimed = 1
    cdef uint32_t version = <uint32_t>(cell >> VERSION_AT) & VERSION_MASK
    cdef uint64_t word = 0, segment
    cdef mbuf_t *head
    cdef mbuf_t *tail
    cdef bint good = False
    cdef int _try
    if first >= s.size:
        _compat.counter_add(&q.bad_entries, 1)
        return NULL
    # The sender may be about to make the ring the owner, or somebody to free what it has left; the
    # version stays the same, and the frame is there.
    for _try in range(CLAIM_TRIES):
        word = _compat.load64(&s.owners[first])
        if owner_kind(word) == OWNER_SEG or owner_version(word) & VERSION_MASK != version:
            return NULL
        if shm_claim(s, first, word, 1):
            break
    else:
        return NULL
    segment = owner_word(OWNER_SEG, first, owner_version(word))
    head = tail = received(q, first, &next, &good)
    while good and next != 0:
        good = (next <= s.size and head.nb_segs < MBUF_SEGS_MAX
                and claim_segment(s, next - 1, segment))
        if good:
            claimed += 1
            tail.next = received(q, next - 1, &next, &good)
            tail = tail.next
            head.nb_segs += 1
            head.pkt_len += tail.data_len
            good = good and head.pkt_len <= PKT_LEN_MAX
    if good:
        mbuf_guard(head)
        taken[0] += claimed
        return head
    _compat.fetch_add(&s.held, claimed)
    _compat.counter_add(&q.bad_entries, 1)
    mbuf_free(head)
    return NULL


cdef uint32_t ring_rx(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    cdef ring_rxq_t *q = <ring_rxq_t *>base
    cdef ring_t *r = q.ring
    cdef uint32_t steps = n + 2 * r.size + SPARE_STEPS
    cdef uint32_t got = 0, taken = 0
    cdef uint64_t head = _compat.load64(r.head), begun = head, cell
    cdef uint64_t end = head
    cdef mbuf_t *m
    cdef int64_t d
    while got < n and steps > 0:
        steps -= 1
        if <int64_t>(end - head) <= 0:
            end = frames_until(r, head)
            if end == head:
                break
        if <int64_t>(end - head) > AHEAD:
            cell = _compat.load64(&r.cells[(head + AHEAD) & r.mask])
            fetch_early(r, <uint32_t>(cell >> SLOT_AT) & SLOT_MASK)
        cell = _compat.load64(&r.cells[head & r.mask])
        d = ahead(r, cell, head)
        if d < 0 or (d == 0 and not cell & 1):
            break
        if d == 0:
            if head - _compat.load64(r.head) > 2 * r.size:
                # This thread stood still for long.  The cell's lap may be one with the same number.
                head = begun = _compat.load64(r.head)
                continue
            m = take(q, cell, &taken)
            _compat.cas64(&r.cells[head & r.mask], cell, cell_empty(head + r.size))
            if m != NULL:
                out[got] = m
                got += 1
        head += 1
        if head - begun >= r.size:      # others who begin at the old one have so far to go
            advance(r.head, head)
            begun = head
    advance(r.head, head)
    if got == 0:
        return 0
    _compat.fetch_add(&q.ring.shm.held, taken)
    _compat.counter_add(&base.packets, got)
    _compat.counter_add(&base.bytes, count_frames(&base.traffic, out, got, True))
    return got


cdef mbuf_t layout_check

if rest_size(&layout_check) != SHM_REST:
    raise ImportError("what travels with a frame is not what an mbuf has")
