# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport QueueBase, tx_share_t, txq_t


cdef class TxQueueBase(QueueBase):
    cdef txq_t *q

    cdef void serve(self, txq_t *q) noexcept
    cdef uint32_t run(self, mbuf_t **v, uint32_t n, int *error) noexcept
    cdef int tell(self, uint32_t news) except -1
    cdef int tell_news(self) except -1
    cdef void leave(self) noexcept
    cdef void settle(self) noexcept


cdef void tx_alone(tx_share_t *s) noexcept nogil
cdef uint32_t tx_lost(txq_t *q, mbuf_t **v, uint32_t n) noexcept nogil


cdef inline uint64_t tx_lost_frames(const txq_t *q) noexcept nogil:
    """A queue's errors that were frames of bursts, not pieces."""
    return q.errors - q.piece_errors
