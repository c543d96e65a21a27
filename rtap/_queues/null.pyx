# SPDX-License-Identifier: BSD-3-Clause
"""Queues without a kernel behind them: receiving makes frames, sending frees them.

They cost only as much as bursts and buffers, and need no privileges.
"""

from libc.stdint cimport uint16_t, uint32_t

cimport rtap._core.compat as _compat
from rtap._core.gil cimport gil_mode
from rtap._core.mbuf cimport check_range
from rtap._core.mempool cimport Mempool
from rtap._core.pool cimport fork_generation, mbuf_free_bulk, mbuf_reset, mbuf_t, pool_get
from rtap._core.queue cimport QUEUE_CLOSED, QUEUE_STOPPED, rxq_t, txq_t
from rtap._core.rx_queue cimport RxQueueBase
from rtap._core.traffic cimport count_frames
from rtap._core.tx_queue cimport TxQueueBase, tx_lost


cdef uint32_t null_rx(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    cdef null_rxq_t *q = <null_rxq_t *>base
    cdef uint32_t got = pool_get(q.pool, out, n), i
    for i in range(got):
        mbuf_reset(out[i])
        out[i].data_len = out[i].pkt_len = q.size
        out[i].port = q.port
    if got == 0:
        _compat.counter_add(&base.nombuf, 1)
        return 0
    _compat.counter_add(&base.packets, got)
    _compat.counter_add(&base.bytes, count_frames(&base.traffic, out, got, True))
    return got


cdef uint32_t null_tx(txq_t *q, mbuf_t **v, uint32_t n, int *error) noexcept nogil:
    if _compat.load_relaxed(&q.unplugged) != 0:
        return tx_lost(q, v, n)
    _compat.counter_add(&q.packets, n)
    _compat.counter_add(&q.bytes, count_frames(&q.traffic, v, n, True))
    mbuf_free_bulk(v, n)
    return n


cdef class NullRxQueue(RxQueueBase):
    """NullRxQueue(pool, *, name, size=64, queue_id=0, port=0xffff, nb_desc=64, gil='auto')\n--\n

    Hands out as many frames of ``size`` bytes as asked for, with the old bytes of their
    buffers; ValueError when the pool's ``data_room`` is smaller."""

    def __init__(self, Mempool pool not None, *, str name, size=64, int queue_id=0, int port=0xffff,
                 nb_desc=64, str gil="auto"):
        cdef int mode = gil_mode(gil), n_desc = <int>check_range("nb_desc", nb_desc, 1, 32768)
        cdef uint32_t length = check_range("size", size, 14, pool.data_room)
        self.once()
        self.null.pool = pool.hold()
        self.pool = pool
        self.gil.mode = mode
        self.nb_desc = n_desc
        self.null.size = length
        self.null.port = <uint16_t>port
        self.null.base.burst = null_rx
        self.null.base.fd = -1
        self.serve(&self.null.base)
        self.name = name
        self.queue_id = queue_id
        self.port = port
        self.chosen, self.why = "none", "no kernel is entered"
        self.generation = fork_generation()

    def __dealloc__(self):
        if self.q != NULL and self.gate.state != QUEUE_CLOSED and self.pool is not None:
            self.pool.let_go()

    def close(self):
        """Stops, for good; idempotent."""
        self.checked()
        self.stop()
        if _compat.cas(&self.gate.state, QUEUE_STOPPED, QUEUE_CLOSED):
            self.pool.let_go()


cdef class NullTxQueue(TxQueueBase):
    """NullTxQueue(name, *, queue_id=0, port=0xffff, nb_desc=64, gil='auto')\n--\n

    Takes every frame and frees it."""

    def __init__(self, str name, *, int queue_id=0, int port=0xffff, nb_desc=64, str gil="auto"):
        cdef int mode = gil_mode(gil), n_desc = <int>check_range("nb_desc", nb_desc, 1, 32768)
        self.once()
        self.gil.mode = mode
        self.nb_desc = n_desc
        self.null.burst = null_tx
        self.null.fd = -1
        self.serve(&self.null)
        self.name = name
        self.queue_id = queue_id
        self.port = port
        self.chosen, self.why = "none", "no kernel is entered"
        self.generation = fork_generation()
