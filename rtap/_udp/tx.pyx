# SPDX-License-Identifier: BSD-3-Clause
"""The transmit loop on a UDP socket.

Datagrams of one size to one peer that follow each other leave as one message with UDP_SEGMENT, up
to 64 of them and 64 KiB; a shorter one may be the last.  Messages leave with sendmmsg(2).  A TCP or
UDP super-frame is split here, its checksums are finished, and its pieces, which lie one behind the
other, leave in the same way.

The kernel refuses messages of several datagrams on some paths, or from some size on.  Then they
leave one by one, and so do later ones of that size, until it is tried again.
"""

from libc.errno cimport EAGAIN, EBADF, EINTR, EINVAL, EMSGSIZE, ENOBUFS, ENOMEM, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, memset

cimport rtap._core.compat as _compat
from rtap._core.flags cimport RX_LRO, TX_REQUESTS, TX_SPECIAL
from rtap._core.linux cimport (
    ECONNREFUSED, EDESTADDRREQ, EHOSTUNREACH, EIO, ENETDOWN, ENETUNREACH, iovec, mmsghdr, sendmmsg,
    set_segment,
)
from rtap._core.pool cimport mbuf_free, mbuf_free_bulk, mbuf_t, mbuf_window
from rtap._core.queue cimport txq_t
from rtap._core.traffic cimport count_frames
from rtap._core.tx_queue cimport tx_lost
from rtap._frames.parse cimport headers_of
from rtap._frames.pieces cimport gso_bytes, plan_inside
from rtap._frames.request cimport finish_checksum, take_requests
from rtap._frames.vnet cimport keeps_vnet_hdr
from rtap._udp.peers cimport peer_address

cdef enum:
    AGAIN_NS = 10_000_000_000   # until the kernel is asked again for what it has refused
    TRIES = 3                   # a socket tells errors about earlier datagrams first

    # What became of a message
    AGAIN = 0                   # nothing yet: it is tried again
    FULL = 1
    REFUSED = 2                 # its first datagram was consumed, the others are still to be sent
    ALONE = 3                   # its datagrams have to leave one by one
    BROKEN = 4


# ---- messages


cdef inline bint may_join(const udp_txq_t *q, uint32_t size) noexcept nogil:
    """Whether datagrams of that size may leave together."""
    return size > 0 and (q.too_big_from == 0 or size < q.too_big_from)


cdef void new_message(udp_txq_t *q, uint32_t at, uint32_t peer, iovec *iov) noexcept nogil:
    cdef mmsghdr *m = &q.msgs[at]
    memset(m, 0, sizeof(mmsghdr))
    m.msg_hdr.msg_iov = iov
    if peer != 0 or not q.connected:
        m.msg_hdr.msg_name = &q.names[at]
        m.msg_hdr.msg_namelen = q.address_len


cdef inline bint has_address(udp_txq_t *q, uint32_t at, uint32_t peer) noexcept nogil:
    if peer == 0:
        return q.connected
    return peer_address(q.peers, peer, &q.names[at])


cdef uint32_t add_iovecs(const mbuf_t *m, iovec *iov, uint32_t room,
                         uint32_t *length) noexcept nogil:
    """Describes a frame, and says how long it is; 0 when it has more segments than there is room
    for."""
    cdef uint32_t n = 0, total = 0
    cdef uint8_t *start
    while m != NULL:
        if n == room:
            return 0
        iov[n].iov_len = mbuf_window(m, &start)
        iov[n].iov_base = start
        total += <uint32_t>iov[n].iov_len
        n += 1
        m = m.next
    length[0] = total
    return n


cdef int outcome(udp_txq_t *q, uint32_t datagrams, uint32_t size, uint32_t *tries,
                 int *error) noexcept nogil:
    """What an errno of sendmmsg means for its first message."""
    cdef int code = errno
    if code == EAGAIN or code == ENOBUFS or code == ENOMEM:
        return FULL
    tries[0] += 1
    if code == EINTR and tries[0] < TRIES:
        return AGAIN
    if code == EBADF:
        error[0] = EBADF
        return BROKEN
    if code == ECONNREFUSED or code == EHOSTUNREACH or code == ENETUNREACH:
        _compat.counter_add(&q.icmp, 1)
        if tries[0] < TRIES:
            return AGAIN
    elif datagrams > 1 and (code == EIO or code == EINVAL or code == EMSGSIZE):
        _compat.counter_add(&q.fallbacks, 1)
        q.too_big_from = 1 if code == EIO else size if q.too_big_from == 0 else min(
            size, q.too_big_from)
        q.again_at = _compat.now_ns() + <uint64_t>AGAIN_NS
        _compat.store(&q.fell_back, <uint32_t>code)
        return ALONE
    q.base.why = code
    if code == EMSGSIZE:
        _compat.counter_add(&q.too_big, 1)
    if code == ENETDOWN:
        _compat.counter_add(&q.base.down, 1)
    else:
        _compat.counter_add(&q.base.refused, 1)
    _compat.counter_add(&q.base.errors, 1)
    return REFUSED


# ---- frames as they are


cdef void lose(udp_txq_t *q, mbuf_t *m, int why) noexcept nogil:
    """Consumes a frame that cannot be sent."""
    q.base.why = why
    if why == EMSGSIZE:
        _compat.counter_add(&q.too_big, 1)
        _compat.counter_add(&q.base.refused, 1)
    else:
        if why == EDESTADDRREQ:
            _compat.counter_add(&q.no_peer, 1)
        _compat.counter_add(&q.base.bad_request, 1)
    _compat.counter_add(&q.base.errors, 1)
    mbuf_free(m)


cdef uint32_t add_message(udp_txq_t *q, mbuf_t **v, uint32_t n, uint32_t at, uint32_t *iovecs,
                          bint join) noexcept nogil:
    """Describes a message from the front of ``v``; returns how many frames are in it, 0 when it
    does not fit.  ``v[0]`` has an address, which is in place."""
    cdef uint32_t begun = iovecs[0], used = begun, count = 0, total = 0, size = 0, length = 0, k
    cdef uint32_t peer = v[0].peer
    while count < n and count < <uint32_t>SEGMENTS_MAX and (join or count == 0):
        if v[count].peer != peer:
            break
        k = add_iovecs(v[count], &q.iov[used], <uint32_t>IOVECS - used, &length)
        if k == 0 or total + length > <uint32_t>PAYLOAD_MAX:
            break
        if count > 0 and (length > size or length == 0 or not may_join(q, size)):
            break
        if count == 0:
            size = length
        used += k
        total += length
        count += 1
        if length < size:
            break
    if count == 0:
        return 0
    new_message(q, at, peer, &q.iov[begun])
    q.msgs[at].msg_hdr.msg_iovlen = used - begun
    if count > 1:
        set_segment(&q.msgs[at].msg_hdr, q.control[at], <uint16_t>size)
    q.messages[at].n = count
    q.messages[at].size = size
    iovecs[0] = used
    return count


cdef uint32_t count_sent(udp_txq_t *q, mbuf_t **v, uint32_t n) noexcept nogil:
    cdef uint32_t i
    if n == 0:
        return 0
    for i in range(n):
        if v[i].next != NULL:
            _compat.counter_add(&q.base.multiseg, 1)
    _compat.counter_add(&q.base.packets, n)
    _compat.counter_add(&q.base.bytes, count_frames(&q.base.traffic, v, n, False))
    mbuf_free_bulk(v, n)
    return n


cdef uint32_t send_frames(udp_txq_t *q, mbuf_t **v, uint32_t n, bint join, bint *stop,
                          int *error) noexcept nogil:
    """Sends prepared frames from the front of ``v``; returns how many were consumed."""
    cdef uint32_t done = 0, planned, iovecs, at, built, k, tries = 0
    cdef int rc, what
    while done < n and not stop[0]:
        built = planned = iovecs = 0
        while built < <uint32_t>MESSAGES and done + planned < n:
            if not has_address(q, built, v[done + planned].peer):
                break
            k = add_message(q, v + done + planned, n - done - planned, built, &iovecs, join)
            if k == 0:
                break
            planned += k
            built += 1
        if built == 0:          # the first one cannot be sent at all
            lose(q, v[done], EMSGSIZE if has_address(q, 0, v[done].peer) else EDESTADDRREQ)
            done += 1
            continue
        rc = sendmmsg(q.base.fd, q.msgs, built)
        if rc > 0:
            tries = 0
            for at in range(<uint32_t>rc):
                k = q.messages[at].n
                if k > 1:
                    _compat.counter_add(&q.gso_sends, 1)
                    _compat.counter_add(&q.gso_segments, k)
                done += count_sent(q, v + done, k)
            continue
        k = q.messages[0].n
        what = outcome(q, k, q.messages[0].size, &tries, error)
        if what == REFUSED:
            mbuf_free(v[done])
            done += 1
            tries = 0
        elif what == ALONE:
            done += send_frames(q, v + done, k, False, stop, error)
            tries = 0
        elif what == FULL:
            _compat.counter_add(&q.base.full, 1)
            stop[0] = True
        elif what == BROKEN:
            stop[0] = True
    return done


# ---- super-frames


cdef void discard(udp_txq_t *q, uint64_t *reason) noexcept nogil:
    """Drops what is left of the super-frame, and counts its pieces as errors for that reason."""
    cdef uint32_t n = q.base.waiting
    _compat.counter_add(reason, n)
    _compat.counter_add(&q.base.errors, n)
    q.base.piece_errors += n
    udp_tx_forget(q)


cdef void udp_tx_forget(udp_txq_t *q) noexcept nogil:
    if q.frame != NULL:
        mbuf_free(q.frame)
    q.frame = NULL
    q.n_made = 0
    _compat.store(&q.base.waiting, 0)


cdef int begin(udp_txq_t *q, mbuf_t *m) noexcept nogil:
    """Takes over a super-frame, when none is in hand; 0, or the errno for which it is not sent."""
    cdef const uint8_t *p
    cdef uint32_t n, longest
    if plan_inside(m, &q.plan) != 0:
        return EINVAL
    if not has_address(q, 0, m.peer):
        return EDESTADDRREQ
    longest = q.plan.hdr_len + min(q.plan.gso_size, q.plan.payload)
    if longest > <uint32_t>PAYLOAD_MAX:
        return EMSGSIZE
    p = headers_of(m, q.headers, &n)
    if p != q.headers:
        memcpy(q.headers, p, q.plan.hdr_len)
    q.frame = m
    q.peer = m.peer
    q.next = q.n_made = q.first = q.made_at = 0
    _compat.store(&q.base.waiting, q.plan.count)
    _compat.counter_add(&q.base.tso, 1)
    _compat.counter_add(&q.base.software_gso, 1)
    return 0


cdef bint make_pieces(udp_txq_t *q) noexcept nogil:
    """The next pieces of the super-frame; false when another holder of it has shortened it."""
    cdef uint32_t n, size = q.plan.hdr_len + q.plan.gso_size
    cdef uint32_t most = max(1, min(<uint32_t>SEGMENTS_MAX, <uint32_t>PAYLOAD_MAX // size))
    n = gso_bytes(q.frame, &q.plan, q.headers, q.next, q.pieces, PIECES_ROOM, q.lengths, most)
    q.n_made = n
    q.first = q.made_at = 0
    q.next += n
    return n > 0


cdef void count_pieces(udp_txq_t *q, uint32_t n) noexcept nogil:
    """Counts pieces that were sent, and passes them."""
    cdef mbuf_t piece
    cdef mbuf_t *one = &piece
    cdef uint64_t bytes = 0
    cdef uint32_t _i
    memset(&piece, 0, sizeof(piece))
    piece.nb_segs = 1
    for _i in range(n):
        piece.buf = q.pieces + q.made_at
        piece.buf_len = piece.data_len = piece.pkt_len = q.lengths[q.first]
        bytes += count_frames(&q.base.traffic, &one, 1, False)
        q.made_at += q.lengths[q.first]
        q.first += 1
    q.n_made -= n
    _compat.store(&q.base.waiting, q.base.waiting - n)
    _compat.counter_add(&q.base.packets, n)
    _compat.counter_add(&q.base.bytes, bytes)


cdef void pass_piece(udp_txq_t *q) noexcept nogil:
    """Passes a piece that the kernel has refused."""
    q.made_at += q.lengths[q.first]
    q.first += 1
    q.n_made -= 1
    q.base.piece_errors += 1
    _compat.store(&q.base.waiting, q.base.waiting - 1)


cdef bint flush(udp_txq_t *q, int *error) noexcept nogil:
    """Sends the pieces of the super-frame in hand; true when none is left."""
    cdef uint32_t n, bytes, i, tries = 0
    cdef int what
    while q.base.waiting != 0:
        if q.n_made == 0 and not make_pieces(q):
            discard(q, &q.base.bad_request)
            break
        if not has_address(q, 0, q.peer):       # its peer was removed meanwhile
            _compat.counter_add(&q.no_peer, q.base.waiting)
            discard(q, &q.base.bad_request)
            break
        n = q.n_made if may_join(q, q.lengths[q.first]) else 1
        bytes = 0
        for i in range(n):
            bytes += q.lengths[q.first + i]
        new_message(q, 0, q.peer, q.iov)
        q.iov[0].iov_base = q.pieces + q.made_at
        q.iov[0].iov_len = bytes
        q.msgs[0].msg_hdr.msg_iovlen = 1
        if n > 1:
            set_segment(&q.msgs[0].msg_hdr, q.control[0], <uint16_t>q.lengths[q.first])
        if sendmmsg(q.base.fd, q.msgs, 1) > 0:
            if n > 1:
                _compat.counter_add(&q.gso_sends, 1)
                _compat.counter_add(&q.gso_segments, n)
            count_pieces(q, n)
            tries = 0
            continue
        what = outcome(q, n, q.lengths[q.first], &tries, error)
        if what == REFUSED:
            pass_piece(q)
            tries = 0
        elif what == FULL:
            _compat.counter_add(&q.base.full, 1)
            return False
        elif what == BROKEN:
            return False
        elif what == ALONE:
            tries = 0
    udp_tx_forget(q)
    return True


cdef void udp_tx_abandon(txq_t *base) noexcept nogil:
    if base.waiting != 0:
        discard(<udp_txq_t *>base, &base.unsent)


# ---- bursts


cdef int prepare(udp_txq_t *q, mbuf_t **frame) noexcept nogil:
    """Does what is asked of a frame, and finishes its checksum; 0, or -errno.  Leaves super-frames
    as they are."""
    cdef int rc = 0
    if frame[0].ol_flags & TX_REQUESTS:
        rc = take_requests(frame, False)
    if rc != 0 or not keeps_vnet_hdr(frame[0]) or frame[0].ol_flags & RX_LRO:
        return rc
    rc = finish_checksum(frame)
    if rc == 0:
        _compat.counter_add(&q.base.checksum, 1)
    return rc


cdef uint32_t udp_tx(txq_t *base, mbuf_t **v, uint32_t n, int *error) noexcept nogil:
    """The queue's burst function.  No frame overtakes the pieces of a super-frame."""
    cdef udp_txq_t *q = <udp_txq_t *>base
    cdef uint32_t done = 0, ready = 0, consumed
    cdef bint stop = False, super_frame
    cdef int rc
    if _compat.load_relaxed(&base.unplugged) != 0:
        if base.waiting != 0:
            discard(q, &base.down)
        return tx_lost(base, v, n)
    if q.too_big_from != 0 and _compat.now_ns() >= q.again_at:
        q.too_big_from = 0
        _compat.store(&q.fell_back, 0)
    if base.waiting != 0 and not flush(q, error):
        return 0
    while done < n and not stop:
        # Frames that may leave together: up to one that cannot be prepared, or a super-frame.
        ready = done
        rc = 0
        super_frame = False
        while ready < n:
            if v[ready].ol_flags & TX_SPECIAL:
                rc = prepare(q, &v[ready])
                if rc != 0:
                    break
                super_frame = v[ready].ol_flags & RX_LRO and keeps_vnet_hdr(v[ready])
                if super_frame:
                    break
            ready += 1
        while done < ready and not stop:
            consumed = send_frames(q, v + done, ready - done, True, &stop, error)
            done += consumed
        if stop or done < ready:
            break
        if rc == -ENOBUFS:
            _compat.counter_add(&base.full, 1)
            break
        if rc != 0:
            lose(q, v[done], -rc)
            done += 1
        elif super_frame:
            rc = begin(q, v[done])
            if rc != 0:
                lose(q, v[done], rc)
                done += 1
                continue
            done += 1
            stop = not flush(q, error)
    if done < n:
        memmove(v, v + done, (n - done) * sizeof(mbuf_t *))
    return done
