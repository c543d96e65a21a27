# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t
from rtap._queues.wrapped cimport WrappedRxQueue, wrapped_t


cdef struct noisy_t:
    wrapped_t wrapped
    mbuf_t **fifo               # a ring of `size` frames
    uint32_t size
    uint32_t head               # the oldest
    uint32_t count
    bint flushing
    uint64_t flush_ns           # 0: frames leave only when pushed out
    uint64_t since              # when a frame last left, or came into an empty buffer
    uint64_t *memory            # a power of two of words
    uint64_t mask
    uint32_t reads
    uint32_t writes
    uint32_t reads_writes
    uint64_t random
    uint64_t seen               # keeps the compiler from omitting the reads


cdef class NoisyRxQueue(WrappedRxQueue):
    cdef noisy_t noisy

    cdef void empty(self) noexcept
