# SPDX-License-Identifier: BSD-3-Clause
"""The native state of a ring in shared memory, and its bursts."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t, pool_t
from rtap._core.queue cimport rxq_t, txq_t
from rtap._core.shm cimport shm_t


cdef struct ring_t:
    uint8_t *base
    uint64_t total
    uint64_t *cells
    uint64_t *head              # the oldest position that may still have a frame, or an earlier one
    uint64_t *tail              # the first that may be free, or an earlier one
    uint32_t *waiters           # WAIT_*: who sleeps until there is a frame
    uint64_t mask
    uint32_t shift              # the logarithm of the size
    uint32_t size
    uint32_t number             # in the pool
    int fd
    int event_fd                # or -1
    pool_t *pool
    shm_t *shm


cdef struct ring_rxq_t:
    rxq_t base
    ring_t *ring
    uint64_t bad_entries


cdef struct ring_txq_t:
    txq_t base
    ring_t *ring
    uint64_t copied
    uint64_t no_buffer


cdef inline uint64_t cell_empty(uint64_t position) noexcept nogil:
    return position << 1


cdef uint64_t ring_count(const ring_t *r) noexcept nogil
cdef bint ring_idle(rxq_t *base, int ms) noexcept nogil
cdef uint32_t ring_tx(txq_t *base, mbuf_t **v, uint32_t n, int *error) noexcept nogil
cdef uint32_t ring_rx(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil
