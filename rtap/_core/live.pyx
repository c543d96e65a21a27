# SPDX-License-Identifier: BSD-3-Clause
"""How many native objects there are, by kind: for tests, in the checked build."""

from libc.stdint cimport int32_t, uint32_t

cimport rtap._core.compat as _compat

cdef tuple NAMES = (
    "pools", "arenas", "pool users", "mbufs", "rx queues", "tx queues", "splitters", "mergers",
    "gro tables", "stage rooms", "workers", "worker threads", "threads with a ring",
    "descriptors in rings", "arenas in rings", "shared rings",
)

cdef uint32_t[<int>KINDS] numbers


cdef void live_add(uint32_t kind, uint32_t n) noexcept nogil:
    _compat.fetch_add(&numbers[kind], n)


def counts():
    """Objects of this process by kind, a dict of name to int; {} where none are counted."""
    cdef int i
    if not COUNTS:
        return {}
    return {name: <int32_t>_compat.load(&numbers[i]) for i, name in enumerate(NAMES)}
