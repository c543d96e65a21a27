# SPDX-License-Identifier: BSD-3-Clause
"""The common part of all drivers' queues: a burst function over native state, counters, and what
their Python shells share.  A driver's own state struct starts with ``rxq_t`` or ``txq_t``."""

from libc.stdint cimport uint32_t, uint64_t

from rtap._core.gil cimport gil_t
from rtap._core.pool cimport mbuf_t
from rtap._core.traffic cimport traffic_t


cdef enum:
    # gate_t.state
    QUEUE_STOPPED = 0
    QUEUE_STARTED = 1
    QUEUE_CLOSED = 2

    # gate_t.owned: 0, the number of the thread that bursts, or
    OWNED_BY_WORKER = 0xffffffff
    OWNER_AWAY = 0x80000000     # with its thread's number: it runs signal handlers while it waits

    # The first header of a queue's frames, or of the frames that a stage takes
    LAYER_ANY = 0
    LAYER_ETHERNET = 2
    LAYER_IP = 3

    BURST_MAX = 65535


cdef struct gate_t:             # who may burst on a queue, and with which engine
    uint32_t state
    uint32_t owned
    uint32_t fell_back          # the errno that made it burst by system calls for now; or 0


cdef struct rx_share_t:         # of a kernel entry that serves several queues
    rxq_t *q
    mbuf_t **out
    uint32_t n                  # as of a burst
    uint32_t got
    int error                   # 0 before
    uint32_t reads
    uint32_t first              # of the entries, the number of its first read
    mbuf_t **slots              # of its reads
    bint filled                 # each read found a frame


cdef struct tx_share_t:
    txq_t *q
    mbuf_t **v
    uint32_t n                  # 0: sends only frames that wait in the queue
    uint32_t ready              # of these, how many at the front are already prepared; 0 before
    uint32_t sent               # as from a burst: v[0] is then the first unsent one; 0 before
    uint32_t lost               # of these, how many were consumed unsent; 0 before
    int error                   # 0 before
    uint64_t bytes              # sent
    uint64_t cycles


cdef struct rxq_t:
    # Receives at most n frames into out and returns their number; *error is 0, or the errno
    # that ended the burst.  Only the queue's owner calls it.
    uint32_t (*burst)(rxq_t *q, mbuf_t **out, uint32_t n, int *error) noexcept nogil
    # The same for several queues at once, all with this function: serves at least the first and
    # returns how many.  NULL where that gains nothing.
    uint32_t (*many)(rx_share_t *shares, uint32_t k) noexcept nogil
    # Before anybody waits for the queue: true when it has frames by now, so that there is nothing
    # to wait for.  Without a descriptor, waits itself, for so many milliseconds at most.  NULL
    # where the descriptor needs no preparation.
    bint (*idle)(rxq_t *q, int ms) noexcept nogil
    int fd                      # to wait on; -1 when there is nothing to wait for
    bint revisit                # may have frames, or an end, that its descriptor does not show
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
    uint64_t gso_super          # the number of these super-frames
    uint64_t gso_too_long       # frames that its pool could never hold
    uint64_t stopped            # frames that it had in hand when the queue was stopped
    uint64_t purged             # frames from before a start, or of a queue that is detached
    uint64_t checksum_good
    uint64_t checksum_none      # unfinished, the data is intact
    uint64_t checksum_bad
    traffic_t traffic


cdef struct txq_t:
    # Sends from the front of v: returns how many frames it consumed; v[0] is then the first
    # unsent one.  *error is 0, or the errno that ended the burst for good.
    uint32_t (*burst)(txq_t *q, mbuf_t **v, uint32_t n, int *error) noexcept nogil
    # The same for several shares at once, in this order, of queues that all have this function:
    # serves at least the first and returns how many.  NULL where that gains nothing.
    uint32_t (*many)(tx_share_t *shares, uint32_t k) noexcept nogil
    # Counts the waiting frames as unsent, and drops them.  NULL where no frame ever waits.
    void (*abandon)(txq_t *q) noexcept nogil
    int fd
    gate_t gate
    uint32_t unplugged          # the link is down: all sent frames are lost
    # Pieces of super-frames that it has taken; any burst, even an empty one, sends them first.
    uint32_t waiting
    int why                     # errno of the last frame that was consumed unsent
    uint32_t news               # what the queue's shell reports after the burst; 0: nothing
    uint64_t packets
    uint64_t bytes
    uint64_t errors             # frames consumed unsent, for one of the next four reasons
    uint64_t piece_errors       # of these, pieces of super-frames; the others came in a burst
    uint64_t bad_request        # the frame's request or header does not fit it
    uint64_t refused            # by the kernel: EINVAL and other errors about one frame
    uint64_t down               # the link or the interface (EIO) was down
    uint64_t unsent             # they waited when the queue was stopped, or its worker left it
    uint64_t tso                # super-frames
    uint64_t checksum           # checksums left to the kernel, or done here without a header
    uint64_t multiseg
    uint64_t software_gso       # super-frames that were split here because the kernel does not
    uint64_t gro                # frames that tx_gro sent as part of a super-frame
    traffic_t traffic
    uint64_t full               # times the kernel took no more (EAGAIN, ENOMEM, ENOBUFS)


cdef struct lent_t:             # what another process counts while it has the queue
    uint32_t lock
    void *page                  # its queue's state; NULL while nobody has it
    size_t size
    const uint64_t *theirs      # its counters, in there
    uint64_t *seen              # what they were when they were last added to ours


cdef class QueueBase:
    cdef gate_t *gate           # of the queue; NULL until there is one
    cdef uint64_t *counts       # all its counters
    cdef size_t counts_at       # bytes of the state in front of them
    cdef uint32_t n_counts
    cdef lent_t lent
    cdef gil_t gil
    cdef uint32_t made          # a constructor has reached `once`
    cdef uint32_t generation
    cdef bint adopted           # a device closes it, or is told of as unclosed
    cdef str origin             # where it was made, see rtap._core.origin
    cdef dict zero              # totals at the last reset_counters, and
    cdef dict xzero             # at the last reset_xcounters; None before
    cdef str chosen             # its first engine, and
    cdef str why
    cdef public str name
    cdef readonly int queue_id
    cdef readonly int port
    cdef readonly int nb_desc
    cdef int layer              # LAYER_*: the first header of its frames

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
    cdef void count_in(self, void *state, uint64_t *first, size_t size) noexcept
    cdef void count_lent(self) noexcept
    cdef void add_lent(self) noexcept
    cdef dict zero_of(self, bint extended)
    cdef int set_zero(self, bint extended, dict totals) except -1
    cdef dict totals(self)
    cdef dict xtotals(self)


cdef str refusal(int error)
cdef dict since(dict zero, dict totals)
