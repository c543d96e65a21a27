# SPDX-License-Identifier: BSD-3-Clause
"""The Python shell of a receive queue: arguments, the GIL, waiting for frames and for buffers.

A kernel returns a count and an errno value; the shell releases the GIL once for each burst and
raises.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint32_t, uint64_t

cimport rtap._core.compat as _compat
cimport rtap._core.live as _live
from rtap._core.burst cimport Burst, burst_make
from rtap._core.gil cimport gil_keep, gil_taken_back
from rtap._core.linux cimport EBADFD, POLLIN, poll, pollfd, usleep
from rtap._core.mbuf cimport check_range
from rtap._core.pool cimport mbuf_t, thread_number
from rtap._core.queue cimport (
    BURST_MAX, OWNER_AWAY, QUEUE_STARTED, QueueBase, refusal, rx_share_t, rxq_t, since,
)
from rtap._core.traffic cimport traffic_counts

import math
from rtap.errors import DeviceStateError, raise_errno

cdef enum:
    WAIT_SLICE_MS = 20          # a waiting thread notices a stop within one
    SIGNAL_SLICE_MS = 60        # between checks for pending signals
    EMPTY_POOL_US = 1000        # between looks for a free buffer


cdef uint64_t wait_deadline(timeout) except? 1:
    """The CLOCK_MONOTONIC ns at which to stop waiting; 0 to not wait at all."""
    cdef double seconds
    if timeout is None:
        return <uint64_t>-1
    seconds = timeout
    if not seconds >= 0 or math.isinf(seconds):
        raise ValueError(f"timeout must be None or at least 0 seconds, got {timeout!r}")
    if seconds == 0:
        return 0
    return _compat.now_ns() + <uint64_t>(min(seconds, 1e9) * 1e9)


cdef bint wait_readable(rxq_t *q, uint64_t deadline) noexcept nogil:
    """Polls the descriptor for a short slice: true when it is ready or in error, or the queue has
    frames."""
    cdef pollfd p
    cdef uint64_t now = _compat.now_ns()
    cdef uint64_t until = now + <uint64_t>SIGNAL_SLICE_MS * 1000000
    cdef uint64_t left
    cdef int ms, rc
    p.fd = q.fd
    p.events = POLLIN
    if until > deadline:
        until = deadline
    while now < until and _compat.load(&q.gate.state) == QUEUE_STARTED:
        left = (until - now + 999999) // 1000000
        ms = WAIT_SLICE_MS if left > WAIT_SLICE_MS else <int>left
        if q.idle != NULL:
            if q.idle(q, ms):
                return True
            if q.fd < 0:
                now = _compat.now_ns()
                continue
        p.revents = 0
        rc = poll(&p, 1, ms)
        if rc != 0:
            return rc > 0
        now = _compat.now_ns()
    return False


cdef uint32_t rx_cut_off(rxq_t *q, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    error[0] = EBADFD
    return 0


cdef uint32_t rx_cut_off_many(rx_share_t *shares, uint32_t k) noexcept nogil:
    shares[0].error = EBADFD
    return 1


@cython.no_gc_clear
cdef class RxQueueBase(QueueBase):
    """Receive side of one queue; see :class:`rtap._ring.RxQueue`."""

    cdef void serve(self, rxq_t *q) noexcept:
        self.q = q
        self.gate = &q.gate
        self.count_in(q, &q.packets, sizeof(rxq_t))
        _live.made(_live.RX_QUEUES, 1)

    def __dealloc__(self):
        if self.q != NULL:
            _live.gone(_live.RX_QUEUES, 1)

    def __repr__(self):
        return f"rx queue {self.queue_id} of {self.label()}"

    @property
    def fd(self):
        """Descriptor that is readable while frames wait; -1 when the driver has none."""
        self.checked()
        return self.q.fd

    def rx_burst(self, n=64, timeout=0):
        """Up to ``n`` frames that have arrived, as a :class:`rtap.Burst`, in order.

        ``timeout`` in seconds to wait for the first one, None for ever; waiting never holds the
        GIL and Ctrl-C ends it.  When the pool has no buffer for a frame, ``nombuf`` counts, and the
        call waits for a buffer in the same way, until the time is up.
        DeviceGone when the interface is deleted, RuntimeError when the queue is stopped or used
        by another thread.
        """
        cdef uint32_t count = check_range("n", n, 1, BURST_MAX)
        cdef uint64_t deadline = wait_deadline(timeout)
        cdef Burst burst = burst_make(count)
        cdef uint64_t nombuf
        cdef int error
        self.own(thread_number())
        try:
            while True:
                nombuf = self.q.nombuf
                error = self.run(burst, count)
                if burst.n > 0 or error != 0 or deadline == 0:
                    break
                if self.q.nombuf != nombuf:     # there is a frame, but no buffer
                    if not self.wait_buffer(deadline):
                        break
                elif not self.wait(deadline):
                    break
        finally:
            self.disown()
        if error != 0 and burst.n == 0:
            raise_errno(error, "rx_burst", self.label(), hint=refusal(error))
        return burst

    cdef int run(self, Burst burst, uint32_t n) except? -1:
        cdef rxq_t *q = self.q
        cdef mbuf_t **out = burst.v
        cdef uint32_t got
        cdef uint64_t asked
        cdef int error = 0
        if gil_keep(&self.gil, n):
            got = q.burst(q, out, n, &error)
        else:
            with nogil:
                got = q.burst(q, out, n, &error)
                asked = _compat.now_ns()
            gil_taken_back(&self.gil, asked)
        burst.n = got
        return error

    cdef bint wait(self, uint64_t deadline) except -1:
        """Waits for a frame; False when the time is up."""
        cdef rxq_t *q = self.q
        cdef bint ready
        while True:
            with nogil:
                ready = wait_readable(q, deadline)
            self.look_up()
            if ready:
                return True
            if _compat.now_ns() >= deadline:
                return False
            if q.revisit:
                return True

    cdef bint wait_buffer(self, uint64_t deadline) except -1:
        """Waits until the pool has a free buffer; False when the time is up."""
        cdef uint64_t look
        while True:
            look = _compat.now_ns() + <uint64_t>SIGNAL_SLICE_MS * 1000000
            while True:
                with nogil:
                    usleep(EMPTY_POOL_US)
                if (_compat.now_ns() >= min(look, deadline) or self.pool.available > 0
                        or _compat.load(&self.q.gate.state) != QUEUE_STARTED):
                    break
            self.look_up()
            if self.pool.available > 0:
                return True
            if _compat.now_ns() >= deadline:
                return False

    def cut_off(self):
        """From now on bursts raise DeviceGone, and waiting ones within 60 ms.  Once none is in
        progress, the descriptor is not used any more."""
        self.not_inherited()
        if self.q.many != NULL:
            self.q.many = rx_cut_off_many
        self.q.burst = rx_cut_off
        self.q.revisit = True

    cdef int look_up(self) except -1:
        """During a wait: runs signal handlers, and raises when one of them or another thread
        stopped the queue.  That other thread does not wait for the handlers."""
        cdef uint32_t me = thread_number()
        _compat.store(&self.q.gate.owned, me | OWNER_AWAY)
        try:
            PyErr_CheckSignals()
        finally:
            # Written before the state is read, see move(): a plain store may be seen later.
            _compat.exchange(&self.q.gate.owned, me)
        if _compat.load(&self.q.gate.state) != QUEUE_STARTED:
            raise DeviceStateError(f"{self!r} was stopped while waiting")
        return 0

    def counters(self):
        """Totals since the start or the last reset, as a dict of name to int.

        packets, bytes (frames delivered); errors = truncated (longer than max_frame) +
        bad_vnet_hdr (header does not fit the frame) + too_long (for the pool, with ``split``) +
        read_errors; nombuf (bursts that found a frame and no free mbuf)."""
        # The zero is read first: no total read from here on is less.
        return since(self.zero_of(False), self.totals())

    cdef dict totals(self):
        cdef rxq_t *q = self.q
        self.checked()
        self.count_lent()
        return {
            "packets": _compat.counter_read(&q.packets),
            "bytes": _compat.counter_read(&q.bytes),
            "errors": _compat.counter_read(&q.errors),
            "nombuf": _compat.counter_read(&q.nombuf),
            "truncated": _compat.counter_read(&q.truncated),
            "bad_vnet_hdr": _compat.counter_read(&q.bad_vnet_hdr),
            "too_long": _compat.counter_read(&q.gso_too_long),
            "read_errors": _compat.counter_read(&q.read_errors),
        }

    cdef dict xtotals(self):
        cdef rxq_t *q = self.q
        self.checked()
        self.count_lent()
        return traffic_counts(&q.traffic) | {
            "lro_packets": _compat.counter_read(&q.lro),
            "checksum_good": _compat.counter_read(&q.checksum_good),
            "checksum_none": _compat.counter_read(&q.checksum_none),
            "checksum_bad": _compat.counter_read(&q.checksum_bad),
            "mbuf_alloc_failed": _compat.counter_read(&q.nombuf),
            "filtered_unicast_packets": _compat.counter_read(&q.filtered_unicast),
            "filtered_multicast_packets": _compat.counter_read(&q.filtered_multicast),
            "truncated_packets": _compat.counter_read(&q.truncated),
            "bad_header_packets": _compat.counter_read(&q.bad_vnet_hdr),
            "read_errors": _compat.counter_read(&q.read_errors),
            "gso_super_packets": _compat.counter_read(&q.gso_super),
            "gso_split_packets": _compat.counter_read(&q.gso),
            "gso_too_long_packets": _compat.counter_read(&q.gso_too_long),
            "stopped_packets": _compat.counter_read(&q.stopped),
            "purged_packets": _compat.counter_read(&q.purged),
        }
