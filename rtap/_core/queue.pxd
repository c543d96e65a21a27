# SPDX-License-Identifier: BSD-3-Clause
"""What every driver's queues have in common: a burst function over native state, counters, and
the Python shell around them.  A driver's own state struct starts with ``rxq_t`` or ``txq_t``."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from rtap._core.burst cimport Burst
from rtap._core.gil cimport gil_t
from rtap._core.mempool cimport Mempool
from rtap._core.pool cimport mbuf_t
from rtap._core.traffic cimport traffic_t


cdef enum:
    # gate_t.state
    QUEUE_STOPPED = 0
    QUEUE_STARTED = 1
    QUEUE_CLOSED = 2

    # gate_t.owned: 0, the number of the thread that bursts, or
    OWNED_BY_WORKER = 0xffffffff
    OWNER_AWAY = 0x80000000     # with its thread's number: it runs signal handlers in its wait

    # What the frames of a queue begin with, or those that a stage is for
    LAYER_ANY = 0
    LAYER_ETHERNET = 2
    LAYER_IP = 3

    BURST_MAX = 65535


cdef struct gate_t:             # who may burst on a queue, and through what
    uint32_t state
    uint32_t owned
    uint32_t fell_back          # the errno for which it bursts by system calls meanwhile; or 0


cdef struct rx_share_t:         # of a kernel entry that serves several queues
    rxq_t *q
    mbuf_t **out
    uint32_t n                  # as of a burst
    uint32_t got
    int error                   # 0 before
    uint32_t reads


cdef struct tx_share_t:
    txq_t *q
    mbuf_t **v
    uint32_t n                  # 0: only what waits in the queue is sent
    uint32_t ready              # of these, from the front: already prepared for it; 0 before
    uint32_t sent               # as of a burst: v[0] is then the first unsent one; 0 before
    uint32_t lost               # of these, consumed unsent; 0 before
    int error                   # 0 before
    uint64_t bytes              # sent
    uint64_t cycles


cdef struct rxq_t:
    # Receives at most n frames into out and returns their number; *error is 0, or the errno
    # that ended the burst.  Called by whoever owns the queue.
    uint32_t (*burst)(rxq_t *q, mbuf_t **out, uint32_t n, int *error) noexcept nogil
    # The same for several queues at once, all with this function: serves at least the first and
    # returns how many.  NULL where that gains nothing.
    uint32_t (*many)(rx_share_t *shares, uint32_t k) noexcept nogil
    int fd                      # to wait on; -1 when there is nothing to wait for
    bint revisit                # may have frames, or an end, of which its descriptor knows nothing
    gate_t gate
    # Counters only grow, and only the owner writes them: see since() for resets.
    uint64_t packets
    uint64_t bytes
    uint64_t errors             # frames lost to truncated, bad_vnet_hdr, gso_too_long, read_errors
    uint64_t nombuf
    uint64_t truncated
    uint64_t bad_vnet_hdr
    uint64_t read_errors
    uint64_t filtered_unicast   # dropped while not promiscuous
    uint64_t filtered_multicast
    uint64_t lro                # super-frames
    uint64_t gso                # frames that rx_gso made of super-frames
    uint64_t gso_super          # of so many
    uint64_t gso_too_long       # frames that its pool could never hold
    uint64_t stopped            # frames that it had in hand when the queue was stopped
    uint64_t purged             # frames of before a start, or of a queue that is detached
    uint64_t checksum_good
    uint64_t checksum_none      # left to do, the data is intact
    uint64_t checksum_bad
    traffic_t traffic


cdef struct txq_t:
    # Sends from the front of v: returns how many frames it consumed; v[0] is then the first
    # unsent one.  *error is 0, or the errno that ended the burst for good.
    uint32_t (*burst)(txq_t *q, mbuf_t **v, uint32_t n, int *error) noexcept nogil
    # The same for several shares at once, in this order, of queues that all have this function:
    # serves at least the first and returns how many.  NULL where that gains nothing.
    uint32_t (*many)(tx_share_t *shares, uint32_t k) noexcept nogil
    # Counts what waits as unsent, and forgets it.  NULL where nothing ever waits.
    void (*abandon)(txq_t *q) noexcept nogil
    int fd
    gate_t gate
    uint32_t unplugged          # the link is down: whatever is sent is lost
    # Pieces of super-frames that it has taken: any burst, also an empty one, sends them first.
    uint32_t waiting
    int why                     # errno of the last frame that was consumed unsent
    uint32_t news               # what the queue's shell is to tell of after the burst; 0: nothing
    uint64_t packets
    uint64_t bytes
    uint64_t errors             # frames consumed unsent: for one of the next four reasons
    uint64_t piece_errors       # of these, pieces of super-frames; the others came in a burst
    uint64_t bad_request        # it asks for what does not fit it, or has a header that does not
    uint64_t refused            # by the kernel: EINVAL and whatever else speaks against one frame
    uint64_t down               # the link or the interface (EIO) was down
    uint64_t unsent             # they waited when the queue was stopped, or left by a worker
    uint64_t tso                # super-frames
    uint64_t checksum           # checksums left to the kernel, or done here for want of a header
    uint64_t multiseg
    uint64_t software_gso       # super-frames that were split here, for want of a kernel that does
    uint64_t gro                # frames that tx_gro sent as part of a super-frame
    traffic_t traffic
    uint64_t full               # times the kernel took no more (EAGAIN, ENOMEM, ENOBUFS)


cdef class QueueBase:
    cdef gate_t *gate           # of the queue; NULL until there is one
    cdef gil_t gil
    cdef uint32_t made          # a constructor has got as far as `once`
    cdef uint32_t generation
    cdef dict zero              # totals at the last reset_counters, and
    cdef dict xzero             # at the last reset_xcounters; None before
    cdef str chosen             # its engine at first, and
    cdef str why
    cdef public str name
    cdef readonly int queue_id
    cdef readonly int port
    cdef readonly int nb_desc
    cdef int layer              # LAYER_*: what its frames begin with

    cdef int once(self) except -1
    cdef int checked(self) except -1
    cdef int not_inherited(self) except -1
    cdef int own(self, uint32_t owner) except -1
    cdef void disown(self) noexcept
    cdef bint move(self, uint32_t value) except -1
    cdef bint occupied(self) noexcept
    cdef int may_wait(self, str operation) except -1
    cdef bint set_state(self, uint32_t value) except -1
    cdef str label(self)
    cdef dict zero_of(self, bint extended)
    cdef int set_zero(self, bint extended, dict totals) except -1
    cdef dict totals(self)
    cdef dict xtotals(self)


cdef class RxQueueBase(QueueBase):
    cdef rxq_t *q
    cdef readonly Mempool pool
    cdef public object route_ended  # called with the figures of a route that gave up; or None

    cdef void serve(self, rxq_t *q) noexcept
    cdef int run(self, Burst burst, uint32_t n) except? -1
    cdef bint wait(self, uint64_t deadline) except -1
    cdef bint wait_buffer(self, uint64_t deadline) except -1
    cdef int look_up(self) except -1


cdef class TxQueueBase(QueueBase):
    cdef txq_t *q

    cdef void serve(self, txq_t *q) noexcept
    cdef uint32_t run(self, mbuf_t **v, uint32_t n, int *error) noexcept
    cdef int tell(self, uint32_t news) except -1
    cdef int tell_news(self) except -1
    cdef void leave(self) noexcept
    cdef void settle(self) noexcept


cdef int enter_worker(work) except -1
cdef int leave_worker() except -1
cdef object this_worker()
cdef int forget_workers() except -1
cdef void tx_alone(tx_share_t *s) noexcept nogil
cdef uint32_t tx_lost(txq_t *q, mbuf_t **v, uint32_t n) noexcept nogil


cdef inline uint64_t tx_lost_frames(const txq_t *q) noexcept nogil:
    """Frames of bursts, of a queue's errors."""
    return q.errors - q.piece_errors
