# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint16_t, uint32_t

from rtap._core.pool cimport pool_t
from rtap._core.queue cimport rxq_t, txq_t
from rtap._core.rx_queue cimport RxQueueBase
from rtap._core.tx_queue cimport TxQueueBase


cdef struct null_rxq_t:
    rxq_t base
    pool_t *pool
    uint32_t size
    uint16_t port


cdef class NullRxQueue(RxQueueBase):
    cdef null_rxq_t null


cdef class NullTxQueue(TxQueueBase):
    cdef txq_t null
