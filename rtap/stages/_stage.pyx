# SPDX-License-Identifier: BSD-3-Clause
"""The base class of stages, and their use on a burst from Python."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_RawRealloc
from libc.stdint cimport uint32_t
from libc.string cimport memset

cimport rtap._core.compat as _compat
from rtap._core.burst cimport Burst
from rtap._core.mbuf cimport check_range
from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport LAYER_ANY, LAYER_IP
from rtap._frames.segment cimport SPLIT_MAX
from rtap.stages._runner cimport (
    DROP as NO_TARGET, STAGE_SPLITS, chain_drop, chain_run, scratch_alloc, scratch_free, scratch_t,
    stage_alloc, stage_free, stage_t,
)

import os

DROP = NO_TARGET


cdef int make_room(mbuf_t ***v, Py_ssize_t *capacity, Py_ssize_t wanted) noexcept:
    """Lengthens a lent burst's array; 0 or -1."""
    cdef void *longer = PyMem_RawRealloc(v[0], wanted * sizeof(mbuf_t *))
    if longer == NULL:
        return -1
    v[0] = <mbuf_t **>longer
    capacity[0] = wanted
    return 0


cdef int run_over(stage_t *stage, Burst burst, uint32_t n_targets, list verdicts) except? -1:
    """Runs one stage over a burst, and collects the verdicts on the remaining frames, as bytes;
    0 or the -errno of the stage."""
    cdef Py_ssize_t n, capacity
    cdef uint32_t room, left, got, failed = 0, total = 0
    cdef scratch_t scratch
    cdef mbuf_t **v
    cdef int rc = 0
    memset(&scratch, 0, sizeof(scratch))
    n = burst.lend(&v, &capacity)
    left = <uint32_t>n
    room = max(left, <uint32_t>(SPLIT_MAX if stage.flags & STAGE_SPLITS else 1))
    try:
        if stage_alloc(stage, room) != 0 or scratch_alloc(&scratch, room, stage.flags) != 0:
            total = left
            raise MemoryError("no memory for a burst's arrays")
        while True:
            if capacity < total + room and stage.flags & STAGE_SPLITS:
                if make_room(&v, &capacity, total + room) != 0:
                    total += left
                    raise MemoryError("no memory for a burst's arrays")
            with nogil:
                rc = chain_run(stage, 1, n_targets, &scratch, v + total, &left, &failed)
            got, left = left, 0
            total += got
            verdicts.append(PyBytes_FromStringAndSize(<char *>scratch.verdict,
                                                      got * sizeof(uint32_t)))
            if stage.held.n == 0:
                return rc
    finally:
        chain_drop(stage, 1)
        stage_free(stage)
        scratch_free(&scratch)
        burst.give_back(v, total, capacity)


cdef class Stage:
    """Stage()\n--\n

    One step of a route's work on frames, between its receive queue and its targets.

    In a route: ``worker.forward(source, target, stages=[...])``.  On a burst: ``stage(burst)``.
    One stage may be in several routes, of several workers.
    """

    @property
    def name(self):
        """Its name in figures and messages: its class's, or that of the function that it calls."""
        return type(self).__name__

    def __call__(self, Burst burst not None, targets=1):
        """Works on ``burst`` as in a route with so many targets (1..65535).

        Dropped frames leave the burst.  Returns the target of each remaining frame: a
        read-only uint32 memoryview.  ValueError when it names a target that does not exist.  A
        failing native stage raises OSError with its return value, a failing Python stage its own
        exception; the burst is then empty.
        """
        cdef uint32_t n_targets = check_range("targets", targets, 1, 65535)
        cdef stage_t stage
        cdef list verdicts = []
        cdef int rc
        self.passes(LAYER_ANY, n_targets)
        memset(&stage, 0, sizeof(stage))
        stage.direct = True
        self.enter(&stage)
        try:
            rc = run_over(&stage, burst, n_targets, verdicts)
        finally:
            self.leave()
        if rc != 0:
            self.failed(&stage, -rc)
        return memoryview(b"".join(verdicts)).cast("I")

    cdef int once(self) except -1:
        """Called in a constructor after its arguments are converted; refuses a second call.  Code
        of an argument may have called the constructor before."""
        if not _compat.cas(&self.made, 0, 1):
            raise RuntimeError(f"a {type(self).__name__} stage is made once")
        return 0

    cdef int checked(self) except -1:
        if self.fn == NULL and self.reshape == NULL:
            raise RuntimeError(f"{type(self).__name__} was never initialised")
        return 0

    cdef int passes(self, int layer, uint32_t n_targets) except -1:
        """The first header of the frames that come out, when those that go in begin with ``layer``.
        ValueError if it would lose frames in a route with so many targets."""
        self.checked()
        if self.targets > n_targets:
            raise ValueError(f"{self.name} names target {self.targets - 1}, and there "
                             + ("is only target 0" if n_targets == 1 else
                                f"are only targets 0..{n_targets - 1}"))
        if self.layer == LAYER_ANY:
            return layer
        if layer != LAYER_ANY and layer != self.layer:
            raise ValueError(
                f"{self.name} is for " + (
                    "Ethernet frames, and gets IP packets, of a TUN device"
                    if layer == LAYER_IP else
                    "IP packets (l2=False), and gets Ethernet frames, of a TAP device"))
        return self.layer

    cdef int enter(self, stage_t *stage) except -1:
        """Fills in how it is run, and keeps the objects it needs until ``leave``."""
        self.checked()
        stage.fn = self.fn
        stage.reshape = self.reshape
        stage.ctx = self.ctx
        stage.flags = self.flags
        return 0

    cdef int leave(self) except -1:
        """Called once for each ``enter``, when the stage no longer runs."""
        return 0

    cdef int failed(self, stage_t *stage, int error) except -1:
        raise OSError(error, f"{why_failed(stage, error)} (stage {self.name})")


cdef str why_failed(const stage_t *stage, int error):
    """A stage's reason for its failure, or the text of its errno."""
    return (<bytes>stage.why).decode("utf-8", "replace") or os.strerror(error)
