# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t, pool_t
from rtap._core.queue cimport rxq_t
from rtap._core.rx_queue cimport RxQueueBase


cdef enum:
    HEADER_MAX = 128
    SEGMENTS_MAX = 64


cdef struct generate_t:
    rxq_t base
    pool_t *pool
    uint32_t n_segments
    uint32_t frame_len
    uint32_t lengths[SEGMENTS_MAX]
    uint32_t header_len
    uint8_t header[HEADER_MAX]
    # Flows differ in one 32-bit word of the header, which its IPv4 checksum covers.
    uint32_t flows
    uint32_t flow               # the next frame's
    uint32_t vary_at
    uint32_t first              # the word of flow 0, host byte order
    uint32_t rest_sum           # of the IPv4 header without that word and the checksum


cdef class GenerateRxQueue(RxQueueBase):
    cdef generate_t g
