# SPDX-License-Identifier: BSD-3-Clause
"""A ring in shared memory, through which processes hand each other slots of a shared pool."""

from libc.stdint cimport uint32_t

from rtap._core.mempool cimport Mempool
from rtap._core.rx_queue cimport RxQueueBase
from rtap._core.tx_queue cimport TxQueueBase
from rtap._queues.shm_cells cimport ring_rxq_t, ring_t, ring_txq_t


cdef class Mapping:
    cdef ring_t ring
    cdef Mempool pool
    cdef uint32_t generation
    cdef bint opened            # it has the ring open, and the pool

    cdef void drop(self) noexcept


cdef class ShmRxQueue(RxQueueBase):
    cdef ring_rxq_t state
    cdef Mapping mapping


cdef class ShmTxQueue(TxQueueBase):
    cdef ring_txq_t state
    cdef Mapping mapping


cdef class ShmRing:
    cdef Mapping mapping
    cdef uint32_t made
    cdef ShmRxQueue rx
    cdef ShmTxQueue tx
    cdef str label
    cdef object __weakref__

    cdef Mapping alive(self)
