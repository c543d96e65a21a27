# SPDX-License-Identifier: BSD-3-Clause
from rtap._core.mempool cimport Mempool
from rtap._core.rx_queue cimport RxQueueBase
from rtap._core.tx_queue cimport TxQueueBase
from rtap._tap.rx cimport tap_rxq_t
from rtap._tap.tx cimport tap_txq_t


cdef class RxQueue(RxQueueBase):
    cdef tap_rxq_t *tap
    cdef int state_fd           # -1, or a descriptor that its state was mapped from
    cdef readonly int max_frame
    cdef readonly bint scatter
    cdef list retired           # pools that a burst may still be reading into
    cdef Mempool reads          # the pool that frames are read into when they are split

    cdef int release_pools(self) except -1
    cdef int release_retired(self) except -1


cdef class TxQueue(TxQueueBase):
    cdef tap_txq_t *tap
    cdef int state_fd
    cdef object on_refused
