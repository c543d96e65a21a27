# SPDX-License-Identifier: BSD-3-Clause
"""The receive loop on a UDP socket.

With UDP_GRO the kernel gives datagrams of one sender as one message of up to 64 KiB, and says how
long each is.  Messages are read into memory of the queue's own; their datagrams are copied into
mbufs, with headroom in front of each, when there are mbufs.  As in ``segment``, two mbufs that
refer to a datagram would pay above 9000 bytes only.  What a burst has no room for waits here, and
an eventfd tells threads that wait for the descriptor.
"""

from libc.errno cimport EAGAIN, EBADF, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cimport rtap._core.compat as _compat
from rtap._core.linux cimport (
    ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, MSG_TRUNC, get_segment, read, recvmmsg, write,
)
from rtap._core.pool cimport (
    MBUF_SEGS_MAX, mbuf_data, mbuf_free, mbuf_guard, mbuf_reset, mbuf_t, pool_get,
)
from rtap._core.queue cimport rxq_t
from rtap._core.traffic cimport count_frames
from rtap._udp.peers cimport STRANGERS_DROPPED, address_t, peer_from

cdef enum:
    PURGE_MAX = 1 << 16
    ERRORS_MAX = 16             # of one burst, before it gives up


cdef inline void signal(udp_rxq_t *q) noexcept nogil:
    """Makes the eventfd show whether datagrams wait here."""
    cdef bint waiting = q.at < q.n
    cdef uint64_t value = 1
    if waiting == q.awake:
        return
    if waiting:
        write(q.wake, &value, sizeof(value))
    else:
        read(q.wake, &value, sizeof(value))
    q.awake = waiting


cdef inline uint32_t datagrams_left(const udp_rxq_t *q) noexcept nogil:
    """Of the present message.  An empty datagram is one, too."""
    cdef uint32_t left = q.msgs[q.at].msg_len - q.offset
    if left == 0:
        return 1
    return (left + q.size - 1) // q.size


cdef void take_message(udp_rxq_t *q) noexcept nogil:
    """Looks at message ``q.at``, the first time; passes messages that are dropped."""
    cdef mmsghdr *m
    cdef uint32_t count
    cdef bint known = True
    while q.at < q.n:
        m = &q.msgs[q.at]
        q.offset = 0
        q.peer = 0
        if m.msg_hdr.msg_flags & MSG_TRUNC or m.msg_len > MESSAGE_MAX:
            _compat.counter_add(&q.base.truncated, 1)
            _compat.counter_add(&q.base.errors, 1)
            q.at += 1
            continue
        q.size = get_segment(&m.msg_hdr)
        if q.size == 0 or q.size > m.msg_len:
            q.size = max(m.msg_len, 1)
        count = datagrams_left(q)
        if count > 1:
            _compat.counter_add(&q.merged, 1)
            _compat.counter_add(&q.datagrams, count)
        if q.peers == NULL:
            return
        q.peer = peer_from(q.peers, &q.names[q.at], &known)
        if not known:
            _compat.counter_add(&q.unknown, count)
        if q.peer == 0 and q.peers.policy == STRANGERS_DROPPED:
            _compat.counter_add(&q.dropped, count)
            q.at += 1
            continue
        return


cdef bint receive(udp_rxq_t *q, int *error) noexcept nogil:
    """Reads messages; false when the socket has no more now."""
    cdef uint32_t i, tries = 0
    cdef int got
    q.n = q.at = 0
    while True:
        for i in range(<uint32_t>READS):
            q.msgs[i].msg_hdr.msg_namelen = sizeof(address_t) if q.peers != NULL else 0
            q.msgs[i].msg_hdr.msg_controllen = CONTROL_MAX
            q.msgs[i].msg_hdr.msg_flags = 0
        got = recvmmsg(q.base.fd, q.msgs, READS)
        if got > 0:
            q.n = <uint32_t>got
            take_message(q)
            return got == READS
        if got == 0 or errno == EAGAIN:
            return False
        tries += 1
        if errno == EINTR and tries < ERRORS_MAX:
            continue
        if errno == EBADF:
            error[0] = EBADF
            return False
        if errno == ECONNREFUSED or errno == EHOSTUNREACH or errno == ENETUNREACH:
            _compat.counter_add(&q.icmp, 1)
        else:
            _compat.counter_add(&q.base.read_errors, 1)
        if tries >= ERRORS_MAX:
            return False


cdef mbuf_t *fill(udp_rxq_t *q, mbuf_t *m, const uint8_t *p, uint32_t n) noexcept nogil:
    """Copies a datagram into an empty mbuf and, where it is longer, more mbufs of the pool; NULL
    when that has too few, and then all are free again."""
    cdef uint32_t room = q.pool.data_room, part
    cdef mbuf_t *seg = m
    cdef mbuf_t *more
    m.pkt_len = n
    m.port = q.port
    m.peer = q.peer
    while True:
        part = min(n, room)
        memcpy(mbuf_data(seg), p, part)
        seg.data_len = part
        n -= part
        if n == 0:
            mbuf_guard(m)
            return m
        p += part
        if pool_get(q.pool, &more, 1) == 0:
            mbuf_free(m)
            return NULL
        mbuf_reset(more)
        seg.next = more
        m.nb_segs += 1
        seg = more


cdef void next_datagram(udp_rxq_t *q, uint32_t n) noexcept nogil:
    q.offset += n
    if q.offset >= q.msgs[q.at].msg_len:
        q.at += 1
        take_message(q)


cdef bint too_long(const udp_rxq_t *q, uint32_t n) noexcept nogil:
    """Whether the pool could never hold a datagram."""
    return n > <uint64_t>q.pool.data_room * min(q.pool.size, <uint32_t>MBUF_SEGS_MAX)


cdef uint32_t deal(udp_rxq_t *q, mbuf_t **out, uint32_t n) noexcept nogil:
    """Hands out datagrams of the present message; 0 when there are no mbufs."""
    cdef const uint8_t *p = q.bytes + <size_t>q.at * MESSAGE_MAX
    cdef uint32_t length = q.msgs[q.at].msg_len
    cdef uint32_t got = pool_get(q.pool, out, min(n, datagrams_left(q))), made = 0, i, part
    cdef uint32_t at = q.at
    for i in range(got):
        part = min(q.size, length - q.offset)
        mbuf_reset(out[i])
        out[i] = fill(q, out[i], p + q.offset, part)
        if out[i] == NULL:
            break
        made += 1
        next_datagram(q, part)
        if q.at != at:
            break
    for i in range(made + (made < got and out[made] == NULL), got):
        mbuf_reset(out[i])
        mbuf_free(out[i])
    return made


cdef uint32_t udp_rx(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    cdef udp_rxq_t *q = <udp_rxq_t *>base
    cdef uint32_t got = 0, some
    cdef bint more = True
    if _compat.load_relaxed(&q.stale) != 0:
        udp_rx_drop(q)
    while got < n:
        if q.at >= q.n:
            if not more:
                break
            more = receive(q, error)
            if q.at >= q.n and not more:
                break
            continue
        if too_long(q, min(q.size, q.msgs[q.at].msg_len - q.offset)):
            _compat.counter_add(&base.gso_too_long, 1)
            _compat.counter_add(&base.errors, 1)
            next_datagram(q, min(q.size, q.msgs[q.at].msg_len - q.offset))
            continue
        some = deal(q, out + got, n - got)
        if some == 0:
            _compat.counter_add(&base.nombuf, 1)
            break
        got += some
    signal(q)
    if got > 0:
        _compat.counter_add(&base.packets, got)
        _compat.counter_add(&base.bytes, count_frames(&base.traffic, out, got, False))
    return got


cdef bint udp_rx_idle(rxq_t *base, int ms) noexcept nogil:
    """See ``rxq_t``."""
    cdef udp_rxq_t *q = <udp_rxq_t *>base
    return q.at < q.n


cdef void udp_rx_drop(udp_rxq_t *q) noexcept nogil:
    """Throws away what waits here, and counts it; for the queue's owner."""
    cdef uint32_t lost = 0
    _compat.store(&q.stale, 0)
    while q.at < q.n:
        lost += datagrams_left(q)
        q.at += 1
        take_message(q)
    q.n = q.at = 0
    _compat.counter_add(&q.base.stopped, lost)
    signal(q)


cdef uint64_t udp_rx_purge(udp_rxq_t *q) noexcept nogil:
    """Throws away the datagrams that wait in the socket of a stopped queue, and counts them."""
    cdef uint64_t lost = 0
    cdef bint more = True
    cdef int error = 0
    udp_rx_drop(q)
    while more and lost < PURGE_MAX:
        more = receive(q, &error)
        while q.at < q.n:
            lost += datagrams_left(q)
            q.at += 1
            take_message(q)
    q.n = q.at = 0
    _compat.counter_add(&q.base.purged, lost)
    return lost
