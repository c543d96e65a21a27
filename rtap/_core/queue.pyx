# SPDX-License-Identifier: BSD-3-Clause
"""The common part of both sides of a queue for Python: states, ownership by one thread, counters.

A queue belongs to one thread while that thread bursts; a second one gets an error.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport ENOSYS, EPERM, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport strerror

cimport rtap._core.compat as _compat
from rtap._core.linux cimport usleep
from rtap._core.memfd cimport memfd_flaw, memfd_map, memfd_unmap
from rtap._core.pool cimport fork_generation, thread_number
from rtap._core.workers cimport this_worker

import os
from rtap.errors import DeviceStateError

cdef enum:
    OWNER_POLL_US = 200


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


cdef void lent_forget(lent_t *lent) noexcept:
    free(lent.seen)
    if lent.page != NULL:
        memfd_unmap(lent.page, lent.size)


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
        if owner == OWNED_BY_WORKER and this_worker() is not None:
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

    def __dealloc__(self):
        lent_forget(&self.lent)

    cdef void count_in(self, void *state, uint64_t *first, size_t size) noexcept:
        """The counters are those from ``first`` to the end of ``state``, a struct of that size."""
        self.counts = first
        self.counts_at = <size_t>(<char *>first - <char *>state)
        self.n_counts = <uint32_t>((size - self.counts_at) // sizeof(uint64_t))

    def lend(self, int fd, size_t size):
        """From now on another process has the queue.  Its state, with its counters, is in the
        sealed memfd ``fd`` of ``size`` bytes, which is new; what it counts there is counted here
        too.  For a stopped queue."""
        cdef void *page
        cdef uint64_t *seen
        cdef const char *flaw
        cdef uint64_t there
        self.not_inherited()
        flaw = memfd_flaw(fd, &there)
        if flaw != NULL or there < size:
            raise ValueError(f"{self!r} cannot be lent in descriptor {fd}: "
                             + (flaw.decode() if flaw != NULL else f"it has {there} bytes"))
        seen = <uint64_t *>calloc(self.n_counts, sizeof(uint64_t))
        if seen == NULL:
            raise MemoryError("no memory to lend a queue")
        page = memfd_map(fd, size, False)
        if page == NULL:
            free(seen)
            raise OSError(errno, f"{self!r} cannot be lent: {os.strerror(errno)}")
        self.take_back()
        _compat.lock(&self.lent.lock)
        self.lent.size = size
        self.lent.seen = seen
        self.lent.theirs = <const uint64_t *>(<char *>page + self.counts_at)
        self.lent.page = page
        _compat.unlock(&self.lent.lock)

    def take_back(self):
        """Nobody else has the queue any more.  Idempotent."""
        cdef lent_t was
        self.checked()
        _compat.lock(&self.lent.lock)
        self.add_lent()
        was = self.lent
        self.lent.page = self.lent.seen = NULL
        _compat.unlock(&self.lent.lock)
        lent_forget(&was)

    cdef void count_lent(self) noexcept:
        """Adds what another process has counted since the last time."""
        if self.lent.page != NULL:
            _compat.lock(&self.lent.lock)
            self.add_lent()
            _compat.unlock(&self.lent.lock)

    cdef void add_lent(self) noexcept:
        cdef uint64_t now
        cdef uint32_t i
        if self.lent.page == NULL:
            return
        for i in range(self.n_counts):
            now = _compat.counter_read(&self.lent.theirs[i])
            _compat.counter_add(&self.counts[i], now - self.lent.seen[i])
            self.lent.seen[i] = now

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


cdef str refusal(int error):
    """Advice about the errno of a burst, or None."""
    if error != EPERM and error != ENOSYS:
        return ""
    return "io_uring is blocked since; engine='auto' goes on with system calls"


cdef dict since(dict zero, dict totals):
    """``totals`` counted from ``zero``, which is earlier totals or None.

    A queue's owner adds to counters without a lock.  If another thread stored a zero, the owner's
    addition could overwrite it.  So a reset only remembers the totals."""
    if zero is None:
        return totals
    return {name: n - zero[name] for name, n in totals.items()}
