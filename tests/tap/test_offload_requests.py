# SPDX-License-Identifier: BSD-3-Clause
"""Checksum and segmentation requests in shared frames, and requests that do not fit.

Results are compared with scapy's frames, as in test_offload_tx.py. Refused frames are counted, and
the rest is sent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs import TX_L4, TX_SEG, Shape, iproute, label, write_in
from scapy.layers.inet import IP
from support import PacketSocket, pattern, settle
from tx_rigs import OFFLOADS, SHAPES, Rig, counters, made, rigs, txq_counters

import rtap
from rtap import Burst, Mbuf, MbufFlag, Mempool, NetNS


@pytest.fixture(scope="module", params=rigs(True, False))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Each engine, with virtio-net headers and without."""
    yield from made(request.param)


# ---- shared frames


def mbuf_state(mbuf: Mbuf) -> tuple[object, ...]:
    lengths = (mbuf.pkt_len, mbuf.l2_len, mbuf.l3_len, mbuf.l4_len, mbuf.tso_segsz)
    return bytes(mbuf), mbuf.ol_flags, mbuf.refcnt, *lengths


@pytest.mark.parametrize("data_room", [4096, 333])
@pytest.mark.parametrize("shape", [Shape(4), Shape(6, "udp"), Shape(4, "udp", 1)], ids=label)
def test_a_shared_original_is_left_alone(rig: Rig, shape: Shape, data_room: int) -> None:
    payload = pattern(5, 1400)
    padded = shape.unfinished(payload) + b"\xa5" * 5
    for segsz in (0, 1000):
        wanted = shape.segments(payload, segsz or len(payload))
        with Mempool(64, data_room) as pool:
            mbuf = shape.request(pool.alloc(padded), segsz)
            state = mbuf_state(mbuf)
            for copies in (1, 2):
                assert rig.dev.tx_burst(0, Burst([mbuf] * copies)) == copies
                assert rig.bridge.arriving(len(wanted) * copies) == wanted * copies
                assert mbuf_state(mbuf) == state
            clone = mbuf.clone()
            assert rig.dev.tx_burst(0, Burst([clone])) == 1
            del clone
            assert rig.bridge.arriving(len(wanted)) == wanted
            assert mbuf_state(mbuf) == state
            del mbuf
            assert settle(pool) == 0


def test_flooded_to_a_device_with_and_one_without_headers(rig: Rig) -> None:
    """One mbuf in the bursts of two devices, with an unfinished checksum."""
    shape = Shape()
    frame = shape.unfinished(b"flood")
    with (
        rtap.open("flood", netns=rig.bridge.ns, tx_offloads=0 if rig.header else OFFLOADS) as other,
        PacketSocket(rig.bridge.ns, "flood", 0x0003) as seen,
    ):
        assert other.info().vnet_hdr is not rig.header
        mbuf = shape.request(rig.dev.pool.alloc(frame))
        mine, theirs = Burst([mbuf]), Burst([mbuf])
        assert other.tx_burst(0, theirs) == rig.dev.tx_burst(0, mine) == 1
        assert bytes(mbuf) == frame
        assert rig.bridge.arriving(1) == [shape.finished(b"flood")]
        (got,) = seen.frames(1)
        if rig.header:  # the other one has none, so software finishes the checksum
            assert got == shape.finished(b"flood")
        else:  # a packet socket sees the checksum unfinished
            assert got[:34] == shape.finished(b"flood")[:34]
            assert got[-5:] == b"flood"


def test_a_shared_frame_waits_when_there_is_no_mbuf_for_its_copy(rig: Rig) -> None:
    shape = Shape()
    with Mempool(2, 4096) as pool:
        mbuf = shape.request(pool.alloc(shape.unfinished(b"one")))
        other = pool.alloc(b"in the way")
        burst = Burst([mbuf])
        sent, errors, _ = counters(rig.dev)
        assert rig.dev.tx_burst(0, burst) == 0
        assert len(burst) == 1
        assert counters(rig.dev)[:2] == (sent, errors)
        assert txq_counters(rig.dev)["full"] > 0
        del other
        assert rig.dev.tx_burst(0, burst) == 1
        assert rig.bridge.arriving(1) == [shape.finished(b"one")]
        assert bytes(mbuf) == shape.unfinished(b"one")
        del burst, mbuf
        assert settle(pool) == 0


def test_a_frame_sent_alone_needs_no_second_mbuf(rig: Rig) -> None:
    shape = Shape()
    with Mempool(1, 4096) as pool:
        for _ in range(3):
            burst = pool.alloc_burst(1, [shape.unfinished(b"one")])
            shape.request(burst[0])
            assert rig.dev.tx_burst(0, burst) == 1
            assert rig.bridge.arriving(1) == [shape.finished(b"one")]


# ---- requests that do not fit their frame


def edit(offset: int, value: bytes) -> Callable[[Mbuf], None]:
    def change(mbuf: Mbuf) -> None:
        mbuf[offset : offset + len(value)] = value

    return change


def assign(**fields: int) -> Callable[[Mbuf], None]:
    def change(mbuf: Mbuf) -> None:
        for name, value in fields.items():
            setattr(mbuf, name, value)

    return change


V4 = MbufFlag.TX_IPV4
WRONG: dict[str, tuple[Shape, Callable[[Mbuf], None]]] = {
    "no lengths": (Shape(), assign(l2_len=0, l3_len=0)),
    "no l2_len": (Shape(), assign(l2_len=0)),
    "l2_len one short": (Shape(), assign(l2_len=13)),
    "l2_len past the end": (Shape(), assign(l2_len=120)),
    "l2_len at its limit": (Shape(), assign(l2_len=65535)),
    "tag forgotten": (Shape(vlans=1), assign(l2_len=14)),
    "no l3_len": (Shape(), assign(l3_len=0)),
    "l3_len below a header": (Shape(), assign(l3_len=16)),
    "l3_len and ihl differ": (Shape(), assign(l3_len=24)),
    "options forgotten": (Shape(l3_options=True), assign(l3_len=20)),
    "l3_len past the end": (Shape(), assign(l3_len=200)),
    "l3_len at its limit": (Shape(), assign(l3_len=65535)),
    "v6: l3_len of v4": (Shape(6), assign(l3_len=20)),
    "v6: no l3_len": (Shape(6), assign(l3_len=0)),
    "v6: l3_len past the payload": (Shape(6), assign(l3_len=40 + 32 + 60)),
    "neither IPv4 nor IPv6": (Shape(), edit(14, b"\x55")),
    "ihl below a header": (Shape(), edit(14, b"\x44")),
    "ihl above l3_len": (Shape(), edit(14, b"\x4f")),
    "IP length below its header": (Shape(), edit(16, b"\0\x13")),
    "IP length without room for TCP": (Shape(), edit(16, b"\0\x27")),
    "IP length past the frame": (Shape(), edit(16, b"\x05\0")),
    "IP length at its limit": (Shape(), edit(16, b"\xff\xff")),
    "v6: length past the frame": (Shape(6), edit(18, b"\x05\0")),
    "v6: length of zero": (Shape(6), edit(18, b"\0\0")),
    "udp: length without room for UDP": (Shape(4, "udp"), edit(16, b"\0\x1b")),
    "tcp: data offset below a header": (Shape(), edit(46, b"\x40")),
    "tcp: data offset of zero": (Shape(), edit(46, b"\x00")),
    "tcp: data offset past the payload": (Shape(proto="tcp"), edit(46, b"\xf0")),
    "fragment": (Shape(), edit(20, b"\x20\x00")),
    "later fragment": (Shape(), edit(20, b"\x00\x10")),
    "another protocol": (Shape(), edit(23, b"\x11")),
    "udp: another protocol": (Shape(4, "udp"), edit(23, b"\x06")),
    "v6: another protocol": (Shape(6), edit(20, b"\x11")),
    "v6: fragment": (Shape(6, l3_options=True), edit(20, b"\x2c")),
    "v6: options forgotten": (Shape(6, l3_options=True), assign(l3_len=40)),
    "sctp": (Shape(), assign(ol_flags=MbufFlag.TX_SCTP_CKSUM | V4)),
    "two transports": (Shape(), assign(ol_flags=TX_L4["tcp"] | TX_SEG["udp"] | V4, tso_segsz=2)),
    "two segmentations": (
        Shape(),
        assign(ol_flags=TX_SEG["tcp"] | TX_SEG["udp"] | V4, tso_segsz=2),
    ),
    "segments of nothing": (Shape(), assign(ol_flags=TX_SEG["tcp"] | V4, tso_segsz=0)),
    "udp: segments of nothing": (Shape(4, "udp"), assign(ol_flags=TX_SEG["udp"] | V4, tso_segsz=0)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_request_that_does_not_fit_is_refused_and_counted(rig: Rig, case: str) -> None:
    """The others of its burst are sent, in order."""
    shape, spoil = WRONG[case]
    pool = rig.dev.pool
    payload = b"payload" if "data offset past" not in case else b""
    bad = shape.request(pool.alloc(shape.unfinished(payload)))
    spoil(bad)
    first = shape.request(pool.alloc(shape.unfinished(b"first")))
    last = shape.request(pool.alloc(shape.unfinished(b"last!")))
    sent, errors, refused = counters(rig.dev)
    burst = Burst([first, bad, last])
    del first, bad, last
    assert rig.dev.tx_burst(0, burst) == 3
    assert len(burst) == 0
    assert counters(rig.dev) == (sent + 2, errors + 1, refused + 1)
    assert rig.bridge.arriving(2) == [shape.finished(b"first"), shape.finished(b"last!")]
    assert rig.bridge.nothing_arrives()
    assert settle(pool) == 0


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        (Shape(4, "tcp"), True),
        (Shape(4, "udp", 2), True),
        (Shape(6, "udp"), True),
        (Shape(6, "udp", 1), False),
        (Shape(6, "tcp"), False),
        (Shape(4, "tcp", 2, True), False),
    ],
    ids=label,
)
def test_headers_have_to_be_in_the_first_segment(rig: Rig, shape: Shape, fits: bool) -> None:
    """The first segment must hold them up to the end of the transport header's fixed part."""
    with Mempool(64, 64) as pool:
        sent, errors, refused = counters(rig.dev)
        mbuf = shape.request(pool.alloc(shape.unfinished(b"x" * 100)))
        assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
        assert counters(rig.dev) == (sent + fits, errors + (not fits), refused + (not fits))
        if fits:
            assert rig.bridge.arriving(1) == [shape.finished(b"x" * 100)]
        del mbuf
    assert rig.bridge.nothing_arrives()


def test_a_burst_of_refused_frames(rig: Rig) -> None:
    pool = rig.dev.pool
    sent, errors, refused = counters(rig.dev)
    burst = pool.alloc_burst(100, [Shape().unfinished(b"x")] * 100)
    burst.ol_flags = int(TX_L4["tcp"])
    assert rig.dev.tx_burst(0, burst) == 100
    assert counters(rig.dev) == (sent, errors + 100, refused + 100)
    del burst
    assert settle(pool) == 0
    assert rig.bridge.nothing_arrives()


def test_flags_that_ask_for_nothing(rig: Rig) -> None:
    """TX_IPV4 and the like only describe a frame."""
    frame = Shape().unfinished(b"abc")
    mbuf = rig.dev.pool.alloc(frame)
    mbuf.ol_flags = MbufFlag.TX_IPV4 | MbufFlag.TX_OUTER_IPV4 | MbufFlag.RX_VLAN
    assert rig.dev.tx_burst(0, Burst([mbuf])) == 1
    assert rig.bridge.arriving(1) == [frame]


# ---- TUN


@pytest.mark.parametrize("header", [True, False])
def test_requests_on_a_tun_device(netns: NetNS, engine: str, header: bool) -> None:
    """The kernel routes between two TUN devices and finishes the checksums as requested."""
    with (
        rtap.open(
            "u0", netns=netns, mode="tun", engine=engine, tx_offloads=OFFLOADS if header else 0
        ) as a,
        rtap.open("u1", netns=netns, mode="tun") as b,
    ):
        write_in(netns, "/proc/sys/net/ipv4/ip_forward", "1")
        write_in(netns, "/proc/sys/net/ipv4/conf/all/rp_filter", "0")
        write_in(netns, "/proc/sys/net/ipv4/conf/u0/rp_filter", "0")
        iproute(netns, "addr add 10.0.0.254/32 dev u0")
        iproute(netns, "route add 10.0.0.2/32 dev u1")
        for proto in ("tcp", "udp"):
            shape = Shape(4, proto)
            for payload, segsz in ((b"x", 0), (pattern(1, 1000), 0), (pattern(1, 2500), 1000)):
                packet = shape.unfinished(payload)[14:]
                mbuf = shape.request(a.pool.alloc(packet), segsz)
                mbuf.l2_len = 0
                assert a.tx_burst(0, Burst([mbuf])) == 1
                wanted = shape.segments(payload, segsz or 65535)
                for segment in wanted:
                    forwarded = IP(segment[14:])
                    forwarded.ttl -= 1
                    del forwarded.chksum
                    assert b.recv(5) == bytes(forwarded)


# ---- anything at all


@functools.cache
def template(number: int, n: int) -> bytes:
    """An unfinished frame of that shape with ``n`` bytes of payload; cached, as scapy is slow."""
    return SHAPES[number].unfinished(bytes(n))[: -n or None]


# Broadcast: an example may make the bridge expect the receiver elsewhere.
MARK = b"\xff" * 6 + Shape().finished(b"mark")[6:]


@pytest.mark.fuzz
@pytest.mark.parametrize("rig", [("uring", True), ("syscall", False)], indirect=True)
@given(data=st.data())
def test_any_request_is_sent_or_counted(rig: Rig, data: st.DataObject) -> None:
    """Whatever the lengths and flags say, nothing is lost, nothing breaks, and the rest is sent."""
    number = data.draw(st.integers(0, len(SHAPES) - 1))
    shape = SHAPES[number]
    payload = data.draw(st.binary(max_size=100))
    raw = bytearray(template(number, len(payload)) + payload)
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(14, len(raw)))]
    lengths = st.one_of(st.integers(0, 70), st.integers(0, 65535))
    sent, errors, _ = counters(rig.dev)
    with Mempool(16, data.draw(st.sampled_from((64, 65, 100, 2048)))) as pool:
        mbuf = pool.alloc(raw)
        shape.request(mbuf)
        mbuf.ol_flags = data.draw(st.one_of(st.just(mbuf.ol_flags), st.integers(0, 2**64 - 1)))
        if data.draw(st.booleans()):
            mbuf.l2_len = data.draw(lengths)
        if data.draw(st.booleans()):
            mbuf.l3_len = data.draw(lengths)
        mbuf.tso_segsz = data.draw(lengths)
        held = mbuf.clone() if data.draw(st.booleans()) else None
        burst = Burst([mbuf])
        del mbuf
        assert rig.dev.tx_burst(0, burst) == 1
        now_sent, now_errors, _ = counters(rig.dev)
        assert now_sent + now_errors == sent + errors + 1
        if held is not None:
            assert bytes(held) == bytes(raw)
        del held, burst
        assert pool.in_use == 0
    assert rig.dev.send(MARK)
    while (got := rig.bridge.b.recv(5)) != MARK:
        assert got is not None
