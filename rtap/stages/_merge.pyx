# SPDX-License-Identifier: BSD-3-Clause
"""Frames of a flow coalesced into super-frames."""

from libc.stdint cimport uint32_t

cimport rtap._core.compat as _compat
from rtap._core.mbuf cimport check_range
from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport LAYER_ETHERNET, LAYER_IP
from rtap._frames.coalesce cimport gro_burst
from rtap._frames.gro cimport GRO_FIXED_ID, GRO_L3, GRO_TRUST, GRO_UDP
from rtap.stages._runner cimport STAGE_MERGES, scratch_t, stage_t
from rtap.stages._stage cimport Stage


cdef struct merge_t:
    uint32_t flags
    uint32_t max_length


cdef uint32_t merge(stage_t *stage, scratch_t *s, mbuf_t **v, uint32_t n) noexcept nogil:
    """Merges one target after the other: frames for different targets stay apart."""
    cdef merge_t *how = <merge_t *>stage.ctx
    cdef uint32_t got = 0, at = 0, target, part, rest, made, i
    s.gro.flags = how.flags
    s.gro.max_length = how.max_length
    while at < n:
        target = s.verdict[at]
        part = 0
        for i in range(at, n):
            if s.verdict[i] == target:
                s.spare[part] = v[i]
                part += 1
        rest = n
        for i in range(n - at):         # the other frames stay in order, and move to the end
            if s.verdict[n - 1 - i] != target:
                rest -= 1
                v[rest] = v[n - 1 - i]
                s.verdict[rest] = s.verdict[n - 1 - i]
        made = gro_burst(s.gro, s.spare, part, 0, 0, NULL, v + got)
        for i in range(made):
            s.verdict[got + i] = target
        got += made
        at = rest
    _compat.counter_add(&stage.merged, n - got)
    return got


cdef class Gro(Stage):
    """Gro(*, udp=False, max_length=65535, fixed_id=False, l2=True)\n--\n

    Coalesces the frames of a flow in one burst into super-frames, which devices take as
    they are; see :class:`rtap.offload.Gro` for the rules.

    A checksum that the kernel found right is not checked again.  The order
    within a flow is kept.  No frame is held back for the next burst.

    udp:        datagrams too; only for receivers that want the datagrams back one by one
    max_length: bytes of a super-frame's IP packet (576..65535)
    fixed_id:   IPv4 frames with DF may repeat their ID; the kernel increments it when it splits
    l2:         Ethernet frames (TAP), else IP packets (TUN)
    """

    cdef merge_t how

    def __init__(self, *, bint udp=False, max_length=65535, bint fixed_id=False, bint l2=True):
        cdef uint32_t longest = <uint32_t>check_range("max_length", max_length, 576, 65535)
        self.once()
        self.how.max_length = longest
        self.how.flags = (GRO_TRUST | (GRO_UDP if udp else 0) | (GRO_FIXED_ID if fixed_id else 0)
                          | (0 if l2 else GRO_L3))
        self.layer = LAYER_ETHERNET if l2 else LAYER_IP
        self.ctx = &self.how
        self.flags = STAGE_MERGES
        self.reshape = merge
