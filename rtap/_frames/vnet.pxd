# SPDX-License-Identifier: BSD-3-Clause
"""The virtio-net header of a frame: no allocation, no exceptions; every read is inside the
frame."""

from libc.stdint cimport uint8_t, uint64_t

from rtap._core.flags cimport RX_L4_CKSUM_NONE, RX_LRO
from rtap._core.linux cimport VIRTIO_NET_HDR_F_NEEDS_CSUM
from rtap._core.pool cimport mbuf_t


cdef enum:
    VNET_HDR_LEN = 10           # struct virtio_net_hdr, without num_buffers


cdef inline bint keeps_vnet_hdr(const mbuf_t *m) noexcept nogil:
    """Whether the frame came with an unfinished checksum or as a super-frame, and is still marked
    so.

    A datagram without any checksum is RX_L4_CKSUM_NONE too, and has nothing unfinished."""
    return m.ol_flags & RX_LRO or (
        m.ol_flags & RX_L4_CKSUM_NONE == RX_L4_CKSUM_NONE
        and m.vnet_flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)


cdef int vnet_hdr_to_mbuf(mbuf_t *m, const uint8_t *hdr, bint l2, uint64_t offloads) noexcept nogil
cdef bint vnet_hdr_fits(const mbuf_t *m) noexcept nogil
cdef void vnet_hdr_from_mbuf(const mbuf_t *m, uint8_t *hdr) noexcept nogil
