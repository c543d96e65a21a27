# SPDX-License-Identifier: BSD-3-Clause
"""Loops over the offload kernels, without Python objects; ``bench.offload`` builds them."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t n)

from rtap._core.burst cimport Burst
from rtap._frames.checksum cimport chain_sum
from rtap._core.mbuf cimport Mbuf
from rtap._core.mempool cimport Mempool
from rtap._core.pool cimport mbuf_data, mbuf_free_bulk, mbuf_ref, mbuf_t
from rtap._frames.segment cimport gso_mbuf

cdef extern from "sum16.h" nogil:
    uint32_t plain_sum16(const uint8_t *p, size_t n)


def checksum_loop(Burst burst not None, bint plain, uint32_t rounds):
    """Sums every frame of a burst ``rounds`` times, with the kernel or with a plain C loop;
    returns the number of bytes."""
    cdef uint32_t i, _round
    cdef uint64_t total = 0, n = 0
    with nogil:
        for _round in range(rounds):
            for i in range(<uint32_t>burst.n):
                if plain:
                    total += plain_sum16(mbuf_data(burst.v[i]), burst.v[i].data_len)
                else:
                    total += chain_sum(burst.v[i], 0, burst.v[i].pkt_len)
                n += burst.v[i].pkt_len
    if total == 0:
        raise AssertionError("every sum was zero")
    return n


def segment_loop(Mbuf frame not None, Mempool pool not None, uint32_t rounds):
    """Splits a super-frame and frees the segments ``rounds`` times; returns the number of bytes."""
    cdef mbuf_t *out[2048]
    cdef uint32_t _round
    cdef uint64_t n = 0
    cdef int got = 0
    with nogil:
        for _round in range(rounds):
            mbuf_ref(frame.m)
            got = gso_mbuf(frame.m, pool.p, True, out, 2048)
            if got < 0:
                break
            mbuf_free_bulk(out, <uint32_t>got)
            n += frame.m.pkt_len
    if got < 0:
        raise OSError(-got, "gso_mbuf")
    return n


def copy_loop(uint32_t size, uint32_t rounds):
    """memcpy of ``size`` bytes in the cache between two aligned places. Without alignment, a
    repeated string move is many times slower on some processors."""
    cdef size_t room = (<size_t>size + 8191) / 4096 * 4096
    cdef uint8_t *a = <uint8_t *>aligned_alloc(4096, 2 * room)
    cdef uint32_t round_
    cdef uint64_t seen = 0
    if a == NULL:
        raise MemoryError
    with nogil:
        for round_ in range(2 * <uint32_t>room):
            a[round_] = <uint8_t>round_
        for round_ in range(rounds):
            a[round_ % size] += 1   # so that no copy is like the one before it
            memcpy(a + room, a, size)
            seen += a[room + round_ % size]
        free(a)
    return <uint64_t>size * rounds if seen else 0
