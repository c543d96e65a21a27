# SPDX-License-Identifier: BSD-3-Clause
"""Queues on a TAP or TUN descriptor: :class:`RxQueue` and :class:`TxQueue`.

Two engines.  ``uring`` submits a batch of RWF_NOWAIT reads or writes in one ``io_uring_enter``
and finds every result when it returns; ``syscall`` does one read(2) or write(2) a frame, for
kernels and containers without io_uring.  Which is faster depends on what a system call costs:
``auto`` measures both once for each process.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cimport rtap._compat as _compat
from rtap._linux cimport read
from rtap._mbuf cimport check_range
from rtap._mempool cimport Mempool
from rtap._offload cimport VNET_HDR_LEN
from rtap._pool cimport pool_t, thread_number
from rtap._queue cimport QUEUE_CLOSED, RxQueueBase, TxQueueBase, gil_mode, rxq_t, txq_t
from rtap._traffic cimport SIZE_BUCKETS, traffic_t
from rtap._rx cimport SEGS_MAX, rx_syscall, rx_uring, tap_rxq_t
from rtap._tx cimport tap_txq_t, tx_syscall, tx_uring, tx_checked
from rtap._uring cimport (
    ENGINE_AUTO, ENGINE_SYSCALL, ENGINE_URING, RING_ENTRIES, fork_generation, uring_costs,
    uring_forget_file, uring_new_file_id, uring_refusal,
)

import errno as errno_names

cdef enum:
    PURGE_MAX = 1 << 20


cdef tuple choose_engine(str engine, int fd):
    """(number, name, reason) for ``engine`` on a TAP descriptor."""
    cdef str refusal
    if engine == "syscall":
        return ENGINE_SYSCALL, "syscall", "asked for"
    if engine != "uring" and engine != "auto":
        raise ValueError(f"engine must be auto, uring or syscall, got {engine!r}")
    refusal = uring_refusal(fd)
    if engine == "auto":
        if refusal:
            return ENGINE_SYSCALL, "syscall", refusal
        by_ring, by_call = uring_costs()
        reason = f"a write costs {by_ring} ns through io_uring, {by_call} ns by system call"
        if by_call + by_call // 16 < by_ring:
            return ENGINE_SYSCALL, "syscall", reason
        return ENGINE_AUTO, "uring", reason
    if refusal:
        raise OSError(errno_names.ENOSYS, f"engine='uring' cannot be used: {refusal}")
    return ENGINE_URING, "uring", "asked for"


cdef class RxQueue(RxQueueBase):
    """Receives frames from a TAP or TUN descriptor into the mbufs of ``pool``.

    fd:        non-blocking descriptor of one queue; stays the caller's, who closes it after us
    name:      interface name, for messages
    nb_desc:   most frames for each kernel entry (1..32768; the ring takes 256 at once)
    vnet_hdr:  the descriptor has IFF_VNET_HDR with the 10-byte little-endian header
    max_frame: longest legal frame in bytes, without that header; what is longer is counted in
               ``truncated`` and dropped
    scatter:   frames longer than the pool's ``data_room`` become chains; else such a pool is
               refused with ValueError
    l2:        Ethernet frames (TAP); False for IP packets (TUN)
    engine:    "auto", "uring" or "syscall";  gil: "auto", "release" or "hold"
    """

    def __init__(self, int fd, Mempool pool not None, *, str name, int queue_id=0, int port=0xffff,
                 nb_desc=64, bint vnet_hdr=True, max_frame=1522, bint scatter=False,
                 bint l2=True, str engine="auto", str gil="auto"):
        cdef pool_t *p = pool.alive()
        cdef tap_rxq_t *q
        cdef uint32_t segs = 1
        if self.tap != NULL:
            raise RuntimeError("an RxQueue is made once")
        check_range("nb_desc", nb_desc, 1, 32768)
        check_range("max_frame", max_frame, 14, 1 << 20)
        if p.data_room <= <uint32_t>max_frame:
            # A read that fills its buffer cannot be told from a cut one: one byte is kept spare.
            segs = (<uint32_t>max_frame + p.data_room) // p.data_room
            if not scatter:
                raise ValueError(f"frames of up to {max_frame} bytes need a data_room of at least "
                                 f"{max_frame + 1}, the pool's is {p.data_room} (or the SCATTER "
                                 "offload)")
            if segs > SEGS_MAX:
                raise ValueError(f"frames of {max_frame} bytes would take {segs} segments of "
                                 f"{p.data_room} bytes, the most is {SEGS_MAX}")
        self.gil.mode = gil_mode(gil)
        number, self.engine, self.engine_reason = choose_engine(engine, fd)
        q = <tap_rxq_t *>calloc(1, sizeof(tap_rxq_t))
        if q == NULL:
            raise MemoryError("no memory for an rx queue")
        self.tap = q
        self.q = &q.base
        q.base.burst = rx_syscall if number == ENGINE_SYSCALL else rx_uring
        q.base.fd = fd
        q.pool = p
        q.file_id = uring_new_file_id()
        q.engine = number
        q.entries = min(<uint32_t>nb_desc, <uint32_t>RING_ENTRIES)
        q.depth = 1
        q.hdr_len = VNET_HDR_LEN if vnet_hdr else 0
        q.segs = segs
        q.l2 = l2
        q.port = <uint16_t>port
        self.pool = pool
        pool.queues += 1
        self.name = name
        self.queue_id = queue_id
        self.port = port
        self.nb_desc = nb_desc
        self.max_frame = max_frame
        self.generation = fork_generation()

    def __dealloc__(self):
        if self.tap != NULL:
            if self.tap.base.state != QUEUE_CLOSED:
                if self.generation == fork_generation():
                    uring_forget_file(self.tap.file_id)
                if self.pool is not None:
                    self.pool.queues -= 1
            free(self.tap)

    def close(self):
        """Stops, and drops the rings' references on the descriptor; idempotent.  Does not close
        the descriptor.  The counters stay readable."""
        self.checked()
        if close_queue(self, &self.q.state, self.generation, self.tap.file_id):
            self.pool.queues -= 1

    def purge(self):
        """Throws away the frames that wait in the kernel; returns how many.  Uncounted."""
        cdef uint8_t scratch[64]
        cdef Py_ssize_t n = 0
        self.checked()
        if not _compat.cas(&self.q.owned, 0, thread_number()):
            raise RuntimeError(f"{self!r} is in use by another thread or worker")
        with nogil:
            while n < PURGE_MAX and read(self.q.fd, scratch, sizeof(scratch)) > 0:
                n += 1
        self.disown()
        return n

    def counters(self):
        """Totals since the start or the last reset, as a dict of name to int.

        packets, bytes (frames delivered); errors = truncated (longer than max_frame) +
        bad_vnet_hdr (header does not fit the frame) + read_errors; nombuf (bursts that found a
        frame and no free mbuf)."""
        cdef rxq_t *q = self.q
        self.checked()
        return {
            "packets": _compat.counter_read(&q.packets),
            "bytes": _compat.counter_read(&q.bytes),
            "errors": _compat.counter_read(&q.errors),
            "nombuf": _compat.counter_read(&q.nombuf),
            "truncated": _compat.counter_read(&q.truncated),
            "bad_vnet_hdr": _compat.counter_read(&q.bad_vnet_hdr),
            "read_errors": _compat.counter_read(&q.read_errors),
        }

    def reset_counters(self):
        """Sets every counter to zero."""
        cdef rxq_t *q = self.q
        self.checked()
        q.packets = q.bytes = q.errors = q.nombuf = 0
        q.truncated = q.bad_vnet_hdr = q.read_errors = 0

    def xcounters(self):
        """Extended statistics since the last reset of these: dict of name to int, in the C
        driver's order and with its names, less their ``rx_q<N>_``."""
        cdef rxq_t *q = self.q
        self.checked()
        return traffic_dict(&q.traffic) | {
            "lro_packets": _compat.counter_read(&q.lro),
            "checksum_good": _compat.counter_read(&q.checksum_good),
            "checksum_none": _compat.counter_read(&q.checksum_none),
            "checksum_bad": _compat.counter_read(&q.checksum_bad),
            "mbuf_alloc_failed": _compat.counter_read(&q.alloc_failed),
        }

    def reset_xcounters(self):
        """Sets every counter of ``xcounters`` to zero."""
        cdef rxq_t *q = self.q
        self.checked()
        q.lro = q.checksum_good = q.checksum_none = q.checksum_bad = q.alloc_failed = 0
        memset(&q.traffic, 0, sizeof(traffic_t))


cdef class TxQueue(TxQueueBase):
    """Sends frames to a TAP or TUN descriptor; arguments as for :class:`RxQueue`.

    ordered: link the writes of a batch, so that what a full kernel queue leaves unsent is never
             followed by a later frame; needed only with a finite TUNSETSNDBUF (costs a third)
    """

    def __init__(self, int fd, *, str name, int queue_id=0, int port=0xffff, nb_desc=64,
                 bint vnet_hdr=True, bint l2=True, bint ordered=False, str engine="auto",
                 str gil="auto"):
        cdef tap_txq_t *q
        if self.tap != NULL:
            raise RuntimeError("a TxQueue is made once")
        check_range("nb_desc", nb_desc, 1, 32768)
        self.gil.mode = gil_mode(gil)
        number, self.engine, self.engine_reason = choose_engine(engine, fd)
        q = <tap_txq_t *>calloc(1, sizeof(tap_txq_t))
        if q == NULL:
            raise MemoryError("no memory for a tx queue")
        self.tap = q
        self.q = &q.base
        q.send = tx_syscall if number == ENGINE_SYSCALL else tx_uring
        q.base.burst = tx_checked
        q.base.fd = fd
        q.file_id = uring_new_file_id()
        q.engine = number
        q.entries = min(<uint32_t>nb_desc, <uint32_t>RING_ENTRIES)
        q.hdr_len = VNET_HDR_LEN if vnet_hdr else 0
        q.ordered = ordered
        q.l2 = l2
        self.name = name
        self.queue_id = queue_id
        self.port = port
        self.nb_desc = nb_desc
        self.generation = fork_generation()

    def __dealloc__(self):
        if self.tap != NULL:
            if self.tap.base.state != QUEUE_CLOSED and self.generation == fork_generation():
                uring_forget_file(self.tap.file_id)
            free(self.tap)

    def close(self):
        """Stops, and drops the rings' references on the descriptor; idempotent.  Does not close
        the descriptor.  The counters stay readable."""
        self.checked()
        close_queue(self, &self.q.state, self.generation, self.tap.file_id)

    def counters(self):
        """Totals since the start or the last reset, as a dict of name to int.

        packets, bytes (frames the kernel took); errors = refused (EINVAL and the like, one frame
        each) + down (the interface was down, EIO); full (bursts that the kernel cut short)."""
        cdef txq_t *q = self.q
        self.checked()
        return {
            "packets": _compat.counter_read(&q.packets),
            "bytes": _compat.counter_read(&q.bytes),
            "errors": _compat.counter_read(&q.errors),
            "refused": _compat.counter_read(&q.refused),
            "down": _compat.counter_read(&q.down),
            "full": _compat.counter_read(&q.full),
        }

    def reset_counters(self):
        """Sets every counter to zero."""
        cdef txq_t *q = self.q
        self.checked()
        q.packets = q.bytes = q.errors = q.refused = q.down = q.full = 0

    def xcounters(self):
        """Extended statistics since the last reset of these: dict of name to int, in the C
        driver's order and with its names, less their ``tx_q<N>_``."""
        cdef txq_t *q = self.q
        self.checked()
        return traffic_dict(&q.traffic) | {
            "tso_packets": _compat.counter_read(&q.tso),
            "checksum_offload": _compat.counter_read(&q.checksum),
            "multiseg_packets": _compat.counter_read(&q.multiseg),
        }

    def reset_xcounters(self):
        """Sets every counter of ``xcounters`` to zero."""
        cdef txq_t *q = self.q
        self.checked()
        q.tso = q.checksum = q.multiseg = 0
        memset(&q.traffic, 0, sizeof(traffic_t))


cdef tuple SIZE_NAMES = (
    "size_64_packets", "size_65_to_127_packets", "size_128_to_255_packets",
    "size_256_to_511_packets", "size_512_to_1023_packets", "size_1024_to_1518_packets",
    "size_above_1518_packets",
)


cdef dict traffic_dict(const traffic_t *t):
    cdef uint32_t i
    cdef dict out = {}
    for i in range(<uint32_t>SIZE_BUCKETS):
        out[SIZE_NAMES[i]] = _compat.counter_read(&t.sizes[i])
    out["broadcast_packets"] = _compat.counter_read(&t.broadcast)
    out["multicast_packets"] = _compat.counter_read(&t.multicast)
    out["unicast_packets"] = _compat.counter_read(&t.unicast)
    return out


cdef bint close_queue(queue, uint32_t *state, uint32_t generation, uint64_t file_id) except -1:
    """Closes a queue that is not closed yet; true when it was not."""
    if _compat.load(state) == QUEUE_CLOSED:
        return False
    if generation == fork_generation():
        queue.stop()
        uring_forget_file(file_id)
    _compat.store(state, QUEUE_CLOSED)
    return True
