# SPDX-License-Identifier: BSD-3-Clause
"""Super-frames split into the frames that go on a wire."""

from libc.errno cimport EMSGSIZE, ENOBUFS
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

cimport rtap._compat as _compat
from rtap._chain cimport LAYER_ETHERNET, LAYER_IP, STAGE_SPLITS, held_t, scratch_t, stage_t
from rtap._mempool cimport Mempool
from rtap._pool cimport mbuf_free, mbuf_t, pool_t
from rtap._request cimport TX_TCP_SEG, TX_UDP_SEG
from rtap._segment cimport gso_mbuf
from rtap._vnet cimport keeps_vnet_hdr
from rtap.stages._stage cimport Stage


cdef struct split_t:
    pool_t *pool                # NULL: each frame's own
    bint l2


cdef inline bint is_whole(const mbuf_t *m) noexcept nogil:
    return not keeps_vnet_hdr(m) and m.ol_flags & (TX_TCP_SEG | TX_UDP_SEG) == 0


cdef uint32_t split(stage_t *stage, scratch_t *s, mbuf_t **v, uint32_t n) noexcept nogil:
    cdef split_t *how = <split_t *>stage.ctx
    cdef held_t *held = &stage.held
    cdef uint32_t got = 0, drops = 0, verdict, i
    cdef uint64_t more = 0
    cdef mbuf_t *m
    cdef int rc
    while got < n and is_whole(v[got]):
        got += 1
    if got < n:                 # from here on they are written anew
        held.at = 0
        held.n = n - got
        memcpy(held.frames, v + got, held.n * sizeof(mbuf_t *))
        memcpy(held.verdict, s.verdict + got, held.n * sizeof(uint32_t))
    while held.n > 0:
        m = held.frames[held.at]
        verdict = held.verdict[held.at]
        rc = -EMSGSIZE
        if got < s.room and is_whole(m):
            v[got] = m
            rc = 1
        elif got < s.room:
            rc = gso_mbuf(m, how.pool if how.pool != NULL else m.pool, how.l2, v + got,
                          s.room - got)
        if got > 0 and (rc == -EMSGSIZE or rc == -ENOBUFS):
            break               # when those before it are gone there is room, and buffers
        held.at += 1
        held.n -= 1
        if rc < 0:
            mbuf_free(m)
            drops += 1
            continue
        more += rc - 1
        for i in range(rc):
            s.verdict[got + i] = verdict
        got += rc
    _compat.counter_add(&stage.split, more)
    _compat.counter_add(&stage.drops, drops)
    return got


cdef class Gso(Stage):
    """Gso(pool=None, *, l2=True)\n--\n

    Splits super-frames, TCP or UDP, into frames within their segment size, as on a wire: headers
    and checksums complete.  A frame whose checksum was left to the kernel gets it.

    For what comes next and wants plain frames; devices take super-frames as they are.  A
    super-frame that does not fit what it says of itself, or for which there are no buffers even
    when nothing is in hand, is dropped.

    pool: the :class:`rtap.Mempool` of the frames; without, each super-frame's own
    l2:   Ethernet frames (TAP), else IP packets (TUN)
    """

    cdef split_t how
    cdef Mempool pool

    def __init__(self, Mempool pool=None, *, bint l2=True):
        self.once()
        self.pool = pool
        self.how.l2 = l2
        self.layer = LAYER_ETHERNET if l2 else LAYER_IP
        self.ctx = &self.how
        self.flags = STAGE_SPLITS
        self.reshape = split

    cdef int enter(self, stage_t *stage) except -1:
        cdef pool_t *pool
        Stage.enter(self, stage)
        if self.pool is not None:
            pool = self.pool.hold()
            self.how.pool = pool        # the same each time, for it is closed once
        return 0

    cdef int leave(self) except -1:
        if self.pool is not None:
            self.pool.let_go()
        return 0
