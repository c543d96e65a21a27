# SPDX-License-Identifier: BSD-3-Clause
"""Changes addresses and ports of frames in place.

Sums do not depend on the order of their words, so swapping leaves every checksum right, even an
unfinished one.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from rtap._core.pool cimport mbuf_data, mbuf_read, mbuf_t, mbuf_write
from rtap._frames.headers cimport IPPROTO_TCP, IPPROTO_UDP, IPV4_OFFSET, MAC_LEN
from rtap._frames.parse cimport HEADERS_MAX, be16, headers_of, headers_t, parse_outermost

cdef inline void swap(uint8_t *p, uint32_t n) noexcept nogil:
    """Exchanges ``n`` (at most 16) bytes with the ``n`` behind them."""
    cdef uint8_t kept[16]
    memcpy(kept, p, n)
    memcpy(p, p + n, n)
    memcpy(p + n, kept, n)


cdef void swap_mac(mbuf_t *m) noexcept nogil:
    """Exchanges the Ethernet addresses."""
    cdef uint8_t both[2 * MAC_LEN]
    if m.data_len >= 2 * MAC_LEN:
        swap(mbuf_data(m), MAC_LEN)
    elif m.pkt_len >= 2 * MAC_LEN:
        mbuf_read(m, 0, both, 2 * MAC_LEN)
        swap(both, MAC_LEN)
        mbuf_write(m, 0, both, 2 * MAC_LEN)


cdef void set_mac(mbuf_t *m, const uint8_t *addresses) noexcept nogil:
    """Writes destination and source, 12 bytes."""
    if m.data_len >= 2 * MAC_LEN:
        memcpy(mbuf_data(m), addresses, 2 * MAC_LEN)
    elif m.pkt_len >= 2 * MAC_LEN:
        mbuf_write(m, 0, addresses, 2 * MAC_LEN)


cdef void swap_five_tuple(mbuf_t *m) noexcept nogil:
    """Exchanges Ethernet addresses, the outermost IP addresses and, with TCP and UDP behind them,
    ports.  The later fragments of an IPv4 packet have no ports; IPv6 fragments are treated
    alike."""
    cdef uint8_t copy[HEADERS_MAX]
    cdef headers_t h
    cdef uint32_t n
    cdef uint8_t *p = <uint8_t *>headers_of(m, copy, &n)
    if n < 2 * MAC_LEN:
        return
    swap(p, MAC_LEN)
    if parse_outermost(p, n, m.pkt_len, True, &h) == 0 and h.version != 0:
        if h.version == 4:
            swap(p + h.l3 + 12, 4)
        else:
            swap(p + h.l3 + 8, 16)
        if (h.protocol == IPPROTO_TCP or h.protocol == IPPROTO_UDP) and h.l4 + 4 <= n and (
                not h.fragment or h.version == 4 and be16(p + h.l3 + 6) & IPV4_OFFSET == 0):
            swap(p + h.l4, 2)
    if p == copy:
        mbuf_write(m, 0, copy, n)
