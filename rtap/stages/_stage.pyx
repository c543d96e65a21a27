# SPDX-License-Identifier: BSD-3-Clause
"""The base class of stages, and their use on a burst from Python."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_RawRealloc
from libc.stdint cimport uint32_t
from libc.string cimport memset

from rtap._burst cimport Burst
from rtap._chain cimport (
    DROP as NO_TARGET, STAGE_SPLITS, chain_drop, chain_run, scratch_alloc, scratch_free, scratch_t,
    stage_alloc, stage_free, stage_t,
)
from rtap._mbuf cimport check_range
from rtap._pool cimport mbuf_t
from rtap._segment cimport SPLIT_MAX

import os

DROP = NO_TARGET


cdef int make_room(mbuf_t ***v, Py_ssize_t *capacity, Py_ssize_t wanted) noexcept:
    """Lengthens a burst's array, which is lent to us; 0 or -1."""
    cdef void *longer = PyMem_RawRealloc(v[0], wanted * sizeof(mbuf_t *))
    if longer == NULL:
        return -1
    v[0] = <mbuf_t **>longer
    capacity[0] = wanted
    return 0


cdef class Stage:
    """What happens to frames between a receive queue and its targets.

    In a route: ``worker.forward(source, target, stages=[...])``.  On a burst: ``stage(burst)``.
    One stage may be in several routes, of several workers.
    """

    @property
    def name(self):
        """Of the class, or of the function that it calls."""
        return type(self).__name__

    def __call__(self, Burst burst not None, targets=1):
        """Does to ``burst`` what it does in a route with so many targets.

        Frames that it drops leave the burst.  Returns the target of each frame that is left: a
        read-only uint32 memoryview.  OSError with what a native stage returned, and an empty
        burst then.
        """
        cdef uint32_t n_targets = check_range("targets", targets, 1, 65535)
        cdef Py_ssize_t n, capacity
        cdef uint32_t room, left, failed = 0, total = 0
        cdef bint lacking
        cdef scratch_t scratch
        cdef stage_t stage
        cdef mbuf_t **v
        cdef list verdicts = []
        cdef int rc = 0
        memset(&stage, 0, sizeof(stage))
        memset(&scratch, 0, sizeof(scratch))
        self.enter(&stage)
        n = burst.lend(&v, &capacity)
        left = <uint32_t>n
        room = max(left, <uint32_t>(SPLIT_MAX if self.flags & STAGE_SPLITS else 1))
        lacking = (stage_alloc(&stage, room) != 0
                   or scratch_alloc(&scratch, room, self.flags) != 0)
        if lacking:
            total = left
        while not lacking:
            if capacity < total + room and stage.flags & STAGE_SPLITS:
                if make_room(&v, &capacity, total + room) != 0:
                    lacking = True
                    break
            with nogil:
                rc = chain_run(&stage, 1, n_targets, &scratch, v + total, &left, &failed)
            verdicts.append(PyBytes_FromStringAndSize(<char *>scratch.verdict,
                                                      left * sizeof(uint32_t)))
            total += left
            left = 0
            if stage.held.n == 0:
                break
        chain_drop(&stage, 1)
        stage_free(&stage)
        scratch_free(&scratch)
        burst.give_back(v, total, capacity)
        self.leave()
        if lacking:
            raise MemoryError("no memory for a burst's arrays")
        if rc != 0:
            self.failed(-rc)
        return memoryview(b"".join(verdicts)).cast("I")

    cdef int checked(self) except -1:
        if self.fn == NULL and self.reshape == NULL:
            raise RuntimeError(f"{type(self).__name__} was never initialised")
        return 0

    cdef int enter(self, stage_t *stage) except -1:
        """Says how it is run, and keeps what it needs for that until ``leave``."""
        self.checked()
        stage.fn = self.fn
        stage.reshape = self.reshape
        stage.ctx = self.ctx
        stage.flags = self.flags
        return 0

    cdef int leave(self) except -1:
        """Once for each ``enter``, when it runs no more."""
        return 0

    cdef int failed(self, int error) except -1:
        raise OSError(error, f"{os.strerror(error)} (stage {self.name})")
