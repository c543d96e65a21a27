# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint32_t, uint64_t

from rtap._core.flags cimport RX_LRO
from rtap._core.linux cimport (
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
)
from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport txq_t
from rtap._tap.tx cimport tap_txq_t


cdef enum:
    # Kinds of super-frames, see tap_txq_t.software
    GSO_TCP4 = 1
    GSO_TCP6 = 2
    GSO_UDP = 4


cdef int tx_split(tap_txq_t *q, mbuf_t *m) noexcept nogil
cdef bint tx_flush(tap_txq_t *q, int *error) noexcept nogil
cdef void tx_discard(tap_txq_t *q, uint64_t *reason) noexcept nogil
cdef void tx_abandon(txq_t *base) noexcept nogil
cdef void tx_forget(tap_txq_t *q) noexcept nogil
cdef int tx_fall_back(tap_txq_t *q, mbuf_t *m, int *error) noexcept nogil


cdef inline uint32_t gso_kind(const mbuf_t *m) noexcept nogil:
    """The GSO_* of a super-frame, 0 for any other frame."""
    if not m.ol_flags & RX_LRO:
        return 0
    cdef uint32_t kind = m.gso_type & ~<uint32_t>VIRTIO_NET_HDR_GSO_ECN
    return (GSO_TCP4 if kind == VIRTIO_NET_HDR_GSO_TCPV4 else
            GSO_TCP6 if kind == VIRTIO_NET_HDR_GSO_TCPV6 else
            GSO_UDP if kind == VIRTIO_NET_HDR_GSO_UDP_L4 else 0)
