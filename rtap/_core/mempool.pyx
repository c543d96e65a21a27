# SPDX-License-Identifier: BSD-3-Clause
"""Packet buffers for Python: :class:`Mempool`."""

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_SIMPLE, PyBUF_STRIDES, PyBuffer_Release, PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport EINVAL, EMSGSIZE, ENOENT, ENOSYS, ENOTDIR, EUSERS
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, strerror
from posix.unistd cimport getpid

import os

cimport rtap._core.compat as _compat
from rtap._core.burst cimport Burst, burst_make
from rtap._core.mbuf cimport bytes_like, check_range, mbuf_wrap, no_room, row_stride
from rtap._core.pool cimport (
    MAX_DATA_ROOM, MBUF_SEGS_MAX, MIN_HEADROOM, PKT_LEN_MAX, mbuf_fill, mbuf_free, mbuf_free_bulk,
    mbuf_guard, mbuf_reset, mbuf_t, pool_available, pool_close, pool_create, pool_disown, pool_get,
    pool_hold, pool_let_go, pool_reclaim, pool_t,
)
from rtap._core.shm cimport SHM_MEMBERS, SHM_SLOTS_MAX, shm_attach, shm_create, shm_t


cdef closed():
    return ValueError("the mempool is closed")


cdef no_member(int error):
    """Why a shared pool could not be mapped."""
    if error == ENOENT or error == ENOTDIR:
        return OSError(error, "a shared mempool needs /proc, to tell which of its processes live")
    if error == EUSERS:
        return OSError(error, f"{SHM_MEMBERS} processes have the mempool mapped, and no more can")
    if error == ENOSYS:
        return OSError(error, "this processor cannot change 64 bits of shared memory in one step")
    return OSError(error, os.strerror(error))


@cython.final
cdef class Mempool:
    """Mempool(n, data_room=2048, headroom=128, *, memfd=False, shared=False, name='')\n--\n

    ``n`` packet buffers of ``data_room`` bytes each, in one block of memory.

    ``headroom`` bytes (at least 16) lie in front of each buffer for headers to grow into.
    ``memfd=True`` puts the arena in a memfd, whose descriptor is ``fd``, so that another
    process can map it.  Its size is sealed (F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_SEAL); every holder
    of the descriptor can write to its bytes.  ``name`` is for people: the repr shows it, and the
    memfd has it.  Any number of threads may allocate and free.

    ``shared=True`` makes a memfd that other processes allocate from and free to, once they have
    ``attach``-ed its descriptor; a ring of shared memory moves frames between them.  At most
    4,194,304 buffers and 64 processes.

    ValueError or TypeError for sizes out of range, MemoryError when the memory cannot be mapped.
    """

    def __init__(self, n, data_room=2048, headroom=128, *, bint memfd=False, bint shared=False,
                 str name=""):
        cdef Py_ssize_t slots, room, head
        cdef bytes label, id
        cdef shm_t *shm = NULL
        cdef uint64_t number = 0
        cdef int rc = 0
        slots = check_range("n", n, 1, SHM_SLOTS_MAX if shared else 1 << 24)
        room = check_range("data_room", data_room, 64, MAX_DATA_ROOM)
        head = check_range("headroom", headroom, MIN_HEADROOM, 4096)
        label = (name or "rtap").encode()
        id = os.urandom(sizeof(number))
        memcpy(&number, PyBytes_AS_STRING(id), sizeof(number))
        # The arguments' own code has run by now.
        if not _compat.cas(&self.made, 0, 1):
            raise RuntimeError("a Mempool is made once")
        self.name = name
        self.pid = getpid()
        if shared:
            rc = shm_create(&shm, PyBytes_AS_STRING(label), number, <uint32_t>slots, <uint32_t>room,
                            <uint32_t>head)
            if rc == -ENOENT or rc == -ENOTDIR or rc == -ENOSYS:
                raise no_member(-rc)
        if rc == 0:
            rc = pool_create(&self.p, <uint32_t>slots, <uint32_t>room, <uint32_t>head,
                             PyBytes_AS_STRING(label) if memfd else NULL, shm)
        if rc != 0:
            self.p = NULL
            raise MemoryError(f"cannot map {slots} buffers of {room} + {head} bytes: "
                              f"{strerror(-rc).decode()}")

    @classmethod
    def attach(cls, int fd, *, str name=""):
        """The shared pool behind ``fd``, which another process made with ``shared=True``.

        The descriptor stays the caller's.  Each call makes a member of its own: a process that
        attaches a pool that it has already gets a second pool over the same buffers.  ValueError
        when the descriptor is not of such a pool; OSError when there are too many processes, or
        without /proc."""
        cdef Mempool pool = Mempool.__new__(Mempool)
        cdef const char *why = NULL
        cdef shm_t *shm = NULL
        cdef int rc = shm_attach(&shm, fd, &why)
        pool.made = 1
        pool.name = name
        pool.pid = getpid()
        if rc == -EINVAL and why != NULL:
            raise ValueError(f"descriptor {fd} cannot be attached as a mempool: {why.decode()}")
        if rc != 0:
            raise no_member(-rc)
        rc = pool_create(&pool.p, shm.size, shm.data_room, shm.headroom, NULL, shm)
        if rc != 0:
            pool.p = NULL
            raise MemoryError(f"cannot map the mempool: {strerror(-rc).decode()}")
        return pool

    def __dealloc__(self):
        if self.p != NULL:
            pool_disown(self.p)

    # Not guarded by this object's lock: in a forked child, it could belong to a thread that the
    # child does not have.  The pool has its own locks, and lives as long as this object.

    cdef pool_t *alive(self) except NULL:
        if self.p == NULL or _compat.load_relaxed(&self.p.closed):
            raise closed()
        if self.p.memfd >= 0 and self.pid != getpid():
            raise RuntimeError("a memfd mempool was made before fork(): its bytes are shared with "
                               "the parent process, its free list is not")
        return self.p

    cdef pool_t *hold(self) except NULL:
        """For an rx queue or a stage: the pool stays open until ``let_go``."""
        cdef pool_t *p = self.alive()
        if not pool_hold(p):
            raise closed()
        return p

    cdef void let_go(self) noexcept:
        pool_let_go(self.p)

    cdef mbuf_t *take(self) except NULL:
        """A buffer, empty and with one reference, which keeps the pool open."""
        cdef mbuf_t *m
        if pool_get(self.alive(), &m, 1) == 0:
            raise no_room(self.alive(), 1)      # it may be closed by now
        mbuf_reset(m)
        return m

    cdef int take_all(self, Burst burst, Py_ssize_t count) except -1:
        cdef pool_t *p = self.alive()
        cdef Py_ssize_t i
        if count > <Py_ssize_t>p.size:
            raise no_room(p, count)
        burst.reserve(count)
        burst.n = pool_get(p, burst.v, <uint32_t>count)
        for i in range(burst.n):
            mbuf_reset(burst.v[i])
        if burst.n < count:
            mbuf_free_bulk(burst.v, <uint32_t>burst.n)
            burst.n = 0
            raise no_room(self.alive(), count)
        return 0

    def close(self):
        """Unmaps the arena; idempotent.  BufferError while one of its buffers is in use, or while a
        receive queue or a running stage takes buffers from it."""
        cdef uint32_t users, in_use
        if self.p == NULL or _compat.load_relaxed(&self.p.closed):
            return
        if pool_close(self.alive(), &users, &in_use):
            return
        if users:
            raise BufferError(f"{users} rx queues or stages take buffers from the mempool" if
                              self.p.shm == NULL else
                              f"{users} rx queues, rings or stages use buffers of the mempool")
        raise BufferError(f"{in_use} of {self.p.size} mbufs are in use" + (
            "" if self.p.shm == NULL else " by this process"))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    @property
    def size(self):
        """Buffers of the pool, free and in use."""
        return self.alive().size

    @property
    def data_room(self):
        """Bytes of a buffer without its headroom."""
        return self.alive().data_room

    @property
    def headroom(self):
        """Bytes in front of an empty buffer, for headers to grow into."""
        return self.alive().headroom

    @property
    def fd(self):
        """Descriptor of the memfd that holds the arena, or None.  Nobody can change its size."""
        cdef int fd = self.alive().memfd
        return fd if fd >= 0 else None

    @property
    def shared(self):
        """Whether other processes can allocate and free its buffers, too."""
        return self.alive().shm != NULL

    @property
    def available(self):
        """Buffers that could be allocated now, no matter which thread freed them.

        Of a shared pool, also those of processes that died.  Free buffers in the caches of another
        process's threads do not count: a thirty-second of the pool for each thread, 256 at most."""
        return pool_available(self.alive())

    def reclaim(self):
        """Takes back what processes have left that died, and frames in rings that no process has
        open any more; returns the number of buffers.

        Happens by itself when a shared pool is empty, and where ``available`` is read."""
        return pool_reclaim(self.alive())

    @property
    def in_use(self):
        """Buffers that somebody holds, in any process: ``size - available``."""
        cdef pool_t *p = self.alive()
        return p.size - pool_available(p)

    def __repr__(self):
        if self.p == NULL or _compat.load_relaxed(&self.p.closed):
            return "<Mempool closed>"
        return (f"<Mempool {self.name + ' ' if self.name else ''}{pool_available(self.p)} of "
                f"{self.p.size} available, data_room={self.p.data_room}, "
                f"headroom={self.p.headroom}>")

    def alloc(self, data=None):
        """One :class:`Mbuf`: empty, or with a copy of ``data`` (any buffer, or an object with
        ``__bytes__``).

        Data longer than ``data_room`` takes a chain of buffers.  PoolEmpty when too few are free,
        ValueError for more than a frame may have (bytes or segments)."""
        return mbuf_wrap(alloc_one(self, data))

    def alloc_burst(self, n, data=None):
        """A :class:`Burst` of ``n`` mbufs, all or none (PoolEmpty).

        ``data`` fills them: one bytes-like object for all, a sequence of ``n`` bytes-like
        objects, or an ``(n, length)`` uint8 array.
        """
        cdef Py_ssize_t count = check_range("n", n, 0, 1 << 24), i
        cdef Burst burst = burst_make(0)
        cdef list items
        self.take_all(burst, count)
        if data is None:
            return burst
        if PyObject_CheckBuffer(data):
            fill_from_buffer(burst, data)
            return burst
        items = list(data)
        if len(items) != count:
            raise ValueError(f"data has {len(items)} items for {count} mbufs")
        for i in range(count):
            fill_one(burst.v[i], items[i])
        return burst


cdef mbuf_t *alloc_one(Mempool pool, data) except NULL:
    """A frame with one reference, holding ``data`` unless that is None."""
    cdef mbuf_t *m = pool.take()
    if data is not None:
        try:
            fill_one(m, data)
        except BaseException:
            mbuf_free(m)
            raise
    return m


cdef fill_error(int rc, pool_t *p, Py_ssize_t asked):
    if rc == -EMSGSIZE:
        return ValueError(f"a frame has at most {PKT_LEN_MAX} bytes and {MBUF_SEGS_MAX} segments, "
                          f"here of {p.data_room} bytes each")
    return no_room(p, asked)


cdef int fill_one(mbuf_t *m, data) except -1:
    cdef Py_buffer view
    cdef int rc
    PyObject_GetBuffer(bytes_like(data), &view, PyBUF_SIMPLE)
    rc = mbuf_fill(m, <const uint8_t *>view.buf, view.len)
    PyBuffer_Release(&view)
    mbuf_guard(m)
    if rc != 0:
        raise fill_error(rc, m.pool, m.nb_segs + 1)
    return 0


cdef int fill_from_buffer(Burst burst, data) except -1:
    """One frame for all (1-d bytes) or a row each (2-d uint8)."""
    cdef Py_buffer view
    cdef Py_ssize_t length, stride = 0, i
    cdef int rc = 0
    PyObject_GetBuffer(data, &view, PyBUF_STRIDES | PyBUF_FORMAT)
    try:
        length = view.len
        if view.ndim > 1:
            stride = row_stride(&view, burst.n)
            length = view.shape[1]
        elif view.ndim != 1 or view.strides != NULL and length > 0 and (
                view.strides[0] != view.itemsize):
            raise ValueError("data must be contiguous bytes or an (n, length) uint8 array")
        for i in range(burst.n):
            rc = rc or mbuf_fill(burst.v[i], <const uint8_t *>view.buf + i * stride, length)
            mbuf_guard(burst.v[i])
    finally:
        PyBuffer_Release(&view)
    if rc != 0:
        raise fill_error(rc, burst.v[0].pool, burst.n)
    return 0
