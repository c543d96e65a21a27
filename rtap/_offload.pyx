# SPDX-License-Identifier: BSD-3-Clause
"""The functions of :mod:`rtap.offload`.  They check arguments; the native functions of ``_frames``
do the work."""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport E2BIG, ENOBUFS
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memmove, memset

from rtap._core.burst cimport Burst, burst_make
from rtap._core.flags cimport (
    RX_IP_CKSUM_BAD, RX_IP_CKSUM_GOOD, RX_L4_CKSUM_BAD, RX_L4_CKSUM_GOOD, RX_L4_CKSUM_NONE,
    RX_OUTER_IP_CKSUM_BAD, RX_OUTER_L4_CKSUM_BAD,
)
from rtap._core.linux cimport VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE
from rtap._core.mbuf cimport Mbuf, check_range
from rtap._core.mempool cimport Mempool
from rtap._core.pool cimport (
    MAX_DATA_ROOM, mbuf_free, mbuf_read, mbuf_ref, mbuf_t, mbuf_window, pool_t,
)
from rtap._frames.checksum cimport chain_sum, fold16, sum16, update16
from rtap._frames.parse cimport HEADERS_MAX, headers_of, headers_t, parse_headers
from rtap._frames.segment cimport (
    FITS, MISFITS, MISFIT_SUPER, check_one, complete as complete_frame, gso_mbuf, misfit_t,
    plan_mbuf, plan_segments, plan_t, segment_payload, vnet_t, write_segment,
)
from rtap._frames.verify cimport (
    fill_frame, fill_unfinished, note_verdict, unfinished_at, verify_frame,
)

cdef enum:
    GIL_BYTES = 1 << 20         # summing fewer takes less time than getting the GIL back
    # ChecksumStatus
    UNKNOWN = 0
    BAD = 1
    GOOD = 2
    NONE = 3
    FRAME_MAX = MAX_DATA_ROOM


@cython.final
cdef class _Frame:
    """An mbuf, or the bytes of a buffer as one; ``m`` is valid while this object lives."""

    cdef mbuf_t own
    cdef mbuf_t *m
    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, frame):
        if isinstance(frame, Mbuf):
            with cython.critical_section(frame):
                self.m = (<Mbuf>frame).frame()
                mbuf_ref(self.m)
            return
        PyObject_GetBuffer(frame, &self.view, PyBUF_SIMPLE)
        self.held = True
        if self.view.len > FRAME_MAX:
            raise ValueError(f"a frame has at most {FRAME_MAX} bytes, got {self.view.len}")
        memset(&self.own, 0, sizeof(mbuf_t))
        self.own.buf = <uint8_t *>self.view.buf
        self.own.buf_len = self.own.data_len = self.own.pkt_len = <uint32_t>self.view.len
        self.own.nb_segs = 1
        self.m = &self.own

    cdef uint32_t piece(self, const uint8_t **start) noexcept:
        """Where the first segment's bytes are, and their number."""
        cdef uint8_t *p
        cdef uint32_t n = mbuf_window(self.m, &p)
        start[0] = p
        return n

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)
        else:
            mbuf_free(self.m)


@cython.final
cdef class _Loan:
    """A burst's frames while a native function works on them without the GIL; others see it empty.

    ``end`` gives back the remaining frames, in a ``finally`` that starts together with the loan."""

    cdef Burst burst
    cdef mbuf_t **v
    cdef Py_ssize_t n, capacity

    def __cinit__(self, Burst burst not None):
        self.burst = burst
        self.n = burst.lend(&self.v, &self.capacity)

    cdef int end(self) except -1:
        cdef Burst burst = self.burst
        self.burst = None
        return burst.give_back(self.v, self.n, self.capacity)


cdef const uint8_t *mbuf_headers(const mbuf_t *m, uint8_t *copy, headers_t *h, bint l2,
                                 int *result) noexcept nogil:
    cdef uint32_t n
    cdef const uint8_t *p = headers_of(m, copy, &n)
    result[0] = parse_headers(p, n, m.pkt_len, l2, h)
    return p


cdef uint32_t status_of(uint64_t flags, bint l3, bint l4) noexcept nogil:
    """One ChecksumStatus for both layers: BAD if either is wrong, else the status of layer 4."""
    if l3 and flags & (RX_IP_CKSUM_BAD | RX_OUTER_IP_CKSUM_BAD):
        return BAD
    if not l4:
        return GOOD if flags & RX_IP_CKSUM_GOOD else UNKNOWN
    if flags & RX_OUTER_L4_CKSUM_BAD:
        return BAD
    if flags & RX_L4_CKSUM_NONE == RX_L4_CKSUM_NONE:
        return NONE
    if flags & RX_L4_CKSUM_BAD:
        return BAD
    return GOOD if flags & RX_L4_CKSUM_GOOD else UNKNOWN


def checksum(buf, uint64_t initial=0):
    """The Internet checksum of some bytes, as a header field holds it: complemented, 0..0xffff.

    ``initial`` is added first: a sum of big-endian 16-bit words of any size up to 64 bits, for
    instance :func:`partial` over bytes before these, of even length.  An odd last byte is the high
    half of a word.  RFC 1071.
    """
    return partial(buf, initial) ^ 0xffff


def partial(buf, uint64_t initial=0):
    """Like :func:`checksum`, but not complemented, so that a later sum can continue it:
    0..0xffff."""
    cdef Py_buffer view
    cdef uint32_t total
    if isinstance(buf, Mbuf):
        with cython.critical_section(buf):
            total = chain_sum((<Mbuf>buf).alive(), 0, (<Mbuf>buf).length())
    else:
        PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
        try:
            if view.len < GIL_BYTES:
                total = sum16(<const uint8_t *>view.buf, view.len)
            else:
                with nogil:
                    total = sum16(<const uint8_t *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
    return fold16(<uint64_t>fold16(initial) + total)


def update(checksum, old, new):
    """A checksum field after the bytes ``old`` that it covers were replaced by ``new`` (RFC 1624).

    Both start at an even offset in the summed bytes; zeros follow the shorter one.  A
    result of 0 is right for IP and TCP; a UDP field then takes 0xffff.
    """
    cdef uint32_t field = check_range("checksum", checksum, 0, 0xffff)
    return update16(field, partial(old), partial(new))


def checksum_burst(Burst burst not None, offset=0):
    """:func:`checksum` of every frame from ``offset`` on: a uint16 memoryview, one pass without
    the GIL.  A frame that ends before ``offset`` counts as empty."""
    cdef uint32_t start = check_range("offset", offset, 0, MAX_DATA_ROOM)
    cdef _Loan loan = _Loan(burst)
    cdef bytes out
    cdef uint16_t *p
    cdef Py_ssize_t i
    try:
        out = PyBytes_FromStringAndSize(NULL, loan.n * sizeof(uint16_t))
        p = <uint16_t *>PyBytes_AS_STRING(out)
        with nogil:
            for i in range(loan.n):
                p[i] = chain_sum(loan.v[i], start, <uint32_t>-1) ^ 0xffff
    finally:
        loan.end()
    return memoryview(out).cast("H")


def verify(frame, bint l2, bint l3, bint l4):
    cdef _Frame f = _Frame(frame)
    return status_of(verify_frame(f.m, l2), l3, l4)


def verify_burst(Burst burst not None, *, bint l2=True):
    """:func:`verify` for every frame: a uint8 memoryview of :class:`ChecksumStatus` values.

    Sets each mbuf's ``RX_*_CKSUM_*`` flags to the result, as a device with checksum offloads
    does."""
    cdef _Loan loan = _Loan(burst)
    cdef bytes out
    cdef uint8_t *p
    cdef uint64_t flags
    cdef Py_ssize_t i
    try:
        out = PyBytes_FromStringAndSize(NULL, loan.n)
        p = <uint8_t *>PyBytes_AS_STRING(out)
        with nogil:
            for i in range(loan.n):
                flags = verify_frame(loan.v[i], l2)
                note_verdict(loan.v[i], flags)
                p[i] = <uint8_t>status_of(flags, True, True)
    finally:
        loan.end()
    return memoryview(out)


def parse(frame, bint l2):
    cdef _Frame f = _Frame(frame)
    cdef uint8_t copy[HEADERS_MAX]
    cdef headers_t h
    cdef int result
    mbuf_headers(f.m, copy, &h, l2, &result)
    if result != 0:
        raise ValueError(f"malformed frame of {f.m.pkt_len} bytes: a length or a version of its "
                         "headers contradicts another one, or the frame ends inside a header")
    return (h.packet_type, h.l2_len, h.l3_len, h.l4_len, h.outer_l2_len, h.outer_l3_len,
            h.fragment != 0)


def parse_burst(Burst burst not None, *, bint l2=True):
    """:func:`parse` for every frame: sets ``packet_type`` and the header lengths of each mbuf and
    returns the packet types, a uint32 memoryview.  Of a malformed frame, only the values that make
    sense are set."""
    cdef _Loan loan = _Loan(burst)
    cdef bytes out
    cdef uint8_t copy[HEADERS_MAX]
    cdef uint32_t *p
    cdef headers_t h
    cdef mbuf_t *m
    cdef Py_ssize_t i
    cdef int result
    try:
        out = PyBytes_FromStringAndSize(NULL, loan.n * sizeof(uint32_t))
        p = <uint32_t *>PyBytes_AS_STRING(out)
        with nogil:
            for i in range(loan.n):
                m = loan.v[i]
                mbuf_headers(m, copy, &h, l2, &result)
                p[i] = m.packet_type = h.packet_type
                m.l2_len = h.l2_len
                m.l3_len = h.l3_len
                m.l4_len = h.l4_len
                m.outer_l2_len = h.outer_l2_len
                m.outer_l3_len = h.outer_l3_len
    finally:
        loan.end()
    return memoryview(out).cast("I")


def fill(frame, *, bint l2=True):
    """The frame with its IPv4, TCP and UDP checksums written, in tunnels those of both layers.

    Their old values do not matter, except that an outer UDP checksum of 0 in a tunnel stays 0.
    With ``l2`` false the frame starts with its IP header.  Fragments get only the IPv4
    checksum.  ValueError when the frame's lengths contradict each other or its size.
    """
    cdef _Frame f = _Frame(frame)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, f.m.pkt_len)
    cdef mbuf_t copy
    memset(&copy, 0, sizeof(mbuf_t))
    copy.buf = <uint8_t *>PyBytes_AS_STRING(out)
    copy.buf_len = <uint32_t>len(out)
    copy.data_len = copy.pkt_len = mbuf_read(f.m, 0, copy.buf, copy.buf_len)
    copy.nb_segs = 1
    if copy.data_len != copy.buf_len:
        raise ValueError("the mbuf shrank while it was read")
    if fill_frame(&copy, l2) != 0:
        raise ValueError(f"malformed frame of {copy.pkt_len} bytes: its checksums cannot be "
                         "computed, since its lengths contradict each other or its size")
    return out


def fill_burst(Burst burst not None, *, bint l2=True):
    """Writes the checksums of every frame in place, like :func:`fill`; all holders of a frame see
    the change.  A super-frame, and a frame whose checksum is left to the kernel, gets the sum of
    its pseudo-header, from which the kernel finishes the checksum.

    Returns how many frames got their checksums; a malformed frame stays unchanged."""
    cdef _Loan loan = _Loan(burst)
    cdef Py_ssize_t i, done = 0
    cdef uint32_t start
    cdef mbuf_t *m
    try:
        with nogil:
            for i in range(loan.n):
                m = loan.v[i]
                if unfinished_at(m, &start):
                    done += fill_unfinished(m, l2) == 0
                else:
                    done += fill_frame(m, l2) == 0
    finally:
        loan.end()
    return done


# In the order of misfit_t.
cdef tuple MISFIT_TEXTS = (
    "it fits",
    "hdr_len is longer than the frame",
    "gso_size must be 1..65534",
    "gso_type is unknown",
    "UDP fragmentation (gso_type 3) is not supported, only segmentation (5)",
    "the ECN bit is for TCP",
    "UDP segmentation needs the NEEDS_CSUM flag",
    "the frame's headers are malformed",
    "gso_type is not for the frame's IP version",
    "gso_type is not for the protocol that the IP packet carries",
    "a fragment cannot be segmented",
    "the IP packet is longer than the frame, or too short for its headers",
    "an authenticated packet cannot be segmented",
    "csum_start is not where the TCP or UDP header, or any header behind IP, starts",
    "csum_offset is not where the checksum is",
    "more than 128 UDP segments",
    "a segment would be longer than 65535 bytes",
    "its lengths contradict each other",
    "its checksum is not inside it",
    "it describes a super-frame: segment() takes that",
)
assert len(MISFIT_TEXTS) == MISFITS


cdef misfit(misfit_t why, str what="the virtio-net header does not fit the frame"):
    return ValueError(f"{what}: {MISFIT_TEXTS[why]}")


cdef vnet_t vnet_hdr(tuple fields) except *:
    cdef vnet_t hdr
    (hdr.flags, hdr.gso_type, hdr.hdr_len, hdr.gso_size, hdr.csum_start,
     hdr.csum_offset) = fields
    return hdr


def complete(frame, tuple hdr, bint l2):
    cdef vnet_t h = vnet_hdr(hdr)
    cdef _Frame f = _Frame(frame)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, f.m.pkt_len)
    cdef uint8_t *p = <uint8_t *>PyBytes_AS_STRING(out)
    cdef uint32_t n = mbuf_read(f.m, 0, p, <uint32_t>len(out))
    cdef misfit_t why = FITS
    if n != len(out):
        raise ValueError("the mbuf shrank while it was read")
    if h.gso_type != VIRTIO_NET_HDR_GSO_NONE:
        raise misfit(MISFIT_SUPER)
    if h.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        why = complete_frame(p, n, l2, &h)
    if why != FITS:
        raise misfit(why)
    return out


def segment(frame, tuple hdr, bint l2):
    cdef vnet_t h = vnet_hdr(hdr)
    cdef bytes whole, out
    cdef _Frame f
    cdef plan_t plan
    cdef misfit_t why
    cdef const uint8_t *p
    cdef uint32_t i, n
    cdef list frames = []
    if h.gso_type == VIRTIO_NET_HDR_GSO_NONE:
        return [complete(frame, hdr, l2)]
    f = _Frame(frame)
    if f.m.next != NULL:
        whole = bytes(frame)
        f = _Frame(whole)
    n = f.piece(&p)
    why = plan_segments(p, n, n, l2, &h, &plan)
    if why != FITS:
        raise misfit(why)
    if plan.count == 1:
        return [complete(frame, (*hdr[:1], VIRTIO_NET_HDR_GSO_NONE, *hdr[2:]), l2)]
    for i in range(plan.count):
        out = PyBytes_FromStringAndSize(NULL, plan.hdr_len + segment_payload(&plan, i))
        write_segment(&plan, p, i, <uint8_t *>PyBytes_AS_STRING(out))
        frames.append(out)
    return frames


def gso(Burst burst not None, Mempool pool=None, *, bint l2=True):
    """Splits the super-frames of a burst and returns the frames that go on a wire, in order.

    A super-frame is an mbuf that came as one (``RX_LRO``), or one with ``TX_TCP_SEG`` or
    ``TX_UDP_SEG`` and ``tso_segsz``.  The new frames take their mbufs from ``pool``, or from each
    super-frame's own pool; with small slots a frame takes several.  Other frames go on unchanged,
    except that an unfinished checksum is finished.

    The frames move: ``burst`` is empty afterwards, or starts with the first frame for which the
    pool had too few mbufs, as after ``tx_burst``.  ValueError for a frame that does not match its
    mbuf's fields; no frame has changed then.
    """
    cdef pool_t *p = NULL if pool is None else pool.hold()  # so that it cannot be closed meanwhile
    try:
        return split_all(burst, p, l2)
    finally:
        if p != NULL:
            pool.let_go()


cdef Burst split_all(Burst burst, pool_t *p, bint l2):
    cdef Burst out
    cdef plan_t plan
    cdef misfit_t why = FITS
    cdef Py_ssize_t i, total = 0, at = 0
    cdef int made = 0
    cdef _Loan loan = _Loan(burst)
    try:
        with nogil:
            for i in range(loan.n):
                why = plan_mbuf(loan.v[i], l2, &plan)
                if why == FITS and plan.count == 1:
                    why = check_one(loan.v[i], l2)
                if why != FITS:
                    at = i
                    break
                total += plan.count
        if why != FITS:
            raise misfit(why, f"frame {at} cannot be segmented")
        out = burst_make(total)
        with nogil:
            while at < loan.n:
                made = gso_mbuf(loan.v[at], loan.v[at].pool if p == NULL else p, l2,
                                out.v + out.n, <uint32_t>(total - out.n))
                if made < 0:
                    break
                out.n += made
                at += 1
        loan.n -= at
        memmove(loan.v, loan.v + at, loan.n * sizeof(mbuf_t *))
    finally:
        loan.end()
    if made < 0 and made != -ENOBUFS and made != -E2BIG:
        out.extend(burst)
        burst.free()
        burst.extend(out)
        raise ValueError(f"frame {at} cannot be segmented: another thread has cut it meanwhile")
    return out
