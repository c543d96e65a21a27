# SPDX-License-Identifier: BSD-3-Clause
"""Ethernet addresses, IP addresses and ports exchanged."""

from libc.stdint cimport uint32_t

from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport LAYER_ETHERNET
from rtap._frames.rewrite cimport swap_five_tuple
from rtap.stages._runner cimport STAGE_WRITES, rtap_burst
from rtap.stages._stage cimport Stage


cdef int five_tuple_swap(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef uint32_t i
    for i in range(burst.n):
        swap_five_tuple(frames[i])
    return 0


cdef class FiveTupleSwap(Stage):
    """FiveTupleSwap()\n--\n

    Exchanges Ethernet addresses, the outermost IP addresses and TCP or UDP ports.  Checksums
    stay right: a sum does not depend on the order of its words."""

    def __init__(self):
        self.once()
        self.layer = LAYER_ETHERNET
        self.flags = STAGE_WRITES
        self.fn = five_tuple_swap
