# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from rtap._core.linux cimport msghdr
from rtap._core.pool cimport mbuf_t, pool_t
from rtap._core.queue cimport rx_share_t, rxq_t
from rtap._tap.rx_gso cimport rx_gso_t


cdef enum:
    BATCH_SLOTS = 512           # the most slots for one batch of reads
    SEGS_MAX = 128              # the most slots of one read
    FILTER_MAX = 64             # the most addresses a queue listens for


cdef struct filter_t:
    uint32_t on                 # off: every frame is wanted (promiscuous)
    uint32_t lock               # guards the next fields, which may change during a burst
    bint allmulticast
    uint32_t n
    uint8_t addresses[FILTER_MAX][6]


cdef struct room_t:
    uint32_t new                # to be adopted by the next burst
    uint32_t lock               # of what follows
    pool_t *pool
    uint32_t segs


cdef struct tap_rxq_t:
    rxq_t base
    room_t room
    pool_t *pool
    uint64_t file_id
    int engine                  # ENGINE_*
    bint cancels                # its reads through a ring may wait: a cancel has to follow them
    uint32_t entries            # most frames for each kernel entry
    uint32_t depth              # reads submitted first by the next burst
    uint32_t hdr_len            # of the virtio-net header; 0 without
    uint64_t offloads           # RxOffload; with any, headers are parsed and reported
    uint32_t segs               # slots for each read
    bint l2                     # Ethernet frames, not IP packets
    bint shared                 # somebody else may make the descriptor blocking
    msghdr *msgs                # of a packet socket, one for each read of an entry; NULL: a TAP's
    uint32_t gone               # its interface is gone; only the first read was told
    uint16_t port
    filter_t filter
    rx_gso_t *gso               # splits frames that are read; NULL: handed out as they come
    uint32_t (*read)(rxq_t *q, mbuf_t **out, uint32_t n, int *error) noexcept nogil


cdef void rx_adopt(tap_rxq_t *q) noexcept nogil
cdef uint32_t rx_uring(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil
cdef uint32_t rx_split(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil
cdef uint32_t rx_syscall(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil
cdef uint32_t rx_uring_many(rx_share_t *shares, uint32_t k) noexcept nogil
