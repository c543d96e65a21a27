# SPDX-License-Identifier: BSD-3-Clause
"""Offload kernels over pointers: no allocation, no exceptions, every read inside the frame."""

from libc.stdint cimport uint8_t, uint64_t

from rtap._pool cimport mbuf_t


cdef enum:
    VNET_HDR_LEN = 10           # struct virtio_net_hdr, without num_buffers

    # rte_mbuf_core.h
    RX_L4_CKSUM_BAD = 1 << 3
    RX_L4_CKSUM_GOOD = 1 << 8
    RX_L4_CKSUM_NONE = RX_L4_CKSUM_BAD | RX_L4_CKSUM_GOOD
    RX_LRO = 1 << 16


cdef inline bint keeps_vnet_hdr(const mbuf_t *m) noexcept nogil:
    """The frame came with an unfinished checksum or as a super-frame, and still says so."""
    return m.ol_flags & RX_LRO or m.ol_flags & RX_L4_CKSUM_NONE == RX_L4_CKSUM_NONE


cdef int vnet_hdr_to_mbuf(mbuf_t *m, const uint8_t *hdr, bint l2) noexcept nogil
cdef void vnet_hdr_from_mbuf(const mbuf_t *m, uint8_t *hdr) noexcept nogil
