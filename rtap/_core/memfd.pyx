# SPDX-License-Identifier: BSD-3-Clause
"""Sealed memfds, made and mapped.

A mapping that is written to here is private in a forked child: the child gets a copy of its present
bytes, and what it writes there nobody else sees.
"""

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

cimport rtap._core.compat as _compat
from rtap._core.linux cimport (
    F_ADD_SEALS, F_GET_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, MAP_ANONYMOUS, MAP_FAILED,
    MAP_PRIVATE, MAP_SHARED, MFD_ALLOW_SEALING, MFD_CLOEXEC, MREMAP_FIXED, MREMAP_MAYMOVE,
    PROT_READ, PROT_WRITE, close, fcntl, file_size, ftruncate, memfd_create, mmap, mremap, munmap,
    pthread_atfork,
)

import os

cdef enum:
    SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL


cdef struct written_t:
    void *mem
    size_t size
    written_t *next

cdef written_t *all_written = NULL
cdef uint32_t written_lock = 0


cdef int memfd_make(const char *name, size_t size) noexcept nogil:
    """A descriptor of so many zero bytes, or -errno."""
    cdef int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)
    cdef int rc
    if fd < 0:
        return -errno
    if ftruncate(fd, <long long>size) != 0 or fcntl(fd, F_ADD_SEALS, <int>SEALS) != 0:
        rc = -errno
        close(fd)
        return rc
    return fd


cdef const char *memfd_flaw(int fd, uint64_t *size) noexcept nogil:
    """What is wrong with a descriptor that should be of a sealed memfd, or NULL; and its size."""
    cdef int seals = fcntl(fd, F_GET_SEALS)
    if file_size(fd, size) != 0:
        return "it is not an open descriptor"
    if seals < 0:
        return "it is not a memfd"
    if seals & SEALS != SEALS:
        return "its size is not sealed"
    return NULL


cdef void *memfd_map(int fd, size_t size, bint writable) noexcept nogil:
    """The first bytes of a checked memfd; NULL, with errno, when they cannot be mapped."""
    cdef written_t *entry = NULL
    cdef void *mem
    if writable:
        entry = <written_t *>malloc(sizeof(written_t))
        if entry == NULL:
            return NULL
    mem = mmap(NULL, size, PROT_READ | PROT_WRITE if writable else PROT_READ, MAP_SHARED, fd, 0)
    if mem == MAP_FAILED:
        free(entry)
        return NULL
    if writable:
        entry.mem = mem
        entry.size = size
        _compat.lock(&written_lock)
        note(entry)
        _compat.unlock(&written_lock)
    return mem


cdef void note(written_t *entry) noexcept nogil:
    global all_written
    entry.next = all_written
    all_written = entry


cdef void memfd_unmap(void *mem, size_t size) noexcept nogil:
    """Gives back what ``memfd_map`` returned, of that size."""
    cdef written_t **link
    cdef written_t *found = NULL
    _compat.lock(&written_lock)
    link = &all_written
    while link[0] != NULL and link[0].mem != mem:
        link = &link[0].next
    found = link[0]
    if found != NULL:
        link[0] = found.next
    _compat.unlock(&written_lock)
    munmap(mem, size)
    free(found)


cdef void before_fork() noexcept nogil:
    _compat.lock(&written_lock)


cdef void after_fork_in_parent() noexcept nogil:
    _compat.unlock(&written_lock)


cdef void after_fork_in_child() noexcept nogil:
    """The parent's threads go on writing to their pages; from here on this process has its own."""
    cdef written_t *entry = all_written
    cdef void *copy
    while entry != NULL:
        copy = mmap(NULL, entry.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if copy != MAP_FAILED:
            memcpy(copy, entry.mem, entry.size)
            mremap(copy, entry.size, entry.size, MREMAP_MAYMOVE | MREMAP_FIXED, entry.mem)
        entry = entry.next
    _compat.unlock(&written_lock)


def make(str name, size_t size):
    """A new sealed memfd of ``size`` zero bytes; its descriptor, which the caller closes.  OSError
    when there can be none."""
    cdef bytes label = name.encode()
    cdef int fd = memfd_make(label, size)
    if fd < 0:
        raise OSError(-fd, f"memfd_create: {os.strerror(-fd)}")
    return fd


if pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) != 0:
    raise MemoryError("cannot watch for fork")
