# SPDX-License-Identifier: BSD-3-Clause
from rtap._core.mbuf cimport Mbuf
from rtap._core.pool cimport mbuf_t


cdef class Burst:
    cdef mbuf_t **v             # one reference each
    cdef Py_ssize_t n
    cdef Py_ssize_t capacity

    cdef int reserve(self, Py_ssize_t capacity) except -1
    cdef int push(self, mbuf_t *m) except -1
    cdef int add_all(self, Burst other) except -1
    cdef Burst part(self, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t step)
    cdef Burst masked(self, list mask)
    cdef Burst picked(self, list indices)
    cdef Mbuf at(self, Py_ssize_t i)
    cdef Mbuf at_or_none(self, Py_ssize_t i)
    cdef Py_ssize_t lend(self, mbuf_t ***v, Py_ssize_t *capacity) noexcept
    cdef int give_back(self, mbuf_t **v, Py_ssize_t n, Py_ssize_t capacity) except -1


cdef Burst burst_make(Py_ssize_t capacity)
