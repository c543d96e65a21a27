# SPDX-License-Identifier: BSD-3-Clause
"""Rings of shared memory for Python: their memory, their queues, and :class:`ShmRing`.

How frames move is in :mod:`rtap._queues.shm_cells`.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport strerror

import os

cimport rtap._core.compat as _compat
cimport rtap._core.live as _live
from rtap._core.burst cimport Burst
from rtap._core.linux cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, F_DUPFD_CLOEXEC, MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE,
    close, eventfd, fcntl, mmap, munmap, pread,
)
from rtap._core.mbuf cimport check_range
from rtap._core.memfd cimport memfd_flaw, memfd_make
from rtap._core.mempool cimport Mempool
from rtap._core.pool cimport fork_generation, pool_t
from rtap._core.queue cimport QUEUE_CLOSED, QUEUE_STARTED, QUEUE_STOPPED
from rtap._core.rx_queue cimport RxQueueBase
from rtap._core.shm cimport (
    SHM_RINGS, shm_ring_close, shm_ring_number, shm_ring_open, shm_t,
)
from rtap._core.tx_queue cimport TxQueueBase
from rtap._queues.shm_cells cimport (
    cell_empty, ring_count, ring_idle, ring_rx, ring_t, ring_tx,
)

cdef enum:
    PAGE = 4096
    FORMAT = 2
    HEAD_AT = 128
    TAIL_AT = 256
    WAITERS_AT = 384
    CELLS_AT = PAGE
    SIZE_MIN = 2
    SIZE_MAX = 1 << 20

cdef uint64_t MAGIC = 0x00676e6972706174        # "tapring"

cdef struct head_t:
    uint64_t magic
    uint64_t pool_id
    uint32_t format
    uint32_t size
    uint32_t number
    uint32_t unused
    uint64_t total


# ---- descriptors

cdef str no_ring(int fd, const char *why):
    return f"descriptor {fd} is not a ring of this pool: {why.decode()}"


cdef pool_t *shared(Mempool pool) except NULL:
    cdef pool_t *p = pool.alive()
    if p.shm == NULL:
        raise ValueError("frames move between processes in the buffers of a shared pool: "
                         "Mempool(..., shared=True)")
    return p


cdef int check_event(int fd) except -1:
    try:
        kind = os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        kind = "not open"
    if kind != "anon_inode:[eventfd]":
        raise ValueError(f"event_fd must be an eventfd, and descriptor {fd} is {kind}")
    return 0


cdef void *map_fd(int fd, uint64_t total) except NULL:
    cdef void *base = mmap(NULL, <size_t>total, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    if base == MAP_FAILED:
        raise OSError(errno, f"cannot map a ring of {total} bytes: {strerror(errno).decode()}")
    return base


cdef inline uint64_t total_of(uint32_t size) noexcept nogil:
    return (<uint64_t>CELLS_AT + <uint64_t>size * sizeof(uint64_t) + PAGE - 1) & ~<uint64_t>(
        PAGE - 1)


cdef int new_ring(shm_t *s, uint32_t size, uint32_t number, const char *name) except -1:
    """The memfd of an empty ring."""
    cdef uint64_t total = total_of(size), i
    cdef int fd = memfd_make(name, total)
    cdef uint64_t *cells
    cdef head_t *head
    cdef void *base
    if fd < 0:
        raise OSError(-fd, f"cannot make a ring of {size} frames: {strerror(-fd).decode()}")
    try:
        base = map_fd(fd, total)
    except BaseException:
        close(fd)
        raise
    head = <head_t *>base
    head.pool_id = s.id
    head.format = FORMAT
    head.size = size
    head.number = number
    head.total = total
    cells = <uint64_t *>(<uint8_t *>base + CELLS_AT)
    for i in range(size):
        cells[i] = cell_empty(i)
    _compat.store64(&head.magic, MAGIC)
    munmap(base, <size_t>total)
    return fd


cdef Mapping map_ring(int fd, uint32_t asked, int event_fd, Mempool pool):
    cdef Mapping mapping = Mapping.__new__(Mapping)
    cdef ring_t *r = &mapping.ring
    cdef uint64_t total = 0
    cdef head_t head            # a copy, which nobody changes any more
    cdef const char *why
    cdef pool_t *p = shared(pool)
    cdef int rc
    why = memfd_flaw(fd, &total)
    if why == NULL:
        if total < CELLS_AT or pread(fd, &head, sizeof(head), 0) != <ssize_t>sizeof(head):
            why = "it is too small"
        elif head.magic != MAGIC:
            why = "it is not a ring"
        elif head.format != FORMAT:
            why = "its format is of another version of rtap"
        elif not (<uint32_t>SIZE_MIN <= head.size <= <uint32_t>SIZE_MAX
                  and head.size & (head.size - 1) == 0 and head.number < <uint32_t>SHM_RINGS):
            why = "numbers in its header are out of range"
        elif head.total != total or total_of(head.size) != total:
            why = "its size is not the one that its header tells"
        elif head.pool_id != p.shm.id:
            why = "it was made for another pool"
    if why != NULL:
        raise ValueError(no_ring(fd, why))
    if asked != 0 and asked != head.size:
        raise ValueError(f"the ring has room for {head.size} frames, not {asked}")
    mapping.pool = pool
    r.pool = pool.hold()
    r.shm = r.pool.shm
    rc = shm_ring_open(r.shm, head.number)
    if rc != 0:
        pool.let_go()
        raise OSError(-rc, "another process is freeing what lay in the ring: "
                      f"{strerror(-rc).decode()}")
    r.number = head.number
    mapping.opened = True
    r.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3)
    if event_fd >= 0:
        r.event_fd = fcntl(event_fd, F_DUPFD_CLOEXEC, 3)
    if r.fd < 0 or (event_fd >= 0 and r.event_fd < 0):
        raise OSError("the process has no descriptor left for a ring")
    r.total = total
    r.base = <uint8_t *>map_fd(r.fd, total)
    _live.made(_live.SHARED_RINGS, 1)
    r.head = <uint64_t *>(r.base + HEAD_AT)
    r.tail = <uint64_t *>(r.base + TAIL_AT)
    r.waiters = <uint32_t *>(r.base + WAITERS_AT)
    r.cells = <uint64_t *>(r.base + CELLS_AT)
    r.size = head.size
    r.mask = head.size - 1
    while 1 << r.shift < r.size:
        r.shift += 1
    return mapping


@cython.no_gc_clear
cdef class Mapping:
    """A ring's memory and descriptors, which its queues keep."""

    def __cinit__(self):
        self.ring.fd = self.ring.event_fd = -1
        self.generation = fork_generation()

    def __dealloc__(self):
        self.drop()

    @cython.critical_section
    cdef void drop(self) noexcept:
        cdef ring_t *r = &self.ring
        if self.opened:
            self.opened = False
            shm_ring_close(r.shm, r.number)
            self.pool.let_go()
        if r.base != NULL:
            munmap(r.base, <size_t>r.total)
            r.base = NULL
            _live.gone(_live.SHARED_RINGS, 1)
        if r.fd >= 0:
            close(r.fd)
        if r.event_fd >= 0:
            close(r.event_fd)
        r.fd = r.event_fd = -1


# ---- for Python

@cython.no_gc_clear
cdef class ShmRxQueue(RxQueueBase):
    """The receiving side of a :class:`ShmRing`, which makes it."""

    def close(self):
        """Stops, for good; idempotent."""
        self.checked()
        self.stop()
        _compat.cas(&self.gate.state, QUEUE_STOPPED, QUEUE_CLOSED)

    cdef dict xtotals(self):
        cdef dict totals = RxQueueBase.xtotals(self)
        totals["bad_entries"] = _compat.counter_read(&self.state.bad_entries)
        return totals


@cython.no_gc_clear
cdef class ShmTxQueue(TxQueueBase):
    """The sending side of a :class:`ShmRing`, which makes it."""

    cdef dict xtotals(self):
        cdef dict totals = TxQueueBase.xtotals(self)
        totals["copied_packets"] = _compat.counter_read(&self.state.copied)
        totals["copy_failed"] = _compat.counter_read(&self.state.no_buffer)
        return totals


cdef ShmRxQueue rx_side(Mapping mapping, str name):
    cdef ShmRxQueue queue = ShmRxQueue.__new__(ShmRxQueue)
    queue.once()
    queue.mapping = mapping
    queue.state.ring = &mapping.ring
    queue.state.base.burst = ring_rx
    queue.state.base.idle = ring_idle
    queue.state.base.fd = mapping.ring.event_fd
    queue.state.base.revisit = True     # nobody may write to the descriptor, though he should
    queue.serve(&queue.state.base)
    queue.pool = mapping.pool
    queue.name = name
    queue.port = 0xffff
    queue.nb_desc = <int>mapping.ring.size
    queue.chosen, queue.why = "none", "no kernel is entered"
    queue.generation = mapping.generation
    queue.gate.state = QUEUE_STARTED
    return queue


cdef ShmTxQueue tx_side(Mapping mapping, str name):
    cdef ShmTxQueue queue = ShmTxQueue.__new__(ShmTxQueue)
    queue.once()
    queue.mapping = mapping
    queue.state.ring = &mapping.ring
    queue.state.base.burst = ring_tx
    queue.state.base.fd = -1
    queue.serve(&queue.state.base)
    queue.name = name
    queue.port = 0xffff
    queue.nb_desc = <int>mapping.ring.size
    queue.chosen, queue.why = "none", "no kernel is entered"
    queue.generation = mapping.generation
    queue.gate.state = QUEUE_STARTED
    return queue


cdef class ShmRing:
    """ShmRing(fd, size=None, *, pool, event_fd=None, name='')\n--\n

    A ring through which processes hand each other frames of a shared ``pool``, without a copy.

    ``fd`` is the descriptor of a ring that :meth:`create` made, here or in another process, and
    ``pool`` is the pool it was made for, attached.  ``event_fd`` is the ring's eventfd: with it,
    receivers sleep until a sender wakes them; without it, a worker looks at the ring several
    thousand times a second.  Both descriptors stay the caller's.  ``size`` is checked, if given.
    ``name`` is for people.

    Any number of processes may send and receive at the same time.  In this one, a thread at a time
    sends and another one receives, as with the queues of a device; make more objects from the
    descriptors for more.  A process that is killed at any moment stops nobody else.

    The ring is a source and a target of a :class:`rtap.Worker`'s routes.  ValueError when the
    descriptor is not of a ring of that pool.
    """

    def __init__(self, fd, size=None, *, Mempool pool not None, event_fd=None, str name=""):
        cdef int ring_fd = <int>check_range("fd", fd, 0, (1 << 31) - 1)
        cdef int event = -1
        cdef uint32_t asked = 0
        cdef str label = name or "ring"
        cdef Mapping mapping
        if size is not None:
            asked = <uint32_t>check_range("size", size, SIZE_MIN, SIZE_MAX)
        if event_fd is not None:
            event = <int>check_range("event_fd", event_fd, 0, (1 << 31) - 1)
            check_event(event)
        # The arguments' own code has run by now.
        if not _compat.cas(&self.made, 0, 1):
            raise RuntimeError("a ShmRing is made once")
        mapping = map_ring(ring_fd, asked, event, pool)
        self.label = label
        self.rx = rx_side(mapping, label)
        self.tx = tx_side(mapping, label)
        self.mapping = mapping

    @classmethod
    def create(cls, Mempool pool not None, size, *, str name=""):
        """A new ring, with room for ``size`` frames: a power of two from 2 to 1,048,576.

        Its descriptors, ``fd`` and ``event_fd``, and the pool's are what other processes need.  A
        pool has at most 256 rings."""
        cdef uint32_t n = <uint32_t>check_range("size", size, SIZE_MIN, SIZE_MAX)
        cdef bytes label = (name or "rtap-ring").encode()
        cdef int number = -1, fd = -1, event = -1
        cdef ShmRing ring
        cdef pool_t *p
        if n & (n - 1) != 0:
            raise ValueError(f"size must be a power of two, got {n}")
        shared(pool)
        p = pool.hold()
        try:
            number = shm_ring_number(p.shm)
            if number < 0:
                raise OSError(-number, f"{SHM_RINGS} rings of the pool are open, and no more can")
            fd = new_ring(p.shm, n, <uint32_t>number, PyBytes_AS_STRING(label))
            event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            if event < 0:
                raise OSError(errno, "the process has no descriptor left for a ring")
            ring = cls.__new__(cls)
            ShmRing.__init__(ring, fd, n, pool=pool, event_fd=event, name=name)
        finally:
            if number >= 0:
                shm_ring_close(p.shm, <uint32_t>number)
            if fd >= 0:
                close(fd)
            if event >= 0:
                close(event)
            pool.let_go()
        return ring

    cdef Mapping alive(self):
        if self.mapping is None:
            raise RuntimeError("the ShmRing was never initialised")
        if not self.mapping.opened:
            raise ValueError("the ring is closed")
        return self.mapping

    def __repr__(self):
        if self.mapping is None:
            return "<ShmRing never initialised>"
        if not self.mapping.opened:
            return f"<ShmRing {self.label} closed>"
        return f"<ShmRing {self.label} {self.count} of {self.size} frames>"

    @property
    def name(self):
        """What people call it."""
        self.alive()
        return self.label

    @property
    def fd(self):
        """Descriptor of the memfd that holds the ring.  Nobody can change its size."""
        return self.alive().ring.fd

    @property
    def event_fd(self):
        """Descriptor that is readable when a sender has woken sleeping receivers, or None."""
        cdef int fd = self.alive().ring.event_fd
        return fd if fd >= 0 else None

    @property
    def pool(self):
        """The shared pool whose frames it moves."""
        return self.alive().pool

    @property
    def size(self):
        """Frames for which there is room."""
        return self.alive().ring.size

    @property
    def count(self):
        """Frames that wait in it, about: others send and receive meanwhile."""
        cdef Mapping mapping = self.alive()
        with cython.critical_section(mapping):
            return ring_count(&self.alive().ring)

    def __len__(self):
        return self.count

    def __bool__(self):
        return True

    @property
    def closed(self):
        """Whether it was closed here."""
        return self.mapping is not None and not self.mapping.opened

    @property
    def rx_queue(self):
        """Its receiving side, as a queue: the source of a worker's route."""
        self.alive()
        return self.rx

    @property
    def tx_queue(self):
        """Its sending side, as a queue: a target of a worker's route."""
        self.alive()
        return self.tx

    def enqueue(self, Burst burst not None):
        """Puts frames from the front of ``burst`` into the ring; returns how many it took.

        These frames are consumed; ``burst[0]`` is then the first that is left.  A full ring gives a
        short count.  A frame that somebody else holds here, a clone, or one of another pool is
        copied into the ring's pool first; when that is empty, the count is short, too."""
        self.alive()
        return self.tx.tx_burst(burst)

    def dequeue(self, n=64, timeout=0):
        """Up to ``n`` frames, as a :class:`rtap.Burst`, in order.

        ``timeout`` in seconds to wait for the first one, None for ever; waiting never holds the GIL
        and Ctrl-C ends it."""
        self.alive()
        return self.rx.rx_burst(n, timeout)

    def counters(self):
        """What this object has moved, as a dict of name to int.

        rx_packets, rx_bytes; tx_packets, tx_bytes; tx_full (bursts that the ring or the pool cut
        short); copied_packets (frames that could not be handed over as they were); copy_failed
        (bursts cut short since the pool had no buffer for a copy); bad_entries (frames that another
        process has spoiled, or of which it died halfway)."""
        cdef dict rx, tx
        self.alive()
        rx, tx = self.rx.totals(), self.tx.totals()
        return {
            "rx_packets": rx["packets"],
            "rx_bytes": rx["bytes"],
            "tx_packets": tx["packets"],
            "tx_bytes": tx["bytes"],
            "tx_full": tx["full"],
            "copied_packets": _compat.counter_read(&self.tx.state.copied),
            "copy_failed": _compat.counter_read(&self.tx.state.no_buffer),
            "bad_entries": _compat.counter_read(&self.rx.state.bad_entries),
        }

    def xstats(self):
        """The extended statistics of both sides, as those of a device's queue: dict of name to
        int, ``rx_...`` and ``tx_...``."""
        self.alive()
        return ({f"rx_{name}": n for name, n in self.rx.xcounters().items()}
                | {f"tx_{name}": n for name, n in self.tx.xcounters().items()})

    def close(self):
        """Ends bursts and waits of this object, then unmaps the ring; idempotent.

        Frames stay in it for others.  The last process that closes a ring frees them."""
        if self.mapping is None:
            raise RuntimeError("the ShmRing was never initialised")
        self.tx.close()
        self.rx.close()
        self.mapping.drop()

    def __enter__(self):
        self.alive()
        return self

    def __exit__(self, *exc):
        self.close()
