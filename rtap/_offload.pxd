# SPDX-License-Identifier: BSD-3-Clause
"""Offload kernels over pointers: no allocation, no exceptions, every read inside the frame."""

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
    const uint64_t TX_UDP_SEG "RTAP_TX_UDP_SEG"
    const uint64_t TX_TUNNEL_MASK "RTAP_TX_TUNNEL_MASK"
    const uint64_t TX_TCP_SEG "RTAP_TX_TCP_SEG"
    const uint64_t TX_TCP_CKSUM "RTAP_TX_TCP_CKSUM"
    const uint64_t TX_UDP_CKSUM "RTAP_TX_UDP_CKSUM"
    const uint64_t TX_L4_MASK "RTAP_TX_L4_MASK"
    const uint64_t TX_IP_CKSUM "RTAP_TX_IP_CKSUM"
    const uint64_t TX_REQUESTS "RTAP_TX_REQUESTS"


cdef inline bint keeps_vnet_hdr(const mbuf_t *m) noexcept nogil:
    """The frame came with an unfinished checksum or as a super-frame, and still says so."""
    return m.ol_flags & RX_LRO or m.ol_flags & RX_L4_CKSUM_NONE == RX_L4_CKSUM_NONE


cdef int vnet_hdr_to_mbuf(mbuf_t *m, const uint8_t *hdr, bint l2) noexcept nogil
cdef int take_requests(mbuf_t **frame) noexcept nogil
cdef int finish_checksum(mbuf_t **frame) noexcept nogil
cdef void vnet_hdr_from_mbuf(const mbuf_t *m, uint8_t *hdr) noexcept nogil
