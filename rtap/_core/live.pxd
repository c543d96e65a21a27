# SPDX-License-Identifier: BSD-3-Clause
"""Native objects that exist, counted in the checked build; in others this comes to nothing.

Whoever makes or takes one says ``made``, and ``gone`` once it is given back.  From any thread."""

from libc.stdint cimport uint32_t

cdef extern from *:
    """
    #ifdef RTAP_CHECKED
    #define RTAP_COUNTS 1
    #else
    #define RTAP_COUNTS 0
    #endif
    """
    const bint COUNTS "RTAP_COUNTS"


cdef enum:                      # as NAMES has them
    POOLS
    ARENAS                      # mapped
    POOL_USERS                  # for which pools stay open: rx queues, stages
    MBUFS                       # out of their pools
    RX_QUEUES
    TX_QUEUES
    SPLITTERS                   # of rx queues
    MERGERS                     # of tx queues
    GRO_TABLES
    STAGE_ROOMS                 # arrays that stages are run with
    WORKERS
    WORKER_THREADS
    RING_THREADS                # that have a ring
    RING_FILES_KEPT             # descriptors registered with rings
    RING_ARENAS_KEPT            # arenas registered with rings
    SHARED_RINGS                # of shared memory, mapped
    KINDS

cdef void live_add(uint32_t kind, uint32_t n) noexcept nogil


cdef inline void made(uint32_t kind, uint32_t n) noexcept nogil:
    if COUNTS:
        live_add(kind, n)


cdef inline void gone(uint32_t kind, uint32_t n) noexcept nogil:
    if COUNTS:
        live_add(kind, 0 - n)
