# SPDX-License-Identifier: BSD-3-Clause
"""Memory that two processes share: memfds whose size nobody can change.

If a holder of the descriptor cut bytes off, they would raise SIGBUS in all others; so a memfd
without the seals is not mapped."""

from libc.stdint cimport uint64_t


cdef int memfd_make(const char *name, size_t size) noexcept nogil
cdef const char *memfd_flaw(int fd, uint64_t *size) noexcept nogil
cdef void *memfd_map(int fd, size_t size, bint writable) noexcept nogil
cdef void memfd_unmap(void *mem, size_t size) noexcept nogil
