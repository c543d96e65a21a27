# SPDX-License-Identifier: BSD-3-Clause
"""Queues on a UDP socket: :class:`UdpRxQueue` and :class:`UdpTxQueue`."""

cimport cython
from libc.stdint cimport uint16_t
from libc.stdlib cimport calloc, free, malloc

cimport rtap._core.compat as _compat
from rtap._core.gil cimport gil_mode
from rtap._core.linux cimport EFD_CLOEXEC, EFD_NONBLOCK, close, eventfd
from rtap._core.mbuf cimport check_range
from rtap._core.mempool cimport Mempool
from rtap._core.pool cimport fork_generation, thread_number
from rtap._core.queue cimport QUEUE_CLOSED, QUEUE_STOPPED
from rtap._core.rx_queue cimport RxQueueBase
from rtap._core.tx_queue cimport TxQueueBase
from rtap._udp.peers cimport Peers
from rtap._udp.rx cimport (
    MESSAGE_MAX, READS, udp_rx, udp_rx_drop, udp_rx_idle, udp_rx_purge, udp_rxq_t,
)
from rtap._udp.tx cimport udp_tx, udp_tx_abandon, udp_tx_forget, udp_txq_t

import os


@cython.no_gc_clear
cdef class UdpRxQueue(RxQueueBase):
    """UdpRxQueue(fd, pool, peers, *, name, connected=False, queue_id=0, port=0xffff, nb_desc=64, \
gil='auto')\n--\n

    Receives the datagrams of a UDP socket into the mbufs of ``pool``.

    fd:        a non-blocking socket, with UDP_GRO where the kernel has that; the caller keeps it
    peers:     the table in which senders are looked up
    connected: the kernel lets in one peer's datagrams only, which all get the number 0
    """

    def __init__(self, int fd, Mempool pool not None, Peers peers not None, *, str name,
                 bint connected=False, int queue_id=0, int port=0xffff, nb_desc=64,
                 str gil="auto"):
        cdef int mode = gil_mode(gil), n_desc = <int>check_range("nb_desc", nb_desc, 1, 32768), i
        cdef udp_rxq_t *q
        self.once()
        q = <udp_rxq_t *>calloc(1, sizeof(udp_rxq_t))
        if q == NULL:
            raise MemoryError("no memory for an rx queue")
        q.wake = -1
        self.udp = q
        q.bytes = <unsigned char *>malloc(<size_t>READS * MESSAGE_MAX)
        if q.bytes == NULL:
            raise MemoryError("no memory for an rx queue")
        q.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if q.wake < 0:
            raise OSError("the process has no descriptor left for an rx queue")
        q.pool = pool.hold()
        self.pool = pool
        self.peers = peers
        q.peers = NULL if connected else &peers.table
        q.port = <uint16_t>port
        for i in range(<int>READS):
            q.iov[i].iov_base = q.bytes + <size_t>i * MESSAGE_MAX
            q.iov[i].iov_len = MESSAGE_MAX
            q.msgs[i].msg_hdr.msg_iov = &q.iov[i]
            q.msgs[i].msg_hdr.msg_iovlen = 1
            q.msgs[i].msg_hdr.msg_name = NULL if connected else &q.names[i]
            q.msgs[i].msg_hdr.msg_control = &q.control[i][0]
        q.base.burst = udp_rx
        q.base.idle = udp_rx_idle
        q.base.fd = fd
        self.gil.mode = mode
        self.serve(&q.base)
        self.name = name
        self.queue_id = queue_id
        self.port = port
        self.nb_desc = n_desc
        self.chosen, self.why = "syscall", "recvmmsg(2)"
        self.generation = fork_generation()

    def __dealloc__(self):
        if self.udp == NULL:
            return
        if self.q != NULL and self.gate.state != QUEUE_CLOSED and self.pool is not None:
            self.pool.let_go()
        if self.udp.wake >= 0:
            close(self.udp.wake)
        free(self.udp.bytes)
        free(self.udp)

    @property
    def wake(self):
        """Descriptor that is readable while datagrams that were read wait for the next burst."""
        self.checked()
        return self.udp.wake

    def stop(self):
        """Refuses further bursts, once the one in progress is over; drops datagrams that wait
        here."""
        RxQueueBase.stop(self)
        if self.generation != fork_generation():
            return
        _compat.store(&self.udp.stale, 1)       # the present owner does it later
        if _compat.cas(&self.gate.owned, 0, thread_number()):
            udp_rx_drop(self.udp)
            self.disown()

    def purge(self):
        """Throws away the datagrams that wait in the socket, for a stopped queue; returns how
        many, which are counted."""
        cdef unsigned long long n = 0
        self.own_stopped()
        try:
            n = udp_rx_purge(self.udp)
        finally:
            self.disown()
        return n

    cdef int own_stopped(self) except -1:
        self.checked()
        if (_compat.load(&self.gate.state) != QUEUE_STOPPED
                or not _compat.cas(&self.gate.owned, 0, thread_number())):
            raise RuntimeError(f"{self!r} is not stopped")
        return 0

    def close(self):
        """Stops, for good; idempotent.  The counters stay readable."""
        self.checked()
        self.stop()
        if _compat.cas(&self.gate.state, QUEUE_STOPPED, QUEUE_CLOSED):
            self.pool.let_go()
            close(self.udp.wake)
            self.udp.wake = -1

    cdef dict xtotals(self):
        cdef dict totals = RxQueueBase.xtotals(self)
        totals["gro_messages"] = _compat.counter_read(&self.udp.merged)
        totals["gro_segments"] = _compat.counter_read(&self.udp.datagrams)
        totals["unknown_packets"] = _compat.counter_read(&self.udp.unknown)
        totals["unknown_dropped_packets"] = _compat.counter_read(&self.udp.dropped)
        totals["icmp_errors"] = _compat.counter_read(&self.udp.icmp)
        return totals


@cython.no_gc_clear
cdef class UdpTxQueue(TxQueueBase):
    """UdpTxQueue(fd, peers, *, name, connected=False, queue_id=0, port=0xffff, nb_desc=64, \
gil='auto')\n--\n

    Sends datagrams on a UDP socket, see :class:`UdpRxQueue`."""

    def __init__(self, int fd, Peers peers not None, *, str name, bint connected=False,
                 int queue_id=0, int port=0xffff, nb_desc=64, str gil="auto"):
        cdef int mode = gil_mode(gil), n_desc = <int>check_range("nb_desc", nb_desc, 1, 32768)
        cdef udp_txq_t *q
        self.once()
        q = <udp_txq_t *>calloc(1, sizeof(udp_txq_t))
        if q == NULL:
            raise MemoryError("no memory for a tx queue")
        self.udp = q
        self.peers = peers
        q.peers = &peers.table
        q.connected = connected
        q.address_len = 16 if peers.family == 2 else 28
        q.base.burst = udp_tx
        q.base.abandon = udp_tx_abandon
        q.base.fd = fd
        self.gil.mode = mode
        self.serve(&q.base)
        self.name = name
        self.queue_id = queue_id
        self.port = port
        self.nb_desc = n_desc
        self.chosen, self.why = "syscall", "sendmmsg(2)"
        self.generation = fork_generation()

    def __dealloc__(self):
        if self.udp != NULL:
            if self.q != NULL and self.generation == fork_generation():
                udp_tx_forget(self.udp)
            free(self.udp)

    @property
    def gso_refused(self):
        """Why the kernel has refused several datagrams in one message, within the last ten seconds
        of sending; None if it has not."""
        cdef int code
        self.checked()
        code = <int>_compat.load(&self.udp.fell_back)
        return os.strerror(code) if code else None

    def stop(self):
        """Refuses further bursts, once the one in progress is over; drops the pieces of a
        super-frame that wait, and counts them as unsent."""
        TxQueueBase.stop(self)
        if self.generation == fork_generation():
            self.settle()

    cdef dict xtotals(self):
        cdef dict totals = TxQueueBase.xtotals(self)
        totals["gso_sends"] = _compat.counter_read(&self.udp.gso_sends)
        totals["gso_segments"] = _compat.counter_read(&self.udp.gso_segments)
        totals["gso_fallbacks"] = _compat.counter_read(&self.udp.fallbacks)
        totals["no_peer_packets"] = _compat.counter_read(&self.udp.no_peer)
        totals["too_big_packets"] = _compat.counter_read(&self.udp.too_big)
        totals["icmp_errors"] = _compat.counter_read(&self.udp.icmp)
        return totals
