# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint32_t, uint64_t

from rtap._core.burst cimport Burst
from rtap._core.mempool cimport Mempool
from rtap._core.queue cimport QueueBase, rxq_t


cdef class RxQueueBase(QueueBase):
    cdef rxq_t *q
    cdef readonly Mempool pool
    cdef public object route_ended  # called with the figures of a route that failed; or None

    cdef void serve(self, rxq_t *q) noexcept
    cdef int run(self, Burst burst, uint32_t n) except? -1
    cdef bint wait(self, uint64_t deadline) except -1
    cdef bint wait_buffer(self, uint64_t deadline) except -1
    cdef int look_up(self) except -1
