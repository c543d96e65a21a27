# SPDX-License-Identifier: BSD-3-Clause
"""What a queue counts of every frame: sizes and kinds of destination, as in the C driver."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cimport rtap._compat as _compat
from rtap._pool cimport mbuf_data, mbuf_t


cdef enum:
    SIZE_BUCKETS = 7            # 64, 65-127, 128-255, 256-511, 512-1023, 1024-1518, above


cdef struct traffic_t:
    uint64_t sizes[SIZE_BUCKETS]
    uint64_t unicast
    uint64_t multicast
    uint64_t broadcast


cdef extern from "rtap_compat.h" nogil:
    uint32_t bit_length "rtap_bit_length" (uint32_t v)


cdef inline uint32_t size_bucket(uint32_t n) noexcept nogil:
    if n <= 64:
        return 0
    if n > 1518:
        return 6
    return min(bit_length(n) - 6, <uint32_t>5)      # 65..127 has 7 bits, 128..255 has 8


cdef inline uint64_t count_frames(traffic_t *t, mbuf_t **v, uint32_t n, bint l2) noexcept nogil:
    """Counts ``n`` frames that were received or sent; returns their bytes.  Without ``l2`` there
    is no destination to look at."""
    cdef uint32_t sizes[SIZE_BUCKETS]
    cdef uint32_t multicast = 0, broadcast = 0, i
    cdef uint64_t n_bytes = 0
    cdef const uint8_t *d
    for i in range(<uint32_t>SIZE_BUCKETS):
        sizes[i] = 0
    for i in range(n):
        sizes[size_bucket(v[i].pkt_len)] += 1
        n_bytes += v[i].pkt_len
        d = mbuf_data(v[i])
        if l2 and v[i].data_len >= 6 and d[0] & 1:
            if d[0] & d[1] & d[2] & d[3] & d[4] & d[5] == 0xff:
                broadcast += 1
            else:
                multicast += 1
    for i in range(<uint32_t>SIZE_BUCKETS):
        if sizes[i] != 0:
            _compat.counter_add(&t.sizes[i], sizes[i])
    if multicast != 0:
        _compat.counter_add(&t.multicast, multicast)
    if broadcast != 0:
        _compat.counter_add(&t.broadcast, broadcast)
    if l2:
        _compat.counter_add(&t.unicast, n - multicast - broadcast)
    return n_bytes
