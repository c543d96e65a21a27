# SPDX-License-Identifier: BSD-3-Clause
"""Receive coalescing in software: which frames may travel as one super-frame, with which headers.

``gro_t`` sorts frames into groups and touches none of them.  The caller that drains a group makes
something of it: a chain of its frames (:class:`Gro`), one write of all its parts (``tx_gro``), or
bytes (:func:`rtap.offload.coalesce`).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t


cdef enum:
    GRO_NONE = 0xffffffff
    GRO_HEADERS_MAX = 256       # of a frame that may be merged

    GRO_SEGS_MAX = 512          # segments of a group: writev(2) takes 1024

    # gro_t.flags
    GRO_UDP = 1                 # UDP as well as TCP
    GRO_FIXED_ID = 2            # IPv4 with DF may repeat its ID instead of counting
    GRO_TRUST = 4               # RX_L4_CKSUM_GOOD is trusted, not checked again
    GRO_L3 = 8                  # frames are IP packets (TUN)


cdef struct gro_item_t:
    mbuf_t *m
    uint32_t next               # in the same group; GRO_NONE ends it
    uint32_t data_off           # the window that was examined
    uint32_t pkt_len


cdef struct gro_group_t:
    # Frames that go on as one frame.  A group of one goes on as it came.
    const uint8_t *head         # the first frame's headers, in one piece
    uint32_t first              # items
    uint32_t last
    uint32_t count
    uint32_t segs
    uint32_t length             # of the super-frame's IP packet
    uint32_t seq                # the next frame's, on TCP
    uint16_t size               # payload of each frame but the last
    uint16_t headers            # bytes of headers: where the payload starts
    uint16_t l3
    uint16_t l4
    uint16_t ip_id              # the next frame's
    uint8_t version
    uint8_t protocol
    uint8_t tcp_flags           # FIN and PSH of the last frame
    uint8_t fixed_id            # the ID is not incremented
    uint8_t verified            # the checksum was checked, or need not be
    uint8_t tag                 # for the caller that drains


cdef struct gro_flow_t:
    gro_group_t group           # the held frames
    uint64_t born               # when its first frame came
    uint32_t hash
    uint32_t chain              # next flow of the bucket, or next free one
    uint32_t older              # order of arrival
    uint32_t newer


cdef struct gro_t:
    uint32_t flags
    uint32_t max_length         # of a super-frame's IP packet
    uint32_t n_flows            # held
    uint32_t max_flows
    uint32_t mask               # buckets - 1
    uint32_t oldest
    uint32_t newest
    uint32_t free_flow
    uint32_t n_items            # frames held or done
    uint32_t max_items
    uint32_t free_item
    uint32_t n_done
    gro_flow_t *flows
    uint32_t *buckets
    gro_item_t *items
    gro_group_t *done           # groups that are complete, in the order they went
    # statistics, written by the owner only
    uint64_t frames             # seen
    uint64_t merged             # went into a group of more than one
    uint64_t supers             # such groups
    uint64_t bad_checksum
    uint64_t evicted            # flows sent on because the table was full


cdef gro_t *gro_create(uint32_t max_flows, uint32_t max_frames, uint32_t flags,
                       uint32_t max_length) noexcept nogil
cdef void gro_destroy(gro_t *g) noexcept nogil
cdef uint32_t gro_room(const gro_t *g) noexcept nogil
cdef void gro_add(gro_t *g, mbuf_t *m, uint64_t now) noexcept nogil
cdef void gro_flush(gro_t *g, uint64_t until) noexcept nogil
cdef void gro_drained(gro_t *g) noexcept nogil
cdef void gro_headers(const gro_group_t *d, uint8_t *out) noexcept nogil
cdef uint32_t gro_length(const gro_t *g, const gro_group_t *d) noexcept nogil
cdef void gro_write(const gro_t *g, const gro_group_t *d, uint8_t *out) noexcept nogil
cdef void gro_describe(const gro_group_t *d, mbuf_t *m) noexcept nogil
