# SPDX-License-Identifier: BSD-3-Clause
"""The native side of a worker: its routes, and the loop that serves them."""

from libc.stdint cimport uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport rxq_t, tx_share_t, txq_t
from rtap.stages._runner cimport scratch_t, stage_t


cdef enum:
    WORKER_BURST_MAX = 512

    # worker_t.wait
    WAIT_POLL = 0
    WAIT_SLEEP = 1
    WAIT_ADAPTIVE = 2

    # route_t.failed, when not one of the targets
    FROM_SOURCE = 0xffffffff
    FROM_STAGE = 0x80000000     # and its number


cdef struct target_t:
    txq_t *tx
    bint owns                   # of several targets with one tx queue, this one gives it back
    uint32_t n                  # frames in hand
    mbuf_t **frames             # room for a burst
    tx_share_t *share           # of the send in progress; NULL: it has none
    uint64_t packets
    uint64_t bytes
    uint64_t drops
    uint64_t retries


cdef struct route_t:
    rxq_t *rx
    target_t *targets
    uint32_t n_targets
    stage_t *stages
    uint32_t n_stages
    bint retry                  # frames that a target does not take are tried again, not dropped
    uint32_t active
    uint32_t gave_up            # it ended while the worker was to run
    uint32_t error              # errno that ended the route; 0 when its queue was stopped
    uint32_t failed             # the target that caused it, or FROM_*
    uint32_t parked             # out of the pass; its descriptor is in the epoll set
    uint32_t empties            # successive empty bursts
    bint woken                  # it came back, and has not been served since
    uint32_t fruitless          # times it was then empty
    uint64_t nombuf             # the queue's counter when last read
    uint64_t packets
    uint64_t bytes
    uint64_t cycles             # spent on bursts that found frames


cdef struct worker_t:
    route_t *routes
    uint32_t n_routes
    target_t *targets           # of all routes
    mbuf_t **frames             # of all targets
    tx_share_t *shares          # of the targets that frames are sent to
    stage_t *stages             # of all routes
    uint32_t n_stages
    scratch_t scratch
    uint32_t *busy              # indexes of the routes that each pass serves
    uint32_t n_busy
    uint32_t n_active
    uint32_t burst
    uint32_t stop
    uint32_t room               # frames of a burst when it is split
    int wait
    int epoll_fd                # the wake-up and the parked routes
    int event_fd                # written to as routes give up
    uint32_t finished           # nobody writes to it any more
    bint starved                # this pass found frames without a buffer or without room
    bint found                  # a route was to be parked, and its queue has frames
    uint64_t looked             # when the parked routes were last polled
    uint64_t scanned            # when their queues were last checked
    uint64_t hurry_until        # queues are being stopped, and the stopping thread waits for us


cdef int worker_alloc(worker_t *w, uint32_t n_routes, uint32_t n_targets, uint32_t n_stages,
                      uint32_t stage_flags) noexcept nogil
cdef void worker_free(worker_t *w) noexcept nogil
cdef void worker_loop(worker_t *w) noexcept nogil
