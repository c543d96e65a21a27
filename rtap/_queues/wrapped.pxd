# SPDX-License-Identifier: BSD-3-Clause
"""Receive queues that wrap another one.  Their own state starts with ``wrapped_t``."""

from libc.stdint cimport uint32_t

from rtap._core.queue cimport rxq_t
from rtap._core.rx_queue cimport RxQueueBase


cdef enum:
    ROUNDS_MAX = 32             # bursts of the inner queue in one, while no frame is handed on


cdef struct wrapped_t:
    rxq_t base
    rxq_t *inner
    uint32_t lent               # the inner queue is held for the worker that owns this one


cdef bint inner_runs(wrapped_t *q) noexcept nogil


cdef class WrappedRxQueue(RxQueueBase):
    cdef wrapped_t *wrapped
    cdef RxQueueBase inner

    cdef int wrap(self, wrapped_t *q, RxQueueBase inner) except -1
    cdef void give_back(self) noexcept
    cdef bint end(self) except -1
