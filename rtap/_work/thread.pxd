# SPDX-License-Identifier: BSD-3-Clause
"""A worker's thread: its loop, and the queues and stages that it has taken."""

from libc.stdint cimport uint32_t

from rtap._core.rx_queue cimport RxQueueBase
from rtap._work.loop cimport worker_t


cdef class Route:
    cdef RxQueueBase rx
    cdef list txs               # TxQueueBase
    cdef list stages            # Stage
    cdef list names             # of the stages
    cdef bint retry
    cdef str device             # the name of the rx queue's device
    cdef list devices           # the names of the tx queues' devices

    cdef int check(self) except -1


cdef class Work:
    cdef worker_t w
    cdef object thread
    cdef object ended           # set when the thread no longer uses anything
    cdef object teller          # ident of the thread that reports ends, while it lives; or None
    cdef object lock            # guards everything here but the loop's own state
    cdef object __weakref__
    cdef list routes            # Route
    cdef list queues            # all of the last start, each once
    cdef uint32_t n_owned       # how many at its front are owned, until the thread has come
    cdef list stages            # all of the last start
    cdef uint32_t n_entered     # how many at its front were entered and have to be left
    cdef uint32_t starts
    cdef uint32_t awaited       # the start whose thread has not come yet; 0: none
    cdef uint32_t generation
    cdef int wake_fd
    cdef int latency_fd
    cdef object cpu
    cdef object resume_latency
    cdef str name

    cdef bint running(self) except -1
    cdef int add(self, Route route) except -1
    cdef int start(self) except -1
    cdef int launch(self) except -1
    cdef int open_fds(self) except -1
    cdef int take(self) except -1
    cdef bint give_back(self) except -1
    cdef int run(self) except -1
    cdef int ask_to_stop(self) except -1
    cdef int stop(self) except -1
    cdef Work waiter(self, str operation)
    cdef bint join(self, str operation, timeout) except -1
    cdef int tidy_up(self) except -1
    cdef int leave_stages(self) except -1
    cdef void close_fds(self) noexcept
    cdef void let_idle(self) noexcept
    cdef void tell_of(self, uint32_t i) noexcept
    cdef object stats(self)
    cdef object route_stats(self, uint32_t i)
