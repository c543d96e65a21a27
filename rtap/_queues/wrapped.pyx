# SPDX-License-Identifier: BSD-3-Clause
"""The base of receive queues that wrap another one: they hold it while they run, and end with
it."""

cimport cython

cimport rtap._core.compat as _compat
from rtap._core.gil cimport GIL_AUTO
from rtap._core.pool cimport fork_generation
from rtap._core.queue cimport OWNED_BY_WORKER, QUEUE_CLOSED, QUEUE_STARTED, QUEUE_STOPPED
from rtap._core.rx_queue cimport RxQueueBase


cdef bint inner_runs(wrapped_t *q) noexcept nogil:
    """Whether the inner queue runs.  If it was stopped, gives it back: the stopping thread waits
    for that."""
    if _compat.load_relaxed(&q.inner.gate.state) == QUEUE_STARTED:
        return True
    _compat.store(&q.base.gate.state, QUEUE_STOPPED)
    if _compat.exchange(&q.lent, 0) != 0:
        _compat.store(&q.inner.gate.owned, 0)
    return False


@cython.no_gc_clear
cdef class WrappedRxQueue(RxQueueBase):
    """Base of the queues that wrap another one."""

    cdef int wrap(self, wrapped_t *q, RxQueueBase inner) except -1:
        """The last step of a constructor: ``q``, whose burst function is set, becomes its state."""
        q.inner = inner.q
        q.base.fd = inner.q.fd
        q.base.revisit = True   # for held frames and the end of the inner queue
        self.gil.mode = GIL_AUTO
        self.wrapped = q
        self.serve(&q.base)
        self.inner = inner
        self.pool = (<object>inner).pool
        self.name = inner.label()
        self.queue_id = inner.queue_id
        self.port = inner.port
        self.nb_desc = inner.nb_desc
        self.layer = inner.layer
        self.route_ended = inner.route_ended
        self.chosen, self.why = "none", "frames come from another queue"
        self.generation = fork_generation()
        return 0

    def __dealloc__(self):
        if self.q != NULL and self.generation == fork_generation():
            self.give_back()

    cdef void give_back(self) noexcept:
        if _compat.exchange(&self.wrapped.lent, 0) != 0:
            _compat.store(&self.wrapped.inner.gate.owned, 0)

    def start(self):
        """Takes the inner queue; DeviceStateError when that is in use or not started."""
        self.checked()
        if self.wrapped.lent == 0:
            self.inner.own(OWNED_BY_WORKER)
            self.wrapped.lent = 1
        RxQueueBase.start(self)

    cdef bint end(self) except -1:
        """Stops for good and gives the inner queue back; False when that was done before."""
        self.checked()
        RxQueueBase.stop(self)
        if not _compat.cas(&self.gate.state, QUEUE_STOPPED, QUEUE_CLOSED):
            return False
        self.give_back()
        return True
