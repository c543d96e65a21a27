# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t, pool_t
from rtap._core.queue cimport rxq_t
from rtap._frames.segment cimport SPLIT_MAX


ctypedef uint32_t (*rx_read_fn)(rxq_t *q, mbuf_t **out, uint32_t n, int *error) noexcept nogil


cdef enum:
    READS = 32                  # the most super-frames read together


cdef struct rx_gso_t:
    pool_t *pool                # for the frames that are handed out
    bint l2
    uint32_t stale              # the queue was stopped: the next burst drops what waits
    bint waited                 # the first one read found too few mbufs in an earlier burst
    uint32_t n_made             # frames of it that were handed out already
    uint32_t n_read             # read and not split yet, from `at_read` on
    uint32_t at_read
    uint32_t n_split            # split and not handed out yet, from `at_split` on
    uint32_t at_split
    int wake                    # eventfd, readable while there are any; -1 without
    bint awake
    mbuf_t *read[READS]
    mbuf_t *split[SPLIT_MAX]


cdef rx_gso_t *rx_gso_create(pool_t *pool, bint l2) noexcept nogil
cdef void rx_gso_destroy(rx_gso_t *t) noexcept nogil
cdef void rx_gso_drop(rx_gso_t *t, rxq_t *q) noexcept nogil
cdef uint32_t rx_gso(rx_gso_t *t, rx_read_fn read, rxq_t *q, mbuf_t **out, uint32_t n,
                     int *error) noexcept nogil
