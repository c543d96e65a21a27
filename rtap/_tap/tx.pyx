# SPDX-License-Identifier: BSD-3-Clause
"""Transmit loops on a TAP or TUN descriptor or a packet socket, one for each engine.

A frame in one private segment gets its virtio-net header written into the headroom, and is sent
from one place.  Chains and shared frames are sent through an iovec with a separate header, so that
sending never writes into bytes that somebody else can see.  Super-frames that the kernel does not
take are in ``tx_pieces``.
"""

from libc.errno cimport EAGAIN, EBADF, EINTR, EINVAL, EIO, ENOBUFS, ENODEV, ENOMEM, ENXIO, errno
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memmove, memset

cimport rtap._core.compat as _compat
from rtap._core.flags cimport RX_LRO, TX_REQUESTS, TX_SPECIAL
from rtap._core.linux cimport (
    EBADFD, ECANCELED, EINPROGRESS, ENETDOWN, RWF_NOWAIT, iovec, write, writev, writev_now,
)
from rtap._core.pool cimport (
    mbuf_data, mbuf_free, mbuf_free_bulk, mbuf_is_private, mbuf_t, mbuf_window, pool_t,
)
from rtap._core.queue cimport tx_share_t, txq_t
from rtap._core.traffic cimport count_frames
from rtap._core.tx_queue cimport tx_lost, tx_lost_frames
from rtap._frames.headers cimport ETHER_HDR_LEN
from rtap._frames.request cimport finish_checksum, take_requests
from rtap._frames.vnet cimport VNET_HDR_LEN, keeps_vnet_hdr, vnet_hdr_fits, vnet_hdr_from_mbuf
from rtap._tap.liburing cimport (
    IOSQE_CQE_SKIP_SUCCESS, IOSQE_FIXED_FILE, IOSQE_IO_LINK, io_uring_cq_advance,
    io_uring_cqe, io_uring_get_sqe, io_uring_peek_batch_cqe, io_uring_prep_write,
    io_uring_prep_write_fixed, io_uring_prep_writev, io_uring_sqe,
)
from rtap._tap.tx_gro cimport tx_gro, tx_gro_frames
from rtap._tap.tx_pieces cimport gso_kind, tx_discard, tx_fall_back, tx_flush, tx_split
from rtap._tap.uring cimport (
    ENGINE_AUTO, RING_ENTRIES, RING_HEADERS, RING_IOVECS, uring_buffer, uring_enter, uring_file,
    uring_finish, uring_leave, uring_run, uring_t,
)

cdef enum:
    IOVECS_MAX = 1024           # UIO_MAXIOV: writev(2) refuses more
    TO_SPLIT = 1


cdef inline uint8_t *tx_in_place(tap_txq_t *q, mbuf_t *m, uint32_t *length) noexcept nogil:
    """Writes the header of a frame of one private segment into the headroom; returns where both
    start, and sets ``length``.  NULL when the frame cannot be sent from one place."""
    cdef uint8_t *start
    if m.next != NULL:
        return NULL
    if q.hdr_len == 0:
        length[0] = mbuf_window(m, &start)
        return start
    if not mbuf_is_private(m) or m.data_off < q.hdr_len:
        return NULL
    start = mbuf_data(m) - q.hdr_len
    length[0] = m.data_len + q.hdr_len
    _compat.unpoison(start, q.hdr_len)
    if keeps_vnet_hdr(m):
        vnet_hdr_from_mbuf(m, start)
    else:
        memset(start, 0, VNET_HDR_LEN)
    return start


cdef uint32_t tx_iovecs(tap_txq_t *q, const mbuf_t *m, uint8_t *hdr, iovec *iov) noexcept nogil:
    """Describes a frame of any shape with a separate header; returns one iovec more than the kernel
    takes when it has too many segments."""
    cdef uint32_t n = 0
    cdef uint8_t *start
    if q.hdr_len != 0:
        vnet_hdr_from_mbuf(m, hdr)
        iov[0].iov_base = hdr
        iov[0].iov_len = q.hdr_len
        n = 1
    while m != NULL and n <= IOVECS_MAX:
        iov[n].iov_len = mbuf_window(m, &start)
        iov[n].iov_base = start
        n += 1
        m = m.next
    return n


cdef uint32_t tx_prepare(tap_txq_t *q, uring_t *r, mbuf_t **v, uint32_t n, uint32_t first,
                         bint skip, uint32_t *iovecs) noexcept nogil:
    """Prepares one write for each frame, whose results will be numbered from ``first`` on, with
    ``skip`` only those of failures; returns how many (``iovecs``, those used so far, may run out
    before ``n``)."""
    cdef int index = uring_file(r, q.file_id, q.base.fd)
    cdef int fd = q.base.fd if index < 0 else index
    cdef uint8_t flags = 0 if index < 0 else <uint8_t>IOSQE_FIXED_FILE
    cdef pool_t *pool = NULL
    cdef int buffer = -1
    cdef uint32_t used = iovecs[0], length = 0, i
    cdef io_uring_sqe *sqe = NULL
    cdef uint8_t *start
    cdef iovec *iov
    cdef mbuf_t *m
    if skip:
        flags |= <uint8_t>IOSQE_CQE_SKIP_SUCCESS
    if q.ordered:
        flags |= <uint8_t>IOSQE_IO_LINK
    for i in range(n):
        m = v[i]
        start = tx_in_place(q, m, &length)
        if start == NULL:
            if used + min(<uint32_t>m.nb_segs, <uint32_t>IOVECS_MAX) + 1 > RING_IOVECS:
                n = i
                break
            sqe = io_uring_get_sqe(&r.ring)
            iov = r.iovecs + used
            used += tx_iovecs(q, m, r.headers + (first + i) * RING_HEADERS, iov)
            io_uring_prep_writev(sqe, fd, iov, <uint32_t>(r.iovecs + used - iov), 0)
        else:
            if m.pool != pool:
                pool = m.pool
                buffer = uring_buffer(r, pool)
            sqe = io_uring_get_sqe(&r.ring)
            if buffer >= 0:
                io_uring_prep_write_fixed(sqe, fd, start, length, 0, buffer)
            else:
                io_uring_prep_write(sqe, fd, start, length, 0)
        sqe.rw_flags = RWF_NOWAIT if q.nowait else 0
        sqe.flags = flags
        sqe.user_data = first + i
    if q.ordered and sqe != NULL:
        sqe.flags = flags & ~<uint8_t>IOSQE_IO_LINK
    iovecs[0] = used
    return n


cdef uint32_t tx_failures(uring_t *r, uint32_t took, bint skip, int32_t *results) noexcept nogil:
    """Collects the failures in ``results`` (0 for successes) and returns the number of the first
    one; ``took`` when all succeeded, and then there may be no results.

    Without RWF_NOWAIT a write that finds no room waits, and is cancelled."""
    cdef io_uring_cqe *cqes[RING_ENTRIES]
    cdef uint32_t ready, i
    if not skip:
        uring_finish(r, took)
    ready = io_uring_peek_batch_cqe(&r.ring, cqes, RING_ENTRIES)
    if ready == 0 and skip:
        return took
    for i in range(took):
        results[i] = 0 if skip else -EINPROGRESS
    for i in range(ready):
        results[cqes[i].user_data] = min(cqes[i].res, 0)
    io_uring_cq_advance(&r.ring, ready)
    for i in range(took):
        if results[i] != 0:
            return i
    return took


cdef uint32_t tx_sent(tap_txq_t *q, mbuf_t **v, uint32_t n) noexcept nogil:
    """Counts and frees frames that the kernel took."""
    cdef uint32_t i
    if n == 0:
        return 0
    for i in range(n):
        if v[i].next != NULL:
            _compat.counter_add(&q.base.multiseg, 1)
        if keeps_vnet_hdr(v[i]):
            _compat.counter_add(&q.base.checksum, 1)
            if v[i].ol_flags & RX_LRO:
                _compat.counter_add(&q.base.tso, 1)
                if q.gro != NULL and tx_gro_frames(q.gro, v[i]) > 1:
                    _compat.counter_add(&q.base.gro, tx_gro_frames(q.gro, v[i]))
    _compat.counter_add(&q.base.packets, n)
    _compat.counter_add(&q.base.bytes, count_frames(&q.base.traffic, v, n, q.l2))
    mbuf_free_bulk(v, n)
    return n


cdef bint tx_failed(tap_txq_t *q, mbuf_t *m, int code, bint *retry, int *error) noexcept nogil:
    """Handles one failed write: true when the frame is consumed, else the caller keeps it."""
    cdef uint32_t frames = 1
    if code == EINVAL:
        code = tx_fall_back(q, m, error)
        if code == 0:
            return True
    if (code == EAGAIN or code == ENOMEM or code == ENOBUFS or code == EINTR
            or code == ECANCELED):
        retry[0] = True
        return False
    if code == EBADFD or code == EBADF or code == ENXIO:
        error[0] = ENODEV if code == ENXIO else code     # a packet socket gives ENXIO
        return False
    if code == EINVAL and m.pkt_len < ETHER_HDR_LEN and q.l2:
        tx_unfit(q, m)
        return True
    q.base.why = code
    if q.gro != NULL:
        frames = tx_gro_frames(q.gro, m)
    if code == EIO or code == ENETDOWN:     # from a TAP, from a packet socket
        _compat.counter_add(&q.base.down, frames)
    else:
        _compat.counter_add(&q.base.refused, frames)
    _compat.counter_add(&q.base.errors, frames)
    if code != EINPROGRESS:     # else the kernel may still read it: it is never used again
        mbuf_free(m)
    return True


cdef uint32_t tx_sort_out(tap_txq_t *q, mbuf_t **v, uint32_t n, const int32_t *results,
                          bint *stop, int *error) noexcept nogil:
    """Frees frames that were sent or refused, and moves the unsent ones, in order, to the end of
    ``v[:n]``; returns how many were consumed."""
    cdef mbuf_t *unsent[RING_ENTRIES]
    cdef uint32_t n_unsent = 0, consumed = 0, i
    cdef bint retry = False
    cdef int first = 0
    for i in range(n):
        if results[i] == 0:
            consumed += tx_sent(q, v + i, 1)
        elif q.ordered and first != 0:
            unsent[n_unsent] = v[i]
            n_unsent += 1
        elif tx_failed(q, v[i], -results[i], &retry, error):
            consumed += 1
        else:
            unsent[n_unsent] = v[i]
            n_unsent += 1
        if first == 0 and results[i] != 0:
            first = results[i]
    for i in range(n_unsent):
        v[consumed + i] = unsent[i]
    if retry:
        _compat.counter_add(&q.base.full, 1)
    stop[0] = retry or error[0] != 0 or q.base.waiting != 0
    return consumed


cdef uint32_t tx_uring(txq_t *base, mbuf_t **v, uint32_t n, int *error) noexcept nogil:
    cdef tap_txq_t *q = <tap_txq_t *>base
    cdef int32_t results[RING_ENTRIES]
    cdef uint32_t done = 0, iovecs, prepared, took, failed, i
    cdef bint stop = False, skip
    cdef uring_t *r
    cdef int rc = 0
    while done < n and not stop:
        r = uring_enter(&rc)
        if r == NULL:
            if q.engine == ENGINE_AUTO:
                _compat.store(&base.gate.fell_back, -rc)
                memmove(v, v + done, (n - done) * sizeof(mbuf_t *))
                return done + tx_syscall(base, v, n - done, error)
            error[0] = -rc
            break
        iovecs = 0
        skip = r.skip_success and q.nowait
        prepared = tx_prepare(q, r, v + done, min(n - done, q.entries), 0, skip, &iovecs)
        took = uring_run(r, prepared)
        failed = tx_failures(r, took, skip, results)
        uring_leave(r)          # frames are freed without it: a dying pool makes rings forget it
        if failed < took:
            if q.ordered and skip:      # a broken chain cancels its rest as silently as it succeeds
                for i in range(failed + 1, took):
                    results[i] = -EAGAIN
            done += tx_sort_out(q, v + done, took, results, &stop, error)
        else:
            done += tx_sent(q, v + done, took)
        if took < prepared:
            break
    if done < n:
        memmove(v, v + done, (n - done) * sizeof(mbuf_t *))
    return done


cdef bint tx_joins(tx_share_t *s, uint32_t *entries, uint32_t *iovecs) noexcept nogil:
    """Prepares a share; returns whether it can go with others.  That takes enough entries and
    iovecs in the ring for all of it, and no frames to be sent before it or instead of its
    frames."""
    cdef tap_txq_t *q = <tap_txq_t *>s.q
    cdef uint32_t need = 0, i
    if (s.n == 0 or s.n > min(entries[0], q.entries) or q.base.waiting != 0
            or _compat.load_relaxed(&q.base.unplugged) != 0 or not tx_share_ready(q, s)):
        return False
    for i in range(s.n):
        need += min(<uint32_t>s.v[i].nb_segs, <uint32_t>IOVECS_MAX) + 1
    if need > iovecs[0]:
        return False
    entries[0] -= s.n
    iovecs[0] -= need
    return True


cdef inline bint tx_share_ready(tap_txq_t *q, tx_share_t *s) noexcept nogil:
    """Prepares the frames that are not prepared yet; false at a frame that cannot be prepared, or
    when none is left.  Frames with a request that does not fit are consumed."""
    cdef uint32_t seen = s.ready, unfit
    cdef int why = 0
    s.ready = tx_ready(q, s.v, s.n, s.ready, &seen, &why)
    unfit = seen - s.ready
    if unfit > 0:
        memmove(s.v + s.ready, s.v + seen, (s.n - seen) * sizeof(mbuf_t *))
        s.n -= unfit
        s.sent += unfit
        s.lost += unfit
    return why == 0 and s.n > 0


cdef void tx_share_alone(tx_share_t *s) noexcept nogil:
    """Sends a share as a burst of its own."""
    cdef uint64_t lost = tx_lost_frames(s.q), bytes = s.q.bytes
    s.sent += tx_rest(<tap_txq_t *>s.q, s.v, s.n, s.ready, &s.error)
    s.lost += <uint32_t>(tx_lost_frames(s.q) - lost)
    s.bytes = s.q.bytes - bytes


cdef uint32_t tx_uring_many(tx_share_t *shares, uint32_t k) noexcept nogil:
    """One io_uring_enter for several shares: as many of the first ones as can go together.

    Not for queues that link their writes: the kernel runs the chains of an enter side by side, so
    that two chains for the same queue would mix."""
    cdef int32_t results[RING_ENTRIES]
    cdef uint32_t entries = RING_ENTRIES, iovecs = RING_IOVECS
    cdef uint32_t served = 0, at = 0, took, failed, want, i
    cdef uint64_t lost, bytes
    cdef uint32_t sent
    cdef bint stop = False, nowait = True, skip
    cdef uring_t *r = NULL
    cdef tx_share_t *s
    cdef tap_txq_t *q
    cdef int rc = 0
    while served < k and tx_joins(&shares[served], &entries, &iovecs):
        nowait = nowait and (<tap_txq_t *>shares[served].q).nowait
        served += 1
    if served > 1:
        r = uring_enter(&rc)
    if r == NULL:
        tx_share_alone(&shares[0])
        return 1
    iovecs = 0
    skip = r.skip_success and nowait
    for i in range(served):
        s = &shares[i]
        at += tx_prepare(<tap_txq_t *>s.q, r, s.v, s.n, at, skip, &iovecs)
    took = uring_run(r, at)
    failed = tx_failures(r, took, skip, results)
    uring_leave(r)
    at = 0
    for i in range(served):
        s = &shares[i]
        q = <tap_txq_t *>s.q
        want = min(s.n, took - min(took, at))
        lost = tx_lost_frames(s.q)
        bytes = s.q.bytes
        if failed < took:
            sent = tx_sort_out(q, s.v, want, results + at, &stop, &s.error)
        else:
            sent = tx_sent(q, s.v, want)
        s.lost += <uint32_t>(tx_lost_frames(s.q) - lost)
        s.bytes = s.q.bytes - bytes
        s.sent += sent
        at += s.n
        if sent < s.n:
            memmove(s.v, s.v + sent, (s.n - sent) * sizeof(mbuf_t *))
    return served


cdef ssize_t tx_now(tap_txq_t *q, const mbuf_t *m, uint8_t *start, uint32_t length, uint8_t *hdr,
                    iovec *iov) noexcept nogil:
    """Writes a frame, which begins at ``start`` if that is not NULL, without waiting for room."""
    if start == NULL:
        return writev_now(q.base.fd, iov, tx_iovecs(q, m, hdr, iov))
    iov[0].iov_base = start
    iov[0].iov_len = length
    return writev_now(q.base.fd, iov, 1)


cdef uint32_t tx_syscall(txq_t *base, mbuf_t **v, uint32_t n, int *error) noexcept nogil:
    cdef tap_txq_t *q = <tap_txq_t *>base
    cdef uint8_t hdr[VNET_HDR_LEN]
    cdef iovec iov[IOVECS_MAX + 1]
    cdef uint32_t done = 0, settled = 0, length = 0
    cdef bint retry = False
    cdef uint8_t *start
    cdef ssize_t rc
    cdef mbuf_t *m
    while done < n:
        m = v[done]
        start = tx_in_place(q, m, &length)
        if q.shared:
            rc = tx_now(q, m, start, length, hdr, iov)
        elif start != NULL:
            rc = write(base.fd, start, length)
        else:
            rc = writev(base.fd, iov, tx_iovecs(q, m, hdr, iov))
        if rc >= 0:
            done += 1
            continue
        rc = errno
        tx_sent(q, v + settled, done - settled)
        settled = done
        if not tx_failed(q, m, <int>rc, &retry, error):
            break
        done += 1
        settled = done
        if error[0] != 0 or q.base.waiting != 0:
            break
    tx_sent(q, v + settled, done - settled)
    if retry:
        _compat.counter_add(&base.full, 1)
    if done < n:
        memmove(v, v + done, (n - done) * sizeof(mbuf_t *))
    return done


cdef int tx_special(tap_txq_t *q, mbuf_t **frame) noexcept nogil:
    """Prepares a frame with a header or an offload request for sending: 0, TO_SPLIT when the
    kernel cannot split it, or -errno."""
    cdef uint32_t kind
    cdef int rc = 0
    if frame[0].ol_flags & TX_REQUESTS:
        rc = take_requests(frame, q.l2)
    if rc != 0 or not keeps_vnet_hdr(frame[0]):
        return rc
    if not vnet_hdr_fits(frame[0]):
        return -EINVAL
    kind = gso_kind(frame[0])
    if kind != 0 and (q.hdr_len == 0 or _compat.load_relaxed(&q.software) & kind):
        return TO_SPLIT
    if q.hdr_len == 0:
        rc = finish_checksum(frame)
        if rc == 0:
            _compat.counter_add(&q.base.checksum, 1)
    return rc


cdef uint32_t tx_ready(tap_txq_t *q, mbuf_t **v, uint32_t n, uint32_t ready, uint32_t *seen,
                       int *why) noexcept nogil:
    """Prepares the frames of ``v[:n]`` from ``seen`` on, once each, and moves them behind the
    ``ready`` ones in front; returns how many are ready then.  Frames with a request that does not
    fit are consumed.  ``why`` is 0 at the end, TO_SPLIT at a frame to be split here, or
    -ENOBUFS."""
    cdef uint32_t i
    cdef int rc = 0
    for i in range(seen[0], n):
        if v[i].pkt_len < q.least:
            rc = -EINVAL
        elif v[i].ol_flags & TX_SPECIAL:
            rc = tx_special(q, &v[i])
            if rc == TO_SPLIT or rc == -ENOBUFS:
                seen[0] = i
                why[0] = rc
                return ready
        if rc == 0:
            v[ready] = v[i]
            ready += 1
        else:
            tx_unfit(q, v[i])
            rc = 0
    seen[0] = n
    why[0] = 0
    return ready


cdef void tx_unfit(tap_txq_t *q, mbuf_t *m) noexcept nogil:
    q.base.why = EINVAL
    _compat.counter_add(&q.base.bad_request, 1)
    _compat.counter_add(&q.base.errors, 1)
    mbuf_free(m)


cdef uint32_t tx_send(txq_t *base, mbuf_t **v, uint32_t n, int *error) noexcept nogil:
    """Sends no frame while pieces wait, so that none overtakes them."""
    cdef tap_txq_t *q = <tap_txq_t *>base
    return q.send(base, v, n, error) if base.waiting == 0 else 0


cdef uint32_t tx_checked(txq_t *base, mbuf_t **v, uint32_t n, int *error) noexcept nogil:
    """The queue's burst function."""
    return tx_rest(<tap_txq_t *>base, v, n, 0, error)


cdef uint32_t tx_rest(tap_txq_t *q, mbuf_t **v, uint32_t n, uint32_t ready,
                      int *error) noexcept nogil:
    """Sends a burst whose first ``ready`` frames are prepared: handles the application's requests
    for single frames, does in software the work that the kernel cannot do, then sends."""
    cdef txq_t *base = &q.base
    cdef uint32_t seen = ready, sent = 0
    cdef int why = 0
    if _compat.load_relaxed(&base.unplugged) != 0:
        if base.waiting != 0:
            base.piece_errors += base.waiting
            tx_discard(q, &base.down)
        return tx_lost(base, v, n)
    if base.waiting != 0 and not tx_flush(q, error):
        return 0
    while True:
        ready = tx_ready(q, v, n, ready, &seen, &why)
        if q.gro != NULL and _compat.load_relaxed(&q.software) == 0:
            sent = tx_gro(q.gro, tx_send, base, v, ready, error)
        else:
            sent = tx_send(base, v, ready, error)
        if why != TO_SPLIT or sent < ready or error[0] != 0 or base.waiting != 0:
            break
        ready = sent = 0
        why = tx_split(q, v[seen])
        if why == -ENOBUFS:
            break
        if why != 0:
            tx_unfit(q, v[seen])
        seen += 1
        if not tx_flush(q, error):
            break
    if why == -ENOBUFS:
        _compat.counter_add(&base.full, 1)
    if seen < n:
        memmove(v + ready - sent, v + seen, (n - seen) * sizeof(mbuf_t *))
    return seen - ready + sent
