# SPDX-License-Identifier: BSD-3-Clause
from rtap._pool cimport mbuf_t, pool_t


cdef class Mbuf:
    cdef mbuf_t *m              # one reference; NULL after free()
    cdef Py_ssize_t exports     # live buffers over the bytes
    cdef bint part              # a later segment: its frame has the length

    cdef mbuf_t *alive(self) except NULL
    cdef mbuf_t *whole(self) except NULL


cdef Mbuf mbuf_wrap(mbuf_t *m)              # steals the reference
cdef no_room(pool_t *p, Py_ssize_t asked)   # the PoolEmpty to raise
cdef Py_ssize_t check_range(str what, value, Py_ssize_t low, Py_ssize_t high) except? -1
cdef int slice_range(slice index, Py_ssize_t n, Py_ssize_t *start, Py_ssize_t *stop,
                     Py_ssize_t *step) except -1
cdef Py_ssize_t wrap_index(index, Py_ssize_t n, str what) except -1
