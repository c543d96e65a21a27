# SPDX-License-Identifier: BSD-3-Clause
"""Addresses of a socket's peers, by number, for burst loops: each call takes the table's lock."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef enum:
    PEERS_MAX = 65535
    STRANGERS = 16              # addresses without a number that are remembered

    # What becomes of a datagram from an address without a number
    STRANGERS_DELIVERED = 0
    STRANGERS_DROPPED = 1
    STRANGERS_LEARNED = 2       # the address gets a number, if there is one


cdef struct address_t:          # struct sockaddr_in or sockaddr_in6
    uint16_t family
    uint16_t port               # network byte order, as all that follows
    uint32_t flow               # the IPv4 address
    uint64_t host[2]
    uint32_t scope


cdef struct peers_t:
    uint32_t lock
    uint32_t policy             # STRANGERS_*
    uint32_t size               # numbers go from 1 to this
    uint32_t n
    uint32_t free_hint
    uint32_t mask               # of the buckets
    uint64_t seed
    address_t *addresses        # by number; family 0: none
    uint32_t *buckets           # numbers, by hash; 0: empty
    uint32_t n_strangers        # ever
    address_t strangers[STRANGERS]


cdef class Peers:
    cdef peers_t table
    cdef readonly int family

    cdef int parse(self, address, address_t *out) except -1
    cdef tuple text(self, const address_t *a)
    cdef uint32_t checked(self, number) except 0


cdef uint32_t peer_from(peers_t *t, const address_t *a, bint *known) noexcept nogil
cdef bint peer_address(peers_t *t, uint32_t number, address_t *out) noexcept nogil
