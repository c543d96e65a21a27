# SPDX-License-Identifier: BSD-3-Clause
"""A traffic generator in the shape of a receive queue: it hands out frames made from a template.

A worker's route from this queue to a device's queue sends at full speed.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cimport rtap._core.compat as _compat
from rtap._core.gil cimport GIL_AUTO
from rtap._core.mbuf cimport check_range
from rtap._core.mempool cimport Mempool
from rtap._core.pool cimport (
    fork_generation, mbuf_data, mbuf_free_bulk, mbuf_reset, mbuf_t, pool_get,
)
from rtap._core.queue cimport QUEUE_CLOSED, QUEUE_STOPPED, rxq_t
from rtap._core.rx_queue cimport RxQueueBase
from rtap._frames.headers cimport ETHER_HDR_LEN, IPV4_HDR_LEN
from rtap._frames.parse cimport be32, put_be16

cdef enum:
    IPV4_CHECKSUM = ETHER_HDR_LEN + 10
    IPV4_SOURCE = ETHER_HDR_LEN + 12
    IPV4_DESTINATION = ETHER_HDR_LEN + 16


cdef inline void turn_to_flow(generate_t *g, uint8_t *header) noexcept nogil:
    """Writes the next flow's address into the header, and the checksum over it (RFC 1071)."""
    cdef uint32_t value = g.first + g.flow
    cdef uint32_t total = g.rest_sum + (value >> 16) + (value & 0xffff)
    g.flow = g.flow + 1 if g.flow + 1 < g.flows else 0
    total = (total & 0xffff) + (total >> 16)
    total = (total & 0xffff) + (total >> 16)
    put_be16(header + g.vary_at, value >> 16)
    put_be16(header + g.vary_at + 2, value & 0xffff)
    put_be16(header + IPV4_CHECKSUM, ~total & 0xffff)


cdef inline void fill_first(generate_t *g, mbuf_t *m) noexcept nogil:
    cdef uint8_t *data
    mbuf_reset(m)
    data = mbuf_data(m)
    memcpy(data, g.header, g.header_len)
    if g.flows > 1:
        turn_to_flow(g, data)
    m.data_len = g.lengths[0]
    m.pkt_len = g.frame_len


cdef inline bint chain(generate_t *g, mbuf_t *first) noexcept nogil:
    """The segments after the first; false when the pool has none left."""
    cdef mbuf_t *more[SEGMENTS_MAX]
    cdef mbuf_t *tail = first
    cdef uint32_t wanted = g.n_segments - 1, i
    cdef uint32_t got = pool_get(g.pool, more, wanted)
    for i in range(got):
        mbuf_reset(more[i])
        more[i].data_len = g.lengths[i + 1]
        tail.next = more[i]
        tail = more[i]
    first.nb_segs = <uint16_t>(1 + got)
    return got == wanted


cdef uint32_t generate_rx(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    cdef generate_t *g = <generate_t *>base
    cdef uint32_t got = pool_get(g.pool, out, n), i
    for i in range(got):
        fill_first(g, out[i])
    if g.n_segments > 1:
        for i in range(got):
            if not chain(g, out[i]):
                mbuf_free_bulk(out + i, got - i)
                got = i
                break
    if got == 0:
        _compat.counter_add(&base.nombuf, 1)
        return 0
    _compat.counter_add(&base.packets, got)
    _compat.counter_add(&base.bytes, <uint64_t>got * g.frame_len)
    return got


cdef int prepare_flows(generate_t *g, uint32_t vary_at) except -1:
    cdef uint32_t at
    if g.header_len < ETHER_HDR_LEN + IPV4_HDR_LEN or g.header[ETHER_HDR_LEN] != 0x45:
        raise ValueError("flows need a header of Ethernet and IPv4 without options")
    g.vary_at = vary_at
    g.first = be32(g.header + vary_at)
    for at in range(ETHER_HDR_LEN, ETHER_HDR_LEN + IPV4_HDR_LEN, 2):
        if at != IPV4_CHECKSUM and at != vary_at and at != vary_at + 2:
            g.rest_sum += (<uint32_t>g.header[at] << 8) | g.header[at + 1]
    return 0


cdef class GenerateRxQueue(RxQueueBase):
    """GenerateRxQueue(pool, header, lengths, *, name='generator', flows=1, \
vary='destination')\n--\n

    Hands out as many frames as asked for: ``header``, then the present bytes of their buffers.

    In a pool of its own these bytes are zeros. ``lengths`` are the bytes of a frame's segments, the
    first of which holds the header. With ``flows`` above 1, the header is Ethernet and IPv4 without
    a tag. Its "source" or "destination" address (``vary``) then goes, frame by frame, through that
    many consecutive values, beginning with its own; the IPv4 checksum is kept right.

    ValueError for lengths that the pool's ``data_room`` or the header does not fit.
    """

    def __init__(self, Mempool pool not None, bytes header not None, lengths, *,
                 str name="generator", flows=1, str vary="destination"):
        cdef generate_t made
        cdef generate_t *g = &made
        cdef uint32_t i
        memset(g, 0, sizeof(generate_t))
        g.header_len = check_range("the header's length", len(header), 1, HEADER_MAX)
        memcpy(g.header, <const char *>header, g.header_len)
        g.n_segments = check_range("the number of segments", len(lengths), 1, SEGMENTS_MAX)
        for i in range(g.n_segments):
            g.lengths[i] = check_range(f"the length of segment {i}", lengths[i],
                                       g.header_len if i == 0 else 1, pool.data_room)
            g.frame_len += g.lengths[i]
        g.flows = check_range("flows", flows, 1, 0x7fffffff)
        if vary not in ("source", "destination"):
            raise ValueError(f"vary must be 'source' or 'destination', got {vary!r}")
        if g.flows > 1:
            prepare_flows(g, IPV4_SOURCE if vary == "source" else IPV4_DESTINATION)
        g.base.burst = generate_rx
        g.base.fd = -1
        self.once()
        g.pool = pool.hold()
        self.g = made
        self.gil.mode = GIL_AUTO
        self.pool = pool
        self.serve(&self.g.base)
        self.name = name
        self.port = 0xffff
        self.nb_desc = 64
        self.chosen, self.why = "none", "no kernel is entered"
        self.generation = fork_generation()

    def __dealloc__(self):
        if self.q != NULL and self.gate.state != QUEUE_CLOSED and self.pool is not None:
            self.pool.let_go()

    @property
    def frame_len(self):
        """Bytes of a frame, all segments."""
        return self.g.frame_len

    def close(self):
        """Stops, for good; idempotent."""
        self.checked()
        self.stop()
        if _compat.cas(&self.gate.state, QUEUE_STOPPED, QUEUE_CLOSED):
            self.pool.let_go()
