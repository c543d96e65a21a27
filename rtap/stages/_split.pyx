# SPDX-License-Identifier: BSD-3-Clause
"""Super-frames split into the frames that go on a wire."""

from libc.errno cimport E2BIG, EMSGSIZE, ENOBUFS
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

cimport rtap._core.compat as _compat
from rtap._core.flags cimport TX_TCP_SEG, TX_UDP_SEG
from rtap._core.mempool cimport Mempool
from rtap._core.pool cimport mbuf_t, pool_t
from rtap._core.queue cimport LAYER_ETHERNET, LAYER_IP
from rtap._frames.segment cimport gso_part, gso_whole
from rtap._frames.vnet cimport keeps_vnet_hdr
from rtap.stages._runner cimport STAGE_SPLITS, held_drop, held_t, scratch_t, stage_t
from rtap.stages._stage cimport Stage


cdef struct split_t:
    pool_t *pool                # NULL: each frame's own pool
    bint l2


cdef inline bint is_whole(const mbuf_t *m) noexcept nogil:
    return not keeps_vnet_hdr(m) and m.ol_flags & (TX_TCP_SEG | TX_UDP_SEG) == 0


cdef int split_next(split_t *how, held_t *held, mbuf_t **out, uint32_t room,
                    bint alone) noexcept nogil:
    """Splits the first waiting frame; returns how many frames it made, as gso_whole.  A consumed
    frame no longer waits.  Only if ``alone``, when no earlier frame is left, may it make some of
    the frames without the others."""
    cdef mbuf_t *m = held.frames[held.at]
    cdef pool_t *pool = how.pool if how.pool != NULL else m.pool
    cdef int rc = -ENOBUFS
    if held.made == 0 and is_whole(m):
        out[0] = m
        held.left = 0
        return 1
    if held.made == 0:
        rc = gso_whole(m, pool, how.l2, True, out, room)
        held.left = 0
    if alone and (rc == -ENOBUFS or rc == -E2BIG):
        rc = gso_part(m, pool, how.l2, True, held.made, out, room, &held.left)
        if rc > 0:
            held.made += rc
    return rc


cdef uint32_t split(stage_t *stage, scratch_t *s, mbuf_t **v, uint32_t n) noexcept nogil:
    cdef split_t *how = <split_t *>stage.ctx
    cdef held_t *held = &stage.held
    cdef uint32_t got = 0, verdict, i
    cdef uint64_t more = 0
    cdef int rc
    while got < n and is_whole(v[got]):
        got += 1
    if got < n:                 # from here on the arrays are written anew
        held.at = 0
        held.n = n - got
        held.made = 0
        memcpy(held.frames, v + got, held.n * sizeof(mbuf_t *))
        memcpy(held.verdict, s.verdict + got, held.n * sizeof(uint32_t))
    while held.n > 0:
        if got == s.room:
            break
        verdict = held.verdict[held.at]
        rc = split_next(how, held, v + got, s.room - got, got == 0)
        if got > 0 and (rc == -EMSGSIZE or rc == -ENOBUFS or rc == -E2BIG):
            break               # when the earlier frames are gone there are room and buffers
        if rc < 0:
            held_drop(stage, 1)
            continue
        for i in range(rc):
            s.verdict[got + i] = verdict
        got += rc
        more += rc
        if held.left > 0:
            break
        more -= 1
        held.at += 1
        held.n -= 1
        held.made = 0
    _compat.counter_add(&stage.split, more)
    return got


cdef class Gso(Stage):
    """Gso(pool=None, *, l2=True)\n--\n

    Splits super-frames, TCP or UDP, into frames within their segment size, as on a wire: headers
    and checksums complete.  A frame whose checksum was left to the kernel gets it.

    Use it in front of stages that want plain frames; devices take super-frames as they are.  If
    there are too few buffers for all frames of a super-frame, even when nothing else is in hand,
    some go first, and the others when these are gone.  Frames for which there is then no buffer at
    all are dropped.  So is a super-frame that does not match its own offload fields, or that would
    make more than 2048 frames.

    pool: the :class:`rtap.Mempool` of the frames; by default each super-frame's own
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
            self.how.pool = pool        # the same for each worker: it is closed only once
        return 0

    cdef int leave(self) except -1:
        if self.pool is not None:
            self.pool.let_go()
        return 0
