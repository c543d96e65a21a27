# SPDX-License-Identifier: BSD-3-Clause
"""Run-to-completion threads: :class:`Worker` moves bursts between queues without the GIL.

A worker owns the queues of its routes while it runs: nobody else can burst on them.  It leaves a
queue when that queue is stopped or its interface is gone, and goes on with the others.
"""

import os
import warnings

cimport cython

from rtap._core.mbuf cimport check_range
from rtap._core.queue cimport QueueBase
from rtap._core.rx_queue cimport RxQueueBase
from rtap._core.tx_queue cimport TxQueueBase
from rtap._work.loop cimport WAIT_ADAPTIVE, WAIT_POLL, WAIT_SLEEP, WORKER_BURST_MAX
from rtap._work.thread cimport Route, Work
from rtap.stages._stage cimport Stage

from rtap._core.origin import origin
from rtap.stages import Call

cdef dict WAITS = {"poll": WAIT_POLL, "sleep": WAIT_SLEEP, "adaptive": WAIT_ADAPTIVE}


cdef QueueBase queue_of(end, str what, str side, kind):
    """The queue at one end of a route; TypeError if the driver's queue does not suit a worker."""
    queue = getattr(end, side, None)
    if isinstance(queue, kind):         # a ring has one of each side
        (<QueueBase>queue).checked()
        return queue
    if not isinstance(end, (tuple, list)) or len(end) != 2:
        raise TypeError(f"{what} must be (device, queue number), got {end!r}")
    device, number = end
    find = getattr(device, side, None)
    if find is None:
        raise TypeError(f"{what} must be (device, queue number): a {type(device).__name__} has no "
                        f"{side}()")
    queue = find(number)
    if not isinstance(queue, kind):
        raise TypeError(f"{side}({number!r}) of {device!r} is {type(queue).__name__}: a worker "
                        f"needs a {kind.__name__}")
    (<QueueBase>queue).checked()
    return queue


cdef str name_of(end, QueueBase queue):
    name = getattr(end[0] if isinstance(end, (tuple, list)) else end, "name", None)
    return name if type(name) is str else queue.label()


cdef Stage stage_of(stage):
    return stage if isinstance(stage, Stage) else Call(stage)


cdef class Worker:
    """Worker(cpu=None, wait='adaptive', *, burst=64, resume_latency=None, \
name='rtap-worker')\n--\n

    A thread that forwards bursts along its routes, and takes the GIL only for a stage in Python.

    cpu:   core to pin the thread to, or None
    wait:  what it does when no frame arrives: "poll" spins, "sleep" waits on the descriptors,
           "adaptive" polls for 100 microseconds, yielding, then waits
    burst: the most frames moved at once along a route (1..512)
    resume_latency: microseconds in which every processor has to come back from idling while the
           worker runs (PM QoS; root).  0 keeps them from halting; on a virtual machine, leaving
           that state is most of the latency of a sleeping worker.  None makes no request
    name:  of the thread, and of the worker in messages

    Context manager: started on entry, stopped on exit.  It can be started again after a stop.  A
    running worker without references gives a ResourceWarning and runs on, until its routes
    end (for instance because their devices are closed) or the process exits.
    """

    cdef Work work
    cdef object __weakref__
    cdef readonly object cpu
    cdef readonly object resume_latency
    cdef readonly str wait
    cdef readonly str name
    cdef str origin

    def __init__(self, cpu=None, wait="adaptive", *, burst=64, resume_latency=None,
                 str name="rtap-worker"):
        cdef Work work = Work()
        if type(wait) is not str or wait not in WAITS:
            raise ValueError(f"wait must be one of {', '.join(WAITS)}, got {wait!r}")
        if cpu is not None and cpu not in os.sched_getaffinity(0):
            raise ValueError(f"cpu {cpu!r} is not one of this process's "
                             f"{sorted(os.sched_getaffinity(0))}")
        work.w.burst = check_range("burst", burst, 1, WORKER_BURST_MAX)
        if resume_latency is not None:
            resume_latency = check_range("resume_latency", resume_latency, 0, 1_000_000)
        work.resume_latency = resume_latency
        work.w.wait = WAITS[wait]
        work.cpu = cpu
        work.name = name
        place = origin()
        # The arguments' own code has run by now.
        with cython.critical_section(self):
            if self.work is not None:
                raise RuntimeError("a Worker is made once")
            self.work = work
            self.resume_latency = resume_latency
            self.wait = wait
            self.cpu = cpu
            self.name = name
            self.origin = place

    cdef Work made(self):
        if self.work is None:
            raise RuntimeError("the Worker was never initialised")
        return self.work

    def __del__(self):
        if self.work is not None and self.work.running():
            warnings.warn(f"forgotten worker {self.name}{self.origin}, which runs on: "
                          f"{self.routes_in_words()}", ResourceWarning, source=self)

    cdef str routes_in_words(self):
        cdef Route route
        return ", ".join([f"{route.rx!r} to " + " and ".join([repr(tx) for tx in route.txs])
                          for route in self.work.routes])

    def __repr__(self):
        cdef Work work = self.work
        if work is None:
            return "<Worker never initialised>"
        with work.lock:
            return (f"<Worker {self.name} {'running' if work.running() else 'stopped'}, "
                    f"{len(work.routes)} routes>")

    @property
    def running(self):
        """True while the thread lives; it also ends by itself when every route has ended."""
        return self.made().running()

    def forward(self, source, target, *, stages=(), on_full="drop"):
        """Adds a route: every frame received on ``source`` is sent on ``target``.

        Both are (device, queue number) or a ring of shared memory; one call is one direction.
        ``stages`` (:mod:`rtap.stages`)
        handle the frames in between, in turn; each is a Stage, or any callable that takes a Burst.
        With a list of targets they say where each frame goes, to the first one by default.
        on_full says what happens to frames that a target does not take at once: "drop" (and count)
        or "retry", which reads no more from the source meanwhile.

        ValueError for a route that would lose frames: a stage names a target that does not exist,
        or expects Ethernet frames and gets IP packets, or the reverse; or a TAP and a TUN device
        have no stage of yours in between.
        """
        cdef Route route = Route()
        cdef list targets = list(target) if isinstance(target, list) else [target]
        cdef Stage stage
        route.rx = queue_of(source, "the source", "rx_queue", RxQueueBase)
        route.txs = [queue_of(end, "a target", "tx_queue", TxQueueBase) for end in targets]
        route.stages = [stage_of(each) for each in stages]
        if not route.txs:
            raise ValueError("a route needs a target")
        if len(set(map(id, route.txs))) < len(route.txs):
            raise ValueError("a target is named twice")
        if on_full not in ("drop", "retry"):
            raise ValueError(f"on_full must be 'drop' or 'retry', got {on_full!r}")
        route.retry = on_full == "retry"
        route.names = [str(stage.name) for stage in route.stages]
        route.device = name_of(source, route.rx)
        route.devices = [name_of(end, queue) for end, queue in zip(targets, route.txs)]
        self.made().add(route)

    def start(self):
        """Takes the queues and starts the thread.  RuntimeError when a queue is in use."""
        self.made().start()

    def stop(self):
        """Ends the thread after the burst in hand and gives the queues back; idempotent.

        Ctrl-C ends the wait for a stage that does not return; the thread still ends after that
        stage.  DeviceStateError in a stage of this worker, and in a stage of another worker that
        has to end itself.
        """
        self.made().stop()

    def join(self, timeout=None):
        """Waits until the thread has ended (seconds, or None); true when it has.

        DeviceStateError as for ``stop``.
        """
        return self.made().join("join", timeout)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.stop()

    def stats(self):
        """A :class:`rtap.WorkerStats` with one :class:`rtap.RouteStats` for each route, readable
        while the worker runs."""
        return self.made().stats()
