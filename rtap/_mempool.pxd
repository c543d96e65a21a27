# SPDX-License-Identifier: BSD-3-Clause
from rtap._pool cimport mbuf_t, pool_t


cdef class Mempool:
    cdef pool_t *p
    cdef readonly str name
    cdef int queues             # that receive into it
    cdef int pid                # of the process that made it

    cdef pool_t *alive(self) except NULL


cdef mbuf_t *alloc_one(pool_t *p, data) except NULL
