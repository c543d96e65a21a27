# SPDX-License-Identifier: BSD-3-Clause
"""Receive coalescing for Python: :class:`Gro` over bursts, and the kernel under
:func:`rtap.offload.coalesce`.

A super-frame is a chain of the original frames without their headers: no payload moves.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

import math

cimport rtap._core.compat as _compat
from rtap._core.burst cimport Burst, burst_make
from rtap._core.flags cimport RX_L4_CKSUM_GOOD, RX_L4_CKSUM_NONE
from rtap._core.mbuf cimport check_range
from rtap._core.pool cimport (
    mbuf_bytes, mbuf_clone, mbuf_copy, mbuf_data, mbuf_free, mbuf_guard, mbuf_is_private, mbuf_t,
)
from rtap._frames.gro cimport (
    GRO_FIXED_ID, GRO_L3, GRO_NONE, GRO_TRUST, GRO_UDP, gro_add, gro_create, gro_describe,
    gro_destroy, gro_drained, gro_flush, gro_group_t, gro_headers, gro_item_t, gro_length, gro_room,
    gro_t, gro_write,
)

cdef enum:
    MAX_FLOWS = 1 << 16
    MAX_FRAMES = 1 << 20
    MAX_FRAME_BYTES = 1 << 17


cdef uint64_t FOR_EVER = <uint64_t>-1


# ---- groups to frames


cdef inline bint unshared(const mbuf_t *m) noexcept nogil:
    while m != NULL:
        if _compat.load(&m.refcnt) != 1:
            return False
        m = m.next
    return True


cdef inline bint as_looked_at(const gro_item_t *item, const mbuf_t *own) noexcept nogil:
    """Whether ``own``, the item's frame or its copy, still has the bytes that were examined
    when it came: another holder of the frame may have moved its window since."""
    return (own.pkt_len == item.pkt_len
            and _compat.load_relaxed(&item.m.data_off) == item.data_off)


cdef bint take_over(gro_t *g, gro_group_t *d) noexcept nogil:
    """Makes a group's frames private, with copies and clones of those that others see;
    false, and the frames as they came, when that is impossible."""
    cdef uint32_t at = d.first
    cdef gro_item_t *item
    cdef mbuf_t *own
    while at != GRO_NONE:
        item = &g.items[at]
        own = item.m
        if at == d.first and not mbuf_is_private(own):
            own = mbuf_copy(own)        # its headers will be written to
        elif not unshared(own):
            own = mbuf_clone(own)
        if own == NULL:
            return False
        # The clone will be chained; the frame may have changed between the examination and the
        # clone.
        if (not as_looked_at(item, own) or own.data_len < d.headers
                or at != d.first and own.data_off != item.data_off):
            if own != item.m:
                mbuf_free(own)
            return False
        if own != item.m:
            mbuf_free(item.m)
            item.m = own
        at = item.next
    d.head = mbuf_data(g.items[d.first].m)
    return True


cdef inline mbuf_t *last_segment(mbuf_t *m) noexcept nogil:
    while m.next != NULL:
        m = m.next
    return m


cdef mbuf_t *chain(gro_t *g, gro_group_t *d) noexcept nogil:
    """Makes one frame of a group: the headers of the first one, and the payloads of all."""
    cdef mbuf_t *head = g.items[d.first].m
    cdef mbuf_t *tail = last_segment(head)
    cdef mbuf_t *rest
    cdef mbuf_t *m
    cdef uint32_t at = g.items[d.first].next, segs = head.nb_segs
    gro_headers(d, mbuf_data(head))
    gro_describe(d, head)
    while at != GRO_NONE:
        m = g.items[at].m
        segs += m.nb_segs
        m.data_off += d.headers
        m.data_len -= d.headers
        if m.data_len == 0:             # a segment of headers only
            rest = m.next
            _compat.check(rest != NULL)
            m.next = NULL
            mbuf_free(m)
            m = rest
            segs -= 1
        tail.next = m
        tail = last_segment(m)
        at = g.items[at].next
    head.nb_segs = <uint16_t>segs
    head.pkt_len = d.l3 + d.length
    _compat.check(head.pkt_len == mbuf_bytes(head))
    mbuf_guard(head)
    return head


cdef uint32_t gro_drain(gro_t *g, mbuf_t **out) noexcept nogil:
    """Puts the results of the complete groups, with their references, into ``out``; returns how
    many."""
    cdef uint32_t n = 0, i, at
    cdef gro_group_t *d
    cdef mbuf_t *m
    for i in range(g.n_done):
        d = &g.done[i]
        at = d.first
        if d.count > 1 and take_over(g, d):
            out[n] = chain(g, d)
            n += 1
            continue
        while at != GRO_NONE:
            m = g.items[at].m
            if d.verified and m.ol_flags & RX_L4_CKSUM_NONE == 0 and mbuf_is_private(m):
                m.ol_flags |= RX_L4_CKSUM_GOOD
            out[n] = m
            n += 1
            at = g.items[at].next
    gro_drained(g)
    return n


cdef uint32_t gro_burst(gro_t *g, mbuf_t **v, uint32_t n, uint64_t now, uint64_t patience,
                        uint64_t *timed_out, mbuf_t **out) noexcept nogil:
    """Takes ``n`` frames in and puts complete ones into ``out``, which has room for these frames
    and the held ones."""
    cdef uint32_t got = 0, flows, i
    if patience != 0:
        flows = g.n_flows
        gro_flush(g, now - patience if now > patience else 0)
        timed_out[0] += flows - g.n_flows
    for i in range(n):
        if gro_room(g) == 0:
            if g.n_done == 0:
                gro_flush(g, FOR_EVER)
            got += gro_drain(g, out + got)
        gro_add(g, v[i], now)
    if patience == 0:
        gro_flush(g, FOR_EVER)
    return got + gro_drain(g, out + got)


# ---- bursts


@cython.no_gc_clear
cdef class Gro:
    """Gro(*, udp=False, timeout=0.0, max_flows=64, max_frames=1024, max_length=65535, \
fixed_id=False, l2=True)\n--\n

    Coalesces frames of a flow into super-frames, across bursts.

    udp:        datagrams too; only for receivers that want the datagrams back one by one
    timeout:    seconds for which a super-frame may wait for more, checked in each call; 0 lets
                everything go at the end of the burst it came in
    max_flows:  flows held at once (1..65536); one more lets the oldest go
    max_frames: frames held at once (1..1048576)
    max_length: bytes of a super-frame's IP packet (576..65535)
    fixed_id:   IPv4 frames with DF may repeat their ID; the kernel increments it when it splits
    l2:         Ethernet frames; False for IP packets (TUN)

    A checksum that the kernel found right (RX_L4_CKSUM_GOOD) is not checked again.
    A super-frame has the same flags as one from the kernel: RX_LRO, RX_L4_CKSUM_NONE, tso_segsz.
    One thread at a time.
    """

    def __init__(self, *, bint udp=False, timeout=0.0, max_flows=64, max_frames=1024,
                 max_length=65535, bint fixed_id=False, bint l2=True):
        cdef uint32_t flags = GRO_TRUST
        cdef double seconds = timeout
        cdef uint32_t flows, frames, longest
        if not 0 <= seconds <= 3600 or math.isnan(seconds):
            raise ValueError(f"timeout must be 0..3600 seconds, got {timeout!r}")
        flows = check_range("max_flows", max_flows, 1, MAX_FLOWS)
        frames = check_range("max_frames", max_frames, 1, MAX_FRAMES)
        longest = check_range("max_length", max_length, 576, 65535)
        if udp:
            flags |= GRO_UDP
        if fixed_id:
            flags |= GRO_FIXED_ID
        if not l2:
            flags |= GRO_L3
        # The arguments' own code has run by now.
        if not _compat.cas(&self.made, 0, 1):
            raise RuntimeError("a Gro is made once")
        self.timeout = seconds
        self.patience = <uint64_t>(seconds * 1e9)
        self.g = gro_create(flows, frames, flags, longest)
        if self.g == NULL:
            raise MemoryError(f"no memory for a table of {flows} flows, {frames} frames")

    def __dealloc__(self):
        cdef uint32_t at
        if self.g != NULL:
            gro_flush(self.g, FOR_EVER)
            for i in range(self.g.n_done):
                at = self.g.done[i].first
                while at != GRO_NONE:
                    mbuf_free(self.g.items[at].m)
                    at = self.g.items[at].next
            gro_destroy(self.g)

    cdef int own(self) except -1:
        if self.g == NULL:
            raise RuntimeError("the Gro was never initialised")
        if not _compat.cas(&self.owned, 0, 1):
            raise RuntimeError("the Gro is in use by another thread")
        return 0

    def coalesce(self, Burst burst not None):
        """Takes the frames out of ``burst`` and returns a new Burst of the frames that go on:
        super-frames, and frames that could not be merged.  The order within a flow is kept.

        With a timeout, call it with an empty burst now and then, or :meth:`flush`."""
        cdef Burst out
        cdef mbuf_t **v
        cdef Py_ssize_t n, capacity
        cdef uint64_t now = _compat.now_ns()
        self.own()
        try:
            n = burst.lend(&v, &capacity)
            try:
                out = burst_make(n + self.g.n_items)
                with nogil:
                    out.n = gro_burst(self.g, v, <uint32_t>n, now, self.patience, &self.timed_out,
                                      out.v)
                n = 0
            finally:
                burst.give_back(v, n, capacity)
        finally:
            _compat.store(&self.owned, 0)
        return out

    def flush(self):
        """All held frames, as a Burst."""
        cdef Burst out
        self.own()
        try:
            out = burst_make(self.g.n_items)
            gro_flush(self.g, FOR_EVER)
            out.n = gro_drain(self.g, out.v)
        finally:
            _compat.store(&self.owned, 0)
        return out

    @property
    def held(self):
        """Frames that wait for more."""
        return self.g.n_items if self.g != NULL else 0

    def stats(self):
        """Totals as a dict: frames (seen), merged (of these, in a super-frame of more than one),
        super_frames (made), bad_checksum, evicted (flows sent on for lack of room), timed_out
        (flows)."""
        self.own()
        try:
            return {
                "frames": self.g.frames,
                "merged": self.g.merged,
                "super_frames": self.g.supers,
                "bad_checksum": self.g.bad_checksum,
                "evicted": self.g.evicted,
                "timed_out": self.timed_out,
            }
        finally:
            _compat.store(&self.owned, 0)


# ---- bytes


cdef object describe(const gro_group_t *d):
    """(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset) of a group."""
    cdef mbuf_t m
    if d.count == 1:
        return (2 if d.verified else 0), 0, 0, 0, 0, 0      # VIRTIO_NET_HDR_F_DATA_VALID
    m.ol_flags = 0
    m.data_off = 0
    gro_describe(d, &m)
    return m.vnet_flags, m.gso_type, d.headers, m.tso_segsz, m.csum_at, m.csum_offset


def coalesce_bytes(list frames not None, *, bint udp=False, bint fixed_id=False, bint l2=True,
                   max_length=65535):
    """Coalesces a list of frames; returns [(virtio-net header's six fields, frame)], in the
    order of the first frame of each."""
    cdef uint32_t n = <uint32_t>len(frames), i, length
    cdef uint32_t flags = (GRO_UDP if udp else 0) | (GRO_FIXED_ID if fixed_id else 0) | (
        0 if l2 else GRO_L3)
    cdef mbuf_t *v = NULL
    cdef gro_t *g = NULL
    cdef list out = []
    cdef bytes frame
    cdef Py_buffer view
    if n == 0:
        return out
    check_range("max_length", max_length, 576, 65535)
    try:
        v = <mbuf_t *>PyMem_RawCalloc(n, sizeof(mbuf_t))
        g = gro_create(min(n, <uint32_t>MAX_FLOWS), n, flags, max_length)
        if v == NULL or g == NULL:
            raise MemoryError(f"no memory for {n} frames")
        for i in range(n):
            PyObject_GetBuffer(frames[i], &view, PyBUF_SIMPLE)
            try:
                if view.len > MAX_FRAME_BYTES:
                    raise ValueError(f"frame {i} has {view.len} bytes, the most is "
                                     f"{MAX_FRAME_BYTES}")
                v[i].buf = <uint8_t *>PyMem_RawMalloc(view.len + 1)
                if v[i].buf == NULL:
                    raise MemoryError(f"no memory for a frame of {view.len} bytes")
                memcpy(v[i].buf, view.buf, view.len)
                v[i].buf_len = v[i].data_len = v[i].pkt_len = <uint32_t>view.len
                v[i].refcnt = v[i].nb_segs = 1
            finally:
                PyBuffer_Release(&view)
        with nogil:
            for i in range(n):
                gro_add(g, &v[i], 0)
            gro_flush(g, FOR_EVER)
        for i in range(g.n_done):
            length = gro_length(g, &g.done[i])
            frame = PyBytes_FromStringAndSize(NULL, length)
            gro_write(g, &g.done[i], <uint8_t *>PyBytes_AS_STRING(frame))
            out.append((g.done[i].first, describe(&g.done[i]), frame))
    finally:
        gro_destroy(g)
        if v != NULL:
            for i in range(n):
                PyMem_RawFree(v[i].buf)
        PyMem_RawFree(v)
    # Items are numbered in the order in which they are taken.
    out.sort(key=first_of)
    return [item[1:] for item in out]


cdef first_of(item):
    return item[0]
