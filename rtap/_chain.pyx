# SPDX-License-Identifier: BSD-3-Clause
"""Runs stages over a burst: what they are given, what becomes of their verdicts."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cimport rtap._compat as _compat
from rtap._linux cimport ENOMEM
from rtap._pool cimport mbuf_data, mbuf_free, mbuf_free_bulk, mbuf_is_private, mbuf_t
from rtap._request cimport make_private


cdef int scratch_alloc(scratch_t *s, uint32_t room) noexcept nogil:
    s.data = <uint8_t **>calloc(room, sizeof(uint8_t *))
    s.len = <uint32_t *>calloc(room, sizeof(uint32_t))
    s.ol_flags = <uint64_t *>calloc(room, sizeof(uint64_t))
    s.verdict = <uint32_t *>calloc(room, sizeof(uint32_t))
    if s.data == NULL or s.len == NULL or s.ol_flags == NULL or s.verdict == NULL:
        scratch_free(s)
        return -ENOMEM
    return 0


cdef void scratch_free(scratch_t *s) noexcept nogil:
    free(s.data)
    free(s.len)
    free(s.ol_flags)
    free(s.verdict)
    memset(s, 0, sizeof(scratch_t))


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
    """Makes each frame nobody else's; those for which there is no buffer are freed."""
    cdef bint lacking = False
    cdef uint32_t i
    for i in range(n):
        if frames[i].next == NULL and mbuf_is_private(frames[i]):
            continue
        if make_private(&frames[i]) != 0:
            s.verdict[i] = DROP
            lacking = True
    return keep(s, frames, n, n_targets) if lacking else n


cdef int chain_run(stage_t *stages, uint32_t n_stages, uint32_t n_targets, scratch_t *s,
                   mbuf_t **frames, uint32_t *n, uint32_t *failed) noexcept nogil:
    """Runs all stages over ``n`` frames, of which ``n`` are left then, with ``s.verdict`` below
    ``n_targets``.  Else the -errno of stage ``failed``, and all frames freed."""
    cdef uint32_t left = n[0], came, i, k
    cdef uint64_t bytes, began
    cdef rtap_burst burst
    cdef stage_t *stage
    cdef bint drops
    cdef int rc
    memset(s.verdict, 0, left * sizeof(uint32_t))
    for k in range(n_stages):
        if left == 0:
            break
        stage = &stages[k]
        began = _compat.cycles()
        bytes = 0
        came = left
        for i in range(left):
            bytes += frames[i].pkt_len
        if stage.flags & STAGE_WRITES:
            left = own_all(s, frames, left, n_targets)
        if stage.flags & STAGE_ARRAYS:
            for i in range(left):
                s.data[i] = mbuf_data(frames[i])
                s.len[i] = frames[i].data_len
                s.ol_flags[i] = frames[i].ol_flags
        burst.abi = STAGE_ABI
        burst.n = left
        burst.n_targets = n_targets
        burst.reserved = 0
        burst.data = s.data
        burst.len = s.len
        burst.ol_flags = s.ol_flags
        burst.verdict = s.verdict
        burst.frames = <void *const *>frames
        rc = stage.fn(stage.ctx, &burst) if left > 0 else 0
        drops = False
        for i in range(left):
            drops |= s.verdict[i] >= n_targets
        if rc != 0:
            mbuf_free_bulk(frames, left)
            left = 0
        else:
            if stage.flags & STAGE_ARRAYS:
                for i in range(left):
                    frames[i].ol_flags = s.ol_flags[i]
            if drops:
                left = keep(s, frames, left, n_targets)
        _compat.counter_add(&stage.packets, came)
        _compat.counter_add(&stage.bytes, bytes)
        if came > left:
            _compat.counter_add(&stage.drops, came - left)
        _compat.counter_add(&stage.cycles, _compat.cycles() - began)
        if rc != 0:
            n[0] = 0
            failed[0] = k
            return rc if rc < 0 else -rc
    n[0] = left
    return 0
