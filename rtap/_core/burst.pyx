# SPDX-License-Identifier: BSD-3-Clause
"""Frames that travel together: :class:`Burst`, and its views for NumPy."""

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_RawFree, PyMem_RawRealloc
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

import sys
from operator import index as as_index

from rtap._core.mbuf cimport Mbuf, check_range, mbuf_wrap, row_stride, slice_range, wrap_index
from rtap._core.pool cimport (
    MAX_DATA_ROOM, mbuf_free_bulk, mbuf_read, mbuf_ref, mbuf_t, mbuf_window, mbuf_write,
)

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX


cdef bint is_bool(item):
    """A Python or NumPy truth value, as opposed to an index."""
    return isinstance(item, bool) or getattr(getattr(item, "dtype", None), "kind", "") == "b"


cdef bytes flag_words(value, Py_ssize_t n):
    """uint64 numbers as bytes: one ``n`` times, or as many as ``value`` has."""
    # A flag is iterable and an array has __index__: only a single number passes both tests.
    cdef bint one = isinstance(value, int) or not hasattr(value, "__iter__")
    cdef list items = [value] * n if one else list(value)
    return b"".join([as_index(item).to_bytes(8, sys.byteorder) for item in items])


cdef typed(bytes words, str format):
    return memoryview(words).cast(format)


cdef Burst burst_make(Py_ssize_t capacity):
    cdef Burst burst = Burst.__new__(Burst)
    burst.reserve(capacity)
    return burst


cdef char *BYTE_FORMAT = "B"


@cython.final
cdef class _Grid:
    """A writable (frames, length) uint8 array over memory that ``owner`` keeps."""

    cdef object owner
    cdef uint8_t *start
    cdef Py_ssize_t shape[2]
    cdef Py_ssize_t strides[2]

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if flags & PyBUF_STRIDES != PyBUF_STRIDES:
            raise BufferError("the rows may be spaced: ask for strides")
        buffer.buf = self.start
        buffer.obj = self
        buffer.len = self.shape[0] * self.shape[1]
        buffer.itemsize = 1
        buffer.readonly = 0
        buffer.ndim = 2
        buffer.format = BYTE_FORMAT if flags & PyBUF_FORMAT else NULL
        buffer.shape = self.shape
        buffer.strides = self.strides
        buffer.suboffsets = NULL
        buffer.internal = NULL


cdef grid(owner, uint8_t *start, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t stride):
    cdef _Grid g = _Grid.__new__(_Grid)
    g.owner = owner
    g.start = start
    g.shape[0] = rows
    g.shape[1] = columns
    g.strides[0] = stride
    g.strides[1] = 1
    return memoryview(g)


@cython.final
@cython.freelist(16)
cdef class Burst:
    """Burst(mbufs=())\n--\n

    An ordered set of frames that travel together, of any size.

    ``Burst(mbufs)`` shares the given mbufs.  Indexing gives an :class:`Mbuf`; slicing and
    :meth:`select` give a new Burst over the same frames.  A frame may be in several bursts.  A
    later segment of a frame (``mbuf.next``) is not a frame: ValueError.
    """

    def __init__(self, mbufs=()):
        self.extend(mbufs)

    def __dealloc__(self):
        if self.v != NULL:
            mbuf_free_bulk(self.v, <uint32_t>self.n)
            PyMem_RawFree(self.v)

    # The callers of these cdef methods hold the critical section.

    cdef int reserve(self, Py_ssize_t capacity) except -1:
        cdef mbuf_t **v
        if capacity <= self.capacity:
            return 0
        v = <mbuf_t **>PyMem_RawRealloc(self.v, capacity * sizeof(mbuf_t *))
        if v == NULL:
            raise MemoryError(f"no memory for a burst of {capacity}")
        self.v = v
        self.capacity = capacity
        return 0

    cdef int push(self, mbuf_t *m) except -1:
        """Adds a frame and takes a reference on it."""
        if self.n == self.capacity:
            self.reserve(2 * self.n if self.n > 0 else 8)
        mbuf_ref(m)
        self.v[self.n] = m
        self.n += 1
        return 0

    @cython.critical_section
    cdef Py_ssize_t lend(self, mbuf_t ***v, Py_ssize_t *capacity) noexcept:
        """Lends the frames to a kernel that runs without the GIL; others see an empty burst."""
        cdef Py_ssize_t n = self.n
        v[0] = self.v
        capacity[0] = self.capacity
        self.v = NULL
        self.n = self.capacity = 0
        return n

    @cython.critical_section
    cdef int give_back(self, mbuf_t **v, Py_ssize_t n, Py_ssize_t capacity) except -1:
        """Takes the remaining lent frames back, in front of any added meanwhile."""
        cdef mbuf_t **added = self.v
        cdef Py_ssize_t n_added = self.n
        self.v = v
        self.n = n
        self.capacity = capacity
        if added != NULL:
            try:
                self.reserve(n + n_added)
                memcpy(self.v + n, added, n_added * sizeof(mbuf_t *))
                self.n = n + n_added
            except MemoryError:
                mbuf_free_bulk(added, <uint32_t>n_added)
                raise
            finally:
                PyMem_RawFree(added)
        return 0

    def append(self, Mbuf mbuf not None):
        """Adds one mbuf at the end; others may share it.  ValueError for a freed mbuf and
        for a later segment of a frame."""
        with cython.critical_section(self, mbuf):
            self.push(mbuf.frame())

    def extend(self, mbufs):
        """Adds mbufs from a Burst or any iterable; all are checked before the first is added."""
        if isinstance(mbufs, Burst):
            with cython.critical_section(self, mbufs):
                self.add_all(<Burst>mbufs)
            return
        items = list(mbufs)
        other = burst_make(len(items))
        for item in items:
            if not isinstance(item, Mbuf):
                raise TypeError(f"a Burst holds Mbuf, not {type(item).__name__}")
            with cython.critical_section(item):
                other.push((<Mbuf>item).frame())
        with cython.critical_section(self):
            self.add_all(other)

    cdef int add_all(self, Burst other) except -1:
        cdef Py_ssize_t n = other.n, i
        self.reserve(self.n + n)
        for i in range(n):
            self.push(other.v[i])
        return 0

    @cython.critical_section
    def free(self):
        """Drops every frame now; idempotent.  The burst is then empty and usable again."""
        cdef uint32_t n = <uint32_t>self.n
        self.n = 0
        mbuf_free_bulk(self.v, n)

    @cython.critical_section
    def __len__(self):
        return self.n

    def __repr__(self):
        return f"<Burst of {len(self)}>"

    @cython.critical_section
    def __getitem__(self, index):
        cdef Py_ssize_t start, stop, step
        if isinstance(index, slice):
            slice_range(index, self.n, &start, &stop, &step)
            return self.part(start, stop, step)
        start = as_index(index)
        return self.at(wrap_index(start, self.n, "burst"))

    cdef Burst part(self, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t step):
        cdef Burst part = burst_make(0)
        cdef Py_ssize_t i
        for i in range(start, stop, step):
            if i < self.n:          # the slice's own __index__ may have changed us
                part.push(self.v[i])
        return part

    cdef Mbuf at(self, Py_ssize_t i):
        mbuf_ref(self.v[i])
        return mbuf_wrap(self.v[i])

    @cython.critical_section
    cdef Mbuf at_or_none(self, Py_ssize_t i):
        return self.at(i) if i < self.n else None

    def __iter__(self):
        cdef Py_ssize_t i = 0
        mbuf = self.at_or_none(0)
        while mbuf is not None:
            yield mbuf
            i += 1
            mbuf = self.at_or_none(i)

    def select(self, which):
        """A new Burst of the frames at some indices, or where a mask of ``len(self)`` is true.

        ``which``: a sequence or array of bool (mask) or of integers (indices, negative allowed).
        """
        cdef list items = which.tolist() if hasattr(which, "tolist") else list(which)
        if items and is_bool(items[0]):
            return self.masked([bool(item) for item in items])
        return self.picked([as_index(item) for item in items])

    @cython.critical_section
    cdef Burst masked(self, list mask):
        cdef Burst part = burst_make(0)
        cdef Py_ssize_t i
        if len(mask) != self.n:
            raise ValueError(f"a mask of {len(mask)} for a burst of {self.n}")
        for i in range(self.n):
            if mask[i]:
                part.push(self.v[i])
        return part

    @cython.critical_section
    cdef Burst picked(self, list indices):
        cdef Burst part = burst_make(0)
        for index in indices:
            part.push(self.v[wrap_index(index, self.n, "burst")])
        return part

    @property
    @cython.critical_section
    def lengths(self):
        """Frame lengths in bytes: a read-only uint32 memoryview, taken now."""
        cdef bytes out = PyBytes_FromStringAndSize(NULL, self.n * sizeof(uint32_t))
        cdef uint32_t *p = <uint32_t *>PyBytes_AS_STRING(out)
        cdef Py_ssize_t i
        for i in range(self.n):
            p[i] = self.v[i].pkt_len
        return typed(out, "I")

    @property
    @cython.critical_section
    def ol_flags(self):
        """Offload flags of each frame: a read-only uint64 memoryview, taken now.  Assign one
        value, or one for each frame, to set them."""
        cdef bytes out = PyBytes_FromStringAndSize(NULL, self.n * sizeof(uint64_t))
        cdef uint64_t *p = <uint64_t *>PyBytes_AS_STRING(out)
        cdef Py_ssize_t i
        for i in range(self.n):
            p[i] = self.v[i].ol_flags
        return typed(out, "Q")

    @ol_flags.setter
    @cython.critical_section
    def ol_flags(self, value):
        cdef bytes flags = flag_words(value, self.n)
        cdef const uint64_t *p = <const uint64_t *>PyBytes_AS_STRING(flags)
        cdef Py_ssize_t n = len(flags) // sizeof(uint64_t), i
        if n != self.n:
            raise ValueError(f"{n} values of ol_flags for a burst of {self.n}")
        for i in range(n):
            self.v[i].ol_flags = p[i]

    @property
    @cython.critical_section
    def peers(self):
        """The peer's number of each frame, see ``Mbuf.peer``: a read-only uint32 memoryview, taken
        now.  Assign one value, or one for each frame, to set them."""
        cdef bytes out = PyBytes_FromStringAndSize(NULL, self.n * sizeof(uint32_t))
        cdef uint32_t *p = <uint32_t *>PyBytes_AS_STRING(out)
        cdef Py_ssize_t i
        for i in range(self.n):
            p[i] = self.v[i].peer
        return typed(out, "I")

    @peers.setter
    @cython.critical_section
    def peers(self, value):
        cdef bytes words = flag_words(value, self.n)
        cdef const uint64_t *p = <const uint64_t *>PyBytes_AS_STRING(words)
        cdef Py_ssize_t n = len(words) // sizeof(uint64_t), i
        if n != self.n:
            raise ValueError(f"{n} numbers of peers for a burst of {self.n}")
        for i in range(n):
            if p[i] > 0xffffffff:
                raise OverflowError(f"the number of a peer has 32 bits, got {p[i]}")
        for i in range(n):
            self.v[i].peer = <uint32_t>p[i]

    @cython.critical_section
    def gather(self, Py_ssize_t offset, Py_ssize_t n):
        """Bytes ``offset .. offset + n`` of every frame: a (len, n) uint8 memoryview over a copy,
        for ``numpy.asarray``.  Missing bytes of a shorter frame are zero."""
        cdef bytearray out
        cdef uint8_t *row
        cdef Py_ssize_t i
        check_range("offset", offset, 0, MAX_DATA_ROOM)
        check_range("n", n, 1, MAX_DATA_ROOM)
        if self.n > 0 and n > PY_SSIZE_T_MAX // self.n:     # with pointers of 32 bits
            raise MemoryError(f"{self.n} rows of {n} bytes are more than there can be")
        out = bytearray(self.n * n)
        row = <uint8_t *>out
        for i in range(self.n):
            mbuf_read(self.v[i], <uint32_t>offset, row, <uint32_t>n)
            row += n
        return grid(out, <uint8_t *>out, self.n, n, n)

    @cython.critical_section
    def scatter(self, Py_ssize_t offset, array):
        """Overwrites bytes from ``offset`` on in every frame with the rows of a (len, n) uint8
        array.  When a frame is too short, raises ValueError and writes nothing."""
        cdef Py_buffer view
        cdef Py_ssize_t stride, i
        check_range("offset", offset, 0, MAX_DATA_ROOM)
        PyObject_GetBuffer(array, &view, PyBUF_STRIDES | PyBUF_FORMAT)
        try:
            stride = row_stride(&view, self.n)
            for i in range(self.n):
                if offset + view.shape[1] > self.v[i].pkt_len:
                    raise ValueError(f"frame {i} has {self.v[i].pkt_len} bytes, "
                                     f"{offset + view.shape[1]} are needed")
            for i in range(self.n):
                mbuf_write(self.v[i], <uint32_t>offset,
                           <const uint8_t *>view.buf + i * stride,
                           <uint32_t>view.shape[1])
        finally:
            PyBuffer_Release(&view)

    @cython.critical_section
    def array(self, Py_ssize_t n):
        """The first ``n`` bytes of every frame as one writable (len, n) uint8 memoryview, no copy.

        ValueError unless the frames lie in regularly spaced slots.  The frames of one
        ``alloc_burst`` from a quiet pool do, received ones rarely; ``gather`` always works."""
        cdef Py_ssize_t i, stride = n
        cdef uint8_t *first = NULL
        cdef uint8_t *start
        cdef uint32_t length
        check_range("n", n, 1, MAX_DATA_ROOM)
        for i in range(self.n):
            length = mbuf_window(self.v[i], &start)
            if length < <uint32_t>n:
                raise ValueError(f"frame {i} has {length} bytes in its first segment, "
                                 f"{n} are needed")
            if i == 0:
                first = start
            elif i == 1:
                stride = start - first
            if stride == 0 or start != first + i * stride:
                raise ValueError("the slots of this burst are not regularly spaced")
        return grid(self.part(0, self.n, 1), first, self.n, n, stride)
