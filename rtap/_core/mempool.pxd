# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint32_t

from rtap._core.burst cimport Burst
from rtap._core.pool cimport mbuf_t, pool_t


cdef class Mempool:
    cdef object __weakref__
    cdef pool_t *p
    cdef uint32_t made          # a constructor has converted its arguments
    cdef readonly str name
    cdef int pid                # of the process that made it

    cdef pool_t *alive(self) except NULL
    cdef pool_t *hold(self) except NULL
    cdef void let_go(self) noexcept
    cdef mbuf_t *take(self) except NULL
    cdef int take_all(self, Burst burst, Py_ssize_t count) except -1


cdef mbuf_t *alloc_one(Mempool pool, data) except NULL
