# SPDX-License-Identifier: BSD-3-Clause
from rtap._pool cimport pool_t


cdef class Mempool:
    cdef pool_t *p
    cdef readonly str name

    cdef pool_t *alive(self) except NULL
