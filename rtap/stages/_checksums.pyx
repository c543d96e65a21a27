# SPDX-License-Identifier: BSD-3-Clause
"""IPv4, TCP, UDP and ICMP checksums: checked, or written."""

from libc.stdint cimport uint32_t, uint64_t

from rtap._chain cimport DROP, STAGE_WRITES, rtap_burst
from rtap._pool cimport mbuf_t
from rtap._verify cimport (
    RX_CKSUM_MASK, RX_IP_CKSUM_BAD, RX_IP_CKSUM_GOOD, RX_L4_CKSUM_BAD, RX_L4_CKSUM_GOOD,
    RX_OUTER_IP_CKSUM_BAD, RX_OUTER_L4_CKSUM_BAD, RX_OUTER_L4_CKSUM_GOOD, fill_frame, verify_frame,
)
from rtap._vnet cimport keeps_vnet_hdr
from rtap.stages._stage cimport Stage


cdef struct checksum_t:
    bint l2
    bint drop


cdef inline bint is_bad(uint64_t found, uint64_t bad, uint64_t good) noexcept nogil:
    """The "bad" bit without the "good" one: both together say that none was looked at."""
    return found & (bad | good) == bad


cdef int checksum_fill(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef bint l2 = (<checksum_t *>ctx).l2
    cdef uint32_t i
    for i in range(burst.n):
        if not keeps_vnet_hdr(frames[i]):       # the kernel finishes those, or whoever sends them
            fill_frame(frames[i], l2)
    return 0


cdef int checksum_verify(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef checksum_t *c = <checksum_t *>ctx
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef uint64_t found
    cdef uint32_t i
    for i in range(burst.n):
        if keeps_vnet_hdr(frames[i]):
            continue
        found = verify_frame(frames[i], c.l2)
        frames[i].ol_flags = frames[i].ol_flags & ~RX_CKSUM_MASK | found
        if c.drop and (is_bad(found, RX_IP_CKSUM_BAD, RX_IP_CKSUM_GOOD)
                       or is_bad(found, RX_L4_CKSUM_BAD, RX_L4_CKSUM_GOOD)
                       or is_bad(found, RX_OUTER_L4_CKSUM_BAD, RX_OUTER_L4_CKSUM_GOOD)
                       or found & RX_OUTER_IP_CKSUM_BAD):
            burst.verdict[i] = DROP
    return 0


cdef class ChecksumFill(Stage):
    """Writes every IPv4, TCP and UDP checksum, of a tunnel's inner and outer packet.

    Frames that came with a checksum which the kernel is to finish, and super-frames, keep what they
    have.  l2: Ethernet frames (TAP), else IP packets (TUN)."""

    cdef checksum_t how

    def __init__(self, bint l2=True):
        self.how.l2 = l2
        self.ctx = &self.how
        self.flags = STAGE_WRITES
        self.fn = checksum_fill


cdef class ChecksumVerify(Stage):
    """Checks checksums, drops frames that have a wrong one (unless ``drop=False``) and sets the
    checksum bits of the others' ``ol_flags``.

    Frames whose checksum the kernel left unfinished are intact, and go on as they are.
    l2: Ethernet frames (TAP), else IP packets (TUN)."""

    cdef checksum_t how

    def __init__(self, bint drop=True, bint l2=True):
        self.how.l2 = l2
        self.how.drop = drop
        self.ctx = &self.how
        self.fn = checksum_verify
