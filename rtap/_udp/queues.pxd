# SPDX-License-Identifier: BSD-3-Clause
from rtap._core.rx_queue cimport RxQueueBase
from rtap._core.tx_queue cimport TxQueueBase
from rtap._udp.peers cimport Peers
from rtap._udp.rx cimport udp_rxq_t
from rtap._udp.tx cimport udp_txq_t


cdef class UdpRxQueue(RxQueueBase):
    cdef udp_rxq_t *udp
    cdef Peers peers

    cdef int own_stopped(self) except -1


cdef class UdpTxQueue(TxQueueBase):
    cdef udp_txq_t *udp
    cdef Peers peers
