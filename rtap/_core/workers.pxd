# SPDX-License-Identifier: BSD-3-Clause

cdef int enter_worker(work) except -1
cdef int leave_worker() except -1
cdef object this_worker()
cdef int forget_workers() except -1
