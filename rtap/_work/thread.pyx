# SPDX-License-Identifier: BSD-3-Clause
"""The state that a worker's thread holds: :class:`Work`.

It does not refer to its :class:`rtap.Worker`.  So a running Worker without references, which nobody
can stop any more, is noticed.
"""

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref

from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport uint32_t, uint64_t

cimport rtap._core.compat as _compat
cimport rtap._core.live as _live
from rtap._core.linux cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EPOLLIN, EPOLL_CLOEXEC, EPOLL_CTL_ADD, close, epoll_create1,
    epoll_ctl, epoll_event, eventfd, write,
)
from rtap._core.pool cimport fork_generation
from rtap._core.queue cimport LAYER_ANY, LAYER_IP, OWNED_BY_WORKER, QueueBase
from rtap._core.tx_queue cimport TxQueueBase
from rtap._core.workers cimport enter_worker, forget_workers, leave_worker, this_worker
from rtap._work.loop cimport (
    FROM_SOURCE, FROM_STAGE, route_t, target_t, worker_alloc, worker_free, worker_loop,
)
from rtap.stages._runner cimport stage_alloc, stage_t
from rtap.stages._stage cimport Stage, why_failed

from rtap._core.forks import forget_in_child, renew_in_child
from rtap._core.threads import begin
from rtap._work.figures import RouteStats, StageStats, TargetStats, WorkerStats
from rtap._work.power import limit_resume_latency
from rtap.errors import DeviceStateError

logger = logging.getLogger("rtap")

cdef dict at_work = {}          # id -> weak reference
cdef double LOOK_S = 0.05        # between checks whether a waiting worker has to end itself
cdef double EXIT_S = 0.5        # for all workers together, when the interpreter exits


cdef list all_at_work():
    found = [ref() for ref in list(at_work.values())]
    return [work for work in found if work is not None]


@atexit.register
def _stop_all():
    """Stops all workers at exit: the interpreter must not destroy objects that a running worker
    uses.  A worker whose stage does not return goes on until the process ends: its thread keeps its
    objects alive."""
    cdef double deadline = time.monotonic() + EXIT_S
    ending = all_at_work()
    for work in ending:
        with contextlib.suppress(Exception):
            (<Work>work).ask_to_stop()
    for work in ending:
        with contextlib.suppress(Exception):
            (<Work>work).join("exit", max(deadline - time.monotonic(), 0))


def _forget():
    """For a forked child, where no worker runs."""
    for work in all_at_work():
        (<Work>work).let_idle()
    at_work.clear()
    forget_workers()


forget_in_child(_forget)


cdef class Route:
    """The request of one call of ``forward``."""

    cdef int check(self) except -1:
        """ValueError when its queues and stages do not fit together, so that it would lose
        frames."""
        cdef TxQueueBase tx
        cdef Stage stage
        cdef int layer = self.rx.layer
        for stage in self.stages:
            layer = stage.passes(layer, <uint32_t>len(self.txs))
        for tx in self.txs:
            if layer != LAYER_ANY and tx.layer != LAYER_ANY and layer != tx.layer:
                raise ValueError(
                    f"{tx!r} takes " + (
                        "Ethernet frames (a TAP device), and IP packets come"
                        if layer == LAYER_IP else
                        "IP packets (a TUN device), and Ethernet frames come")
                    + f" from {self.rx!r}: convert them with a stage of your own")
        return 0


cdef class Work:
    """A worker's loop, its thread, and the queues and stages that they use while they run."""

    def __cinit__(self):
        self.wake_fd = self.w.epoll_fd = self.w.event_fd = self.latency_fd = -1
        self.routes = []
        self.queues = []
        self.stages = []
        _live.made(_live.WORKERS, 1)
        self._in_child()
        renew_in_child(self)
        self.generation = fork_generation()

    def _in_child(self):
        """For :mod:`rtap._core.forks`."""
        self.lock = threading.RLock()

    def __dealloc__(self):
        worker_free(&self.w)
        self.close_fds()
        _live.gone(_live.WORKERS, 1)

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
        """Ends the request that processors wake soon; a forked child's copy of it counts too."""
        if self.latency_fd >= 0:
            close(self.latency_fd)
        self.latency_fd = -1

    cdef bint running(self) except -1:
        with self.lock:
            return (self.thread is not None and self.generation == fork_generation()
                    and not self.ended.is_set())

    cdef int add(self, Route route) except -1:
        cdef Route other
        route.check()
        with self.lock:
            if self.running():
                raise DeviceStateError("routes are added before the worker is started")
            for other in self.routes:
                if other.rx is route.rx:
                    raise ValueError(f"{route.rx!r} has a route already")
            self.routes.append(route)
        return 0

    cdef int start(self) except -1:
        with self.lock:
            if self.running():
                raise DeviceStateError(f"the worker {self.name} is running")
            if not self.routes:
                raise DeviceStateError("the worker has no route: call forward() first")
            self.tidy_up()
            self.launch()
        return 0

    cdef int launch(self) except -1:
        cdef uint32_t flags = 0, n_targets = 0
        cdef Route route
        cdef Stage stage
        cdef list queues = [], stages = []
        for route in self.routes:
            queues.append(route.rx)
            for tx in route.txs:
                if not any(tx is queue for queue in queues):
                    queues.append(tx)
            for stage in route.stages:
                flags |= stage.flags
                stages.append(stage)
            n_targets += <uint32_t>len(route.txs)
        self.queues, self.stages = queues, stages
        if worker_alloc(&self.w, <uint32_t>len(self.routes), n_targets, <uint32_t>len(stages),
                        flags) != 0:
            raise MemoryError("no memory for the routes")
        self.starts = self.starts + 1 or 1
        self.generation = fork_generation()
        _compat.store(&self.awaited, self.starts)
        try:
            self.open_fds()
            self.take()
            self.w.stop = self.w.finished = 0
            at_work[id(self)] = weakref.ref(self)
            # If a signal handler ends Thread.join(), it may take the thread for dead (CPython
            # 3.11).
            self.ended = threading.Event()
            self.thread = threading.Thread(target=self._main, args=(self.starts,), name=self.name,
                                           daemon=True)
            begin(self.thread)
        except BaseException:
            # A new thread may be on its way here: it comes in time, or finds nothing to do.
            if self.give_back():
                self.tidy_up()
            else:
                self.stop()
            raise
        return 0

    cdef int open_fds(self) except -1:
        cdef epoll_event event
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
        return 0

    cdef int take(self) except -1:
        """Owns the queues and enters the stages.  Each one is counted as soon as it is taken;
        nothing can fail in between."""
        cdef TxQueueBase tx
        cdef QueueBase queue
        cdef Stage stage
        cdef Route route
        cdef route_t *r
        cdef uint32_t n_targets = 0
        for route in self.routes:
            r = &self.w.routes[self.w.n_routes]
            r.targets = self.w.targets + n_targets
            r.stages = self.w.stages + self.w.n_stages
            route.rx.own(OWNED_BY_WORKER)
            self.n_owned += 1
            for tx in route.txs:
                if self.n_owned < <uint32_t>len(self.queues):
                    queue = <QueueBase>self.queues[self.n_owned]
                    if queue is tx:     # else an earlier route owns it
                        queue.own(OWNED_BY_WORKER)
                        self.n_owned += 1
                        r.targets[r.n_targets].owns = True
                r.targets[r.n_targets].tx = tx.q
                r.n_targets += 1
            for stage in route.stages:
                stage.enter(&r.stages[r.n_stages])
                self.n_entered += 1
                if stage_alloc(&r.stages[r.n_stages], self.w.room) != 0:
                    raise MemoryError("no memory for the stages")
                r.n_stages += 1
                self.w.n_stages += 1
            n_targets += r.n_targets
            r.rx = route.rx.q
            r.retry = route.retry
            r.active = 1
            self.w.n_routes += 1
        return 0

    cdef bint give_back(self) except -1:
        """Gives back the queues of a start whose thread never came; if it comes later, it finds
        nothing to do.  False when it came: then the loop has the queues."""
        cdef QueueBase queue
        if _compat.exchange(&self.awaited, 0) == 0:
            return False
        while self.n_owned > 0:
            self.n_owned -= 1
            queue = <QueueBase>self.queues[self.n_owned]
            queue.disown()
        return True

    def _main(self, uint32_t start):
        if not _compat.cas(&self.awaited, start, 0):
            return              # too late: they are given back
        self.n_owned = 0        # the loop does that
        _live.made(_live.WORKER_THREADS, 1)
        try:
            self.run()
        finally:
            _live.gone(_live.WORKER_THREADS, 1)
            self.ended.set()

    cdef int run(self) except -1:
        cdef uint64_t one = 1
        teller = None
        try:
            enter_worker(self)
            teller = threading.Thread(target=self._tell, name=f"{self.name}-events", daemon=True)
            teller.start()
            if self.cpu is not None:
                os.sched_setaffinity(0, {self.cpu})
        except BaseException:
            _compat.store(&self.w.stop, 1)
            raise
        finally:
            with nogil:         # also if it has to end at once: it gives the queues back
                worker_loop(&self.w)
            leave_worker()
            self.leave_stages()
            self.let_idle()
            _compat.store(&self.w.finished, 1)
            write(self.w.event_fd, &one, sizeof(one))
            if teller is not None and teller.ident is not None:
                teller.join()
        return 0

    def _tell(self):
        """Reports routes that failed, on a separate thread: the worker's own takes no GIL."""
        cdef uint32_t i
        cdef bint last = False
        cdef set known = set()
        self.teller = PyThread_get_thread_ident()
        while not last:
            os.eventfd_read(self.w.event_fd)
            last = _compat.load(&self.w.finished) != 0
            for i in range(self.w.n_routes):
                if _compat.load(&self.w.routes[i].gave_up) and i not in known:
                    known.add(i)
                    self.tell_of(i)
        self.teller = None

    cdef void tell_of(self, uint32_t i) noexcept:
        """Reports one route.  A failure here, such as a log that cannot be written, does not stop
        the reports of other routes."""
        cdef Route route = self.routes[i]
        stats = self.route_stats(i)
        if route.rx.route_ended is not None:
            route.rx.route_ended(stats)
        if stats.error:
            logger.warning("%s: a route of %s has ended: %s", self.name, route.device, stats.error)

    cdef int ask_to_stop(self) except -1:
        cdef uint64_t one = 1
        with self.lock:
            if self.running():
                _compat.store(&self.w.stop, 1)
                write(self.wake_fd, &one, sizeof(one))
        return 0

    cdef int stop(self) except -1:
        self.waiter("stop")
        self.ask_to_stop()
        self.join("stop", None)
        return 0

    cdef Work waiter(self, str operation):
        """The worker in whose stage this thread is, or None; DeviceStateError for this one's own
        threads."""
        cdef Work own = this_worker()
        if own is self:
            raise DeviceStateError(
                f"{operation}: this is a stage of the worker {self.name}, which cannot wait for "
                "itself. Raise an exception to end the route, or have another thread do this and "
                "do not wait for it")
        if self.teller is not None and self.teller == PyThread_get_thread_ident():
            raise DeviceStateError(
                f"{operation}: the worker {self.name} waits for this thread, which logs the end of "
                "a route. Have another thread do this and do not wait for it")
        return own

    cdef bint join(self, str operation, timeout) except -1:
        """Waits for the thread; signal handlers run.  If a stage waits here and its own worker has
        to end, the wait ends: the other worker may wait for that one."""
        cdef Work own = self.waiter(operation)
        cdef double left = LOOK_S
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.lock:
            thread, ended = self.thread, self.ended
        if thread is not None and self.generation == fork_generation():
            while not ended.is_set():
                if own is not None and _compat.load(&own.w.stop):
                    raise DeviceStateError(
                        f"{operation}: this stage's worker {own.name} has to end, and no longer "
                        f"waits for the worker {self.name}")
                if deadline is not None:
                    left = deadline - time.monotonic()
                ended.wait(min(max(left, 0), LOOK_S))
                PyErr_CheckSignals()
                if left <= 0 and not ended.is_set():
                    return False
            thread.join()
        with self.lock:
            if self.thread is thread:       # nobody cleaned up or started it again meanwhile
                self.tidy_up()
        return True

    cdef int tidy_up(self) except -1:
        self.give_back()
        self.thread = None
        self.leave_stages()
        self.close_fds()
        at_work.pop(id(self), None)
        return 0

    cdef int leave_stages(self) except -1:
        cdef Stage stage
        while self.n_entered > 0:
            self.n_entered -= 1
            stage = <Stage>self.stages[self.n_entered]
            stage.leave()
        return 0

    cdef object stats(self):
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
        cdef Route route = self.routes[i]
        cdef TxQueueBase tx
        for k in range(r.n_targets):
            t = &r.targets[k]
            tx = route.txs[k]
            targets.append(TargetStats(
                target=repr(tx),
                packets=_compat.counter_read(&t.packets),
                bytes=_compat.counter_read(&t.bytes),
                drops=_compat.counter_read(&t.drops),
                retries=_compat.counter_read(&t.retries),
                device=route.devices[k],
                port=tx.port,
                queue=tx.queue_id,
            ))
        for k in range(r.n_stages):
            s = &r.stages[k]
            stages.append(StageStats(
                stage=route.names[k],
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
            why = f"{route.rx!r}: {os.strerror(error)}"
        elif r.failed & FROM_STAGE:
            k = r.failed & ~<uint32_t>FROM_STAGE
            why = (f"stage {k} ({route.names[k]}) of the route from {route.rx!r}: "
                   f"{why_failed(&r.stages[k], <int>error)}")
        else:
            why = f"{route.txs[r.failed]!r}: {os.strerror(error)}"
        return RouteStats(
            source=repr(route.rx),
            rx_packets=_compat.counter_read(&r.packets),
            rx_bytes=_compat.counter_read(&r.bytes),
            cycles=_compat.counter_read(&r.cycles),
            idle=_compat.load(&r.parked) != 0,
            error=why,
            targets=targets,
            stages=stages,
            device=route.device,
            port=route.rx.port,
            queue=route.rx.queue_id,
        )
