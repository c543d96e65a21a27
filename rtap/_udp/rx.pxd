# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from rtap._core.linux cimport iovec, mmsghdr
from rtap._core.pool cimport mbuf_t, pool_t
from rtap._core.queue cimport rxq_t
from rtap._udp.peers cimport address_t, peers_t


cdef enum:
    READS = 8                   # messages of one recvmmsg
    MESSAGE_MAX = 1 << 16       # more than the kernel gives as one
    CONTROL_MAX = 64


cdef struct udp_rxq_t:
    rxq_t base
    pool_t *pool
    peers_t *peers              # NULL: the socket is connected, and all have number 0
    uint16_t port
    uint32_t stale              # the queue was stopped: the next burst drops what waits
    uint32_t n                  # messages read, of which
    uint32_t at                 # this one is the first with datagrams left,
    uint32_t offset             # from here on
    uint32_t size               # of its datagrams; the last one may be shorter
    uint32_t peer
    int wake                    # eventfd, readable while datagrams wait here
    bint awake
    uint64_t merged             # messages of several datagrams
    uint64_t datagrams          # in these
    uint64_t unknown            # datagrams whose sender had no number
    uint64_t dropped            # of these, those that were dropped
    uint64_t icmp               # errors about datagrams sent earlier
    mmsghdr msgs[READS]
    iovec iov[READS]
    address_t names[READS]
    uint8_t control[READS][CONTROL_MAX]
    uint8_t *bytes              # READS * MESSAGE_MAX


cdef bint udp_rx_idle(rxq_t *base, int ms) noexcept nogil
cdef uint32_t udp_rx(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil
cdef void udp_rx_drop(udp_rxq_t *q) noexcept nogil
cdef uint64_t udp_rx_purge(udp_rxq_t *q) noexcept nogil
