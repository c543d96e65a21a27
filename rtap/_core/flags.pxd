# SPDX-License-Identifier: BSD-3-Clause
"""Bits of an mbuf's ol_flags and of offloads; Python has them in :mod:`rtap.flags`."""

from libc.stdint cimport uint64_t

cdef extern from "rtap_compat.h":
    # ol_flags, from rte_mbuf_core.h
    const uint64_t RX_L4_CKSUM_BAD "RTAP_RX_L4_CKSUM_BAD"
    const uint64_t RX_L4_CKSUM_GOOD "RTAP_RX_L4_CKSUM_GOOD"
    const uint64_t RX_L4_CKSUM_NONE "RTAP_RX_L4_CKSUM_NONE"
    const uint64_t RX_IP_CKSUM_BAD "RTAP_RX_IP_CKSUM_BAD"
    const uint64_t RX_IP_CKSUM_GOOD "RTAP_RX_IP_CKSUM_GOOD"
    const uint64_t RX_OUTER_IP_CKSUM_BAD "RTAP_RX_OUTER_IP_CKSUM_BAD"
    const uint64_t RX_OUTER_L4_CKSUM_BAD "RTAP_RX_OUTER_L4_CKSUM_BAD"
    const uint64_t RX_OUTER_L4_CKSUM_GOOD "RTAP_RX_OUTER_L4_CKSUM_GOOD"
    const uint64_t RX_CKSUM_MASK "RTAP_RX_CKSUM_MASK"
    const uint64_t RX_LRO "RTAP_RX_LRO"
    const uint64_t RX_IP_CKSUM_MASK "RTAP_RX_IP_CKSUM_MASK"
    const uint64_t TX_UDP_SEG "RTAP_TX_UDP_SEG"
    const uint64_t TX_TUNNEL_MASK "RTAP_TX_TUNNEL_MASK"
    const uint64_t TX_QINQ "RTAP_TX_QINQ"
    const uint64_t TX_TCP_SEG "RTAP_TX_TCP_SEG"
    const uint64_t TX_TCP_CKSUM "RTAP_TX_TCP_CKSUM"
    const uint64_t TX_UDP_CKSUM "RTAP_TX_UDP_CKSUM"
    const uint64_t TX_L4_MASK "RTAP_TX_L4_MASK"
    const uint64_t TX_IP_CKSUM "RTAP_TX_IP_CKSUM"
    const uint64_t TX_VLAN "RTAP_TX_VLAN"
    const uint64_t TX_CKSUM_REQUESTS "RTAP_TX_CKSUM_REQUESTS"
    const uint64_t TX_REQUESTS "RTAP_TX_REQUESTS"
    const uint64_t TX_SPECIAL "RTAP_TX_SPECIAL"

    # RxOffload
    const uint64_t RX_OFFLOAD_IPV4_CKSUM "RTAP_RX_OFFLOAD_IPV4_CKSUM"
    const uint64_t RX_OFFLOAD_UDP_CKSUM "RTAP_RX_OFFLOAD_UDP_CKSUM"
    const uint64_t RX_OFFLOAD_TCP_CKSUM "RTAP_RX_OFFLOAD_TCP_CKSUM"
    const uint64_t RX_OFFLOAD_CKSUM "RTAP_RX_OFFLOAD_CKSUM"
