# SPDX-License-Identifier: BSD-3-Clause
"""Run-to-completion threads: :class:`Worker` moves bursts between queues without the GIL.

A worker owns the queues of its routes while it runs: nobody else can burst on them.  It leaves a
queue when that queue is stopped or its interface is gone, and goes on with the others.
"""

import atexit
import contextlib
import os
import threading
import weakref

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cimport rtap._compat as _compat
from rtap._linux cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, POLLIN, close, eventfd, poll, pollfd, sched_yield, usleep,
    write,
)
from rtap._mbuf cimport check_range
from rtap._pool cimport mbuf_free_bulk, mbuf_t
from rtap._queue cimport OWNED_BY_WORKER, QUEUE_STARTED, RxQueueBase, TxQueueBase, rxq_t, txq_t
from rtap._uring cimport fork_generation

from rtap.errors import DeviceStateError
from rtap.stats import RouteStats, WorkerStats

cdef enum:
    WORKER_BURST_MAX = 512
    WAIT_POLL = 0
    WAIT_SLEEP = 1
    WAIT_ADAPTIVE = 2

    SPIN_NS = 100_000           # an adaptive worker looks this long, yielding, before it sleeps
    SLEEP_MS = 20               # a queue that is stopped is let go of within this
    FRUITLESS_US = 200          # woken for frames that cannot be taken: no buffers, a full target

cdef dict WAITS = {"poll": WAIT_POLL, "sleep": WAIT_SLEEP, "adaptive": WAIT_ADAPTIVE}


cdef struct route_t:
    rxq_t *rx
    txq_t *tx
    bint retry                  # what the target does not take is tried again, not dropped
    uint32_t active
    uint32_t error              # errno that ended the route; 0 when its queue was stopped
    bint owns_tx                # of the routes to one tx queue, one gives it back
    uint32_t n                  # frames in hand
    uint64_t rx_packets
    uint64_t tx_packets
    uint64_t drops
    uint64_t retries
    mbuf_t *frames[WORKER_BURST_MAX]


cdef struct worker_t:
    route_t *routes
    uint32_t n_routes
    uint32_t burst
    uint32_t stop
    int wait
    pollfd *fds                 # the wake-up, then each route's descriptor


cdef void route_end(worker_t *w, route_t *r, int error) noexcept nogil:
    if r.n > 0:
        mbuf_free_bulk(r.frames, r.n)
        _compat.counter_add(&r.drops, r.n)
        r.n = 0
    w.fds[1 + (r - w.routes)].fd = -1
    _compat.store(&r.error, error)
    _compat.store(&r.active, 0)
    route_leave(w, r)


cdef bint route_run(worker_t *w, route_t *r) noexcept nogil:
    """One burst along a route; true when frames moved."""
    cdef uint32_t sent
    cdef uint64_t lost
    cdef int error = 0
    if (_compat.load_relaxed(&r.rx.state) != QUEUE_STARTED
            or _compat.load_relaxed(&r.tx.state) != QUEUE_STARTED):
        route_end(w, r, 0)
        return False
    if r.n == 0:
        r.n = r.rx.burst(r.rx, r.frames, w.burst, &error)
        if r.n == 0:
            if error != 0:
                route_end(w, r, error)
            return False
        _compat.counter_add(&r.rx_packets, r.n)
    lost = r.tx.errors
    sent = r.tx.burst(r.tx, r.frames, r.n, &error)
    lost = min(r.tx.errors - lost, <uint64_t>sent)      # consumed, but not sent
    r.n -= sent
    _compat.counter_add(&r.tx_packets, sent - lost)
    _compat.counter_add(&r.drops, lost)
    if error != 0:
        route_end(w, r, error)
    elif r.n > 0 and r.retry:
        _compat.counter_add(&r.retries, 1)
    elif r.n > 0:
        mbuf_free_bulk(r.frames, r.n)
        _compat.counter_add(&r.drops, r.n)
        r.n = 0
    return sent > 0


cdef void route_leave(worker_t *w, route_t *ended) noexcept nogil:
    """Gives up the queues of a route that has ended: to another route that still uses one, or to
    nobody.  Whoever stops a queue waits for that."""
    cdef route_t *r
    cdef uint32_t i
    for i in range(w.n_routes):
        r = &w.routes[i]
        if r.active != 0 and r.tx == ended.tx and ended.owns_tx:
            r.owns_tx = True
            ended.owns_tx = False
    if ended.owns_tx:
        _compat.store(&ended.tx.owned, 0)
        ended.owns_tx = False
    _compat.store(&ended.rx.owned, 0)


cdef void worker_loop(worker_t *w) noexcept nogil:
    cdef uint64_t idle_since = 0, now
    cdef uint32_t fruitless = 0, active, i
    cdef bint moved, in_hand
    cdef int ready
    while _compat.load_relaxed(&w.stop) == 0:
        moved = in_hand = False
        active = 0
        for i in range(w.n_routes):
            if w.routes[i].active != 0:
                moved |= route_run(w, &w.routes[i])
                active += w.routes[i].active
                in_hand |= w.routes[i].n > 0
        if active == 0:
            break
        if moved:
            idle_since = 0
            fruitless = 0
            continue
        if w.wait == WAIT_POLL:
            continue
        if in_hand:             # a full target does not say when it has room
            usleep(FRUITLESS_US)
            continue
        now = _compat.now_ns()
        if idle_since == 0:
            idle_since = now
        if w.wait == WAIT_ADAPTIVE and now - idle_since < SPIN_NS:
            sched_yield()
            continue
        # Not an epoll set: a descriptor that is in one wakes it for every frame, at the sender's
        # expense, also while nobody sleeps.
        ready = poll(w.fds, 1 + w.n_routes, SLEEP_MS)
        idle_since = 0
        if ready > 0:
            fruitless += 1
            if fruitless > 1:
                usleep(FRUITLESS_US)
    for i in range(w.n_routes):
        if w.routes[i].active != 0:
            route_end(w, &w.routes[i], 0)


cdef object running = weakref.WeakSet()


@atexit.register
def _stop_all():
    """The interpreter must not take its objects down under a running worker."""
    for worker in list(running):
        with contextlib.suppress(Exception):
            worker.stop()


cdef class Worker:
    """A thread that forwards bursts along its routes, never taking the GIL.

    cpu:   core to pin the thread to, or None
    wait:  what it does when nothing arrives: "poll" spins, "sleep" waits on the descriptors,
           "adaptive" looks for 100 microseconds, yielding, then waits
    burst: most frames moved at once along a route (1..512)

    Context manager: started on entry, stopped on exit.  Can be started again after a stop.
    """

    cdef worker_t w
    cdef object thread
    cdef object lock            # of start and of what follows the end
    cdef object __weakref__
    cdef list routes            # (rx queue, tx queue, retry)
    cdef uint32_t generation
    cdef int wake_fd
    cdef readonly object cpu
    cdef readonly str wait
    cdef readonly str name

    def __init__(self, cpu=None, wait="adaptive", *, burst=64, str name="rtap-worker"):
        if self.routes is not None:
            raise RuntimeError("a Worker is made once")
        if wait not in WAITS:
            raise ValueError(f"wait must be one of {', '.join(WAITS)}, got {wait!r}")
        if cpu is not None and cpu not in os.sched_getaffinity(0):
            raise ValueError(f"cpu {cpu!r} is not one of this process's "
                             f"{sorted(os.sched_getaffinity(0))}")
        self.w.burst = check_range("burst", burst, 1, WORKER_BURST_MAX)
        self.w.wait = WAITS[wait]
        self.wait = wait
        self.cpu = cpu
        self.name = name
        self.routes = []
        self.lock = threading.RLock()
        self.generation = fork_generation()

    def __cinit__(self):
        self.wake_fd = -1

    def __dealloc__(self):
        free(self.w.routes)
        free(self.w.fds)
        if self.wake_fd >= 0:
            close(self.wake_fd)

    def __repr__(self):
        return (f"<Worker {self.name} {'running' if self.running else 'stopped'}, "
                f"{len(self.routes)} routes>")

    @property
    def running(self):
        """True while the thread lives; it also ends by itself when every route has ended."""
        return (self.thread is not None and self.generation == fork_generation()
                and self.thread.is_alive())

    def forward(self, source, target, *, on_full="drop"):
        """Adds a route: every frame received on ``source`` is sent on ``target``.

        Both are (device, queue number); one call is one direction.  on_full says what happens to
        frames the target does not take at once: "drop" (and count) or "retry".
        """
        cdef RxQueueBase rx = source[0].rx_queue(source[1])
        cdef TxQueueBase tx = target[0].tx_queue(target[1])
        if on_full not in ("drop", "retry"):
            raise ValueError(f"on_full must be 'drop' or 'retry', got {on_full!r}")
        if self.running:
            raise DeviceStateError("routes are added before the worker is started")
        if any(route[0] is rx for route in self.routes):
            raise ValueError(f"{rx!r} has a route already")
        self.routes.append((rx, tx, on_full == "retry"))

    def start(self):
        """Takes the queues and starts the thread.  RuntimeError when a queue is in use."""
        with self.lock:
            if self.running:
                raise DeviceStateError(f"{self!r} is running")
            if not self.routes:
                raise DeviceStateError("the worker has no route: call forward() first")
            self.tidy_up()
            self.launch()

    cdef int launch(self) except -1:
        cdef list taken = []
        free(self.w.routes)
        free(self.w.fds)
        self.w.n_routes = 0
        self.w.routes = <route_t *>calloc(len(self.routes), sizeof(route_t))
        self.w.fds = <pollfd *>calloc(len(self.routes) + 1, sizeof(pollfd))
        if self.w.routes == NULL or self.w.fds == NULL:
            raise MemoryError("no memory for the routes")
        try:
            self.take(taken)
            self.w.stop = 0
            self.generation = fork_generation()
            self.thread = threading.Thread(target=self._main, name=self.name, daemon=True)
            running.add(self)
            self.thread.start()
        except BaseException:
            if self.thread is not None and self.thread.ident is not None:
                self.stop()     # Ctrl-C came when it ran already: it gives the queues back
            else:
                for queue in taken:
                    disown(queue)
                self.tidy_up()
            raise
        return 0

    cdef int take(self, list taken) except -1:
        cdef RxQueueBase rx
        cdef TxQueueBase tx
        cdef route_t *r
        self.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.wake_fd < 0:
            raise OSError("the process has no descriptor left for a worker")
        self.w.fds[0].fd = self.wake_fd
        self.w.fds[0].events = POLLIN
        for rx, tx, retry in self.routes:
            r = &self.w.routes[self.w.n_routes]
            rx.own(OWNED_BY_WORKER)
            taken.append(rx)
            if not any(tx is other for other in taken):
                tx.own(OWNED_BY_WORKER)
                taken.append(tx)
                r.owns_tx = True
            r.rx = rx.q
            r.tx = tx.q
            r.retry = retry
            r.active = 1
            self.w.n_routes += 1
            self.w.fds[self.w.n_routes].fd = rx.q.fd
            self.w.fds[self.w.n_routes].events = POLLIN
        return 0

    def _main(self):
        try:
            if self.cpu is not None:
                os.sched_setaffinity(0, {self.cpu})
        except BaseException:
            _compat.store(&self.w.stop, 1)
            raise
        finally:
            with nogil:         # also when it is to end at once: it gives the queues back
                worker_loop(&self.w)

    def stop(self):
        """Ends the thread after the burst in hand and gives the queues back; idempotent."""
        cdef uint64_t one = 1
        if self.running:
            _compat.store(&self.w.stop, 1)
            write(self.wake_fd, &one, sizeof(one))
        self.join()

    def join(self, timeout=None):
        """Waits until the thread has ended (seconds, or None); true when it has."""
        thread = self.thread
        if thread is not None and self.generation == fork_generation():
            thread.join(timeout)
            if thread.is_alive():
                return False
        with self.lock:
            if self.thread is thread:       # nobody tidied up or started it again meanwhile
                self.tidy_up()
        return True

    cdef int tidy_up(self) except -1:
        self.thread = None
        if self.wake_fd >= 0:
            close(self.wake_fd)
        self.wake_fd = -1
        running.discard(self)
        return 0

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.stop()

    def stats(self):
        """A :class:`rtap.WorkerStats` with one :class:`rtap.RouteStats` for each route, readable
        while the worker runs."""
        cdef route_t *r
        cdef uint32_t i
        out = []
        for i in range(self.w.n_routes):
            r = &self.w.routes[i]
            rx, tx, _ = self.routes[i]
            out.append(RouteStats(
                source=repr(rx), target=repr(tx),
                rx_packets=_compat.counter_read(&r.rx_packets),
                tx_packets=_compat.counter_read(&r.tx_packets),
                drops=_compat.counter_read(&r.drops),
                retries=_compat.counter_read(&r.retries),
                error=os.strerror(_compat.load(&r.error)) if _compat.load(&r.error) else "",
            ))
        return WorkerStats(routes=out)


cdef void disown(queue) noexcept:
    if isinstance(queue, RxQueueBase):
        (<RxQueueBase>queue).disown()
    else:
        (<TxQueueBase>queue).disown()
