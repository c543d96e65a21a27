# SPDX-License-Identifier: BSD-3-Clause
"""Answers to ARP, neighbour discovery and echo requests."""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from rtap._core.mbuf cimport check_range
from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport LAYER_ETHERNET
from rtap._frames.answers cimport make_answer
from rtap.stages._runner cimport DROP, STAGE_WRITES, rtap_burst
from rtap.stages._stage cimport Stage

from rtap.ether import MacAddr


cdef struct echo_t:
    uint8_t mac[6]
    uint32_t others


cdef int echo(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef echo_t *e = <echo_t *>ctx
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef uint32_t i
    for i in range(burst.n):
        if not make_answer(frames[i], e.mac):
            burst.verdict[i] = e.others
    return 0


cdef class Echo(Stage):
    """Echo(mac, *, others=None)\n--\n

    Turns ARP requests, ICMP and ICMPv6 echo requests and neighbour solicitations, for any
    address, into answers from ``mac``.  The answers go on along the route; in a route from a device
    to itself they go back.

    others: a target's index for all other frames, or None to drop them."""

    cdef echo_t how

    def __init__(self, mac, *, others=None):
        cdef bytes address = bytes(MacAddr(mac))
        cdef uint32_t rest = DROP if others is None else check_range("others", others, 0, 65534)
        self.once()
        memcpy(self.how.mac, <const uint8_t *>address, 6)
        self.how.others = rest
        self.targets = 0 if rest == DROP else rest + 1
        self.layer = LAYER_ETHERNET
        self.ctx = &self.how
        self.flags = STAGE_WRITES
        self.fn = echo
