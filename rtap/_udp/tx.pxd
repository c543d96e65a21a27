# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._core.linux cimport iovec, mmsghdr
from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport txq_t
from rtap._frames.segment cimport HEADER_ROOM, plan_t
from rtap._udp.peers cimport address_t, peers_t


cdef enum:
    MESSAGES = 64               # of one sendmmsg
    IOVECS = 1024               # in these, and of one: UIO_MAXIOV
    SEGMENTS_MAX = 64           # UDP_MAX_SEGMENTS of older kernels
    PAYLOAD_MAX = 65507         # of one message: 64 KiB without IPv4 and UDP headers
    SEGMENT_ROOM = 32
    PIECES_ROOM = 1 << 16


cdef struct message_t:          # what sendmmsg is asked for
    uint32_t n                  # frames of the burst
    uint32_t size               # of its datagrams, when there are several


cdef struct udp_txq_t:
    txq_t base
    peers_t *peers
    bint connected              # number 0 is the address the socket is connected to
    uint32_t address_len
    uint32_t too_big_from       # datagrams of this size and more leave one by one; 0: none has to
    uint64_t again_at           # CLOCK_MONOTONIC ns; from then on that is tried anew
    uint32_t fell_back          # errno of the last message of several datagrams that was refused
    uint64_t gso_sends          # messages of several datagrams
    uint64_t gso_segments       # datagrams in these
    uint64_t fallbacks          # messages whose datagrams were sent one by one instead
    uint64_t no_peer            # frames whose number has no address
    uint64_t too_big            # datagrams above the path's MTU, or of more than 65507 bytes
    uint64_t icmp               # errors about datagrams sent earlier
    # A super-frame on its way
    mbuf_t *frame               # NULL: none
    uint32_t next               # the first of its pieces that is not made yet
    plan_t plan
    uint8_t headers[HEADER_ROOM]
    uint32_t n_made             # pieces that are made and not sent, which begin
    uint32_t made_at            # here in `pieces`
    uint32_t peer
    uint32_t lengths[SEGMENTS_MAX]
    uint32_t first              # of `lengths`, the first one not sent
    uint8_t pieces[PIECES_ROOM]
    # For sendmmsg
    mmsghdr msgs[MESSAGES]
    iovec iov[IOVECS]
    address_t names[MESSAGES]
    uint8_t control[MESSAGES][SEGMENT_ROOM]
    message_t messages[MESSAGES]


cdef uint32_t udp_tx(txq_t *base, mbuf_t **v, uint32_t n, int *error) noexcept nogil
cdef void udp_tx_abandon(txq_t *base) noexcept nogil
cdef void udp_tx_forget(udp_txq_t *q) noexcept nogil
