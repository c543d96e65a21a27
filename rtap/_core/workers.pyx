# SPDX-License-Identifier: BSD-3-Clause
"""Which threads run a worker's loop, and with it the stages of its routes."""

from cpython.pythread cimport PyThread_get_thread_ident

# Ident of each thread that runs a worker's loop -> its Work.
cdef dict worker_threads = {}


cdef int enter_worker(work) except -1:
    """This thread owns a worker's queues until it leaves."""
    worker_threads[PyThread_get_thread_ident()] = work
    return 0


cdef int leave_worker() except -1:
    worker_threads.pop(PyThread_get_thread_ident(), None)
    return 0


cdef object this_worker():
    """The Work whose loop, and a stage in it, this thread runs; None on any other."""
    return worker_threads.get(PyThread_get_thread_ident())


cdef int forget_workers() except -1:
    """For a forked child: its threads may get the same idents as the parent's."""
    work = this_worker()
    worker_threads.clear()
    if work is not None:        # a stage forked
        enter_worker(work)
    return 0


def in_worker():
    """Whether this is a worker's thread, which is then in a stage."""
    return PyThread_get_thread_ident() in worker_threads
