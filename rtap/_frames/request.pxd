# SPDX-License-Identifier: BSD-3-Clause
"""Requests of the application for single frames; every read inside the frame."""

from libc.stdint cimport uint64_t

from rtap._core.pool cimport mbuf_t


cdef extern from "rtap_compat.h":
    # ol_flags, from rte_mbuf_core.h
    const uint64_t TX_UDP_SEG "RTAP_TX_UDP_SEG"
    const uint64_t TX_TUNNEL_MASK "RTAP_TX_TUNNEL_MASK"
    const uint64_t TX_TCP_SEG "RTAP_TX_TCP_SEG"
    const uint64_t TX_TCP_CKSUM "RTAP_TX_TCP_CKSUM"
    const uint64_t TX_UDP_CKSUM "RTAP_TX_UDP_CKSUM"
    const uint64_t TX_L4_MASK "RTAP_TX_L4_MASK"
    const uint64_t TX_IP_CKSUM "RTAP_TX_IP_CKSUM"
    const uint64_t TX_QINQ "RTAP_TX_QINQ"
    const uint64_t TX_VLAN "RTAP_TX_VLAN"
    const uint64_t TX_CKSUM_REQUESTS "RTAP_TX_CKSUM_REQUESTS"
    const uint64_t TX_REQUESTS "RTAP_TX_REQUESTS"
    const uint64_t TX_SPECIAL "RTAP_TX_SPECIAL"


cdef int take_requests(mbuf_t **frame, bint l2) noexcept nogil
cdef int finish_checksum(mbuf_t **frame) noexcept nogil
cdef mbuf_t *private_of(mbuf_t *m) noexcept nogil
cdef int make_private(mbuf_t **frame) noexcept nogil
