# SPDX-License-Identifier: BSD-3-Clause
"""Spreads flows over targets: the frames of a flow, in both directions, go to the same one."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from rtap._core.mbuf cimport check_range
from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport LAYER_ETHERNET, LAYER_IP
from rtap._frames.parse cimport HEADERS_MAX, be16, has_ports, headers_of, headers_t, parse_outermost
from rtap.stages._runner cimport rtap_burst
from rtap.stages._stage cimport Stage


cdef struct spread_t:
    bint l2
    bint ports
    uint64_t seed


cdef inline uint64_t word(const uint8_t *p, uint32_t n) noexcept nogil:
    cdef uint64_t v = 0
    memcpy(&v, p, n)
    return v


cdef inline uint64_t mix(uint64_t v) noexcept nogil:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    v = (v ^ v >> 30) * <uint64_t>0xbf58476d1ce4e5b9
    v = (v ^ v >> 27) * <uint64_t>0x94d049bb133111eb
    return v ^ v >> 31


cdef inline uint64_t pair(uint64_t a, uint64_t b) noexcept nogil:
    """A hash of two numbers that does not depend on their order."""
    return mix(a) + mix(b)


cdef uint64_t flow_hash(const spread_t *s, const mbuf_t *m) noexcept nogil:
    cdef uint8_t copy[HEADERS_MAX]
    cdef headers_t h
    cdef uint32_t n
    cdef uint64_t hash
    cdef const uint8_t *p = headers_of(m, copy, &n)
    parse_outermost(p, n, m.pkt_len, s.l2, &h)
    if h.version == 0:
        if not s.l2 or n < 14:
            return 0
        return mix(s.seed + pair(word(p, 6), word(p + 6, 6)))
    if h.version == 4:
        hash = pair(word(p + h.l3 + 12, 4), word(p + h.l3 + 16, 4))
    else:
        hash = pair(word(p + h.l3 + 8, 8) ^ mix(word(p + h.l3 + 16, 8)),
                    word(p + h.l3 + 24, 8) ^ mix(word(p + h.l3 + 32, 8)))
    hash += s.seed + h.protocol
    # The later fragments of a packet have no ports, so ports must not count for the first one
    # either.
    if s.ports and has_ports(&h, n):
        hash += mix(pair(be16(p + h.l4), be16(p + h.l4 + 2)))
    return mix(hash)


cdef int spread(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef uint32_t i
    for i in range(burst.n):
        burst.verdict[i] = <uint32_t>(
            (flow_hash(<spread_t *>ctx, frames[i]) >> 32) * burst.n_targets >> 32)
    return 0


cdef class Spread(Stage):
    """Spread(ports=True, l2=True, seed=0)\n--\n

    Spreads flows over the route's targets by a hash that is the same for both directions.

    The frames of a flow have the same IP addresses, protocol and, with TCP, UDP and SCTP, ports;
    without ``ports`` only addresses and protocol count. Frames of a flow go to one target, in
    order. For fragments only addresses and protocol count: if some packets of a flow are
    fragmented, ``ports=False`` keeps them together. Frames that are not IP are spread by Ethernet
    addresses. l2: Ethernet frames (TAP), else IP packets (TUN). seed: 0..0xffffffff, selects
    another distribution. If the targets of one Spread lead to a second one, give that another seed:
    with the same seed it would send all its frames to one target.
    """

    cdef spread_t how

    def __init__(self, bint ports=True, bint l2=True, seed=0):
        cdef uint64_t mixed = mix(<uint64_t>check_range("seed", seed, 0, 0xffffffff))
        self.once()
        self.how.l2 = l2
        self.how.ports = ports
        self.how.seed = mixed
        self.layer = LAYER_ETHERNET if l2 else LAYER_IP
        self.ctx = &self.how
        self.fn = spread
