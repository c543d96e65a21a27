# SPDX-License-Identifier: BSD-3-Clause
"""One io_uring for each thread that bursts, lent to the queues it serves."""

from libc.stdint cimport uint32_t, uint64_t, uint8_t

from rtap._core.linux cimport iovec
from rtap._core.pool cimport pool_t
from rtap._tap.liburing cimport io_uring


cdef enum:
    # A queue's engine.  AUTO is URING with system calls as fallback when there is no ring.
    ENGINE_SYSCALL = 0
    ENGINE_URING = 1
    ENGINE_AUTO = 2

    RING_ENTRIES = 256          # fits a 64 KiB RLIMIT_MEMLOCK
    RING_FILES = 256
    FILE_FORGOTTEN = 0xffffffff
    RING_POOLS = 16
    RING_IOVECS = 2048
    RING_HEADERS = 16           # bytes kept for each entry's virtio-net header
    CANCELS = 0xffffffff        # user_data of an entry that cancels; others have less


cdef struct uring_pool_t:
    uint64_t id
    uint32_t bursts             # seen so far: only a pool that stays is worth pinning
    bint registered


cdef struct uring_t:
    io_uring ring
    uint32_t lock               # held during a burst, and while a registration is dropped
    uint32_t idle               # its thread has ended
    bint open
    bint broken                 # to be torn down when its burst is over
    int refused                 # -errno: its thread may no longer use io_uring
    uint32_t failures           # successive rings from which the kernel took no entry
    uint64_t failed_at          # CLOCK_MONOTONIC ns
    bint skip_success           # writes report only failures
    bint files_ok
    bint buffers_ok
    uring_t *next               # all rings of the process
    uint64_t file_ids[RING_FILES]
    uring_pool_t pools[RING_POOLS]
    iovec iovecs[RING_IOVECS]
    uint8_t headers[RING_ENTRIES * RING_HEADERS]


cdef uring_t *uring_enter(int *error) noexcept nogil
cdef void uring_leave(uring_t *r) noexcept nogil
cdef int uring_file(uring_t *r, uint64_t file_id, int fd) noexcept nogil
cdef void uring_forget_file(uint64_t file_id) noexcept nogil
cdef int uring_buffer(uring_t *r, pool_t *p) noexcept nogil
cdef uint32_t uring_run(uring_t *r, uint32_t n) noexcept nogil
cdef void uring_cancel(uring_t *r) noexcept nogil
cdef uint32_t uring_finish(uring_t *r, uint32_t n) noexcept nogil
cdef uint64_t uring_new_file_id() noexcept nogil
cdef tuple uring_way(int fd, bint packet)
cdef tuple uring_costs()
