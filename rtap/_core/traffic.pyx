# SPDX-License-Identifier: BSD-3-Clause
"""Counts frames by size and by kind of destination.

A function and not an inline one, so that callgrind sees what it costs (bench/instructions.py).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cimport rtap._core.compat as _compat
from rtap._core.pool cimport mbuf_t

cdef enum:
    SMALL_MAX = 64
    LARGE_MIN = 1519
    MIDDLES = SIZE_BUCKETS - 2  # from 65 on, each up to twice the one before

    UNICAST = 0
    MULTICAST = 1
    BROADCAST = 2


cdef extern from "rtap_compat.h" nogil:
    uint32_t log2 "rtap_log2" (uint32_t v)


# A shared frame may be resized by another thread while it is counted.

cdef inline uint32_t destination(const mbuf_t *m) noexcept nogil:
    cdef uint32_t offset = _compat.peek(&m.data_off), head
    cdef const uint8_t *d = m.buf + offset
    cdef uint16_t tail
    # Reads at most one byte behind the slot, where the arena goes on.  The cheap test comes first.
    if _compat.peek(&m.data_len) < 6 or d[0] & 1 == 0 or offset + 6 > m.buf_len:
        return UNICAST
    memcpy(&head, d, 4)
    memcpy(&tail, d + 4, 2)
    return BROADCAST if head == <uint32_t>-1 and tail == 0xffff else MULTICAST


cdef uint64_t count_one(traffic_t *t, const mbuf_t *m, bint l2) noexcept nogil:
    """count_frames for one frame; that spends most of its time on empty buckets."""
    cdef uint32_t length = _compat.peek(&m.pkt_len), bucket = 0, kind
    if length > SMALL_MAX:
        bucket = log2(length) - 5 if length < LARGE_MIN else SIZE_BUCKETS - 1
    _compat.counter_add(&t.sizes[bucket], 1)
    if l2:
        kind = destination(m)
        _compat.counter_add(&t.unicast if kind == UNICAST else &t.multicast
                            if kind == MULTICAST else &t.broadcast, 1)
    return length


cdef uint64_t count_frames(traffic_t *t, mbuf_t **v, uint32_t n, bint l2) noexcept nogil:
    """Counts ``n`` frames that were received or sent; returns their bytes.  Without ``l2`` they
    have no destination address."""
    cdef uint32_t middle[MIDDLES]
    cdef uint32_t small = n, large = 0, multicast = 0, broadcast = 0, length, kind, i
    cdef uint64_t n_bytes = 0
    if n == 1:
        return count_one(t, v[0], l2)
    for i in range(<uint32_t>MIDDLES):
        middle[i] = 0
    for i in range(n):
        length = _compat.peek(&v[i].pkt_len)
        n_bytes += length
        if length > SMALL_MAX:
            if length < LARGE_MIN:
                middle[log2(length) - 6] += 1
            else:
                large += 1
        if l2:
            kind = destination(v[i])
            if kind == BROADCAST:
                broadcast += 1
            elif kind == MULTICAST:
                multicast += 1
    for i in range(<uint32_t>MIDDLES):
        if middle[i] != 0:
            _compat.counter_add(&t.sizes[i + 1], middle[i])
            small -= middle[i]
    if large != 0:
        _compat.counter_add(&t.sizes[SIZE_BUCKETS - 1], large)
        small -= large
    if small != 0:
        _compat.counter_add(&t.sizes[0], small)
    if multicast != 0:
        _compat.counter_add(&t.multicast, multicast)
    if broadcast != 0:
        _compat.counter_add(&t.broadcast, broadcast)
    if l2:
        _compat.counter_add(&t.unicast, n - multicast - broadcast)
    return n_bytes


cdef tuple SIZE_NAMES = (
    "size_64_packets", "size_65_to_127_packets", "size_128_to_255_packets",
    "size_256_to_511_packets", "size_512_to_1023_packets", "size_1024_to_1518_packets",
    "size_above_1518_packets",
)


cdef dict traffic_counts(const traffic_t *t):
    """The counters, by the names of extended statistics."""
    cdef uint32_t i
    cdef dict out = {}
    for i in range(<uint32_t>SIZE_BUCKETS):
        out[SIZE_NAMES[i]] = _compat.counter_read(&t.sizes[i])
    out["broadcast_packets"] = _compat.counter_read(&t.broadcast)
    out["multicast_packets"] = _compat.counter_read(&t.multicast)
    out["unicast_packets"] = _compat.counter_read(&t.unicast)
    return out
