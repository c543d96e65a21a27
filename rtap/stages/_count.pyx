# SPDX-License-Identifier: BSD-3-Clause
"""Counters of frames and bytes."""

from libc.stdint cimport uint32_t, uint64_t

cimport rtap._core.compat as _compat
from rtap._core.pool cimport mbuf_t
from rtap.stages._runner cimport rtap_burst
from rtap.stages._stage cimport Stage


cdef struct count_t:
    uint64_t packets
    uint64_t bytes


cdef int count(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef count_t *c = <count_t *>ctx
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef uint64_t bytes = 0
    cdef uint32_t i
    for i in range(burst.n):
        bytes += frames[i].pkt_len
    _compat.shared_add(&c.packets, burst.n)
    _compat.shared_add(&c.bytes, bytes)
    return 0


cdef class Counter(Stage):
    """Counter()\n--\n

    Counts all frames, over all routes with this stage; readable at any time, also from another
    thread."""

    cdef count_t counted

    def __init__(self):
        self.once()
        self.ctx = &self.counted
        self.fn = count

    @property
    def packets(self):
        """Frames so far; a super-frame is one."""
        return _compat.counter_read(&self.counted.packets)

    @property
    def bytes(self):
        """Bytes of those frames."""
        return _compat.counter_read(&self.counted.bytes)
