# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport int64_t, uint8_t, uint32_t

from rtap._core.pool cimport mbuf_t, pool_t


cdef class Mbuf:
    cdef mbuf_t *m              # one reference; NULL after free()
    cdef Py_ssize_t exports     # live buffers over the bytes
    cdef bint part              # a later segment, not a frame

    cdef mbuf_t *alive(self) except NULL
    cdef mbuf_t *frame(self) except NULL
    cdef uint32_t length(self) except? 0
    cdef uint32_t segments(self) except? 0
    cdef void guard(self) noexcept


cdef Mbuf mbuf_wrap(mbuf_t *m)              # steals the reference
cdef Py_ssize_t row_stride(const Py_buffer *view, Py_ssize_t rows) except? -1
cdef bytes_like(value)
cdef no_room(pool_t *p, Py_ssize_t asked)   # the PoolEmpty to raise
cdef int64_t check_range(str what, value, int64_t low, int64_t high) except? -1
cdef int slice_range(slice index, Py_ssize_t n, Py_ssize_t *start, Py_ssize_t *stop,
                     Py_ssize_t *step) except -1
cdef Py_ssize_t wrap_index(index, Py_ssize_t n, str what) except -1

# Functions that move a frame's window return the room there was; if it is less than ``n``, nothing
# moved.
cdef uint32_t frame_prepend(mbuf_t *m, Py_ssize_t n, uint8_t **start) noexcept nogil
cdef uint32_t frame_append(mbuf_t *m, Py_ssize_t n, uint8_t **start) noexcept nogil
cdef uint32_t frame_adj(mbuf_t *m, Py_ssize_t n) noexcept nogil
cdef uint32_t frame_trim(mbuf_t *m, Py_ssize_t n) noexcept nogil
