# SPDX-License-Identifier: BSD-3-Clause
"""A receive queue around another one whose frames it changes on their way: addresses, ports,
checksums, requests that become their answers."""

from libc.stdint cimport uint32_t
from libc.string cimport memcpy

cimport rtap._compat as _compat
from rtap._echo cimport make_answer
from rtap._pool cimport mbuf_free, mbuf_t
from rtap._queue cimport RxQueueBase, rxq_t
from rtap._request cimport make_private
from rtap._rewrite cimport set_mac, swap_five_tuple, swap_mac
from rtap._verify cimport fill_frame
from rtap._vnet cimport keeps_vnet_hdr
from rtap._wrapped cimport ROUNDS_MAX, WrappedRxQueue, inner_runs

cdef enum:
    MAC
    MACSWAP
    FIVE_TUPLE
    CSUM
    ECHO

cdef dict CHANGES = {"mac": MAC, "macswap": MACSWAP, "5tswap": FIVE_TUPLE, "csum": CSUM,
                     "icmpecho": ECHO}


cdef inline bint change_frame(change_t *q, mbuf_t *m) noexcept nogil:
    """Whether the frame is to go on."""
    if q.change == MAC:
        set_mac(m, q.addresses)
    elif q.change == MACSWAP:
        swap_mac(m)
    elif q.change == FIVE_TUPLE:
        swap_five_tuple(m)
    elif q.change == CSUM:
        set_mac(m, q.addresses)
        if not keeps_vnet_hdr(m):   # the kernel finishes those, or whoever sends them
            fill_frame(m, True)
    else:
        return make_answer(m, q.addresses + 6)
    return True


cdef uint32_t keep_changed(change_t *q, mbuf_t **v, uint32_t n) noexcept nogil:
    """Those of ``n`` frames that go on, changed, move to the front; their number."""
    cdef uint32_t kept = 0, i
    for i in range(n):
        if make_private(&v[i]) == 0 and change_frame(q, v[i]):
            v[kept] = v[i]
            kept += 1
        else:
            mbuf_free(v[i])
    return kept


cdef uint32_t change_rx(rxq_t *base, mbuf_t **out, uint32_t n, int *error) noexcept nogil:
    cdef change_t *q = <change_t *>base
    cdef rxq_t *inner = q.wrapped.inner
    cdef uint32_t got = 1, kept = 0, rounds = 0
    if not inner_runs(&q.wrapped):
        return 0
    # Nothing out of a burst looks like an idle queue, and must not be taken for one.
    while kept == 0 and got > 0 and error[0] == 0 and rounds < ROUNDS_MAX:
        got = inner.burst(inner, out, n, error)
        kept = keep_changed(q, out, got)
        _compat.counter_add(&base.errors, got - kept)
        rounds += 1
    if kept > 0:
        _compat.counter_add(&base.packets, kept)
    return kept


cdef class ChangeRxQueue(WrappedRxQueue):
    """Receives what ``inner`` receives, changed.

    "mac" writes the addresses given, "macswap" exchanges a frame's own, "5tswap" IP addresses and
    ports as well, "csum" writes the addresses and every IPv4, TCP and UDP checksum, "icmpecho"
    answers ARP, neighbour and echo requests from ``source`` and frees everything else.

    While started it holds the inner queue, which must be started too; it ends when that is
    stopped. It counts ``packets`` and, as ``errors``, the frames that did not go on.
    """

    def __init__(self, RxQueueBase inner not None, str change, *, bytes destination=bytes(6),
                 bytes source=bytes(6)):
        if self.q != NULL:
            raise RuntimeError("a ChangeRxQueue is made once")
        inner.checked()
        if change not in CHANGES:
            raise ValueError(f"change must be one of {', '.join(CHANGES)}, got {change!r}")
        if len(destination) != 6 or len(source) != 6:
            raise ValueError("an Ethernet address has 6 bytes")
        self.changes.change = CHANGES[change]
        memcpy(self.changes.addresses, <const char *>destination, 6)
        memcpy(self.changes.addresses + 6, <const char *>source, 6)
        self.changes.wrapped.base.burst = change_rx
        self.wrap(&self.changes.wrapped, inner)

    def close(self):
        """Gives the inner queue back. For good; idempotent."""
        self.end()
