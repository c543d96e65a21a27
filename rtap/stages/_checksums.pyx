# SPDX-License-Identifier: BSD-3-Clause
"""IPv4, TCP, UDP and ICMP checksums: checked, or written."""

from libc.stdint cimport uint32_t, uint64_t

cimport rtap._core.compat as _compat
from rtap._core.flags cimport (
    RX_IP_CKSUM_BAD, RX_IP_CKSUM_GOOD, RX_L4_CKSUM_BAD, RX_L4_CKSUM_GOOD, RX_OUTER_IP_CKSUM_BAD,
    RX_OUTER_L4_CKSUM_BAD, RX_OUTER_L4_CKSUM_GOOD,
)
from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport LAYER_ETHERNET, LAYER_IP
from rtap._frames.verify cimport fill_frame, fill_unfinished, note_verdict, verify_frame
from rtap._frames.vnet cimport keeps_vnet_hdr
from rtap.stages._runner cimport DROP, STAGE_WRITES, rtap_burst
from rtap.stages._stage cimport Stage


cdef struct checksum_t:
    bint l2
    bint drop
    uint64_t bad_ip             # frames
    uint64_t bad_l4
    uint64_t bad_outer_ip
    uint64_t bad_outer_l4


cdef inline bint is_bad(uint64_t found, uint64_t bad, uint64_t good) noexcept nogil:
    """The "bad" bit without the "good" one: both together mean "not checked"."""
    return found & (bad | good) == bad


cdef int checksum_fill(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef bint l2 = (<checksum_t *>ctx).l2
    cdef uint32_t i
    for i in range(burst.n):
        if keeps_vnet_hdr(frames[i]):           # the kernel or the final sender finishes these
            fill_unfinished(frames[i], l2)
        else:
            fill_frame(frames[i], l2)
    return 0


cdef inline bint count_bad(checksum_t *c, uint64_t found) noexcept nogil:
    """Counts wrong checksums; returns whether there is one."""
    cdef bint ip = is_bad(found, RX_IP_CKSUM_BAD, RX_IP_CKSUM_GOOD)
    cdef bint l4 = is_bad(found, RX_L4_CKSUM_BAD, RX_L4_CKSUM_GOOD)
    cdef bint outer_ip = found & RX_OUTER_IP_CKSUM_BAD != 0
    cdef bint outer_l4 = is_bad(found, RX_OUTER_L4_CKSUM_BAD, RX_OUTER_L4_CKSUM_GOOD)
    if not (ip or l4 or outer_ip or outer_l4):
        return False
    _compat.shared_add(&c.bad_ip, ip)
    _compat.shared_add(&c.bad_l4, l4)
    _compat.shared_add(&c.bad_outer_ip, outer_ip)
    _compat.shared_add(&c.bad_outer_l4, outer_l4)
    return True


cdef int checksum_verify(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef checksum_t *c = <checksum_t *>ctx
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef uint64_t found
    cdef uint32_t i
    for i in range(burst.n):
        found = verify_frame(frames[i], c.l2)
        note_verdict(frames[i], found)
        if count_bad(c, found) and c.drop:
            burst.verdict[i] = DROP
    return 0


cdef class ChecksumFill(Stage):
    """ChecksumFill(l2=True)\n--\n

    Writes every IPv4, TCP and UDP checksum, of a tunnel's inner and outer packet.

    If a frame came as a super-frame, or with a checksum that the kernel has to finish, that
    checksum's field gets the sum of the pseudo-header, from which the kernel finishes it.
    l2: Ethernet frames (TAP), else IP packets (TUN)."""

    cdef checksum_t how

    def __init__(self, bint l2=True):
        self.once()
        self.how.l2 = l2
        self.layer = LAYER_ETHERNET if l2 else LAYER_IP
        self.ctx = &self.how
        self.flags = STAGE_WRITES
        self.fn = checksum_fill


cdef class ChecksumVerify(Stage):
    """ChecksumVerify(drop=True, l2=True)\n--\n

    Checks checksums, drops frames that have a wrong one (unless ``drop=False``) and sets the
    checksum bits of the others' ``ol_flags``.

    ``bad_ip``, ``bad_l4``, ``bad_outer_ip`` and ``bad_outer_l4`` count frames with a wrong checksum
    of that kind, over all routes with this stage; the outer ones belong to tunnels.

    A checksum that the kernel left unfinished is wrong when its field does not hold the sum of the
    pseudo-header.  Frames with an unfinished one, and super-frames, keep ``RX_L4_CKSUM_NONE``.
    l2: Ethernet frames (TAP), else IP packets (TUN)."""

    cdef checksum_t how

    def __init__(self, bint drop=True, bint l2=True):
        self.once()
        self.how.l2 = l2
        self.layer = LAYER_ETHERNET if l2 else LAYER_IP
        self.how.drop = drop
        self.ctx = &self.how
        self.fn = checksum_verify

    @property
    def bad_ip(self):
        """Frames with a wrong IPv4 header checksum, of a tunnel's inner packet."""
        return _compat.counter_read(&self.how.bad_ip)

    @property
    def bad_l4(self):
        """Frames with a wrong TCP or UDP checksum, of a tunnel's inner packet."""
        return _compat.counter_read(&self.how.bad_l4)

    @property
    def bad_outer_ip(self):
        """Frames with a wrong checksum in a tunnel's outer IPv4 header."""
        return _compat.counter_read(&self.how.bad_outer_ip)

    @property
    def bad_outer_l4(self):
        """Frames with a wrong checksum in a tunnel's outer UDP header."""
        return _compat.counter_read(&self.how.bad_outer_l4)
