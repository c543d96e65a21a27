# SPDX-License-Identifier: BSD-3-Clause
"""The Python shell of a transmit queue: arguments, the GIL, what a burst leaves behind.

A kernel returns a count and an errno value; the shell releases the GIL once for each burst and
raises.
"""

cimport cython
from libc.errno cimport EIO, ENETDOWN
from libc.stdint cimport uint32_t, uint64_t

cimport rtap._core.compat as _compat
cimport rtap._core.live as _live
from rtap._core.burst cimport Burst
from rtap._core.gil cimport gil_keep, gil_taken_back
from rtap._core.linux cimport EBADFD
from rtap._core.mempool cimport Mempool, alloc_one
from rtap._core.pool cimport mbuf_free, mbuf_free_bulk, mbuf_t, thread_number
from rtap._core.queue cimport (
    LAYER_ETHERNET, LAYER_IP, QUEUE_CLOSED, QUEUE_STARTED, QUEUE_STOPPED, QueueBase, refusal,
    since, tx_share_t, txq_t,
)
from rtap._core.traffic cimport traffic_counts

from rtap.errors import raise_errno


cdef uint32_t tx_lost(txq_t *q, mbuf_t **v, uint32_t n) noexcept nogil:
    """Consumes a burst while the link is down."""
    mbuf_free_bulk(v, n)
    q.why = ENETDOWN
    _compat.counter_add(&q.down, n)
    _compat.counter_add(&q.errors, n)
    return n


cdef void tx_alone(tx_share_t *s) noexcept nogil:
    """Sends a share as a burst of its own."""
    cdef uint64_t lost = tx_lost_frames(s.q), bytes = s.q.bytes
    s.sent = s.q.burst(s.q, s.v, s.n, &s.error)
    s.lost = <uint32_t>(tx_lost_frames(s.q) - lost)
    s.bytes = s.q.bytes - bytes


cdef uint32_t tx_cut_off(txq_t *q, mbuf_t **v, uint32_t n, int *error) noexcept nogil:
    error[0] = EBADFD
    return 0


cdef uint32_t tx_cut_off_many(tx_share_t *shares, uint32_t k) noexcept nogil:
    shares[0].error = EBADFD
    return 1


@cython.no_gc_clear
cdef class TxQueueBase(QueueBase):
    """Transmit side of one queue; see :class:`rtap._ring.TxQueue`."""

    cdef void serve(self, txq_t *q) noexcept:
        self.q = q
        self.gate = &q.gate
        self.count_in(q, &q.packets, sizeof(txq_t))
        _live.made(_live.TX_QUEUES, 1)

    def __dealloc__(self):
        if self.q != NULL:
            _live.gone(_live.TX_QUEUES, 1)

    def __repr__(self):
        return f"tx queue {self.queue_id} of {self.label()}"

    def set_plugged(self, bint plugged):
        """Whether the link is up.  While it is not, bursts are taken and lost, and counted in
        ``down``; takes effect on the next burst, also of a worker."""
        self.checked()
        _compat.store(&self.q.unplugged, not plugged)

    def close(self):
        """Stops, for good; idempotent.  The counters stay readable."""
        self.checked()
        self.stop()
        _compat.cas(&self.gate.state, QUEUE_STOPPED, QUEUE_CLOSED)

    def cut_off(self):
        """From now on bursts raise DeviceGone.  Once none is in progress, the descriptor is not
        used any more."""
        self.not_inherited()
        if self.q.many != NULL:
            self.q.many = tx_cut_off_many
        self.q.burst = tx_cut_off

    def tx_burst(self, Burst burst not None):
        """Sends frames from the front of ``burst``; returns how many it took.

        These frames are consumed; ``burst[0]`` is then the first unsent one.  A full kernel queue
        gives a short count, not an error; a frame that the kernel refuses is consumed and counted
        in ``errors``.  If the kernel had no room for pieces of a super-frame that was split here,
        they leave first with the next burst, even an empty one.

        DeviceGone (with ``.sent``) when the interface is deleted, RuntimeError when the queue is
        stopped or used by another thread.
        """
        cdef mbuf_t **v
        cdef Py_ssize_t n, capacity
        cdef uint32_t sent
        cdef int error = 0
        self.own(thread_number())
        n = burst.lend(&v, &capacity)
        sent = self.run(v, <uint32_t>n, &error)
        self.leave()
        burst.give_back(v, n - sent, capacity)
        if self.q.news != 0:
            self.tell_news()
        if error != 0:
            raise_errno(error, "tx_burst", self.label(), sent, hint=refusal(error))
        return sent

    @property
    def waiting(self):
        """Frames that wait to be sent: pieces of a super-frame that was split here.  The next
        burst, even an empty one, sends them first."""
        self.checked()
        return _compat.load(&self.q.waiting)

    def send(self, frame, Mempool pool not None):
        """Sends one frame, any bytes-like object, from a buffer of ``pool``: a burst of one
        without the objects around it.

        True when the kernel took it; False when it takes no more now, or the link or the interface
        is down (counted in ``down``).  ValueError for a frame shorter than its header, OSError
        for one that the kernel refuses (counted in ``errors``)."""
        cdef uint32_t least = (14 if self.layer == LAYER_ETHERNET else
                               20 if self.layer == LAYER_IP else 1)
        cdef txq_t *q
        cdef mbuf_t *m
        cdef uint32_t sent, length
        cdef uint64_t lost
        cdef int error = 0, why
        if frame is None:
            raise TypeError("a frame is a bytes-like object, not None")
        m = alloc_one(pool, frame)
        length = m.pkt_len
        try:
            self.own(thread_number())
        except BaseException:
            mbuf_free(m)
            raise
        q = self.q
        if length < least:
            self.disown()
            mbuf_free(m)
            raise ValueError(f"send: a frame of {length} bytes is too short: {self!r} takes "
                             + ("Ethernet frames, with a header of 14 bytes" if least == 14 else
                                "IP packets, with a header of 20 bytes or more" if least == 20 else
                                "at least one byte"))
        lost = tx_lost_frames(q)
        sent = self.run(&m, 1, &error)
        lost = tx_lost_frames(q) - lost
        why = q.why
        self.leave()
        if sent == 0:
            mbuf_free(m)
        if error != 0:
            raise_errno(error, "send", self.label(), sent, hint=refusal(error))
        if lost == 0:
            return sent == 1
        if why == EIO or why == ENETDOWN:
            return False
        raise_errno(why, f"send a frame of {length} bytes", self.label())

    cdef int tell(self, uint32_t news) except -1:
        return 0

    cdef int tell_news(self) except -1:
        """Reports after a burst what it found out; after the next one again if this raises."""
        cdef uint32_t news = _compat.load(&self.q.news)
        self.tell(news)
        _compat.cas(&self.q.news, news, 0)
        return 0

    cdef void leave(self) noexcept:
        """Ends a burst.  A thread that stopped the queue meanwhile, without waiting, found it
        owned: whichever of the two comes last counts the waiting frames."""
        if self.q.waiting == 0:
            self.disown()
            return
        # Written before the state is read, see move(): a plain store may be seen later.
        _compat.exchange(&self.gate.owned, 0)
        if _compat.load(&self.gate.state) != QUEUE_STARTED:
            self.settle()

    cdef void settle(self) noexcept:
        """Counts the waiting frames of a stopped queue, unless it has an owner, who then does
        so."""
        if self.q.abandon != NULL and _compat.cas(&self.gate.owned, 0, thread_number()):
            self.q.abandon(self.q)
            self.disown()

    cdef uint32_t run(self, mbuf_t **v, uint32_t n, int *error) noexcept:
        cdef txq_t *q = self.q
        cdef uint32_t sent
        cdef uint64_t asked
        if gil_keep(&self.gil, n):
            return q.burst(q, v, n, error)
        with nogil:
            sent = q.burst(q, v, n, error)
            asked = _compat.now_ns()
        gil_taken_back(&self.gil, asked)
        return sent

    def counters(self):
        """Totals since the start or the last reset, as a dict of name to int.

        packets, bytes (frames the kernel took); errors = refused (by the kernel, or for a request
        that does not fit the frame) + down (the link or the interface was down) + unsent (pieces
        of super-frames that waited when the queue was stopped); full (bursts cut short by the
        kernel)."""
        return since(self.zero_of(False), self.totals())

    cdef dict totals(self):
        cdef txq_t *q = self.q
        self.checked()
        self.count_lent()
        return {
            "packets": _compat.counter_read(&q.packets),
            "bytes": _compat.counter_read(&q.bytes),
            "errors": _compat.counter_read(&q.errors),
            "refused": _compat.counter_read(&q.refused) + _compat.counter_read(&q.bad_request),
            "down": _compat.counter_read(&q.down),
            "unsent": _compat.counter_read(&q.unsent),
            "full": _compat.counter_read(&q.full),
        }

    cdef dict xtotals(self):
        cdef txq_t *q = self.q
        self.checked()
        self.count_lent()
        return traffic_counts(&q.traffic) | {
            "tso_packets": _compat.counter_read(&q.tso),
            "checksum_offload": _compat.counter_read(&q.checksum),
            "multiseg_packets": _compat.counter_read(&q.multiseg),
            "software_gso_packets": _compat.counter_read(&q.software_gso),
            "bad_request_packets": _compat.counter_read(&q.bad_request),
            "kernel_refused_packets": _compat.counter_read(&q.refused),
            "link_down_packets": _compat.counter_read(&q.down),
            "unsent_packets": _compat.counter_read(&q.unsent),
            "gro_merged_packets": _compat.counter_read(&q.gro),
        }
