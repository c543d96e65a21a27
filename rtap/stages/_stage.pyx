# SPDX-License-Identifier: BSD-3-Clause
"""The base class of stages, and their use on a burst from Python."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t
from libc.string cimport memcpy, memset

from rtap._burst cimport Burst
from rtap._chain cimport (
    DROP as NO_TARGET, chain_run, scratch_alloc, scratch_free, scratch_t, stage_t,
)
from rtap._mbuf cimport check_range
from rtap._pool cimport mbuf_t

import os

DROP = NO_TARGET


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
        cdef scratch_t scratch
        cdef stage_t stage
        cdef mbuf_t **v
        cdef uint32_t left, failed = 0
        cdef bytes out
        cdef int rc
        if self.fn == NULL:
            raise RuntimeError(f"{type(self).__name__} was never initialised")
        memset(&stage, 0, sizeof(stage))
        stage.fn = self.fn
        stage.ctx = self.ctx
        stage.flags = self.flags
        n = burst.lend(&v, &capacity)
        if scratch_alloc(&scratch, <uint32_t>max(n, 1)) != 0:
            burst.give_back(v, n, capacity)
            raise MemoryError("no memory for a burst's arrays")
        left = <uint32_t>n
        with nogil:
            rc = chain_run(&stage, 1, n_targets, &scratch, v, &left, &failed)
        out = PyBytes_FromStringAndSize(NULL, left * sizeof(uint32_t))
        memcpy(PyBytes_AS_STRING(out), scratch.verdict, left * sizeof(uint32_t))
        scratch_free(&scratch)
        burst.give_back(v, left, capacity)
        if rc != 0:
            self.failed(-rc)
        return memoryview(out).cast("I")

    cdef int failed(self, int error) except -1:
        raise OSError(error, f"{os.strerror(error)} (stage {self.name})")
