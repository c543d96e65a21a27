# SPDX-License-Identifier: BSD-3-Clause
"""The Python shells of a queue: arguments, ownership by one thread, the GIL, waiting.

Kernels return counts and errno values; these shells release the GIL once for each burst and
raise.  A queue belongs to one thread while that thread bursts; a second one gets an error.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from libc.errno cimport EIO, ENETDOWN, ENOSYS, EPERM
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport strerror

cimport rtap._core.compat as _compat
cimport rtap._core.live as _live
from rtap._core.burst cimport Burst, burst_make
from rtap._core.gil cimport gil_keep, gil_taken_back
from rtap._core.linux cimport POLLIN, poll, pollfd, usleep
from rtap._core.mbuf cimport check_range
from rtap._core.mempool cimport Mempool, alloc_one
from rtap._core.pool cimport fork_generation, mbuf_free, mbuf_free_bulk, mbuf_t, thread_number
from rtap._core.traffic cimport traffic_counts

import math
from rtap.errors import DeviceStateError, raise_errno

cdef enum:
    WAIT_SLICE_MS = 20          # a waiting thread notices a stop within one
    SIGNAL_SLICE_MS = 60        # between checks for pending signals
    EMPTY_POOL_US = 1000        # between looks for a free buffer
    OWNER_POLL_US = 200

# Ident of each thread that runs a worker's loop -> its Work.
cdef dict worker_threads = {}


cdef int enter_worker(work) except -1:
    """This thread owns a worker's queues until it leaves."""
    worker_threads[PyThread_get_thread_ident()] = work
    return 0


cdef int leave_worker() except -1:
    worker_threads.pop(PyThread_get_thread_ident(), None)
    return 0


cdef object this_worker():
    """The Work whose loop, and a stage in it, this thread runs; None on any other."""
    return worker_threads.get(PyThread_get_thread_ident())


cdef int forget_workers() except -1:
    """For a forked child: its threads may get the same idents as the parent's."""
    work = this_worker()
    worker_threads.clear()
    if work is not None:        # a stage forked
        enter_worker(work)
    return 0


def in_worker():
    """Whether this is a worker's thread, which is then in a stage."""
    return PyThread_get_thread_ident() in worker_threads


def may_wait(str operation, queues):
    """DeviceStateError when this thread must not wait until the bursts on ``queues`` are over."""
    for queue in queues:
        if isinstance(queue, QueueBase):
            (<QueueBase>queue).may_wait(operation)


def refuse(queues):
    """Makes ``queues`` refuse bursts from now on, without waiting for bursts in progress.  Queues
    that are not subclasses of this module's have to do that themselves."""
    for queue in queues:
        if isinstance(queue, QueueBase):
            (<QueueBase>queue).move(QUEUE_STOPPED)


def adopt(queue):
    """A device is to close ``queue`` from now on: whoever forgets the device is told so."""
    if isinstance(queue, QueueBase):
        (<QueueBase>queue).adopted = True


def occupied(queues):
    """Whether somebody is in the middle of a burst on one of ``queues``."""
    for queue in queues:
        if isinstance(queue, QueueBase) and (<QueueBase>queue).occupied():
            return True
    return False


cdef str refusal(int error):
    """Advice about the errno of a burst, or None."""
    if error != EPERM and error != ENOSYS:
        return ""
    return "io_uring is blocked since; engine='auto' goes on with system calls"


@cython.no_gc_clear
cdef class QueueBase:
    """The common part of both sides: start and stop, one owner at a time, counters."""

    cdef int once(self) except -1:
        """Called in a constructor after its arguments are converted; refuses a second call.  Code
        of an argument may have called the constructor before."""
        if not _compat.cas(&self.made, 0, 1):
            raise RuntimeError(f"a queue is made once, and this {type(self).__name__} was")
        return 0

    cdef int checked(self) except -1:
        if self.gate == NULL:
            raise DeviceStateError("the queue was never initialised")
        return 0

    cdef int not_inherited(self) except -1:
        """A forked child has only a copy of this queue: a thread that does not exist there may hold
        a lock in it."""
        self.checked()
        if self.generation != fork_generation():
            raise DeviceStateError(f"{self!r} was opened before fork() and belongs to the parent "
                                   "process")
        return 0

    cdef int own(self, uint32_t owner) except -1:
        self.checked()
        if self.generation != fork_generation():
            raise DeviceStateError(f"{self!r} was opened before fork() and belongs to the parent "
                                   "process; open or attach the device in the child")
        if not _compat.cas(&self.gate.owned, 0, owner):
            raise DeviceStateError(f"{self!r} is in use by another thread or worker")
        if _compat.load(&self.gate.state) != QUEUE_STARTED:
            _compat.store(&self.gate.owned, 0)
            raise DeviceStateError(f"{self!r} is " + (
                "closed" if self.gate.state == QUEUE_CLOSED else "not started"))
        return 0

    cdef void disown(self) noexcept:
        _compat.store(&self.gate.owned, 0)

    cdef bint move(self, uint32_t value) except -1:
        """Changes the state without waiting; false, and no change, when it is closed."""
        cdef uint32_t before
        self.not_inherited()
        before = _compat.load(&self.gate.state)
        # The state is written before owned is read; own() and wait() do it in the other order.
        while before != QUEUE_CLOSED and not _compat.cas(&self.gate.state, before, value):
            before = _compat.load(&self.gate.state)
        return before != QUEUE_CLOSED

    cdef bint occupied(self) noexcept:
        """Whether a thread bursts on it.  A thread that runs signal handlers during its wait does
        not count: it checks the state before it touches the queue again."""
        cdef uint32_t owner = _compat.load(&self.gate.owned)
        return owner == OWNED_BY_WORKER or (owner != 0 and not owner & OWNER_AWAY)

    cdef int may_wait(self, str operation) except -1:
        """DeviceStateError for a thread that would wait for itself: in a burst on this queue, or
        in a worker's stage, since another worker may wait for that one."""
        cdef uint32_t owner = _compat.load(&self.gate.owned)
        if owner == OWNED_BY_WORKER and in_worker():
            raise DeviceStateError(
                f"{operation}: {self!r} is in use by a worker, and a stage cannot wait for one. "
                "Raise an exception to end the route, or have another thread do this")
        if owner == thread_number():
            raise DeviceStateError(f"{operation}: this thread is in the middle of a burst on "
                                   f"{self!r}: let that end first")
        return 0

    cdef bint set_state(self, uint32_t value) except -1:
        """Changes the state.  Unless it starts the queue, waits until the thread that bursts has
        left: for one burst, or 20 ms if that waits.  False, and no change, when the queue is
        closed.  Signal handlers run meanwhile; if one raises, the state is changed nevertheless.
        """
        if value != QUEUE_STARTED:
            self.may_wait("stop")
        if not self.move(value):
            return False
        while value != QUEUE_STARTED and self.occupied():
            with nogil:
                usleep(OWNER_POLL_US)
            PyErr_CheckSignals()
        return True

    @cython.critical_section
    cdef str label(self):
        return self.name

    @property
    def engine(self):
        """The engine of its bursts: "uring", "syscall", or "none" where no kernel is entered."""
        self.checked()
        return "syscall" if _compat.load(&self.gate.fell_back) else self.chosen

    @property
    def engine_reason(self):
        """Why it has this engine, in one sentence."""
        cdef uint32_t fell_back
        self.checked()
        fell_back = _compat.load(&self.gate.fell_back)
        if fell_back == 0:
            return self.why
        return f"io_uring is refused meanwhile ({strerror(<int>fell_back).decode()})"

    def start(self):
        """Bursts are allowed from now on."""
        self.checked()
        if not self.set_state(QUEUE_STARTED):
            raise DeviceStateError(f"{self!r} is closed")

    def stop(self):
        """Refuses further bursts, once the one in progress is over; waits end within 20 ms."""
        self.checked()
        if _compat.load(&self.gate.state) != QUEUE_CLOSED:
            self.set_state(QUEUE_STOPPED)

    @cython.critical_section
    cdef dict zero_of(self, bint extended):
        return self.xzero if extended else self.zero

    @cython.critical_section
    cdef int set_zero(self, bint extended, dict totals) except -1:
        if extended:
            self.xzero = totals
        else:
            self.zero = totals
        return 0

    cdef dict totals(self):
        raise NotImplementedError

    cdef dict xtotals(self):
        raise NotImplementedError

    def reset_counters(self):
        """Makes ``counters`` count from here, even while another thread or a worker bursts."""
        self.set_zero(False, self.totals())

    def xcounters(self):
        """Extended statistics since the last reset of these: dict of name to int, in the C
        driver's order and with its names without ``rx_q<N>_`` or ``tx_q<N>_``."""
        # The zero is read first: no total read from here on is less.
        return since(self.zero_of(True), self.xtotals())

    def reset_xcounters(self):
        """Makes ``xcounters`` count from here, as ``reset_counters`` does."""
        self.set_zero(True, self.xtotals())


@cython.no_gc_clear
cdef class RxQueueBase(QueueBase):
    """Receive side of one queue; see :class:`rtap._ring.RxQueue`."""

    cdef void serve(self, rxq_t *q) noexcept:
        self.q = q
        self.gate = &q.gate
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

    cdef int look_up(self) except -1:
        """During a wait: runs signal handlers, and raises when one of them or another thread
        stopped the queue.  That other thread does not wait for the handlers."""
        cdef uint32_t me = thread_number()
        _compat.store(&self.q.gate.owned, me | OWNER_AWAY)
        try:
            PyErr_CheckSignals()
        finally:
            _compat.store(&self.q.gate.owned, me)
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
    """Polls the descriptor for a short slice: true when it is ready or in error."""
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
        p.revents = 0
        rc = poll(&p, 1, ms)
        if rc != 0:
            return rc > 0
        now = _compat.now_ns()
    return False


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


@cython.no_gc_clear
cdef class TxQueueBase(QueueBase):
    """Transmit side of one queue; see :class:`rtap._ring.TxQueue`."""

    cdef void serve(self, txq_t *q) noexcept:
        self.q = q
        self.gate = &q.gate
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
        self.disown()
        if _compat.load(&self.q.waiting) != 0 and _compat.load(&self.gate.state) != QUEUE_STARTED:
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


cdef dict since(dict zero, dict totals):
    """``totals`` counted from ``zero``, which is earlier totals or None.

    A queue's owner adds to counters without a lock.  If another thread stored a zero, the owner's
    addition could overwrite it.  So a reset only remembers the totals."""
    if zero is None:
        return totals
    return {name: n - zero[name] for name, n in totals.items()}
