# SPDX-License-Identifier: BSD-3-Clause
"""Super-frames that the kernel does not take: which kinds these are, and their pieces.

Pieces wait in the queue until the kernel has taken them; no frame overtakes them.
"""

from libc.errno cimport EINVAL, ENOBUFS, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

cimport rtap._core.compat as _compat
from rtap._core.linux cimport iovec, write, writev_now
from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport txq_t
from rtap._frames.probe cimport PROBE_MAX, probe_frame
from rtap._tap.tx cimport tap_txq_t
from rtap._tap.tx_split cimport split_begin, split_drop, split_more, tx_split_t

cdef enum:
    PROBE_NS = 1_000_000_000    # between probes of the kernel's segmentation


cdef int tx_split(tap_txq_t *q, mbuf_t *m) noexcept nogil:
    """Takes over a super-frame whose pieces are sent next; 0, or -errno: -EINVAL when it is
    malformed, -ENOBUFS when pieces of another one wait, or there is no memory now."""
    cdef int n
    if q.base.waiting != 0:
        return -ENOBUFS
    if q.split == NULL:
        q.split = <tx_split_t *>malloc(sizeof(tx_split_t))
        if q.split == NULL:
            return -ENOBUFS
    n = split_begin(q.split, m, q.l2)
    if n < 0:
        return n
    _compat.store(&q.base.waiting, <uint32_t>n)
    _compat.counter_add(&q.base.software_gso, 1)
    return 0


cdef bint tx_flush(tap_txq_t *q, int *error) noexcept nogil:
    """Sends the waiting pieces; true when none is left."""
    cdef tx_split_t *s = q.split
    cdef uint64_t errors = q.base.errors
    cdef uint32_t sent = 1
    while q.base.waiting != 0 and sent != 0 and error[0] == 0:
        if s.n == 0 and split_more(s) == 0:
            tx_discard(q, &q.base.bad_request)
            break
        sent = q.send(&q.base, s.v, s.n, error)
        s.n -= sent
        _compat.store(&q.base.waiting, q.base.waiting - sent)
    q.base.piece_errors += q.base.errors - errors
    return q.base.waiting == 0


cdef void tx_discard(tap_txq_t *q, uint64_t *reason) noexcept nogil:
    """Drops the waiting pieces and counts them as errors for that reason."""
    cdef uint32_t n = q.base.waiting
    _compat.counter_add(reason, n)
    _compat.counter_add(&q.base.errors, n)
    _compat.store(&q.base.waiting, 0)
    split_drop(q.split)


cdef void tx_abandon(txq_t *base) noexcept nogil:
    cdef tap_txq_t *q = <tap_txq_t *>base
    cdef uint32_t n = base.waiting
    if n != 0:
        tx_discard(q, &base.unsent)
        base.piece_errors += n


cdef void tx_forget(tap_txq_t *q) noexcept nogil:
    """Frees memory before a queue goes, also in a forked child."""
    if q.base.waiting != 0:
        split_drop(q.split)
    free(q.split)


cdef void tx_probe(tap_txq_t *q, uint32_t kind, uint8_t gso_type) noexcept nogil:
    """Called when the kernel has refused a well-formed super-frame.  If it refuses the simplest one
    of that kind too, super-frames of that kind are split here from now on."""
    cdef uint8_t frame[PROBE_MAX]
    cdef iovec iov
    cdef ssize_t rc
    cdef uint64_t now = _compat.now_ns()
    if q.software & kind or now < q.probe_after:
        return
    q.probe_after = now + <uint64_t>PROBE_NS
    iov.iov_base = frame
    iov.iov_len = probe_frame(frame, gso_type, q.l2)
    if q.shared:
        rc = writev_now(q.base.fd, &iov, 1)
    else:
        rc = write(q.base.fd, frame, iov.iov_len)
    if rc < 0 and errno == EINVAL:
        _compat.store(&q.software, q.software | kind)
        if q.refused != NULL:
            q.refused(q, kind)


cdef int tx_fall_back(tap_txq_t *q, mbuf_t *m, int *error) noexcept nogil:
    """Called when the kernel has answered a frame with EINVAL.  0 when it was a super-frame, and
    its pieces have been sent or wait; else the errno for this frame."""
    cdef uint32_t kind = gso_kind(m)
    cdef uint8_t gso_type = m.gso_type
    cdef int rc
    if kind == 0 or q.hdr_len == 0:
        return EINVAL
    rc = tx_split(q, m)
    if rc != 0:
        return -rc
    tx_probe(q, kind, gso_type)
    tx_flush(q, error)
    return 0
