# SPDX-License-Identifier: BSD-3-Clause
"""Runs stages over a burst: prepares their arguments, and carries out their verdicts."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cimport rtap._core.compat as _compat
cimport rtap._core.live as _live
from rtap._core.linux cimport ENOMEM, EPROTO
from rtap._core.pool cimport (
    mbuf_free, mbuf_free_bulk, mbuf_guard, mbuf_is_private, mbuf_t, mbuf_window,
)
from rtap._frames.gro cimport gro_create, gro_destroy
from rtap._frames.request cimport make_private

cdef enum:
    ERRNO_MAX = 4095            # include/linux/err.h


cdef int scratch_alloc(scratch_t *s, uint32_t room, uint32_t flags) noexcept nogil:
    """Allocates arrays for stages with these flags and bursts of up to ``room`` frames; 0 or
    -ENOMEM."""
    s.room = room
    _live.made(_live.STAGE_ROOMS, 1)
    s.data = <uint8_t **>calloc(room, sizeof(uint8_t *))
    s.len = <uint32_t *>calloc(room, sizeof(uint32_t))
    s.ol_flags = <uint64_t *>calloc(room, sizeof(uint64_t))
    s.verdict = <uint32_t *>calloc(room, sizeof(uint32_t))
    s.spare = <mbuf_t **>calloc(room, sizeof(mbuf_t *))
    s.gro = gro_create(room, room, 0, 0) if flags & STAGE_MERGES else NULL
    if (s.data == NULL or s.len == NULL or s.ol_flags == NULL or s.verdict == NULL
            or s.spare == NULL or flags & STAGE_MERGES and s.gro == NULL):
        scratch_free(s)
        return -ENOMEM
    return 0


cdef void scratch_free(scratch_t *s) noexcept nogil:
    if s.room != 0:
        _live.gone(_live.STAGE_ROOMS, 1)
    free(s.data)
    free(s.len)
    free(s.ol_flags)
    free(s.verdict)
    free(s.spare)
    gro_destroy(s.gro)
    memset(s, 0, sizeof(scratch_t))


cdef int stage_alloc(stage_t *stage, uint32_t room) noexcept nogil:
    """Allocates the stage's own memory, for bursts of up to ``room`` frames; 0 or -ENOMEM."""
    if stage.flags & STAGE_SPLITS:
        stage.held.frames = <mbuf_t **>calloc(room, sizeof(mbuf_t *))
        stage.held.verdict = <uint32_t *>calloc(room, sizeof(uint32_t))
        if stage.held.frames == NULL or stage.held.verdict == NULL:
            stage_free(stage)
            return -ENOMEM
    return 0


cdef void stage_free(stage_t *stage) noexcept nogil:
    free(stage.held.frames)
    free(stage.held.verdict)
    memset(&stage.held, 0, sizeof(held_t))


cdef bint chain_holds(const stage_t *stages, uint32_t n_stages) noexcept nogil:
    """Whether frames wait in a stage, for a run with n = 0."""
    cdef uint32_t k
    for k in range(n_stages):
        if stages[k].held.n > 0:
            return True
    return False


cdef void held_drop(stage_t *stage, uint32_t n) noexcept nogil:
    """Frees the first ``n`` frames that wait in a stage, and counts them.  If some frames of a
    super-frame were made, the remaining ones count as if they had been made too."""
    cdef held_t *held = &stage.held
    cdef uint32_t more
    if n == 0:
        return
    more = held.left - 1 if held.made > 0 else 0
    mbuf_free_bulk(held.frames + held.at, n)
    held.at += n
    held.n -= n
    held.made = 0
    _compat.counter_add(&stage.split, more)
    _compat.counter_add(&stage.drops, n + more)


cdef void chain_drop(stage_t *stages, uint32_t n_stages) noexcept nogil:
    """Frees the frames that wait in all stages."""
    cdef uint32_t k
    for k in range(n_stages):
        held_drop(&stages[k], stages[k].held.n)


cdef uint32_t keep(scratch_t *s, mbuf_t **frames, uint32_t n, uint32_t n_targets) noexcept nogil:
    """Frees frames whose verdict is no target; returns how many are left, in order."""
    cdef uint32_t kept = 0, i
    for i in range(n):
        if s.verdict[i] >= n_targets:
            mbuf_free(frames[i])
            continue
        frames[kept] = frames[i]
        s.verdict[kept] = s.verdict[i]
        kept += 1
    return kept


cdef uint32_t own_all(scratch_t *s, mbuf_t **frames, uint32_t n, uint32_t n_targets) noexcept nogil:
    """Makes each frame private; frees those for which there is no buffer."""
    cdef bint lacking = False
    cdef uint32_t i
    for i in range(n):
        if frames[i].next == NULL and mbuf_is_private(frames[i]):
            continue
        if make_private(&frames[i]) != 0:
            s.verdict[i] = DROP
            lacking = True
    return keep(s, frames, n, n_targets) if lacking else n


cdef int error_of(stage_t *stage, int rc) noexcept nogil:
    """The -errno of a stage's return value, which the user's own stage may get wrong."""
    if -<int>ERRNO_MAX <= rc < 0:
        return rc
    if 0 < rc <= ERRNO_MAX:
        return -rc
    snprintf(stage.why, STAGE_WHY, "it returned %d, which is neither 0 nor -errno", rc)
    return -EPROTO


cdef int call(stage_t *stage, scratch_t *s, uint32_t n_targets, mbuf_t **frames,
              uint32_t *n) noexcept nogil:
    """Runs a stage's function over ``n`` frames; ``n`` is then the number of frames left.  If it
    fails, returns its -errno and frees all of them."""
    cdef uint32_t left = n[0], came = left, i
    cdef stage_burst_t b
    cdef rtap_burst *burst = &b.burst
    cdef bint drops = False
    cdef int rc = 0
    if stage.flags & STAGE_WRITES:
        left = own_all(s, frames, left, n_targets)
    for i in range(left):
        mbuf_guard(frames[i])
    if stage.flags & STAGE_ARRAYS:
        for i in range(left):
            s.len[i] = mbuf_window(frames[i], &s.data[i])
            s.ol_flags[i] = frames[i].ol_flags
    b.stage = stage
    burst.abi = STAGE_ABI
    burst.n = left
    burst.n_targets = n_targets
    burst.reserved = 0
    burst.data = s.data
    burst.len = s.len
    burst.ol_flags = s.ol_flags
    burst.verdict = s.verdict
    burst.frames = <void *const *>frames
    if left > 0:
        rc = stage.fn(stage.ctx, burst)
    for i in range(left):
        drops |= s.verdict[i] >= n_targets
    if rc != 0:
        rc = error_of(stage, rc)
        mbuf_free_bulk(frames, left)
        left = 0
    else:
        if stage.flags & STAGE_ARRAYS:
            for i in range(left):
                frames[i].ol_flags = s.ol_flags[i]
        if drops:
            left = keep(s, frames, left, n_targets)
    if came > left:
        _compat.counter_add(&stage.drops, came - left)
    n[0] = left
    return rc


cdef int chain_run(stage_t *stages, uint32_t n_stages, uint32_t n_targets, scratch_t *s,
                   mbuf_t **frames, uint32_t *n, uint32_t *failed) noexcept nogil:
    """Runs all stages over ``n`` frames; ``n`` is then the number of frames left, with
    ``s.verdict`` below ``n_targets``.  If stage ``failed`` fails, returns its -errno and frees all
    frames.

    With n = 0 it goes on with frames that wait in stages; while there are any it takes no others.
    """
    cdef uint32_t first = 0, i, k
    cdef uint64_t bytes, began
    cdef stage_t *stage
    cdef int rc = 0
    memset(s.verdict, 0, n[0] * sizeof(uint32_t))
    for k in range(n_stages):
        if stages[k].held.n > 0:
            first = k               # the frames that are furthest along
    for k in range(first, n_stages):
        stage = &stages[k]
        if n[0] == 0 and stage.held.n == 0:
            break
        began = _compat.cycles()
        bytes = 0
        for i in range(n[0]):
            bytes += frames[i].pkt_len
        _compat.counter_add(&stage.packets, n[0])
        _compat.counter_add(&stage.bytes, bytes)
        if stage.reshape != NULL:
            n[0] = stage.reshape(stage, s, frames, n[0])
        else:
            rc = call(stage, s, n_targets, frames, n)
        _compat.counter_add(&stage.cycles, _compat.cycles() - began)
        if rc != 0:
            failed[0] = k
            return rc
    return 0
