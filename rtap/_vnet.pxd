# SPDX-License-Identifier: BSD-3-Clause
"""The virtio-net header of a frame: no allocation, no exceptions, every read inside the frame."""

from libc.stdint cimport uint8_t, uint64_t

from rtap._pool cimport mbuf_t


cdef enum:
    VNET_HDR_LEN = 10           # struct virtio_net_hdr, without num_buffers


cdef extern from "rtap_compat.h":
    # ol_flags, from rte_mbuf_core.h
    const uint64_t RX_L4_CKSUM_BAD "RTAP_RX_L4_CKSUM_BAD"
    const uint64_t RX_L4_CKSUM_GOOD "RTAP_RX_L4_CKSUM_GOOD"
    const uint64_t RX_L4_CKSUM_NONE "RTAP_RX_L4_CKSUM_NONE"
    const uint64_t RX_LRO "RTAP_RX_LRO"


cdef inline bint keeps_vnet_hdr(const mbuf_t *m) noexcept nogil:
    """The frame came with an unfinished checksum or as a super-frame, and still says so."""
    return m.ol_flags & RX_LRO or m.ol_flags & RX_L4_CKSUM_NONE == RX_L4_CKSUM_NONE


cdef int vnet_hdr_to_mbuf(mbuf_t *m, const uint8_t *hdr, bint l2) noexcept nogil
cdef bint vnet_hdr_fits(const mbuf_t *m) noexcept nogil
cdef void vnet_hdr_from_mbuf(const mbuf_t *m, uint8_t *hdr) noexcept nogil
