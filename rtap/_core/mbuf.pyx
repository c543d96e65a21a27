# SPDX-License-Identifier: BSD-3-Clause
"""One frame for Python: :class:`Mbuf`, a reference on a chain of segments.

Dropping the last reference returns the slots; a view keeps its frame.  The names are those of
DPDK's ``rte_mbuf.h``.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.number cimport PyNumber_Index
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cimport rtap._core.compat as _compat
from rtap._core.pool cimport (
    mbuf_bytes, mbuf_clone, mbuf_data, mbuf_free, mbuf_guard, mbuf_read, mbuf_ref, mbuf_t,
    mbuf_tailroom, mbuf_window, mbuf_write, pool_available, pool_t,
)

from rtap.errors import PoolEmpty


cdef int64_t check_range(str what, value, int64_t low, int64_t high) except? -1:
    """``value`` as an integer in low..high; TypeError or ValueError naming ``what``."""
    cdef int64_t n
    try:
        number = PyNumber_Index(value)
    except TypeError:
        raise TypeError(f"{what} must be an int, got {type(value).__name__}") from None
    try:
        n = number              # its digits: a subclass of int may override its methods wrongly
    except OverflowError:
        n = low - 1
    if not low <= n <= high:
        raise ValueError(f"{what} must be {low}..{high}, got {number}")
    return n


cdef Py_ssize_t row_stride(const Py_buffer *view, Py_ssize_t rows) except? -1:
    """Bytes from one row to the next of a (rows, n) uint8 array with contiguous rows;
    ValueError for a buffer of another shape.  A buffer without strides, such as a ctypes array,
    is contiguous."""
    if view.ndim != 2 or view.shape == NULL or view.itemsize != 1 or view.shape[0] != rows:
        shape = tuple([view.shape[i] for i in range(view.ndim)]) if view.shape != NULL else ()
        raise ValueError(f"expected a ({rows}, n) uint8 array, got shape {shape} of "
                         f"{view.itemsize}-byte items")
    if view.strides == NULL:
        return view.shape[1]
    if view.shape[1] > 1 and view.strides[1] != 1:
        raise ValueError("the bytes of each row must be contiguous")
    return view.strides[0]


cdef bytes_like(value):
    """An object whose buffer holds the bytes of ``value``: ``value`` itself, or ``bytes(value)``
    if it has ``__bytes__``, as a MacAddr does."""
    if not PyObject_CheckBuffer(value) and hasattr(type(value), "__bytes__"):
        return bytes(value)
    return value


cdef no_room(pool_t *p, Py_ssize_t asked):
    return PoolEmpty(f"too few free mbufs: {asked} asked for, {pool_available(p)} of {p.size} "
                     "free")


cdef Mbuf mbuf_wrap(mbuf_t *m):
    cdef Mbuf mbuf = Mbuf.__new__(Mbuf)
    mbuf.m = m
    return mbuf


@cython.final
cdef class _Window:
    """Exports some bytes of a frame's segment and keeps the frame."""

    cdef Mbuf owner
    cdef uint8_t *start
    cdef Py_ssize_t n

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        with cython.critical_section(self.owner):
            self.owner.alive()
            PyBuffer_FillInfo(buffer, self, self.start, self.n, 0, flags)
            self.owner.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        with cython.critical_section(self.owner):
            self.owner.exports -= 1


cdef window(Mbuf owner, uint8_t *start, Py_ssize_t n):
    cdef _Window w = _Window.__new__(_Window)
    w.owner = owner
    w.start = start
    w.n = n
    return memoryview(w)


@cython.final
@cython.freelist(64)
cdef class Mbuf:
    """One frame: a chain of ``nb_segs`` segments, the first holding the metadata.

    Made by :meth:`Mempool.alloc` or by indexing a :class:`Burst`; shares the frame with the
    burst it came from.  ``bytes(mbuf)`` copies the whole frame.  ``mbuf[a:b]`` reads and
    ``mbuf[a:b] = data`` overwrites across segments; data is bytes, or has ``__bytes__`` as a
    :class:`MacAddr` does.  ``memoryview(mbuf)`` (or ``.data``) is the writable window on a frame of
    one segment.
    """

    def __init__(self):
        raise TypeError("mbufs come from Mempool.alloc()")

    def __dealloc__(self):
        mbuf_free(self.m)

    cdef mbuf_t *alive(self) except NULL:
        if self.m == NULL:
            raise ValueError("the mbuf was freed")
        return self.m

    cdef mbuf_t *frame(self) except NULL:
        if self.part:
            raise ValueError("a later segment is no frame: use the frame's first mbuf, or a "
                             "clone() of the segment")
        return self.alive()

    cdef uint32_t length(self) except? 0:
        """The result of ``len``.  The first segment has the length of its frame; a later one adds
        up the segments from it on, since its frame may have been resized."""
        cdef const mbuf_t *m = self.alive()
        return mbuf_bytes(m) if self.part else m.pkt_len

    cdef uint32_t segments(self) except? 0:
        cdef const mbuf_t *m = self.alive()
        cdef uint32_t n = 0
        if not self.part:
            return m.nb_segs
        while m != NULL:
            n += 1
            m = m.next
        return n

    @cython.critical_section
    def free(self):
        """Drops this reference now; idempotent.  BufferError while a view of it exists."""
        if self.exports > 0:
            raise BufferError("a view of the mbuf exists")
        mbuf_free(self.m)
        self.m = NULL

    @cython.critical_section
    def clone(self):
        """A second frame over the same bytes, with its own window and metadata.  The clone of a
        later segment is a frame of the rest of the chain.  Headroom and tailroom are shared too:
        bytes that one prepends or appends, the other may overwrite.

        Takes a header from the pool for each segment; PoolEmpty when there is none."""
        cdef mbuf_t *m = mbuf_clone(self.alive())
        if m == NULL:
            raise no_room(self.m.pool, self.segments())
        return mbuf_wrap(m)

    @cython.critical_section
    def __len__(self):
        return self.length()

    def __eq__(self, other):
        if not isinstance(other, Mbuf):
            return NotImplemented
        with cython.critical_section(self, other):
            return self.m == (<Mbuf>other).m and self.m != NULL

    @cython.critical_section
    def __hash__(self):
        return hash(<size_t>self.alive())

    @cython.critical_section
    def __repr__(self):
        if self.m == NULL:
            return "<Mbuf freed>"
        return (f"<Mbuf pkt_len={self.length()} nb_segs={self.segments()} "
                f"ol_flags={self.m.ol_flags:#x}>")

    @cython.critical_section
    def __bytes__(self):
        return copy_out(self.alive(), 0, self.length())

    @cython.critical_section
    def __getitem__(self, index):
        cdef Py_ssize_t start, stop, step
        if isinstance(index, slice):
            slice_range(index, self.length(), &start, &stop, &step)
            if step != 1:
                return copy_out(self.alive(), 0, self.length())[index]
            return copy_out(self.alive(), start, max(stop - start, 0))
        start = wrap_index(index, self.length(), "mbuf")
        return copy_out(self.alive(), start, 1)[0]

    @cython.critical_section
    def __setitem__(self, index, value):
        cdef Py_ssize_t start, stop, step
        cdef Py_buffer view
        cdef uint8_t byte
        if not isinstance(index, slice):
            start = wrap_index(index, self.length(), "mbuf")
            byte = check_range("a byte", value, 0, 255)
            mbuf_write(self.alive(), <uint32_t>start, &byte, 1)
            return
        slice_range(index, self.length(), &start, &stop, &step)
        if step != 1:
            raise ValueError("slices of an mbuf are assigned with step 1")
        stop = max(start, stop)
        PyObject_GetBuffer(bytes_like(value), &view, PyBUF_SIMPLE)
        try:
            if view.len != stop - start:
                raise ValueError(f"cannot put {view.len} bytes into {stop - start}: an mbuf grows "
                                 "by append() and prepend()")
            mbuf_write(self.alive(), <uint32_t>start, <const uint8_t *>view.buf,
                       <uint32_t>view.len)
        finally:
            PyBuffer_Release(&view)

    @cython.critical_section
    def __getbuffer__(self, Py_buffer *buffer, int flags):
        cdef mbuf_t *m = self.alive()
        cdef uint8_t *start
        cdef uint32_t n
        if m.next != NULL:
            raise BufferError(f"the frame has {self.segments()} segments: use bytes(mbuf), slices, "
                              "or .data of each segment through .next")
        n = mbuf_window(m, &start)
        PyBuffer_FillInfo(buffer, self, start, n, 0, flags)
        self.exports += 1

    @cython.critical_section
    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1

    @property
    def data(self):
        """Writable memoryview of the frame; BufferError when it has several segments."""
        return memoryview(self)

    @property
    @cython.critical_section
    def next(self):
        """The rest of the chain from the next segment on as an :class:`Mbuf`, or None.  It can be
        read and written, but is not a frame: calls that resize or take frames refuse it with
        ValueError; its :meth:`clone` is a frame."""
        cdef mbuf_t *seg = self.alive().next
        cdef Mbuf rest
        if seg == NULL:
            return None
        mbuf_ref(seg)
        rest = mbuf_wrap(seg)
        rest.part = True
        return rest

    def prepend(self, Py_ssize_t n):
        """Grows the frame by ``n`` bytes at the front, out of the headroom; returns a writable
        view of the new bytes.  ValueError when the headroom is shorter."""
        cdef uint8_t *start = NULL
        cdef Py_ssize_t room
        with cython.critical_section(self):
            room = frame_prepend(self.frame(), n, &start)
        check_range("n", n, 0, room)
        return window(self, start, n)

    def append(self, Py_ssize_t n):
        """Grows the frame by ``n`` bytes at the end of its last segment; returns a writable view
        of the new bytes.  ValueError when the tailroom is shorter."""
        cdef uint8_t *start = NULL
        cdef Py_ssize_t room
        with cython.critical_section(self):
            room = frame_append(self.frame(), n, &start)
        check_range("n", n, 0, room)
        return window(self, start, n)

    @cython.critical_section
    def adj(self, Py_ssize_t n):
        """Cuts ``n`` bytes off the front by moving the window; they must lie in the first
        segment."""
        check_range("n", n, 0, frame_adj(self.frame(), n))
        self.guard()

    @cython.critical_section
    def trim(self, Py_ssize_t n):
        """Cuts ``n`` bytes off the end by moving the window; they must lie in the last
        segment."""
        check_range("n", n, 0, frame_trim(self.frame(), n))
        self.guard()

    cdef void guard(self) noexcept:
        if self.exports == 0:           # a view keeps its bytes
            mbuf_guard(self.m)

    @property
    @cython.critical_section
    def headroom(self):
        """Bytes that :meth:`prepend` can still take."""
        return 0 if self.part else self.alive().data_off

    @property
    @cython.critical_section
    def tailroom(self):
        """Bytes that :meth:`append` can still take."""
        return 0 if self.part else mbuf_tailroom(last_segment(self.alive()))

    @property
    @cython.critical_section
    def refcnt(self):
        """References on the frame: of this object, of bursts that hold it, and of its clones."""
        return _compat.load(&self.alive().refcnt)

    @property
    @cython.critical_section
    def pkt_len(self):
        """Bytes of the frame, all segments together; the same as ``len(mbuf)``.  Read-only."""
        return self.length()

    @property
    @cython.critical_section
    def data_len(self):
        """Bytes of this segment.  Read-only."""
        return self.alive().data_len

    @property
    @cython.critical_section
    def nb_segs(self):
        """Segments of the frame; for a later segment (:attr:`next`), the segments from it on.
        Read-only."""
        return self.segments()

    @property
    @cython.critical_section
    def ol_flags(self):
        """Offload flags: the bits of :class:`rtap.MbufFlag`, a 64-bit int.  Assignable."""
        return self.alive().ol_flags

    @ol_flags.setter
    @cython.critical_section
    def ol_flags(self, uint64_t value):
        self.alive().ol_flags = value

    @property
    @cython.critical_section
    def packet_type(self):
        """DPDK's packet type, four bits for each layer (``offload.PacketType``); 0 when nobody
        has parsed the frame.  A 32-bit int, assignable."""
        return self.alive().packet_type

    @packet_type.setter
    @cython.critical_section
    def packet_type(self, uint32_t value):
        self.alive().packet_type = value

    @property
    @cython.critical_section
    def l2_len(self):
        """Bytes of the Ethernet header with its VLAN tags; of a tunnelled packet, all bytes between
        the outer and the inner IP header.  0 to 65535, assignable."""
        return self.alive().l2_len

    @l2_len.setter
    @cython.critical_section
    def l2_len(self, uint16_t value):
        self.alive().l2_len = value

    @property
    @cython.critical_section
    def l3_len(self):
        """Bytes of the (inner) IP header with its options or extension headers.  0 to 65535,
        assignable."""
        return self.alive().l3_len

    @l3_len.setter
    @cython.critical_section
    def l3_len(self, uint16_t value):
        self.alive().l3_len = value

    @property
    @cython.critical_section
    def l4_len(self):
        """Bytes of the (inner) TCP or UDP header.  0 to 65535, assignable."""
        return self.alive().l4_len

    @l4_len.setter
    @cython.critical_section
    def l4_len(self, uint16_t value):
        self.alive().l4_len = value

    @property
    @cython.critical_section
    def tso_segsz(self):
        """Bytes of payload of each frame that a super-frame splits into (``MbufFlag.RX_LRO``,
        ``TX_TCP_SEG``, ``TX_UDP_SEG``).  0 to 65535, assignable."""
        return self.alive().tso_segsz

    @tso_segsz.setter
    @cython.critical_section
    def tso_segsz(self, uint16_t value):
        self.alive().tso_segsz = value

    @property
    @cython.critical_section
    def vlan_tci(self):
        """The VLAN tag to insert, 16 bits: priority and VLAN ID (``MbufFlag.TX_VLAN``).
        Assignable."""
        return self.alive().vlan_tci

    @vlan_tci.setter
    @cython.critical_section
    def vlan_tci(self, uint16_t value):
        self.alive().vlan_tci = value

    @property
    @cython.critical_section
    def vlan_tci_outer(self):
        """The outer VLAN tag of two, 16 bits (``MbufFlag.TX_QINQ``).  Assignable."""
        return self.alive().vlan_tci_outer

    @vlan_tci_outer.setter
    @cython.critical_section
    def vlan_tci_outer(self, uint16_t value):
        self.alive().vlan_tci_outer = value

    @property
    @cython.critical_section
    def outer_l2_len(self):
        """Bytes of a tunnelled packet's outer Ethernet header.  ``l2_len`` then counts from the end
        of the outer IP header.  0 to 65535, assignable."""
        return self.alive().outer_l2_len

    @outer_l2_len.setter
    @cython.critical_section
    def outer_l2_len(self, uint16_t value):
        self.alive().outer_l2_len = value

    @property
    @cython.critical_section
    def outer_l3_len(self):
        """Bytes of a tunnelled packet's outer IP header.  0 to 65535, assignable."""
        return self.alive().outer_l3_len

    @outer_l3_len.setter
    @cython.critical_section
    def outer_l3_len(self, uint16_t value):
        self.alive().outer_l3_len = value

    @property
    @cython.critical_section
    def port(self):
        """Number of the device that received the frame; 0xffff if none did."""
        return self.alive().port

    @port.setter
    @cython.critical_section
    def port(self, uint16_t value):
        self.alive().port = value

    @property
    @cython.critical_section
    def peer(self):
        """Number of the datagram's sender, or of whom it is for: see :attr:`rtap.EthDev.peers`.  0
        for none, and for the only peer of a device with ``remote``."""
        return self.alive().peer

    @peer.setter
    @cython.critical_section
    def peer(self, uint32_t value):
        self.alive().peer = value


cdef inline mbuf_t *last_segment(mbuf_t *m) noexcept nogil:
    while m.next != NULL:
        m = m.next
    return m


# Functions that move a window return the room there was; if it is less than ``n``, nothing moved.
# Several Mbuf objects may refer to one frame.

cdef mbuf_t *step_begin(mbuf_t *m) noexcept nogil:
    """Nobody else moves the frame's windows until ``step_end``; returns its last segment."""
    cdef mbuf_t *last = last_segment(m)
    _compat.step_lock(&m.step)
    if last != m:
        _compat.step_lock(&last.step)
    return last


cdef void step_end(mbuf_t *m, mbuf_t *last) noexcept nogil:
    if last != m:
        _compat.step_unlock(&last.step)
    _compat.step_unlock(&m.step)


cdef uint32_t frame_prepend(mbuf_t *m, Py_ssize_t n, uint8_t **start) noexcept nogil:
    cdef mbuf_t *last = step_begin(m)
    cdef uint32_t room = m.data_off
    if 0 <= n <= room:
        _compat.store(&m.data_off, room - <uint32_t>n)
        _compat.store(&m.data_len, m.data_len + <uint32_t>n)
        _compat.store(&m.pkt_len, m.pkt_len + <uint32_t>n)
        start[0] = mbuf_data(m)
        _compat.unpoison(start[0], n)
    step_end(m, last)
    return room


cdef uint32_t frame_append(mbuf_t *m, Py_ssize_t n, uint8_t **start) noexcept nogil:
    cdef mbuf_t *last = step_begin(m)
    cdef uint32_t room = mbuf_tailroom(last)
    if 0 <= n <= room:
        start[0] = mbuf_data(last) + last.data_len
        _compat.unpoison(start[0], n)
        _compat.store(&last.data_len, last.data_len + <uint32_t>n)
        _compat.store(&m.pkt_len, m.pkt_len + <uint32_t>n)
    step_end(m, last)
    return room


cdef uint32_t frame_adj(mbuf_t *m, Py_ssize_t n) noexcept nogil:
    cdef mbuf_t *last = step_begin(m)
    cdef uint32_t room = m.data_len
    if 0 <= n <= room:
        _compat.store(&m.data_len, room - <uint32_t>n)
        _compat.store(&m.data_off, m.data_off + <uint32_t>n)
        _compat.store(&m.pkt_len, m.pkt_len - <uint32_t>n)
    step_end(m, last)
    return room


cdef uint32_t frame_trim(mbuf_t *m, Py_ssize_t n) noexcept nogil:
    cdef mbuf_t *last = step_begin(m)
    cdef uint32_t room = last.data_len
    if 0 <= n <= room:
        _compat.store(&last.data_len, room - <uint32_t>n)
        _compat.store(&m.pkt_len, m.pkt_len - <uint32_t>n)
    step_end(m, last)
    return room


cdef Py_ssize_t wrap_index(index, Py_ssize_t n, str what) except -1:
    cdef Py_ssize_t i = index
    if i < 0:
        i += n
    if not 0 <= i < n:
        raise IndexError(f"{what} index {index} out of range for length {n}")
    return i


cdef int slice_range(slice index, Py_ssize_t n, Py_ssize_t *start, Py_ssize_t *stop,
                     Py_ssize_t *step) except -1:
    start[0], stop[0], step[0] = index.indices(n)
    return 0


cdef bytes copy_out(mbuf_t *m, Py_ssize_t offset, Py_ssize_t n):
    cdef bytes out = PyBytes_FromStringAndSize(NULL, n)
    if mbuf_read(m, <uint32_t>offset, <uint8_t *>PyBytes_AS_STRING(out), <uint32_t>n) != n:
        raise ValueError("the mbuf shrank while it was read")
    return out
