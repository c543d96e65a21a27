# SPDX-License-Identifier: BSD-3-Clause
"""Receive loops on a TAP or TUN descriptor or a packet socket, one for each engine.

A read puts the virtio-net header into the headroom and the frame after it, into one slot or, with
SCATTER, into a chain.  Buffers hold one byte more than the longest legal frame: a read that fills
its buffer was cut, and is counted instead of delivered.
"""

from libc.errno cimport EAGAIN, EBADF, EINTR, ENODEV, errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp

cimport rtap._core.compat as _compat
from rtap._core.flags cimport RX_L4_CKSUM_BAD, RX_L4_CKSUM_GOOD, RX_L4_CKSUM_NONE, RX_LRO
from rtap._core.linux cimport (
    EBADFD, ECANCELED, ENETDOWN, MSG_DONTWAIT, POLLIN, RWF_NOWAIT, iovec, poll, pollfd, read, readv,
    readv_now, recvmsg,
)
from rtap._core.pool cimport mbuf_data, mbuf_free, mbuf_reset, mbuf_t, pool_get, pool_put
from rtap._core.queue cimport rx_share_t, rxq_t
from rtap._core.traffic cimport count_frames
from rtap._frames.vnet cimport vnet_hdr_to_mbuf
from rtap._tap.liburing cimport (
    IOSQE_FIXED_FILE, io_uring_cq_advance, io_uring_cqe, io_uring_get_sqe, io_uring_peek_batch_cqe,
    io_uring_prep_read, io_uring_prep_read_fixed, io_uring_prep_readv, io_uring_prep_recvmsg,
    io_uring_sqe,
)
from rtap._tap.packet cimport packet_gone, packet_msg, packet_put_tag
from rtap._tap.rx_gso cimport rx_gso
from rtap._tap.uring cimport (
    CANCELS, ENGINE_AUTO, RING_ENTRIES, uring_buffer, uring_cancel, uring_enter, uring_file,
    uring_finish, uring_leave, uring_run, uring_t,
)


cdef enum:
    ARM_MIN = 16                # fewer reads that might be armed cost less by system calls


cdef struct batch_t:            # of reads that a ring ran
    uint32_t taken              # how many of the first ones the kernel took
    uint32_t n                  # how many of these have ended, always all while the ring works
    uint16_t entry[RING_ENTRIES]        # their numbers in the order in which they ended, which is
    int32_t result[RING_ENTRIES]        # that of their frames


cdef inline uint8_t *rx_start(tap_rxq_t *q, mbuf_t *m) noexcept nogil:
    """Where a read puts the virtio-net header, so that the frame starts after the headroom."""
    return m.buf + m.pool.headroom - q.hdr_len


cdef uint32_t rx_iovecs(tap_rxq_t *q, mbuf_t **slots, iovec *iov) noexcept nogil:
    cdef uint32_t i
    for i in range(q.segs):
        iov[i].iov_base = slots[i].buf + q.pool.headroom
        iov[i].iov_len = q.pool.data_room
    iov[0].iov_base = rx_start(q, slots[0])
    iov[0].iov_len = q.pool.data_room + q.hdr_len
    return q.segs


cdef void rx_count_offloads(rxq_t *q, uint64_t ol_flags) noexcept nogil:
    if ol_flags & RX_LRO:
        _compat.counter_add(&q.lro, 1)
    if ol_flags & RX_L4_CKSUM_NONE == RX_L4_CKSUM_NONE:     # both bits
        _compat.counter_add(&q.checksum_none, 1)
    elif ol_flags & RX_L4_CKSUM_GOOD:
        _compat.counter_add(&q.checksum_good, 1)
    elif ol_flags & RX_L4_CKSUM_BAD:
        _compat.counter_add(&q.checksum_bad, 1)


cdef bint rx_wanted(tap_rxq_t *q, const mbuf_t *m) noexcept nogil:
    """Whether a frame is for us: to one of our addresses, to all, or to one of our groups."""
    cdef filter_t *f = &q.filter
    cdef const uint8_t *d = mbuf_data(m)
    cdef bint wanted = False
    cdef uint32_t i
    if m.data_len < 6 or d[0] & d[1] & d[2] & d[3] & d[4] & d[5] == 0xff:
        return True
    _compat.lock(&f.lock)
    if d[0] & 1 and f.allmulticast:
        wanted = True
    for i in range(f.n):
        wanted = wanted or memcmp(d, f.addresses[i], 6) == 0
    _compat.unlock(&f.lock)
    if not wanted:
        _compat.counter_add(&q.base.filtered_multicast if d[0] & 1
                            else &q.base.filtered_unicast, 1)
    return wanted


cdef bint rx_accept(tap_rxq_t *q, mbuf_t **slots, uint32_t n) noexcept nogil:
    """Makes a frame of ``n`` bytes that were read into ``q.segs`` slots; unused slots go back.

    False, and all slots go back, when the frame was cut or its header does not fit it."""
    cdef mbuf_t *m = slots[0]
    cdef mbuf_t *tail = m
    cdef uint32_t room = q.pool.data_room
    cdef uint32_t left, used = 1
    cdef uint8_t *hdr = rx_start(q, m)
    if n >= q.segs * room + q.hdr_len:
        _compat.counter_add(&q.base.truncated, 1)
        _compat.counter_add(&q.base.errors, 1)
        pool_put(q.pool, slots, q.segs)
        return False
    mbuf_reset(m)
    m.port = q.port
    m.pkt_len = n - q.hdr_len
    left = m.pkt_len
    m.data_len = left if left < room else room
    left -= m.data_len
    while left > 0:
        mbuf_reset(slots[used])
        tail.next = slots[used]
        tail = slots[used]
        tail.data_len = left if left < room else room
        left -= tail.data_len
        used += 1
    m.nb_segs = <uint16_t>used
    if used < q.segs:
        pool_put(q.pool, slots + used, q.segs - used)
    if q.msgs != NULL:
        hdr = packet_put_tag(m, hdr)
    if q.hdr_len != 0:
        # The first two bytes are flags and gso_type: without offloads there is nothing to do.
        if (hdr[0] | hdr[1] | q.offloads) != 0:
            if vnet_hdr_to_mbuf(m, hdr, q.l2, q.offloads) != 0:
                _compat.counter_add(&q.base.bad_vnet_hdr, 1)
                _compat.counter_add(&q.base.errors, 1)
                mbuf_free(m)
                return False
    if _compat.load_relaxed(&q.filter.on) != 0 and not rx_wanted(q, m):
        mbuf_free(m)
        return False
    if m.ol_flags != 0:
        rx_count_offloads(&q.base, m.ol_flags)
    return True


cdef void rx_down(tap_rxq_t *q, int32_t result, int *error) noexcept nogil:
    """Handles an empty packet socket; if its interface is gone, only the first read is told so."""
    if result == -ENETDOWN and packet_gone(q.base.fd):
        _compat.store(&q.gone, 1)
    if _compat.load_relaxed(&q.gone) != 0:
        error[0] = ENODEV


cdef bint rx_settle(tap_rxq_t *q, mbuf_t **slots, int32_t result, mbuf_t **out, uint32_t *got,
                    int *error) noexcept nogil:
    """Takes the result of one read; false when the queue has no more."""
    if result > <int32_t>q.hdr_len:
        if rx_accept(q, slots, <uint32_t>result):
            out[got[0]] = slots[0]
            got[0] += 1
        return True
    pool_put(q.pool, slots, q.segs)
    if result == -EBADFD or result == -EBADF:
        error[0] = -result
    elif q.msgs != NULL and (result == -EAGAIN or result == -ENETDOWN):
        rx_down(q, result, error)
    elif result != -EAGAIN and result != -EINTR and result != -ECANCELED:
        _compat.counter_add(&q.base.read_errors, 1)
        _compat.counter_add(&q.base.errors, 1)
    return False


cdef void rx_no_buffers(tap_rxq_t *q) noexcept nogil:
    """Counts an empty pool, but only if a frame was there to take."""
    cdef pollfd p
    p.fd = q.base.fd
    p.events = POLLIN
    p.revents = 0
    if poll(&p, 1, 0) > 0:
        _compat.counter_add(&q.base.nombuf, 1)


cdef inline uint32_t rx_slots(tap_rxq_t *q, mbuf_t **slots, uint32_t reads) noexcept nogil:
    """Takes slots for up to ``reads`` reads; returns how many reads have enough."""
    cdef uint32_t have = pool_get(q.pool, slots, reads * q.segs)
    cdef uint32_t whole = have // q.segs
    if have > whole * q.segs:
        pool_put(q.pool, slots + whole * q.segs, have - whole * q.segs)
    return whole


cdef inline void rx_count(tap_rxq_t *q, mbuf_t **out, uint32_t got, uint32_t limit) noexcept nogil:
    # The next burst asks for a few more frames than came: an idle queue costs one empty read.  It
    # asks for fewer where a read that finds none is armed and cancelled.
    q.depth = max(got - got // 4, 1) if q.cancels else min(got + got // 8 + 1, limit)
    if got > 0 and q.gso == NULL:       # else rx_gso counts
        _compat.counter_add(&q.base.packets, got)
        _compat.counter_add(&q.base.bytes, count_frames(&q.base.traffic, out, got, q.l2))


cdef void rx_adopt(tap_rxq_t *q) noexcept nogil:
    """Changes to the buffers that ``RxQueue.resize`` has provided; called by the queue's owner."""
    cdef room_t *room = &q.room
    if _compat.load_relaxed(&room.new) == 0:
        return
    _compat.lock(&room.lock)
    q.pool = room.pool
    q.segs = room.segs
    q.depth = 1
    _compat.store(&room.new, 0)
    _compat.unlock(&room.lock)


cdef void rx_prepare(tap_rxq_t *q, uring_t *r, mbuf_t **slots, uint32_t n, uint32_t first,
                     iovec *iov) noexcept nogil:
    """Prepares ``n`` reads, whose results will be numbered from ``first`` on."""
    cdef int index = uring_file(r, q.file_id, q.base.fd)
    cdef int fd = q.base.fd if index < 0 else index
    cdef uint8_t flags = 0 if index < 0 else <uint8_t>IOSQE_FIXED_FILE
    cdef int buffer = uring_buffer(r, q.pool) if q.segs == 1 else -1
    cdef uint32_t length = q.pool.data_room + q.hdr_len
    cdef int how = 0 if q.cancels else RWF_NOWAIT if q.msgs == NULL else MSG_DONTWAIT
    cdef bint in_one = q.segs == 1 and q.msgs == NULL
    cdef io_uring_sqe *sqe
    cdef uint32_t i
    for i in range(n):
        sqe = io_uring_get_sqe(&r.ring)
        if not in_one:
            rx_iovecs(q, slots + i * q.segs, iov)
            if q.msgs == NULL:
                io_uring_prep_readv(sqe, fd, iov, q.segs, 0)
            else:
                packet_msg(&q.msgs[i], iov, q.segs)
                io_uring_prep_recvmsg(sqe, fd, &q.msgs[i], MSG_DONTWAIT)
            iov += q.segs
        elif buffer >= 0:
            io_uring_prep_read_fixed(sqe, fd, rx_start(q, slots[i]), length, 0, buffer)
        else:
            io_uring_prep_read(sqe, fd, rx_start(q, slots[i]), length, 0)
        sqe.rw_flags = how
        sqe.flags = flags
        sqe.user_data = first + i


cdef void rx_run(uring_t *r, uint32_t n, bint cancels, batch_t *batch) noexcept nogil:
    """Runs the ``n`` prepared reads."""
    cdef io_uring_cqe *cqes[RING_ENTRIES]
    cdef uint32_t took, ready, i
    if cancels and n > 0:
        uring_cancel(r)
        took = uring_run(r, n + 1)
    else:
        took = uring_run(r, n)
    ready = io_uring_peek_batch_cqe(&r.ring, cqes, uring_finish(r, took))
    batch.taken = min(took, n)
    batch.n = 0
    for i in range(ready):
        if cqes[i].user_data != CANCELS:
            batch.entry[batch.n] = <uint16_t>cqes[i].user_data
            batch.result[batch.n] = cqes[i].res
            batch.n += 1
    io_uring_cq_advance(&r.ring, ready)


cdef void rx_unread(tap_rxq_t *q, mbuf_t **slots, uint32_t entry,
                    const batch_t *batch) noexcept nogil:
    """Gives back the slots of a read that the kernel has not taken.  Slots of a read that has not
    ended it may still write into, so they never go back."""
    cdef uint32_t i
    if entry >= batch.taken:    # the ring is closed before it could run
        pool_put(q.pool, slots, q.segs)
        return
    for i in range(batch.n):
        if batch.entry[i] == entry:
            return
    _compat.counter_add(&q.base.read_errors, 1)
    _compat.counter_add(&q.base.errors, 1)


cdef inline bint rx_in_one(const tap_rxq_t *q) noexcept nogil:
    """Whether read(2) does: one slot, on a descriptor that never blocks."""
    return q.segs == 1 and not q.shared and q.msgs == NULL


cdef inline ssize_t rx_read(tap_rxq_t *q, mbuf_t **slots) noexcept nogil:
    return read(q.base.fd, rx_start(q, slots[0]), q.pool.data_room + q.hdr_len)


cdef ssize_t rx_readv(tap_rxq_t *q, mbuf_t **slots, iovec *iov) noexcept nogil:
    """The same where read(2) does not do."""
    if q.msgs != NULL:
        packet_msg(q.msgs, iov, rx_iovecs(q, slots, iov))
        return recvmsg(q.base.fd, q.msgs, MSG_DONTWAIT)
    if q.shared:
        return readv_now(q.base.fd, iov, rx_iovecs(q, slots, iov))
    return readv(q.base.fd, iov, rx_iovecs(q, slots, iov))


cdef bint rx_read_one(tap_rxq_t *q, mbuf_t **out, uint32_t *got, int *error) noexcept nogil:
    """Reads one frame by a system call; false when the queue has none, or the pool no buffer.

    One read that finds no frame costs less by a system call than armed and cancelled, and wakes
    nobody."""
    cdef mbuf_t *slots[SEGS_MAX]
    cdef iovec iov[SEGS_MAX]
    cdef ssize_t rc
    if rx_slots(q, slots, 1) == 0:
        rx_no_buffers(q)
        return False
    rc = rx_read(q, slots) if rx_in_one(q) else rx_readv(q, slots, iov)
    return rx_settle(q, slots, <int32_t>rc if rc >= 0 else -errno, out, got, error)


cdef bint rx_read_few(tap_rxq_t *q, uint32_t n, mbuf_t **out, uint32_t *got,
                      int *error) noexcept nogil:
    """Up to ``n`` times the same; false when it was that once."""
    while n > 0 and rx_read_one(q, out, got, error):
        n -= 1
    return n == 0


cdef uint32_t rx_uring(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    cdef tap_rxq_t *q = <tap_rxq_t *>base
    cdef mbuf_t *slots[BATCH_SLOTS]
    cdef batch_t batch
    cdef uint32_t got = 0, asked = 0, limit, depth, reads, i
    cdef bint more = True
    cdef int rc = 0
    cdef uring_t *r
    rx_adopt(q)
    limit = min(q.entries, <uint32_t>BATCH_SLOTS // q.segs)
    depth = q.depth
    r = uring_enter(&rc)
    if r == NULL:
        if q.engine == ENGINE_AUTO:
            _compat.store(&base.gate.fell_back, -rc)
            return rx_syscall(base, out, n, error)
        error[0] = -rc
        return 0
    while more and asked < n:   # not "got": frames that are dropped must not prolong a burst
        if q.cancels and depth < ARM_MIN:
            more = rx_read_one(q, out, &got, error)
            asked += 1
            depth = min(asked // 4, limit)
            continue
        reads = rx_slots(q, slots, min(depth, n - asked, limit))
        if reads == 0:
            rx_no_buffers(q)
            break
        asked += reads
        rx_prepare(q, r, slots, reads, 0, r.iovecs)
        rx_run(r, reads, q.cancels, &batch)
        for i in range(batch.n):
            if not rx_settle(q, slots + batch.entry[i] * q.segs, batch.result[i], out, &got, error):
                more = False
        if batch.n < reads:
            for i in range(reads):
                rx_unread(q, slots + i * q.segs, i, &batch)
            more = False
        depth = 1 if q.cancels else min(2 * depth, limit)
    uring_leave(r)
    rx_count(q, out, got, limit)
    if more:                    # there may be as many again
        q.depth = min(max(q.depth, asked), limit)
    return got


cdef inline uint32_t rx_settle_run(rx_share_t **share, const batch_t *batch,
                                   uint32_t i) noexcept nogil:
    """Takes the results from the ``i``-th on, as long as they are of one share; returns where that
    ends."""
    cdef rx_share_t *s = share[batch.entry[i]]
    cdef tap_rxq_t *q = <tap_rxq_t *>s.q
    cdef uint32_t got = s.got, segs = q.segs, first = s.first
    cdef mbuf_t **slots = s.slots
    cdef bint filled = s.filled
    while i < batch.n and share[batch.entry[i]] == s:
        if not rx_settle(q, slots + (batch.entry[i] - first) * segs, batch.result[i], s.out, &got,
                         &s.error):
            filled = False
        i += 1
    s.got = got
    s.filled = filled
    return i


cdef uint32_t rx_uring_many(rx_share_t *shares, uint32_t k) noexcept nogil:
    """One io_uring_enter for several queues: as many of the first ones as the ring has room for,
    at least one; returns how many."""
    cdef mbuf_t *slots[BATCH_SLOTS]
    cdef rx_share_t *share[RING_ENTRIES]    # of each entry
    cdef batch_t batch
    cdef uint32_t entries = 0, used = 0, served = 0, most = RING_ENTRIES, want, i
    cdef bint cancels = False
    cdef rx_share_t *s
    cdef tap_rxq_t *q
    cdef int rc = 0
    cdef uring_t *r = uring_enter(&rc)
    if r == NULL:
        s = &shares[0]
        s.got = s.q.burst(s.q, s.out, s.n, &s.error)
        return 1
    while served < k:
        s = &shares[served]
        q = <tap_rxq_t *>s.q
        rx_adopt(q)
        if q.cancels:
            most = RING_ENTRIES - 1
        if entries >= most:
            break
        want = min(most - entries, (<uint32_t>BATCH_SLOTS - used) // q.segs)
        if want == 0:
            break
        want = min(want, s.n, min(q.depth, q.entries))
        s.got = s.reads = 0
        if q.cancels and want < ARM_MIN:
            s.filled = rx_read_few(q, want, s.out, &s.got, &s.error)
        else:
            cancels = cancels or q.cancels
            s.reads = rx_slots(q, slots + used, want)
            if s.reads == 0:
                rx_no_buffers(q)
            rx_prepare(q, r, slots + used, s.reads, entries, r.iovecs + used)
            s.filled = s.reads > 0
        s.first = entries
        s.slots = slots + used
        for i in range(s.reads):
            share[entries + i] = s
        entries += s.reads
        used += s.reads * q.segs
        served += 1
    rx_run(r, entries, cancels, &batch)
    uring_leave(r)
    i = 0
    while i < batch.n:
        i = rx_settle_run(share, &batch, i)
    if batch.n < entries:
        for i in range(entries):
            s = share[i]
            q = <tap_rxq_t *>s.q
            rx_unread(q, s.slots + (i - s.first) * q.segs, i, &batch)
            s.filled = False
    for i in range(served):
        s = &shares[i]
        q = <tap_rxq_t *>s.q
        rx_count(q, s.out, s.got, q.entries)
        if s.filled:
            q.depth = min(s.got + s.got // 4 + 1 if q.cancels else 2 * s.reads, q.entries)
    return served


cdef uint32_t rx_syscall(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    cdef tap_rxq_t *q = <tap_rxq_t *>base
    cdef mbuf_t *slots[BATCH_SLOTS]
    cdef mbuf_t **at
    cdef iovec iov[SEGS_MAX]
    cdef uint32_t got = 0, asked = 0, limit, depth, reads, done
    cdef bint more = True, in_one
    cdef ssize_t rc
    rx_adopt(q)
    in_one = rx_in_one(q)
    limit = <uint32_t>BATCH_SLOTS // q.segs
    depth = q.depth
    while more and asked < n:   # not "got": frames that are dropped must not prolong a burst
        reads = rx_slots(q, slots, min(depth, n - asked, limit))
        if reads == 0:
            rx_no_buffers(q)
            break
        asked += reads
        done = 0
        while more and done < reads:
            at = slots + done * q.segs
            rc = rx_read(q, at) if in_one else rx_readv(q, at, iov)
            if rc < 0:
                rc = -errno
            more = rx_settle(q, at, <int32_t>rc, out, &got, error)
            done += 1
        if done < reads:
            pool_put(q.pool, slots + done * q.segs, (reads - done) * q.segs)
        depth = min(2 * depth, limit)
    rx_count(q, out, got, limit)
    return got


cdef uint32_t rx_split(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    """The burst function of a queue that splits super-frames."""
    cdef tap_rxq_t *q = <tap_rxq_t *>base
    return rx_gso(q.gso, q.read, base, out, n, error)
