# SPDX-License-Identifier: BSD-3-Clause
"""The counters of frames by size and by kind of destination, as in the C driver."""

from libc.stdint cimport uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t


cdef enum:
    SIZE_BUCKETS = 7            # 64, 65-127, 128-255, 256-511, 512-1023, 1024-1518, above


cdef struct traffic_t:
    uint64_t sizes[SIZE_BUCKETS]
    uint64_t unicast
    uint64_t multicast
    uint64_t broadcast


cdef uint64_t count_frames(traffic_t *t, mbuf_t **v, uint32_t n, bint l2) noexcept nogil
cdef dict traffic_counts(const traffic_t *t)
