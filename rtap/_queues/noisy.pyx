# SPDX-License-Identifier: BSD-3-Clause
"""A receive queue around another one, behaving like a busy network function.

Frames wait in a buffer between the inner queue and the receiver. For each frame memory
is touched at random places, like the tables of a real function.
"""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cimport rtap._core.compat as _compat
from rtap._core.mbuf cimport check_range
from rtap._core.pool cimport fork_generation, mbuf_free_bulk, mbuf_t
from rtap._core.queue cimport rxq_t
from rtap._core.rx_queue cimport RxQueueBase
from rtap._queues.wrapped cimport ROUNDS_MAX, WrappedRxQueue, inner_runs

cdef enum:
    BURST = 512                 # frames taken from the inner queue at a time


cdef inline uint64_t place(noisy_t *q) noexcept nogil:
    """A random index into the memory (xorshift64, Marsaglia 2003)."""
    q.random ^= q.random << 13
    q.random ^= q.random >> 7
    q.random ^= q.random << 17
    return q.random & q.mask


cdef void look_up(noisy_t *q, uint32_t frames) noexcept nogil:
    cdef uint32_t _i, _k, k
    for _i in range(frames):
        for _k in range(q.reads):
            q.seen += q.memory[place(q)]
        for k in range(q.writes):
            q.memory[place(q)] = q.seen + k
        for _k in range(q.reads_writes):
            q.memory[place(q)] += 1


cdef void push(noisy_t *q, mbuf_t **v, uint32_t n) noexcept nogil:
    cdef uint32_t tail = q.head + q.count, i
    if q.count == 0:
        q.since = _compat.now_ns()
    for i in range(n):
        q.fifo[(tail + i) % q.size] = v[i]
    q.count += n


cdef uint32_t pop(noisy_t *q, mbuf_t **out, uint32_t n) noexcept nogil:
    cdef uint32_t i
    n = min(n, q.count)
    for i in range(n):
        out[i] = q.fifo[(q.head + i) % q.size]
    q.head = (q.head + n) % q.size
    q.count -= n
    return n


cdef uint32_t pass_through(noisy_t *q, mbuf_t **out, uint32_t n, uint32_t *got,
                           int *error) noexcept nogil:
    """One burst of the inner queue; how many frames leave."""
    cdef mbuf_t *fresh[BURST]
    cdef rxq_t *inner = q.wrapped.inner
    cdef uint32_t left
    if q.size == 0:
        got[0] = left = inner.burst(inner, out, n, error)
        look_up(q, left)
        return left
    # No more frames than the buffer and the caller have room for.
    got[0] = inner.burst(inner, fresh, min(n, q.size), error)
    look_up(q, got[0])
    left = pop(q, out, q.count + got[0] - q.size if q.count + got[0] > q.size else 0)
    push(q, fresh, got[0])
    if left > 0:
        q.since = _compat.now_ns()
    elif got[0] == 0 and q.count > 0 and q.flush_ns != 0:
        if q.flushing or _compat.now_ns() - q.since >= q.flush_ns:
            left = pop(q, out, n)
            q.flushing = q.count > 0
            q.since = _compat.now_ns()
    return left


cdef uint32_t noisy_rx(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    cdef noisy_t *q = <noisy_t *>base
    cdef uint32_t left = 0, got = 1, rounds = 0
    if not inner_runs(&q.wrapped):
        return 0
    n = min(n, BURST)
    # An empty burst would look like an idle queue, which this is not.
    while left == 0 and got > 0 and error[0] == 0 and rounds < ROUNDS_MAX:
        left = pass_through(q, out, n, &got, error)
        rounds += 1
    if left > 0:
        _compat.counter_add(&base.packets, left)
    return left


@cython.no_gc_clear
cdef class NoisyRxQueue(WrappedRxQueue):
    """NoisyRxQueue(inner, *, buffer_size=0, flush_ms=0, memory_mb=0, reads=0, writes=0, \
reads_writes=0)\n--\n

    Receives what ``inner`` receives, later.

    buffer_size:  frames held back; the oldest leave when newer ones need their place
    flush_ms:     when no frame has left a buffer for so long, it is emptied; 0 for never
    memory_mb:    size of the memory to touch, rounded down to a power of two MiB
    reads, writes, reads_writes: random accesses to it for each frame

    While started it holds the inner queue, which must be started too; it ends when that is
    stopped. It counts only ``packets``.
    """

    def __init__(self, RxQueueBase inner not None, *, buffer_size=0, flush_ms=0, memory_mb=0,
                 reads=0, writes=0, reads_writes=0):
        cdef noisy_t made
        cdef noisy_t *q = &made
        cdef uint64_t megabytes
        memset(q, 0, sizeof(noisy_t))
        inner.checked()
        q.size = check_range("buffer_size", buffer_size, 0, 1 << 20)
        q.flush_ns = <uint64_t>check_range("flush_ms", flush_ms, 0, 3_600_000) * 1_000_000
        megabytes = check_range("memory_mb", memory_mb, 0, 1 << 16)
        q.reads = check_range("reads", reads, 0, 1 << 20)
        q.writes = check_range("writes", writes, 0, 1 << 20)
        q.reads_writes = check_range("reads_writes", reads_writes, 0, 1 << 20)
        if megabytes == 0 and q.reads + q.writes + q.reads_writes > 0:
            raise ValueError("reads and writes need memory_mb, the size of what they touch")
        self.once()
        if megabytes > 0:
            while megabytes & (megabytes - 1):
                megabytes &= megabytes - 1
            q.mask = (megabytes << 20) // sizeof(uint64_t) - 1
            if q.mask < <size_t>-1 // sizeof(uint64_t):
                q.memory = <uint64_t *>calloc(<size_t>q.mask + 1, sizeof(uint64_t))
                self.noisy.memory = q.memory
            if q.memory == NULL:
                raise MemoryError(f"no memory for {megabytes} MiB to look up in")
        if q.size > 0:
            self.noisy.fifo = q.fifo = <mbuf_t **>calloc(q.size, sizeof(mbuf_t *))
            if q.fifo == NULL:
                raise MemoryError(f"no memory for a buffer of {q.size} frames")
        q.random = 88172645463325252    # any but 0
        q.wrapped.base.burst = noisy_rx
        self.noisy = made
        self.wrap(&self.noisy.wrapped, inner)

    def __dealloc__(self):
        if self.q != NULL and self.generation == fork_generation():
            self.empty()
        free(self.noisy.fifo)
        free(self.noisy.memory)

    cdef void empty(self) noexcept:
        cdef mbuf_t *block[BURST]
        cdef uint32_t n
        while self.noisy.count > 0:
            n = pop(&self.noisy, block, BURST)
            mbuf_free_bulk(block, n)

    @property
    def buffered(self):
        """Frames held back at present."""
        return self.noisy.count

    def close(self):
        """Gives the inner queue back and frees the frames held back; returns their number.
        For good; idempotent."""
        cdef uint32_t held
        if not self.end():
            return 0
        held = self.noisy.count
        self.empty()
        return held
