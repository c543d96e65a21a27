# SPDX-License-Identifier: BSD-3-Clause
"""Ethernet addresses: written, or exchanged."""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from rtap._core.pool cimport mbuf_data, mbuf_t, mbuf_write
from rtap._core.queue cimport LAYER_ETHERNET
from rtap._frames.headers cimport MAC_LEN
from rtap._frames.rewrite cimport set_mac, swap_mac
from rtap.stages._runner cimport STAGE_WRITES, rtap_burst
from rtap.stages._stage cimport Stage

from rtap.ether import MacAddr

cdef struct rewrite_t:
    uint8_t addresses[2 * MAC_LEN]
    uint32_t offset             # of the address to write, or of both
    uint32_t n


cdef int mac_swap(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef uint32_t i
    for i in range(burst.n):
        swap_mac(frames[i])
    return 0


cdef int mac_rewrite(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef rewrite_t *r = <rewrite_t *>ctx
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef uint32_t i
    cdef mbuf_t *m
    for i in range(burst.n):
        m = frames[i]
        if r.n == 2 * MAC_LEN:
            set_mac(m, r.addresses)
        elif m.data_len >= 2 * MAC_LEN:
            memcpy(mbuf_data(m) + r.offset, r.addresses + r.offset, r.n)
        elif m.pkt_len >= 2 * MAC_LEN:
            mbuf_write(m, r.offset, r.addresses + r.offset, r.n)
    return 0


cdef class MacSwap(Stage):
    """MacSwap()\n--\n

    Exchanges destination and source address."""

    def __init__(self):
        self.once()
        self.layer = LAYER_ETHERNET
        self.flags = STAGE_WRITES
        self.fn = mac_swap


cdef class MacRewrite(Stage):
    """MacRewrite(destination=None, source=None)\n--\n

    Writes destination and source address, either of them or both (MacAddr, str or 6 bytes)."""

    cdef rewrite_t rewrite

    def __init__(self, destination=None, source=None):
        cdef bytes both
        if destination is None and source is None:
            raise ValueError("MacRewrite needs a destination or a source address")
        both = (bytes(6) if destination is None else bytes(MacAddr(destination)))
        both += (bytes(6) if source is None else bytes(MacAddr(source)))
        self.once()
        memcpy(self.rewrite.addresses, <const uint8_t *>both, 2 * MAC_LEN)
        self.rewrite.offset = MAC_LEN if destination is None else 0
        self.rewrite.n = 2 * MAC_LEN if destination is not None and source is not None else MAC_LEN
        self.layer = LAYER_ETHERNET
        self.ctx = &self.rewrite
        self.flags = STAGE_WRITES
        self.fn = mac_rewrite
