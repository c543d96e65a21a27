# SPDX-License-Identifier: BSD-3-Clause
"""Queues on a TAP or TUN descriptor or a packet socket: :class:`RxQueue` and :class:`TxQueue`.

Two engines.  ``uring`` submits a batch of reads or writes in one ``io_uring_enter`` and finds every
result when it returns; ``syscall`` does one read(2) or write(2) for each frame, for
kernels and containers without io_uring.  Which is faster depends on the cost of a system call:
``auto`` measures both once for each process.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.object cimport PyObject
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

cimport rtap._core.compat as _compat
from rtap._core.gil cimport gil_mode
from rtap._core.linux cimport iovec, msghdr, readv_now
from rtap._core.mbuf cimport check_range
from rtap._core.memfd cimport memfd_flaw, memfd_map, memfd_unmap
from rtap._core.mempool cimport Mempool
from rtap._core.pool cimport fork_generation, pool_t, thread_number
from rtap._core.queue cimport (
    LAYER_ETHERNET, LAYER_IP, OWNED_BY_WORKER, QUEUE_CLOSED, QUEUE_STOPPED, QueueBase,
)
from rtap._core.rx_queue cimport RxQueueBase
from rtap._core.tx_queue cimport TxQueueBase
from rtap._frames.vnet cimport VNET_HDR_LEN
from rtap._tap.packet cimport PACKET_DATA_ROOM, PACKET_HEADROOM
from rtap._tap.rx cimport (
    FILTER_MAX, SEGS_MAX, filter_t, room_t, rx_adopt, rx_split, rx_syscall, rx_uring,
    rx_uring_many, tap_rxq_t,
)
from rtap._tap.rx_gso cimport rx_gso_create, rx_gso_destroy, rx_gso_drop
from rtap._tap.tx cimport tap_txq_t, tx_checked, tx_syscall, tx_uring, tx_uring_many
from rtap._tap.tx_gro cimport tx_gro_create, tx_gro_destroy
from rtap._tap.tx_pieces cimport tx_abandon, tx_forget
from rtap._tap.uring cimport (
    ENGINE_AUTO, ENGINE_SYSCALL, ENGINE_URING, RING_ENTRIES, uring_costs, uring_forget_file,
    uring_new_file_id, uring_way,
)

import errno as errno_names
import os

from rtap._core.origin import origin
from rtap.errors import DeviceStateError

cdef extern from "Python.h":
    int PyErr_ResourceWarning(source, Py_ssize_t stack_level, const char *form, ...) except -1

cdef enum:
    PURGE_MAX = 1 << 20
    FRAME_MAX = 1 << 20


cdef tuple choose_engine(str engine, int fd, bint packet):
    """(number, name, reason, whether it takes RWF_NOWAIT) for ``engine`` on a TAP descriptor, or a
    packet socket."""
    cdef str refusal, way
    cdef bint nowait
    if engine == "syscall":
        return ENGINE_SYSCALL, "syscall", "asked for", True
    if engine != "uring" and engine != "auto":
        raise ValueError(f"engine must be auto, uring or syscall, got {engine!r}")
    refusal, nowait = uring_way(fd, packet)
    way = "" if nowait else "; without RWF_NOWAIT, each batch of reads ends with a cancel"
    if engine == "auto":
        if refusal:
            return ENGINE_SYSCALL, "syscall", refusal, nowait
        by_ring, by_call = uring_costs()
        reason = f"a write costs {by_ring} ns through io_uring, {by_call} ns by system call"
        if by_call + by_call // 16 < by_ring:
            return ENGINE_SYSCALL, "syscall", reason, nowait
        return ENGINE_AUTO, "uring", reason + way, nowait
    if refusal:
        raise OSError(errno_names.ENOSYS, f"engine='uring' cannot be used: {refusal}")
    return ENGINE_URING, "uring", "asked for" + way, nowait


cdef uint32_t segments(pool_t *p, uint32_t longest, bint scatter, bint packet) except 0:
    """How many slots of a pool hold the longest frame, with one spare byte: a read that fills its
    buffer looks the same as a cut one."""
    cdef uint32_t segs = (longest + p.data_room) // p.data_room
    if packet and (p.headroom < PACKET_HEADROOM or p.data_room < PACKET_DATA_ROOM):
        raise ValueError(f"a packet socket needs a pool with a headroom of at least "
                         f"{PACKET_HEADROOM} and a data_room of at least {PACKET_DATA_ROOM}, this "
                         f"one has {p.headroom} and {p.data_room}")
    if segs > 1 and not scatter:
        raise ValueError(f"frames of up to {longest} bytes need a data_room of at least "
                         f"{longest + 1}, the pool's is {p.data_room} (or the SCATTER offload)")
    if segs > SEGS_MAX:
        raise ValueError(f"frames of {longest} bytes would take {segs} segments of "
                         f"{p.data_room} bytes, the most is {SEGS_MAX}")
    if segs > p.size:
        raise ValueError(f"frames of {longest} bytes would take {segs} mbufs of {p.data_room} "
                         f"bytes, the pool has {p.size}")
    return segs


cdef Py_ssize_t read_away(int fd) noexcept nogil:
    """Reads the frames that wait on a descriptor, without waiting; returns how many."""
    cdef uint8_t scratch[64]
    cdef iovec iov
    cdef Py_ssize_t n = 0
    iov.iov_base = scratch
    iov.iov_len = sizeof(scratch)
    while n < PURGE_MAX and readv_now(fd, &iov, 1) > 0:
        n += 1
    return n


def purge(int fd):
    """Throws away the frames that wait in the kernel on a descriptor without a queue; returns
    their number."""
    cdef Py_ssize_t n
    with nogil:
        n = read_away(fd)
    return n


cdef int tell_unclosed(QueueBase queue) except -1:
    """In a finalizer, also when the interpreter has taken its modules down: ResourceWarning for a
    queue that is open, and no device's."""
    if (queue.gate == NULL or queue.adopted or _compat.load(&queue.gate.state) == QUEUE_CLOSED
            or queue.generation != fork_generation()):
        return 0
    text = f"unclosed {queue!r}{queue.origin}"
    PyErr_ResourceWarning(queue, 1, "%U", <PyObject *>text)
    return 0


#: Bytes that the state of a queue of either side fits into.
STATE_SIZE = max(sizeof(tap_rxq_t), sizeof(tap_txq_t))


cdef void *state_make(int fd, size_t size) except NULL:
    """Zeros for the state of a queue, in the memfd ``fd`` unless that is -1."""
    cdef const char *flaw
    cdef uint64_t there
    cdef void *state
    if fd < 0:
        state = calloc(1, size)
        if state == NULL:
            raise MemoryError("no memory for a queue")
        return state
    flaw = memfd_flaw(fd, &there)
    if flaw != NULL or there < size:
        raise ValueError(f"state_fd {fd} needs a sealed memfd of {size} bytes: "
                         + (flaw.decode() if flaw != NULL else f"it has {there}"))
    state = memfd_map(fd, size, True)
    if state == NULL:
        raise OSError(errno, f"state_fd {fd} cannot be mapped: {os.strerror(errno)}")
    memset(state, 0, size)
    return state


cdef void state_free(void *state, int fd, size_t size) noexcept:
    if fd < 0:
        free(state)
    else:
        memfd_unmap(state, size)


@cython.no_gc_clear
cdef class RxQueue(RxQueueBase):
    """RxQueue(fd, pool, *, name, queue_id=0, port=0xffff, nb_desc=64, vnet_hdr=True, \
max_frame=1522, scatter=False, l2=True, offloads=0, split=None, shared=False, packet=False, \
state_fd=-1, engine='auto', gil='auto')\n--\n

    Receives frames from a TAP or TUN descriptor or a packet socket into the mbufs of ``pool``.

    fd:        non-blocking descriptor of one queue; the caller keeps it, and closes it after us
    name:      interface name, for messages
    nb_desc:   most frames for each kernel entry (1..32768; the ring takes 256 at once)
    vnet_hdr:  the descriptor has IFF_VNET_HDR with the 10-byte little-endian header
    max_frame: longest legal frame in bytes, without that header; buffers hold one byte more, and
               a frame that fills its buffer is counted in ``truncated`` and dropped
    scatter:   frames longer than the pool's ``data_room`` become chains; else such a pool is
               refused with ValueError
    l2:        Ethernet frames (TAP); False for IP packets (TUN)
    offloads:  RxOffload bits.  With any of them, mbufs have packet type and header lengths; with
               IPV4_CKSUM, UDP_CKSUM and TCP_CKSUM also the state of that checksum; with vnet_hdr
    split:     a pool to split super-frames into, and to move all others to; ``pool`` is then for
               reading only.  Frames longer than its ``data_room`` become chains; a frame that takes
               more mbufs than it has is counted in ``too_long`` and dropped.  ``wake`` is
               readable while split frames wait for the next burst; with vnet_hdr
    shared:    others have the descriptor's open file too, and may make it blocking: bursts still
               never block, which costs up to 90 ns for each system call
    packet:    the descriptor is a packet socket, with PACKET_VNET_HDR and PACKET_AUXDATA: VLAN tags
               that the kernel has taken out are put back.  The pool that is read into needs
               a ``headroom`` of 64
    state_fd:  a sealed memfd of STATE_SIZE bytes for the queue's state, so that the process that
               lent the descriptor sees the counters (``lend``); -1 for memory of its own
    engine:    "auto", "uring" or "syscall";  gil: "auto", "release" or "hold"
    """

    def __init__(self, int fd, Mempool pool not None, *, str name, int queue_id=0, int port=0xffff,
                 nb_desc=64, bint vnet_hdr=True, max_frame=1522, bint scatter=False,
                 bint l2=True, uint64_t offloads=0, Mempool split=None, bint shared=False,
                 bint packet=False, int state_fd=-1, str engine="auto", str gil="auto"):
        cdef pool_t *p
        cdef tap_rxq_t *q
        cdef msghdr *msgs = NULL
        cdef uint32_t segs
        cdef int mode = gil_mode(gil), n_desc = <int>check_range("nb_desc", nb_desc, 1, 32768)
        cdef int longest = <int>check_range("max_frame", max_frame, 14, FRAME_MAX)
        cdef str chosen, reason
        cdef bint nowait
        number, chosen, reason, nowait = choose_engine(engine, fd, packet)
        if packet and not vnet_hdr:
            raise ValueError("packet needs vnet_hdr: a packet socket gives frames whose checksum "
                             "is not finished, and without headers does not say so")
        if split is not None and not vnet_hdr:
            raise ValueError("split needs vnet_hdr: without headers there are no super-frames")
        self.once()
        p = pool.hold()
        try:
            segs = segments(p, longest, scatter, packet)
            q = <tap_rxq_t *>state_make(state_fd, sizeof(tap_rxq_t))
            if packet:
                msgs = <msghdr *>calloc(RING_ENTRIES, sizeof(msghdr))
                if msgs == NULL:
                    state_free(q, state_fd, sizeof(tap_rxq_t))
                    raise MemoryError("no memory for an rx queue")
            if split is not None:
                try:
                    q.gso = rx_gso_create(split.hold(), l2)
                    if q.gso == NULL:
                        split.let_go()
                        raise MemoryError("no memory or no descriptor for an rx queue that splits")
                except BaseException:
                    state_free(q, state_fd, sizeof(tap_rxq_t))
                    free(msgs)
                    raise
        except BaseException:
            pool.let_go()
            raise
        self.gil.mode = mode
        self.chosen, self.why = chosen, reason
        self.pool = pool
        self.tap = q
        self.state_fd = state_fd
        self.serve(&q.base)
        q.base.burst = q.read = rx_syscall if number == ENGINE_SYSCALL else rx_uring
        if split is not None:
            self.reads = pool
            self.pool = split
            q.base.burst = rx_split
        elif number != ENGINE_SYSCALL:
            q.base.many = rx_uring_many
        q.base.fd = fd
        q.pool = p
        q.file_id = uring_new_file_id()
        q.engine = number
        q.cancels = not nowait and not packet       # there MSG_DONTWAIT does
        q.entries = min(<uint32_t>n_desc, <uint32_t>RING_ENTRIES - q.cancels)
        q.depth = 1
        q.hdr_len = VNET_HDR_LEN if vnet_hdr else 0
        q.offloads = offloads
        q.segs = segs
        q.l2 = l2
        q.shared = shared
        q.msgs = msgs
        self.layer = LAYER_ETHERNET if l2 else LAYER_IP
        q.port = <uint16_t>port
        self.name = name
        self.queue_id = queue_id
        self.port = port
        self.nb_desc = n_desc
        self.max_frame = longest
        self.scatter = scatter
        self.retired = []
        self.origin = origin()
        self.generation = fork_generation()

    def __del__(self):
        tell_unclosed(self)

    def __dealloc__(self):
        if self.tap != NULL:
            if self.gate.state != QUEUE_CLOSED:
                if self.generation == fork_generation():
                    uring_forget_file(self.tap.file_id)
                self.release_pools()
            rx_gso_destroy(self.tap.gso)
            free(self.tap.msgs)
            state_free(self.tap, self.state_fd, sizeof(tap_rxq_t))

    def close(self):
        """Stops, and drops the rings' references on the descriptor; idempotent.  Does not close
        the descriptor.  The counters stay readable."""
        self.checked()
        if close_queue(self, &self.gate.state, self.generation, self.tap.file_id):
            self.release_pools()

    def stop(self):
        """Refuses further bursts, once the one in progress is over; drops the frames that ``split``
        has in hand."""
        RxQueueBase.stop(self)
        if self.tap.gso == NULL or self.generation != fork_generation():
            return
        _compat.store(&self.tap.gso.stale, 1)       # the present owner does it later
        if _compat.cas(&self.gate.owned, 0, thread_number()):
            rx_gso_drop(self.tap.gso, &self.tap.base)
            self.disown()

    def renew(self):
        """From now on the descriptor refers to another open file (dup2(2)): drops the rings'
        references on the former one.  For a stopped queue."""
        self.checked()
        uring_forget_file(self.tap.file_id)
        _compat.store(&self.tap.gone, 0)
        self.tap.base.revisit = False

    def lose(self):
        """Called when the interface of a packet socket is gone.  The kernel tells the socket at
        most that it is down.  From now on bursts raise, waiting ones within 60 ms."""
        self.checked()
        _compat.store(&self.tap.gone, 1)
        self.tap.base.revisit = True

    @cython.critical_section
    cdef int release_pools(self) except -1:
        if self.reads is not None:
            if self.generation == fork_generation():    # else the frames belong to the parent
                rx_gso_drop(self.tap.gso, &self.tap.base)
            self.reads.let_go()
        self.pool.let_go()
        return self.release_retired()

    cdef int release_retired(self) except -1:
        cdef Mempool pool
        for pool in self.retired:
            pool.let_go()
        self.retired.clear()
        return 0

    @property
    def wake(self):
        """Descriptor that is readable while split frames wait for the next burst; -1 for a queue
        that does not split."""
        self.checked()
        return self.tap.gso.wake if self.tap.gso != NULL else -1

    @property
    @cython.critical_section
    def room(self):
        """Bytes that one read can take."""
        cdef room_t *r = &self.tap.room
        cdef uint32_t n
        self.not_inherited()
        _compat.lock(&r.lock)
        if r.new != 0:
            n = r.segs * r.pool.data_room
        else:
            n = self.tap.segs * self.tap.pool.data_room
        _compat.unlock(&r.lock)
        return n

    @cython.critical_section
    def resize(self, max_frame, Mempool pool=None):
        """From the next burst on, also in a worker, takes frames of up to ``max_frame`` bytes, into
        mbufs of another ``pool`` if one is given.  ValueError as for a new queue."""
        cdef Mempool to = self.pool if pool is None else pool
        cdef pool_t *p
        cdef uint32_t segs
        cdef int longest = <int>check_range("max_frame", max_frame, 14, FRAME_MAX)
        cdef room_t *r = &self.tap.room
        self.not_inherited()
        if self.reads is not None:
            raise ValueError(f"{self!r} splits what it reads: its buffers hold the longest frame")
        p = to.hold()
        try:
            segs = segments(p, longest, self.scatter, self.tap.msgs != NULL)
            if _compat.load(&self.gate.state) == QUEUE_CLOSED:
                raise DeviceStateError(f"{self!r} is closed")
        except BaseException:
            to.let_go()
            raise
        self.retired.append(self.pool)      # the same pool if it stays: it is held twice now
        self.pool = to
        _compat.lock(&r.lock)
        r.pool = p
        r.segs = segs
        _compat.store(&r.new, 1)
        _compat.unlock(&r.lock)
        self.max_frame = longest
        if _compat.cas(&self.gate.owned, 0, thread_number()):      # else the next burst does it
            rx_adopt(self.tap)
            self.disown()
            self.release_retired()

    def set_filter(self, bint on, *, bint allmulticast=False, addresses=()):
        """Keeps only frames to ``addresses`` (6 bytes each, up to 64), to the broadcast address
        and, with ``allmulticast``, to any group.  Off: keeps every frame.  Takes effect on the
        next frame, even while another thread bursts."""
        cdef filter_t *f = &self.tap.filter
        cdef list wanted = [bytes(address) for address in addresses]
        cdef const uint8_t *p
        cdef bytes packed
        self.not_inherited()
        if len(wanted) > FILTER_MAX:
            raise ValueError(f"a queue listens for at most {FILTER_MAX} addresses, "
                             f"got {len(wanted)}")
        for address in wanted:
            if len(address) != 6:
                raise ValueError(f"an Ethernet address has 6 bytes, got {address!r}")
        packed = b"".join(wanted)
        p = <const uint8_t *>PyBytes_AS_STRING(packed)
        _compat.lock(&f.lock)
        memcpy(f.addresses, p, len(packed))
        f.n = <uint32_t>len(wanted)
        f.allmulticast = allmulticast
        _compat.unlock(&f.lock)
        _compat.store(&f.on, on)

    def purge(self):
        """Throws away the frames that wait in the kernel; returns how many, and counts them in
        ``purged_packets``."""
        cdef Py_ssize_t n
        self.not_inherited()
        if not _compat.cas(&self.gate.owned, 0, thread_number()):
            raise DeviceStateError(f"{self!r} is in use by another thread or worker")
        if _compat.load(&self.gate.state) == QUEUE_CLOSED:
            self.disown()
            raise DeviceStateError(f"{self!r} is closed")
        with nogil:
            n = read_away(self.q.fd)
            _compat.counter_add(&self.q.purged, n)
            if self.tap.gso != NULL:
                rx_gso_drop(self.tap.gso, &self.tap.base)
        self.disown()
        return n


@cython.no_gc_clear
cdef class TxQueue(TxQueueBase):
    """TxQueue(fd, *, name, queue_id=0, port=0xffff, nb_desc=64, vnet_hdr=True, l2=True, \
ordered=False, on_refused=None, gro=False, gro_udp=False, shared=False, packet=False, \
state_fd=-1, engine='auto', gil='auto')\n--\n

    Sends frames to a TAP or TUN descriptor or a packet socket; arguments as for :class:`RxQueue`.

    ordered: link the writes of a batch, so that no later frame overtakes one that a full kernel
             queue leaves unsent; needed only with a finite TUNSETSNDBUF (costs a third)
    on_refused: called with the kinds of super-frames (see ``software_gso``) that the kernel always
             refuses, in the thread that bursts, after the burst (in a worker, during it); if it
             raises, again after the next burst
    gro:     merge frames of a TCP flow before they enter the kernel, with ``gro_udp`` datagrams
             too; needs ``vnet_hdr``
    """

    def __init__(self, int fd, *, str name, int queue_id=0, int port=0xffff, nb_desc=64,
                 bint vnet_hdr=True, bint l2=True, bint ordered=False, on_refused=None,
                 bint gro=False, bint gro_udp=False, bint shared=False, bint packet=False,
                 int state_fd=-1, str engine="auto", str gil="auto"):
        cdef tap_txq_t *q
        cdef int mode = gil_mode(gil), n_desc = <int>check_range("nb_desc", nb_desc, 1, 32768)
        cdef str chosen, reason
        cdef bint nowait
        number, chosen, reason, nowait = choose_engine(engine, fd, packet)
        if gro and not vnet_hdr:
            raise ValueError("gro needs vnet_hdr: without a header a super-frame cannot say that "
                             "it is one")
        self.once()
        q = <tap_txq_t *>state_make(state_fd, sizeof(tap_txq_t))
        if gro:
            q.gro = tx_gro_create(gro_udp, l2)
            if q.gro == NULL:
                state_free(q, state_fd, sizeof(tap_txq_t))
                raise MemoryError("no memory for a tx queue that merges")
        self.tap = q
        self.state_fd = state_fd
        self.serve(&q.base)
        q.send = tx_syscall if number == ENGINE_SYSCALL else tx_uring
        q.base.burst = tx_checked
        q.base.abandon = tx_abandon
        if number != ENGINE_SYSCALL and not gro and not ordered:
            q.base.many = tx_uring_many
        q.base.fd = fd
        q.file_id = uring_new_file_id()
        q.engine = number
        q.nowait = nowait
        q.entries = min(<uint32_t>n_desc, <uint32_t>RING_ENTRIES)
        q.hdr_len = VNET_HDR_LEN if vnet_hdr else 0
        q.ordered = ordered
        q.shared = shared
        q.l2 = l2
        q.least = 0 if l2 else 20
        self.layer = LAYER_ETHERNET if l2 else LAYER_IP
        q.owner = <void *>self
        q.refused = note_refused
        self.on_refused = on_refused
        self.name = name
        self.queue_id = queue_id
        self.port = port
        self.nb_desc = n_desc
        self.gil.mode = mode
        self.chosen, self.why = chosen, reason
        self.origin = origin()
        self.generation = fork_generation()

    def __del__(self):
        tell_unclosed(self)

    def __dealloc__(self):
        if self.tap != NULL:
            if self.gate.state != QUEUE_CLOSED and self.generation == fork_generation():
                uring_forget_file(self.tap.file_id)
            tx_forget(self.tap)
            tx_gro_destroy(self.tap.gro)
            state_free(self.tap, self.state_fd, sizeof(tap_txq_t))

    def close(self):
        """Stops, and drops the rings' references on the descriptor; idempotent.  Does not close
        the descriptor.  The counters stay readable."""
        self.checked()
        close_queue(self, &self.gate.state, self.generation, self.tap.file_id)

    def stop(self):
        """Refuses further bursts, once the one in progress is over; pieces of a super-frame that
        waited to be sent are lost, and counted in ``unsent``."""
        TxQueueBase.stop(self)
        if self.generation == fork_generation():
            self.settle()

    def renew(self):
        """From now on the descriptor refers to another open file; see :meth:`RxQueue.renew`."""
        self.checked()
        uring_forget_file(self.tap.file_id)

    cdef int tell(self, uint32_t news) except -1:
        if self.on_refused is not None:
            self.on_refused(news)
        return 0

    @property
    def software_gso(self):
        """Kinds of super-frames that are split here because the kernel refuses them: bits 1 (TCP
        over IPv4), 2 (TCP over IPv6), 4 (UDP)."""
        self.checked()
        return _compat.load(&self.tap.software)

    @software_gso.setter
    def software_gso(self, kinds):
        self.checked()
        _compat.store(&self.tap.software, check_range("software_gso", kinds, 0, 7))


cdef void note_refused(tap_txq_t *q, uint32_t kind) noexcept nogil:
    """Notes a refused kind during a burst.  The queue's shell reports it afterwards, where it can
    pass on exceptions of signal handlers.  A worker has no shell, and its thread runs no signal
    handlers, so it reports at once."""
    if _compat.load(&q.base.gate.owned) == OWNED_BY_WORKER:
        tell_refused(q, kind)
    else:
        _compat.store(&q.base.news, q.base.news | kind)


cdef void tell_refused(tap_txq_t *q, uint32_t kind) noexcept with gil:
    cdef TxQueue queue = <TxQueue>q.owner
    if queue.on_refused is not None:
        queue.on_refused(kind)


cdef bint close_queue(queue, uint32_t *state, uint32_t generation, uint64_t file_id) except -1:
    """Closes a queue unless it is closed; true only for the caller that closed it."""
    if _compat.load(state) == QUEUE_CLOSED:
        return False
    if generation == fork_generation():
        queue.stop()
        if not _compat.cas(state, QUEUE_STOPPED, QUEUE_CLOSED):
            return False
        uring_forget_file(file_id)
        return True
    return _compat.exchange(state, QUEUE_CLOSED) != QUEUE_CLOSED
