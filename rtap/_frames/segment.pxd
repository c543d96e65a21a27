# SPDX-License-Identifier: BSD-3-Clause
"""Super-frames split into the frames that go on a wire (TSO, USO), and checksums finished.

``plan_segments`` checks a virtio-net header against its frame once; after that each frame can be
written on its own.  Every read and write is inside the frames.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t, mbuf_window, pool_t
from rtap._frames.parse cimport headers_t


cdef enum:
    UDP_SEGMENTS_MAX = 128      # UDP_MAX_SEGMENTS of linux/udp.h
    SPLIT_MAX = 2048            # the most frames of one: 65535 bytes at the least segment size
    HEADER_ROOM = 1024          # the longest headers of a frame that is split
    REFERENCE_MIN = 16384       # the shortest payload, and piece of one, that is not copied


cdef enum misfit_t:             # why a virtio-net header does not fit its frame
    FITS
    MISFIT_HDR_LEN
    MISFIT_GSO_SIZE
    MISFIT_GSO_TYPE
    MISFIT_UFO
    MISFIT_ECN
    MISFIT_NO_CSUM
    MISFIT_HEADERS
    MISFIT_VERSION
    MISFIT_PROTOCOL
    MISFIT_FRAGMENT
    MISFIT_LENGTH
    MISFIT_AUTH
    MISFIT_CSUM_START
    MISFIT_CSUM_OFFSET
    MISFIT_TOO_MANY
    MISFIT_TOO_LONG
    MISFIT_CONTRADICTION
    MISFIT_OUTSIDE
    MISFIT_SUPER
    MISFITS


cdef struct vnet_t:             # struct virtio_net_hdr in native byte order
    uint8_t flags
    uint8_t gso_type
    uint16_t hdr_len
    uint16_t gso_size
    uint16_t csum_start
    uint16_t csum_offset


cdef struct plan_t:
    headers_t h
    uint32_t count              # frames; 1 when the frame need not be split
    uint32_t hdr_len            # bytes of headers in front of each payload
    uint32_t payload            # total bytes of payload
    uint32_t gso_size
    uint32_t seq                # of the first frame
    uint32_t ip_id
    uint32_t ip_sum             # the IPv4 header without length, identification and checksum
    uint32_t l4_sum             # pseudo-header and header without what differs between frames
    uint32_t flags              # bytes 12 and 13 of the TCP header
    bint udp


cdef struct cursor_t:           # a place in a chain
    const mbuf_t *seg
    uint32_t offset


cdef misfit_t check_completion(const uint8_t *p, uint32_t n, uint32_t pkt_len, bint l2,
                               const vnet_t *hdr, uint32_t *end) noexcept nogil
cdef misfit_t complete(uint8_t *p, uint32_t n, bint l2, const vnet_t *hdr) noexcept nogil
cdef misfit_t plan_segments(const uint8_t *p, uint32_t n, uint32_t pkt_len, bint l2,
                            const vnet_t *hdr, plan_t *plan) noexcept nogil
cdef void write_header(const plan_t *plan, uint8_t *out, uint32_t i, uint32_t payload,
                       uint32_t payload_sum) noexcept nogil
cdef void write_segment(const plan_t *plan, const uint8_t *p, uint32_t i,
                        uint8_t *out) noexcept nogil

cdef bint cursor_read(cursor_t *c, uint8_t *dst, uint32_t n, uint32_t *total) noexcept nogil
cdef uint32_t vnet_of(const mbuf_t *m, bint l2, vnet_t *hdr) noexcept nogil
cdef misfit_t check_one(const mbuf_t *m, bint l2) noexcept nogil
cdef misfit_t plan_mbuf(const mbuf_t *m, bint l2, plan_t *plan) noexcept nogil
cdef int gso_whole(mbuf_t *m, pool_t *pool, bint l2, bint refer, mbuf_t **out,
                   uint32_t room) noexcept nogil
cdef int gso_part(mbuf_t *m, pool_t *pool, bint l2, bint refer, uint32_t first, mbuf_t **out,
                  uint32_t room, uint32_t *left) noexcept nogil
cdef int plan_split(const mbuf_t *m, bint l2, plan_t *plan) noexcept nogil
cdef int gso_check(const mbuf_t *m, const pool_t *pool, bint l2, uint32_t most) noexcept nogil


cdef inline int gso_mbuf(mbuf_t *m, pool_t *pool, bint l2, mbuf_t **out,
                         uint32_t room) noexcept nogil:
    return gso_whole(m, pool, l2, True, out, room)


cdef inline uint32_t segment_payload(const plan_t *plan, uint32_t i) noexcept nogil:
    """Payload bytes of frame ``i``."""
    if plan.count == 1:
        return plan.payload
    if i + 1 < plan.count:
        return plan.gso_size
    return plan.payload - i * plan.gso_size


cdef inline uint32_t cursor_piece(cursor_t *c, uint8_t **start) noexcept nogil:
    """Where the next bytes are, and how many lie in one piece; 0 at the end."""
    cdef uint32_t n
    while True:
        n = mbuf_window(c.seg, start)
        if c.offset < n:
            start[0] += c.offset
            return n - c.offset
        if c.seg.next == NULL:
            return 0
        c.offset -= n
        c.seg = c.seg.next
