# SPDX-License-Identifier: BSD-3-Clause
"""The peers of a UDP device: small numbers for addresses.

Burst loops look addresses up in a hash table with linear probing, under a short lock; the program
changes it under the same lock.  The hash has a secret seed: senders cannot choose addresses that
collide.
"""

cimport cython
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

cimport rtap._core.compat as _compat
from rtap._core.mbuf cimport check_range

import _socket
import ipaddress
import os

cdef enum:
    AF_INET = 2
    AF_INET6 = 10

cdef uint64_t MULTIPLIER = 0x9e3779b97f4a7c15


cdef inline uint64_t mix(uint64_t h, uint64_t word) noexcept nogil:
    h = (h ^ word) * MULTIPLIER
    return h ^ (h >> 29)


cdef uint32_t bucket_of(const peers_t *t, const address_t *a) noexcept nogil:
    cdef uint64_t h = mix(t.seed, <uint64_t>a.port << 32 | (a.flow if a.family == AF_INET else 0))
    if a.family != AF_INET:
        h = mix(mix(mix(h, a.host[0]), a.host[1]), a.scope)
    return <uint32_t>(h >> 32) & t.mask


cdef inline bint same(const address_t *a, const address_t *b) noexcept nogil:
    if a.family != b.family or a.port != b.port:
        return False
    if a.family == AF_INET:
        return a.flow == b.flow
    return a.host[0] == b.host[0] and a.host[1] == b.host[1] and a.scope == b.scope


cdef uint32_t find(const peers_t *t, const address_t *a) noexcept nogil:
    cdef uint32_t i = bucket_of(t, a), number
    while True:
        number = t.buckets[i]
        if number == 0 or same(&t.addresses[number], a):
            return number
        i = (i + 1) & t.mask


cdef void enter(peers_t *t, uint32_t number) noexcept nogil:
    cdef uint32_t i = bucket_of(t, &t.addresses[number])
    while t.buckets[i] != 0:
        i = (i + 1) & t.mask
    t.buckets[i] = number


cdef void leave(peers_t *t, uint32_t number) noexcept nogil:
    """Takes a number out of the buckets, and moves those that it kept from their own."""
    cdef uint32_t i = bucket_of(t, &t.addresses[number]), j, home
    while t.buckets[i] != number:
        i = (i + 1) & t.mask
    j = i
    while True:
        j = (j + 1) & t.mask
        if t.buckets[j] == 0:
            break
        home = bucket_of(t, &t.addresses[t.buckets[j]])
        if ((j - home) & t.mask) >= ((j - i) & t.mask):
            t.buckets[i] = t.buckets[j]
            i = j
    t.buckets[i] = 0


cdef void put(peers_t *t, uint32_t number, const address_t *a) noexcept nogil:
    """Gives a number an address, which no other number has."""
    if t.addresses[number].family != 0:
        leave(t, number)
    else:
        t.n += 1
    t.addresses[number] = a[0]
    t.addresses[number].flow = a.flow if a.family == AF_INET else 0
    enter(t, number)


cdef void drop(peers_t *t, uint32_t number) noexcept nogil:
    leave(t, number)
    t.addresses[number].family = 0
    t.n -= 1
    t.free_hint = min(t.free_hint, number)


cdef uint32_t unused(peers_t *t) noexcept nogil:
    """The lowest number without an address; 0 when there is none."""
    cdef uint32_t number
    for number in range(t.free_hint, t.size + 1):
        if t.addresses[number].family == 0:
            t.free_hint = number
            return number
    t.free_hint = t.size + 1
    return 0


cdef uint32_t peer_from(peers_t *t, const address_t *a, bint *known) noexcept nogil:
    """The number of a sender; 0 when it has none.  ``known`` says whether it had one before."""
    cdef uint32_t number
    _compat.lock(&t.lock)
    number = find(t, a)
    known[0] = number != 0
    if number == 0:
        if t.policy == STRANGERS_LEARNED:
            number = unused(t)
        if number != 0:
            put(t, number, a)
        else:
            t.strangers[t.n_strangers % STRANGERS] = a[0]
            t.n_strangers += 1
    _compat.unlock(&t.lock)
    return number


cdef bint peer_address(peers_t *t, uint32_t number, address_t *out) noexcept nogil:
    """The address of a number; false when it has none."""
    cdef bint found
    if number == 0 or number > t.size:
        return False
    _compat.lock(&t.lock)
    out[0] = t.addresses[number]
    found = out.family != 0
    _compat.unlock(&t.lock)
    return found


cdef dict POLICIES = {"deliver": STRANGERS_DELIVERED, "drop": STRANGERS_DROPPED,
                      "learn": STRANGERS_LEARNED}


@cython.final
cdef class Peers:
    """Peers(family, size=1024, unknown='deliver')\n--\n

    The peers of a UDP device: a number from 1 on for each address.

    A received mbuf has the number of its sender in ``mbuf.peer``, and an mbuf is sent to the
    address of its number.  0 is the device's ``remote``, or nobody.  The table works as a dict of
    numbers to addresses, each a tuple of host and port: ``peers[3] = ("10.0.0.2", 4789)``.

    ``family`` is that of the socket, ``size`` the highest number, up to 65535.  ``unknown`` says
    what becomes of datagrams from other addresses: "deliver" hands them out with the number 0;
    "learn" gives the address the lowest free number, if there is one; "drop" drops and counts them.
    """

    def __cinit__(self):
        self.table.size = 0

    def __init__(self, int family, size=1024, str unknown="deliver"):
        cdef peers_t *t = &self.table
        cdef uint32_t most, buckets = 2
        if family != AF_INET and family != AF_INET6:
            raise ValueError(f"family must be AF_INET or AF_INET6, got {family}")
        if unknown not in POLICIES:
            raise ValueError(f"unknown must be learn, deliver or drop, got {unknown!r}")
        most = <uint32_t>check_range("peers", size, 1, PEERS_MAX)
        seed = int.from_bytes(os.urandom(8), "little")
        if t.addresses != NULL:
            raise RuntimeError("a table of peers is made once")
        while buckets < 2 * most:
            buckets *= 2
        t.addresses = <address_t *>calloc(most + 1, sizeof(address_t))
        t.buckets = <uint32_t *>calloc(buckets, sizeof(uint32_t))
        if t.addresses == NULL or t.buckets == NULL:
            raise MemoryError("no memory for a table of peers")
        t.mask = buckets - 1
        t.seed = seed
        t.free_hint = 1
        t.policy = POLICIES[unknown]
        t.size = most
        self.family = family

    def __dealloc__(self):
        free(self.table.addresses)
        free(self.table.buckets)

    cdef int parse(self, address, address_t *out) except -1:
        """The address of a tuple of host and port."""
        cdef uint32_t scope = 0
        cdef int64_t number = 0
        cdef bytes packed
        if self.table.size == 0:
            raise RuntimeError("the table of peers was never initialised")
        try:
            host, port = address[:2]
        except (TypeError, ValueError):
            raise TypeError(f"an address is a tuple of host and port, got {address!r}") from None
        if not isinstance(host, str) or not isinstance(port, int) or isinstance(port, bool):
            raise TypeError(f"an address is a tuple of host and port, got {address!r}")
        try:
            number = port
        except OverflowError:
            pass
        if number < 1 or number > 65535:
            raise ValueError(f"a port is a number from 1 to 65535, got {port}")
        try:
            ip = ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"a host is an IPv4 or IPv6 address, got {host!r}") from None
        memset(out, 0, sizeof(address_t))
        if self.family == AF_INET:
            if ip.version != 4:
                raise ValueError(f"the socket is of IPv4, and {host} is not")
            packed = ip.packed
            memcpy(&out.flow, <const char *>packed, 4)
        else:
            packed = ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed
            memcpy(out.host, <const char *>packed, 16)
            zone = getattr(ip, "scope_id", None)
            if zone is not None:
                scope = int(zone) if zone.isdecimal() else _socket.if_nametoindex(zone)
            out.scope = scope
        out.family = <uint16_t>self.family
        out.port = <uint16_t>(number >> 8 | (number & 255) << 8)
        return 0

    cdef tuple text(self, const address_t *a):
        cdef int port = (a.port >> 8) | (a.port & 255) << 8
        if a.family == AF_INET:
            return str(ipaddress.IPv4Address((<const char *>&a.flow)[:4])), port
        ip = ipaddress.IPv6Address((<const char *>a.host)[:16])
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped), port
        return (f"{ip}%{a.scope}" if a.scope else str(ip)), port

    cdef uint32_t checked(self, number) except 0:
        """A number of the table; KeyError for any other."""
        cdef int64_t n = 0
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"the number of a peer is an int, got {type(number).__name__}")
        try:
            n = number
        except OverflowError:
            pass
        if n < 1 or n > <int64_t>self.table.size:   # its own comparisons may lie
            raise KeyError(number)
        return <uint32_t>n

    @property
    def size(self):
        """The highest number."""
        return self.table.size

    def add(self, address):
        """The number of ``address``, a tuple of host and port: the one it has, or the lowest free
        one.  OSError (ENOSPC) when none is free."""
        cdef address_t a
        cdef peers_t *t = &self.table
        cdef uint32_t number
        self.parse(address, &a)
        _compat.lock(&t.lock)
        number = find(t, &a)
        if number == 0:
            number = unused(t)
            if number != 0:
                put(t, number, &a)
        _compat.unlock(&t.lock)
        if number == 0:
            raise OSError(28, f"the table of peers is full: it has {t.size}")
        return number

    def find(self, address):
        """The number of ``address``, or None."""
        cdef address_t a
        cdef uint32_t number
        self.parse(address, &a)
        _compat.lock(&self.table.lock)
        number = find(&self.table, &a)
        _compat.unlock(&self.table.lock)
        return number if number != 0 else None

    def __setitem__(self, number, address):
        """From now on the number is that of ``address``; if another number had it, that one is
        free."""
        cdef address_t a
        cdef peers_t *t = &self.table
        cdef uint32_t n = self.checked(number), other
        self.parse(address, &a)
        _compat.lock(&t.lock)
        other = find(t, &a)
        if other != n:
            if other != 0:
                drop(t, other)
            put(t, n, &a)
        _compat.unlock(&t.lock)

    def __getitem__(self, number):
        cdef address_t a
        cdef uint32_t n = self.checked(number)
        if not peer_address(&self.table, n, &a):
            raise KeyError(number)
        return self.text(&a)

    def __delitem__(self, number):
        cdef peers_t *t = &self.table
        cdef uint32_t n = self.checked(number)
        cdef bint there
        _compat.lock(&t.lock)
        there = t.addresses[n].family != 0
        if there:
            drop(t, n)
        _compat.unlock(&t.lock)
        if not there:
            raise KeyError(number)

    def __contains__(self, number):
        cdef address_t a
        try:
            return peer_address(&self.table, self.checked(number), &a)
        except (KeyError, TypeError):
            return False

    def __len__(self):
        return self.table.n

    def __iter__(self):
        return iter([number for number in range(1, self.table.size + 1) if number in self])

    def items(self):
        """Pairs of number and address, at present."""
        found = []
        for number in self:
            try:
                found.append((number, self[number]))
            except KeyError:            # removed meanwhile
                pass
        return found

    def unknown(self):
        """The last senders that had no number, up to 16, the latest last."""
        cdef address_t seen[STRANGERS]
        cdef uint32_t n, i
        cdef peers_t *t = &self.table
        _compat.lock(&t.lock)
        n = t.n_strangers
        memcpy(seen, t.strangers, sizeof(seen))
        _compat.unlock(&t.lock)
        return [self.text(&seen[i % STRANGERS]) for i in range(n - min(n, <uint32_t>STRANGERS), n)]

    def __repr__(self):
        return f"<Peers {len(self)} of {self.table.size}>"
