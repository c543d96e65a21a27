# SPDX-License-Identifier: BSD-3-Clause
"""Drops frames of certain five-tuples, or steers them to a target."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from rtap._core.mbuf cimport check_range
from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport LAYER_ETHERNET, LAYER_IP
from rtap._frames.headers cimport IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP
from rtap._frames.parse cimport HEADERS_MAX, be16, has_ports, headers_of, headers_t, parse_outermost
from rtap.stages._runner cimport DROP as NO_TARGET, rtap_burst
from rtap.stages._stage cimport Stage

from rtap.stages._stage import DROP

cdef enum:
    ANY = 0xffffffff
    KEEP = 0xfffffffe           # a verdict is left as it is


cdef struct network_t:
    uint32_t n                  # bytes of an address; 0 for any
    uint8_t address[16]
    uint8_t mask[16]


cdef struct rule_t:
    bint l2
    uint32_t version            # of IP: 4, 6 or 0 for any
    uint32_t protocol
    network_t source
    network_t destination
    bint ports                  # the rule has ports
    uint16_t source_ports[2]    # the first and the last
    uint16_t destination_ports[2]
    uint32_t action
    uint32_t otherwise

cdef dict PROTOCOLS = {"tcp": IPPROTO_TCP, "udp": IPPROTO_UDP, "icmp": 1, "icmpv6": 58,
                       "sctp": IPPROTO_SCTP}


cdef inline bint within(const network_t *net, const uint8_t *address) noexcept nogil:
    cdef uint32_t i
    for i in range(net.n):
        if address[i] & net.mask[i] != net.address[i]:
            return False
    return True


cdef bint matches(const rule_t *r, const mbuf_t *m) noexcept nogil:
    """Whether a frame matches the rule, by its outermost IP header."""
    cdef uint8_t copy[HEADERS_MAX]
    cdef headers_t h
    cdef uint32_t n, port
    cdef const uint8_t *p = headers_of(m, copy, &n)
    cdef const uint8_t *addresses
    parse_outermost(p, n, m.pkt_len, r.l2, &h)
    if h.version == 0:
        return False
    if r.version != 0 and h.version != r.version:
        return False
    if r.protocol != ANY and h.protocol != r.protocol:
        return False
    if h.version == 4:
        addresses = p + h.l3 + 12
        if not within(&r.source, addresses) or not within(&r.destination, addresses + 4):
            return False
    else:
        addresses = p + h.l3 + 8
        if not within(&r.source, addresses) or not within(&r.destination, addresses + 16):
            return False
    if not r.ports:
        return True
    if not has_ports(&h, n):
        return False
    port = be16(p + h.l4)
    if port < r.source_ports[0] or port > r.source_ports[1]:
        return False
    port = be16(p + h.l4 + 2)
    return r.destination_ports[0] <= port <= r.destination_ports[1]


cdef int match(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef rule_t *r = <rule_t *>ctx
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef uint32_t i, verdict
    for i in range(burst.n):
        verdict = r.action if matches(r, frames[i]) else r.otherwise
        if verdict != KEEP:
            burst.verdict[i] = verdict
    return 0


cdef int set_network(network_t *net, rule_t *r, value, str what) except -1:
    cdef bytes address, mask
    if value is None:
        return 0
    import ipaddress            # takes as long as all stages

    network = ipaddress.ip_network(value)
    if r.version not in (0, network.version):
        raise ValueError(f"source and destination are of different IP versions: {what} {value!r}")
    r.version = network.version
    address = network.network_address.packed
    mask = network.netmask.packed
    net.n = <uint32_t>len(address)
    memcpy(net.address, <const uint8_t *>address, net.n)
    memcpy(net.mask, <const uint8_t *>mask, net.n)
    return 0


cdef int set_ports(uint16_t *ports, rule_t *r, value, str what) except -1:
    ports[0] = 0
    ports[1] = 0xffff
    if value is None:
        return 0
    first, last = value if isinstance(value, tuple) else (value, value)
    ports[0] = check_range(what, first, 0, 0xffff)
    ports[1] = check_range(what, last, 0, 0xffff)
    if ports[0] > ports[1]:
        raise ValueError(f"{what}: {first} is more than {last}")
    r.ports = True
    return 0


cdef uint32_t verdict_of(value, str what) except? 0xfffffffd:
    if value is None:
        return KEEP
    if type(value) is int and value == NO_TARGET:
        return NO_TARGET
    return check_range(what, value, 0, 65534)


cdef inline uint32_t targets_of(uint32_t verdict) noexcept:
    """How many targets a verdict requires."""
    return 0 if verdict == KEEP or verdict == NO_TARGET else verdict + 1


cdef class Match(Stage):
    """Match(protocol=None, *, source=None, destination=None, source_port=None, \
destination_port=None, action=DROP, otherwise=None, l2=True)\n--\n

    Sends frames of certain five-tuples to a target, or drops them.

    protocol:    "tcp", "udp", "icmp", "icmpv6", "sctp" or a number
    source, destination: an IP address or network, as ``ipaddress.ip_network`` takes them
    source_port, destination_port: a number, or (first, last); of TCP, UDP and SCTP. Fragments of a
                 packet do not match: only the first would have ports
    action:      target's index, or ``DROP``, for frames that match all given arguments
    otherwise:   the same for all other frames; None, the default, keeps the choice of
                 earlier stages
    l2:          Ethernet frames (TAP), else IP packets (TUN)

    In a tunnel the outer packet counts. Several Match stages in a route work in turn, and the last
    one that matches decides.
    """

    cdef rule_t rule

    def __init__(self, protocol=None, *, source=None, destination=None, source_port=None,
                 destination_port=None, action=DROP, otherwise=None, bint l2=True):
        cdef rule_t rule
        cdef rule_t *r = &rule
        memset(r, 0, sizeof(rule_t))
        given = protocol
        r.l2 = l2
        if isinstance(protocol, str):
            if protocol not in PROTOCOLS:
                raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)} or a number, "
                                 f"got {protocol!r}")
            protocol = PROTOCOLS[protocol]
        r.protocol = ANY if protocol is None else check_range("protocol", protocol, 0, 255)
        set_network(&r.source, r, source, "source")
        set_network(&r.destination, r, destination, "destination")
        set_ports(r.source_ports, r, source_port, "source_port")
        set_ports(r.destination_ports, r, destination_port, "destination_port")
        if r.ports and r.protocol not in (ANY, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP):
            raise ValueError("source_port and destination_port are of TCP, UDP and SCTP: protocol "
                             f"{given!r} has no ports, and nothing would match")
        r.action = verdict_of(action, "action")
        r.otherwise = verdict_of(otherwise, "otherwise")
        self.once()
        self.rule = rule
        self.targets = max(targets_of(rule.action), targets_of(rule.otherwise))
        self.layer = LAYER_ETHERNET if l2 else LAYER_IP
        self.ctx = &self.rule
        self.fn = match
