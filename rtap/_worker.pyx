# SPDX-License-Identifier: BSD-3-Clause
"""Run-to-completion threads: :class:`Worker` moves bursts between queues without the GIL.

A worker owns the queues of its routes while it runs: nobody else can burst on them.  It leaves a
queue when that queue is stopped or its interface is gone, and goes on with the others.
"""

import atexit
import contextlib
import logging
import os
import threading
import weakref

from libc.stdint cimport uint32_t, uint64_t

cimport rtap._compat as _compat
from rtap._chain cimport stage_alloc, stage_t
from rtap._linux cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EPOLLIN, EPOLL_CLOEXEC, EPOLL_CTL_ADD, close, epoll_create1,
    epoll_ctl, epoll_event, eventfd, write,
)
from rtap._loop cimport (
    FROM_SOURCE, FROM_STAGE, WAIT_ADAPTIVE, WAIT_POLL, WAIT_SLEEP, WORKER_BURST_MAX, route_t,
    target_t, worker_alloc, worker_free, worker_loop, worker_t,
)
from rtap._mbuf cimport check_range
from rtap._queue cimport OWNED_BY_WORKER, RxQueueBase, TxQueueBase
from rtap._uring cimport fork_generation
from rtap.stages._stage cimport Stage

from rtap.errors import DeviceStateError
from rtap.events import EthEvent
from rtap.power import limit_resume_latency
from rtap.stages import Call
from rtap.stats import RouteStats, StageStats, TargetStats, WorkerStats

logger = logging.getLogger("rtap")

cdef dict WAITS = {"poll": WAIT_POLL, "sleep": WAIT_SLEEP, "adaptive": WAIT_ADAPTIVE}

cdef dict running = {}          # id -> weak reference


cdef list all_running():
    found = [ref() for ref in list(running.values())]
    return [worker for worker in found if worker is not None]


@atexit.register
def _stop_all():
    """The interpreter must not take its objects down under a running worker."""
    for worker in all_running():
        with contextlib.suppress(Exception):
            worker.stop()


def _after_fork():
    """In the child: who held a lock may not exist here."""
    for worker in all_running():
        (<Worker>worker).lock = threading.RLock()
        (<Worker>worker).let_idle()
    running.clear()


os.register_at_fork(after_in_child=_after_fork)


cdef class Worker:
    """A thread that forwards bursts along its routes, never taking the GIL.

    cpu:   core to pin the thread to, or None
    wait:  what it does when nothing arrives: "poll" spins, "sleep" waits on the descriptors,
           "adaptive" looks for 100 microseconds, yielding, then waits
    burst: most frames moved at once along a route (1..512)
    resume_latency: microseconds in which every processor has to come back from idling while the
           worker runs (PM QoS; root); 0 keeps them from halting, which on a virtual machine is most
           of what a frame for a sleeping worker waits for.  None asks for nothing

    Context manager: started on entry, stopped on exit.  Can be started again after a stop.
    """

    cdef worker_t w
    cdef object thread
    cdef object lock            # of all that is here but the loop's own
    cdef object __weakref__
    cdef list routes            # (rx queue, [tx queue, ...], [stage, ...], retry)
    cdef list sources           # the devices of the rx queues, as weak references
    cdef list entered           # stages that are to be left
    cdef uint32_t generation
    cdef int wake_fd
    cdef int latency_fd
    cdef readonly object cpu
    cdef readonly object resume_latency
    cdef readonly str wait
    cdef readonly str name

    def __init__(self, cpu=None, wait="adaptive", *, burst=64, resume_latency=None,
                 str name="rtap-worker"):
        if self.routes is not None:
            raise RuntimeError("a Worker is made once")
        if wait not in WAITS:
            raise ValueError(f"wait must be one of {', '.join(WAITS)}, got {wait!r}")
        if cpu is not None and cpu not in os.sched_getaffinity(0):
            raise ValueError(f"cpu {cpu!r} is not one of this process's "
                             f"{sorted(os.sched_getaffinity(0))}")
        self.w.burst = check_range("burst", burst, 1, WORKER_BURST_MAX)
        if resume_latency is not None:
            check_range("resume_latency", resume_latency, 0, 1_000_000)
        self.resume_latency = resume_latency
        self.w.wait = WAITS[wait]
        self.wait = wait
        self.cpu = cpu
        self.name = name
        self.routes = []
        self.sources = []
        self.entered = []
        self.lock = threading.RLock()
        self.generation = fork_generation()

    def __cinit__(self):
        self.wake_fd = self.w.epoll_fd = self.w.event_fd = self.latency_fd = -1

    def __dealloc__(self):
        worker_free(&self.w)
        self.close_fds()

    cdef void close_fds(self) noexcept:
        if self.wake_fd >= 0:
            close(self.wake_fd)
        if self.w.epoll_fd >= 0:
            close(self.w.epoll_fd)
        if self.w.event_fd >= 0:
            close(self.w.event_fd)
        self.wake_fd = self.w.epoll_fd = self.w.event_fd = -1
        self.let_idle()

    cdef void let_idle(self) noexcept:
        """Asks no more that processors wake soon; a forked child's copy of the request counts."""
        if self.latency_fd >= 0:
            close(self.latency_fd)
        self.latency_fd = -1

    def __repr__(self):
        with self.lock:
            return (f"<Worker {self.name} {'running' if self.running else 'stopped'}, "
                    f"{len(self.routes)} routes>")

    @property
    def running(self):
        """True while the thread lives; it also ends by itself when every route has ended."""
        with self.lock:
            return (self.thread is not None and self.generation == fork_generation()
                    and self.thread.is_alive())

    def forward(self, source, target, *, stages=(), on_full="drop"):
        """Adds a route: every frame received on ``source`` is sent on ``target``.

        Both are (device, queue number); one call is one direction.  ``stages`` (:mod:`rtap.stages`)
        are what happens to frames in between, in turn: a Stage, or any callable that takes a Burst.
        With a list of targets they say where each frame goes, to the first one by default.
        on_full says what happens to frames that a target does not take at once: "drop" (and count)
        or "retry", which reads no more from the source meanwhile.
        """
        cdef RxQueueBase rx = source[0].rx_queue(source[1])
        cdef list targets = target if isinstance(target, list) else [target]
        cdef list txs = [device.tx_queue(number) for device, number in targets]
        cdef list chain = [stage if isinstance(stage, Stage) else Call(stage) for stage in stages]
        cdef Stage each
        if not txs:
            raise ValueError("a route needs a target")
        if len(set(map(id, txs))) < len(txs):
            raise ValueError("a target is named twice")
        for each in chain:
            each.checked()
        if on_full not in ("drop", "retry"):
            raise ValueError(f"on_full must be 'drop' or 'retry', got {on_full!r}")
        with self.lock:
            if self.running:
                raise DeviceStateError("routes are added before the worker is started")
            if any(route[0] is rx for route in self.routes):
                raise ValueError(f"{rx!r} has a route already")
            self.routes.append((rx, txs, chain, on_full == "retry"))
            self.sources.append(weakref.ref(source[0]))

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
        cdef uint32_t flags = 0
        cdef Stage stage
        for route in self.routes:
            for stage in route[2]:
                flags |= stage.flags
        if worker_alloc(&self.w, <uint32_t>len(self.routes),
                        <uint32_t>sum([len(route[1]) for route in self.routes]),
                        <uint32_t>sum([len(route[2]) for route in self.routes]), flags) != 0:
            raise MemoryError("no memory for the routes")
        try:
            self.take(taken)
            self.w.stop = self.w.finished = 0
            self.generation = fork_generation()
            self.thread = threading.Thread(target=self._main, name=self.name, daemon=True)
            running[id(self)] = weakref.ref(self)
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
        cdef Stage stage
        cdef route_t *r
        cdef epoll_event event
        cdef uint32_t n_targets = 0
        if self.resume_latency is not None:
            self.latency_fd = limit_resume_latency(self.resume_latency)
        self.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.w.event_fd = eventfd(0, EFD_CLOEXEC)
        self.w.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        event.events = EPOLLIN
        event.data.u32 = 0
        if (self.wake_fd < 0 or self.w.epoll_fd < 0 or self.w.event_fd < 0
                or epoll_ctl(self.w.epoll_fd, EPOLL_CTL_ADD, self.wake_fd, &event) != 0):
            raise OSError("the process has no descriptor left for a worker")
        for rx, txs, stages, retry in self.routes:
            r = &self.w.routes[self.w.n_routes]
            r.targets = self.w.targets + n_targets
            r.stages = self.w.stages + self.w.n_stages
            rx.own(OWNED_BY_WORKER)
            taken.append(rx)
            for tx in txs:
                if not any(tx is other for other in taken):
                    tx.own(OWNED_BY_WORKER)
                    taken.append(tx)
                    r.targets[r.n_targets].owns = True
                r.targets[r.n_targets].tx = tx.q
                r.n_targets += 1
            for stage in stages:
                stage.enter(&r.stages[r.n_stages])
                self.entered.append(stage)
                if stage_alloc(&r.stages[r.n_stages], self.w.room) != 0:
                    raise MemoryError("no memory for the stages")
                r.n_stages += 1
                self.w.n_stages += 1
            n_targets += r.n_targets
            r.rx = rx.q
            r.retry = retry
            r.active = 1
            self.w.n_routes += 1
        return 0

    def _main(self):
        cdef uint64_t one = 1
        teller = threading.Thread(target=self._tell, name=f"{self.name}-events", daemon=True)
        try:
            teller.start()
            if self.cpu is not None:
                os.sched_setaffinity(0, {self.cpu})
        except BaseException:
            _compat.store(&self.w.stop, 1)
            raise
        finally:
            with nogil:         # also when it is to end at once: it gives the queues back
                worker_loop(&self.w)
            self.leave_stages()
            self.let_idle()
            _compat.store(&self.w.finished, 1)
            write(self.w.event_fd, &one, sizeof(one))
            if teller.ident is not None:
                teller.join()

    def _tell(self):
        """Tells of routes that give up.  On a thread of its own: the worker's takes no GIL."""
        cdef uint32_t i
        cdef bint last = False
        cdef set known = set()
        while not last:
            os.eventfd_read(self.w.event_fd)
            last = _compat.load(&self.w.finished) != 0
            for i in range(self.w.n_routes):
                if _compat.load(&self.w.routes[i].gave_up) and i not in known:
                    known.add(i)
                    self.route_gave_up(i)

    cdef int route_gave_up(self, uint32_t i) except -1:
        stats = self.route_stats(i)
        if stats.error:
            logger.warning("%s: a route has ended: %s", self.name, stats.error)
        device = self.sources[i]()
        if device is not None:
            device._port.event(EthEvent.ROUTE_END, stats)
        return 0

    def stop(self):
        """Ends the thread after the burst in hand and gives the queues back; idempotent."""
        cdef uint64_t one = 1
        with self.lock:
            if self.running:
                _compat.store(&self.w.stop, 1)
                write(self.wake_fd, &one, sizeof(one))
        self.join()

    def join(self, timeout=None):
        """Waits until the thread has ended (seconds, or None); true when it has."""
        with self.lock:
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
        self.leave_stages()
        self.close_fds()
        running.pop(id(self), None)
        return 0

    cdef int leave_stages(self) except -1:
        cdef Stage stage
        while self.entered:
            stage = self.entered.pop()
            stage.leave()
        return 0

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.stop()

    def stats(self):
        """A :class:`rtap.WorkerStats` with one :class:`rtap.RouteStats` for each route, readable
        while the worker runs."""
        cdef uint32_t i
        with self.lock:
            return WorkerStats(routes=[self.route_stats(i) for i in range(self.w.n_routes)])

    cdef object route_stats(self, uint32_t i):
        cdef route_t *r = &self.w.routes[i]
        cdef uint32_t error = _compat.load(&r.error)
        cdef target_t *t
        cdef stage_t *s
        cdef uint32_t k
        cdef list targets = [], stages = []
        rx, txs, chain, _ = self.routes[i]
        for k in range(r.n_targets):
            t = &r.targets[k]
            targets.append(TargetStats(
                target=repr(txs[k]),
                packets=_compat.counter_read(&t.packets),
                bytes=_compat.counter_read(&t.bytes),
                drops=_compat.counter_read(&t.drops),
                retries=_compat.counter_read(&t.retries),
            ))
        for k in range(r.n_stages):
            s = &r.stages[k]
            stages.append(StageStats(
                stage=chain[k].name,
                packets=_compat.counter_read(&s.packets),
                bytes=_compat.counter_read(&s.bytes),
                drops=_compat.counter_read(&s.drops),
                split=_compat.counter_read(&s.split),
                merged=_compat.counter_read(&s.merged),
                cycles=_compat.counter_read(&s.cycles),
            ))
        if error == 0:
            why = ""
        elif r.failed == FROM_SOURCE:
            why = f"{rx!r}: {os.strerror(error)}"
        elif r.failed & FROM_STAGE:
            k = r.failed & ~<uint32_t>FROM_STAGE
            why = f"stage {k} ({chain[k].name}) of the route from {rx!r}: {os.strerror(error)}"
        else:
            why = f"{txs[r.failed]!r}: {os.strerror(error)}"
        return RouteStats(
            source=repr(rx),
            rx_packets=_compat.counter_read(&r.packets),
            rx_bytes=_compat.counter_read(&r.bytes),
            cycles=_compat.counter_read(&r.cycles),
            idle=_compat.load(&r.parked) != 0,
            error=why,
            targets=targets,
            stages=stages,
        )


cdef void disown(queue) noexcept:
    if isinstance(queue, RxQueueBase):
        (<RxQueueBase>queue).disown()
    else:
        (<TxQueueBase>queue).disown()
