# SPDX-License-Identifier: BSD-3-Clause
"""The virtio-net header of a frame: no allocation, no exceptions, every read inside the frame."""

from libc.stdint cimport uint8_t, uint64_t

from rtap._core.linux cimport VIRTIO_NET_HDR_F_NEEDS_CSUM
from rtap._core.pool cimport mbuf_t


cdef enum:
    VNET_HDR_LEN = 10           # struct virtio_net_hdr, without num_buffers


cdef extern from "rtap_compat.h":
    # ol_flags, from rte_mbuf_core.h
    const uint64_t RX_L4_CKSUM_BAD "RTAP_RX_L4_CKSUM_BAD"
    const uint64_t RX_L4_CKSUM_GOOD "RTAP_RX_L4_CKSUM_GOOD"
    const uint64_t RX_L4_CKSUM_NONE "RTAP_RX_L4_CKSUM_NONE"
    const uint64_t RX_IP_CKSUM_MASK "RTAP_RX_IP_CKSUM_MASK"
    const uint64_t RX_LRO "RTAP_RX_LRO"
    # RxOffload
    const uint64_t RX_OFFLOAD_IPV4_CKSUM "RTAP_RX_OFFLOAD_IPV4_CKSUM"
    const uint64_t RX_OFFLOAD_UDP_CKSUM "RTAP_RX_OFFLOAD_UDP_CKSUM"
    const uint64_t RX_OFFLOAD_TCP_CKSUM "RTAP_RX_OFFLOAD_TCP_CKSUM"
    const uint64_t RX_OFFLOAD_CKSUM "RTAP_RX_OFFLOAD_CKSUM"


cdef inline bint keeps_vnet_hdr(const mbuf_t *m) noexcept nogil:
    """The frame came with an unfinished checksum or as a super-frame, and still says so.

    A datagram without any checksum is RX_L4_CKSUM_NONE too, and has nothing unfinished."""
    return m.ol_flags & RX_LRO or (
        m.ol_flags & RX_L4_CKSUM_NONE == RX_L4_CKSUM_NONE
        and m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)


cdef int vnet_hdr_to_mbuf(mbuf_t *m, const uint8_t *hdr, bint l2, uint64_t offloads) noexcept nogil
cdef bint vnet_hdr_fits(const mbuf_t *m) noexcept nogil
cdef void vnet_hdr_from_mbuf(const mbuf_t *m, uint8_t *hdr) noexcept nogil
