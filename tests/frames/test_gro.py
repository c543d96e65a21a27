# SPDX-License-Identifier: BSD-3-Clause
"""Software receive coalescing over bytes: its rules as data, and that nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trains import (
    ACK,
    CWR,
    DF,
    DSTOPTS,
    ECE,
    FIN,
    HOP,
    MF,
    PSH,
    RST,
    SYN,
    TCP,
    TIMESTAMP,
    UDP,
    URG,
    V6,
    F,
    checksum,
    flow_of,
    ones_sum,
    random_train,
    regular,
)

from rtap import offload
from rtap.offload import VnetHdr

# ---- an independent splitter


def split(header: VnetHdr, frame: bytes) -> list[bytes]:
    """The frames that a super-frame replaces, each with its checksum."""
    if header.gso_type == 0:
        return [frame]
    assert header.flags == 1
    l4, start = header.csum_start, 14
    while frame[start - 2 : start] in (b"\x81\x00", b"\x88\xa8"):
        start += 4
    version = frame[start] >> 4
    tcp = header.gso_type != 5
    end = l4 + ((frame[l4 + 12] >> 4) * 4 if tcp else 8)
    assert header.hdr_len == end
    assert header.csum_offset == (16 if tcp else 6)
    assert header.gso_type == (5 if not tcp else 1 if version == 4 else 4)
    assert len(frame) - end > header.gso_size
    out = []
    pieces = range(end, len(frame), header.gso_size)
    for n, at in enumerate(pieces):
        payload = frame[at : at + header.gso_size]
        head = bytearray(frame[:end])
        length = end - l4 + len(payload)
        if version == 4:
            head[start + 2 : start + 4] = (l4 - start + length).to_bytes(2, "big")
            ident = int.from_bytes(frame[start + 4 : start + 6], "big") + n
            head[start + 4 : start + 6] = (ident & 0xFFFF).to_bytes(2, "big")
            head[start + 10 : start + 12] = b"\0\0"
            total = checksum(bytes(head[start:l4]))
            head[start + 10 : start + 12] = total.to_bytes(2, "big")
            addresses = frame[start + 12 : start + 20]
        else:
            head[start + 4 : start + 6] = (l4 - start - 40 + length).to_bytes(2, "big")
            addresses = frame[start + 8 : start + 40]
        if tcp:
            seq = int.from_bytes(frame[l4 + 4 : l4 + 8], "big") + n * header.gso_size
            head[l4 + 4 : l4 + 8] = (seq & 0xFFFFFFFF).to_bytes(4, "big")
            if at != pieces[-1]:
                head[l4 + 13] &= ~(FIN | PSH) & 0xFF
        else:
            head[l4 + 4 : l4 + 6] = length.to_bytes(2, "big")
        at = l4 + header.csum_offset
        head[at : at + 2] = b"\0\0"
        pseudo = addresses + bytes([0, 0, 0, TCP if tcp else UDP]) + length.to_bytes(4, "big")
        total = checksum(pseudo + bytes(head[l4:]) + payload)
        head[at : at + 2] = (total or (0 if tcp else 0xFFFF)).to_bytes(2, "big")
        out.append(bytes(head) + payload)
    return out


def seed_is_right(header: VnetHdr, frame: bytes) -> bool:
    """Whether the checksum field holds the pseudo-header's sum."""
    start = 14
    while frame[start - 2 : start] in (b"\x81\x00", b"\x88\xa8"):
        start += 4
    addresses = frame[start + 12 : start + 20]
    if frame[start] >> 4 == 6:
        addresses = frame[start + 8 : start + 40]
    protocol = UDP if header.gso_type == 5 else TCP
    length = len(frame) - header.csum_start
    at = header.csum_start + header.csum_offset
    seed = ones_sum(addresses + bytes([0, 0, 0, protocol]) + length.to_bytes(4, "big"))
    return int.from_bytes(frame[at : at + 2], "big") == seed


def per_flow(frames: Sequence[bytes]) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for frame in frames:
        found.setdefault(flow_of(frame), []).append(frame)
    return found


def sizes(results: Sequence[tuple[VnetHdr, bytes]]) -> list[int]:
    """How many frames each result replaces."""
    return [len(split(header, frame)) for header, frame in results]


# ---- nothing is lost


@given(st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_splitting_gives_the_frames_back(r: random.Random, udp: bool, tags: bool) -> None:
    """split(coalesce(x)) == x for each flow, whatever the traffic."""
    frames = random_train(r, tags=tags).bytes()
    results = offload.coalesce(frames, udp)
    again = [piece for header, frame in results for piece in split(header, frame)]
    assert per_flow(again) == per_flow(frames)
    for header, frame in results:
        if header.gso_type:
            assert seed_is_right(header, frame)


@given(st.lists(st.binary(max_size=120), max_size=20), st.booleans(), st.booleans())
def test_anything_passes(frames: list[bytes], udp: bool, l2: bool) -> None:
    """Bytes that are not frames come out unchanged and in order."""
    assert [frame for _, frame in offload.coalesce(frames, udp, l2=l2)] == frames


@given(st.randoms(use_true_random=False), st.data())
def test_damaged_frames(r: random.Random, data: st.DataObject) -> None:
    """Frames are truncated or changed anywhere; those that cannot merge come out unchanged."""
    frames = random_train(r, longest=8).bytes()
    for _ in range(data.draw(st.integers(1, 6))):
        n = r.randrange(len(frames))
        if r.random() < 0.5:
            frames[n] = frames[n][: r.randrange(len(frames[n]) + 1)]
        elif frames[n]:
            at = r.randrange(min(len(frames[n]), 80))
            frames[n] = frames[n][:at] + bytes([r.randrange(256)]) + frames[n][at + 1 :]
    results = offload.coalesce(frames, udp=True)
    again = [piece for header, frame in results for piece in split(header, frame)]
    assert sorted(again) == sorted(frames)


# ---- published cases: Linux tools/testing/selftests/drivers/net/gro.c


def run(size: int, count: int, first: F | None = None, **changes: Any) -> list[F]:
    return list(regular(replace(first or F(), **changes), [size] * count, random.Random(size)))


def with_(frames: list[F], at: int, **changes: Any) -> list[F]:
    return [*frames[:at], replace(frames[at], **changes), *frames[at + 1 :]]


A4, A6 = F(options=b""), F(**V6)
BOTH = pytest.mark.parametrize("first", [A4, A6], ids=["ipv4", "ipv6"])

#: name: (frames made from a first one, how many frames each result replaces)
SELFTESTS: dict[str, Any] = {
    "data_same": (lambda f: run(100, 2, f), [2]),
    "data_lrg_sml": (lambda f: [*run(100, 1, f), *run(40, 1, f, seq=100, ident=1)], [2]),
    "data_sml_lrg": (lambda f: [*run(40, 1, f), *run(100, 1, f, seq=40, ident=1)], [1, 1]),
    "data_burst": (lambda f: run(1000, 8, f), [8]),
    "ack": (lambda f: run(0, 3, f), [1, 1, 1]),
    "flags_psh": (lambda f: with_(run(100, 5, f), 2, flags=ACK | PSH), [3, 2]),
    "flags_syn": (lambda f: with_(run(100, 5, f), 2, flags=ACK | SYN), [2, 1, 2]),
    "flags_rst": (lambda f: with_(run(100, 5, f), 2, flags=ACK | RST), [2, 1, 2]),
    "flags_urg": (lambda f: with_(run(100, 5, f), 2, flags=ACK | URG), [2, 1, 2]),
    "flags_cwr": (lambda f: with_(run(100, 5, f), 2, flags=ACK | CWR), [2, 1, 2]),
    "tcp_csum": (lambda f: with_(run(100, 2, f), 1, bad_l4=True), [1, 1]),
    "tcp_seq": (lambda f: with_(run(100, 2, f), 1, seq=101), [1, 1]),
    "tcp_ts": (
        lambda f: with_(run(100, 5, f, options=TIMESTAMP), 3, options=TIMESTAMP[:-1] + rb"\x09"),
        [3, 1, 1],
    ),
    "tcp_opt": (
        lambda f: [*run(100, 2, f), *run(100, 2, f, seq=200, ident=2, options=TIMESTAMP)],
        [2, 2],
    ),
    "ip_ecn": (lambda f: with_(run(100, 2, f), 1, tos=3), [1, 1]),
    "ip_tos": (lambda f: with_(run(100, 2, f), 1, tos=0x10), [1, 1]),
    "ip_ttl": (lambda f: with_(run(100, 2, f), 1, ttl=63), [1, 1]),
    "fin": (lambda f: with_(run(100, 2, f), 0, flags=ACK | FIN), [1, 1]),
    "fin_last": (lambda f: with_(run(100, 2, f), 1, flags=ACK | FIN), [2]),
    "single": (lambda f: run(100, 1, f), [1]),
}
SELFTESTS_V4: dict[str, Any] = {
    "ip_csum": (with_(run(100, 2), 1, bad_l3=True), [1, 1]),
    "ip_opt": (with_(run(100, 3), 1, ip_options=b"\1\1\1\1"), [1, 1, 1]),
    "ip_frag4": (with_(run(100, 2), 1, frag=MF), [1, 1]),
    "ip_id_df1_inc": (run(100, 3), [3]),
    "ip_id_df1_fixed": ([replace(f, ident=5) for f in run(100, 3)], [1, 1, 1]),
    "ip_id_df0_inc": (run(100, 3, frag=0), [3]),
    "ip_id_df0_fixed": ([replace(f, ident=5) for f in run(100, 3, frag=0)], [1, 1, 1]),
    "ip_id_df1_inc_fixed": (with_(run(100, 3), 2, ident=1), [2, 1]),
    "ip_df": (with_(run(100, 2), 1, frag=0), [1, 1]),
}
PAD = b"\1\4" + bytes(4)
SELFTESTS_V6: dict[str, Any] = {
    "ip_frag6": (with_(run(100, 2, A6), 1, extensions=((44, b"\0\1" + bytes(4)),)), [1, 1]),
    "ip_v6ext_same": (run(100, 2, A6, extensions=((HOP, PAD),)), [2]),
    "ip_v6ext_diff": (
        with_(
            run(100, 2, A6, extensions=((HOP, PAD),)), 1, extensions=((HOP, b"\1\4" + b"\1" * 4),)
        ),
        [1, 1],
    ),
    "ip_v6ext_kind": (
        with_(run(100, 2, A6, extensions=((HOP, PAD),)), 1, extensions=((DSTOPTS, PAD),)),
        [1, 1],
    ),
}


@BOTH
@pytest.mark.parametrize("name", SELFTESTS)
def test_kernel_selftest_cases(first: F, name: str) -> None:
    make, expected = SELFTESTS[name]
    assert sizes(offload.coalesce([f.build() for f in make(first)])) == expected


@pytest.mark.parametrize("name", [*SELFTESTS_V4, *SELFTESTS_V6])
def test_kernel_selftest_cases_of_one_version(name: str) -> None:
    frames, expected = (SELFTESTS_V4 | SELFTESTS_V6)[name]
    assert sizes(offload.coalesce([f.build() for f in frames])) == expected


@BOTH
@pytest.mark.parametrize("rest", [0, 1, 100])
def test_kernel_selftest_large(first: F, rest: int) -> None:
    """Frames fill the longest IP packet, and a remainder does not fit."""
    mss = 1448
    head = 40 if first.version == 4 else 60
    fits = (65535 - head) // mss
    left = 65535 - head - fits * mss
    frames = [*run(mss, fits, first), *run(left + rest, 1, first, seq=fits * mss, ident=fits)]
    results = offload.coalesce([f.build() for f in frames])
    assert sizes(results) == ([fits + 1] if rest == 0 else [fits, 1])
    assert len(results[0][1]) == 14 + (65535 if rest == 0 else head + fits * mss)


# ---- published cases: wireguard-go tun/offload_linux_test.go (handleGRO), on IP packets

PEER = b"\x0a\x00\x00\x03"


def wg(**changes: Any) -> F:
    return replace(F(frag=DF), payload=bytes(100), **changes)


WIREGUARD: dict[str, tuple[list[F], list[int]]] = {
    "multiple flows": (
        [
            wg(seq=1),
            wg(proto=UDP),
            wg(proto=UDP, dst=PEER),
            wg(seq=101, ident=1),
            wg(seq=201, ident=2, dst=PEER),
            wg(seq=1, **V6),
            wg(seq=101, **V6),
            wg(seq=201, **{**V6, "dst": V6["src"]}),
            wg(proto=UDP, ident=1),
        ],
        [2, 2, 1, 1, 2, 1],
    ),
    "PSH interleaved": (
        [
            wg(seq=1),
            wg(seq=101, ident=1, flags=ACK | PSH),
            wg(seq=201, ident=2),
            wg(seq=301, ident=3),
            wg(seq=1, **V6),
            wg(seq=101, flags=ACK | PSH, **V6),
            wg(seq=201, **V6),
            wg(seq=301, **V6),
        ],
        [2, 2, 2, 2],
    ),
    "coalesceItemInvalidCSum": (
        [
            wg(seq=1, bad_l4=True),
            wg(seq=101, ident=1),
            wg(seq=201, ident=2),
            wg(proto=UDP, bad_l4=True),
            wg(proto=UDP, ident=1),
            wg(proto=UDP, ident=2),
        ],
        [1, 2, 1, 2],
    ),
    "out of order": ([wg(seq=101, ident=1), wg(seq=1), wg(seq=201, ident=2)], [1, 1, 1]),
    "unequal TTL": ([wg(seq=1), wg(seq=101, ident=1, ttl=65)], [1, 1]),
    "unequal ToS": ([wg(seq=1), wg(seq=101, ident=1, tos=1)], [1, 1]),
    "unequal flags more fragments set": ([wg(seq=1), wg(seq=101, ident=1, frag=MF)], [1, 1]),
    "unequal flags DF set": ([wg(seq=1, frag=0), wg(seq=101, ident=1)], [1, 1]),
    "ipv6 unequal hop limit": ([wg(seq=1, **V6), wg(seq=101, ttl=65, **V6)], [1, 1]),
    "ipv6 unequal traffic class": ([wg(seq=1, **V6), wg(seq=101, tos=1, **V6)], [1, 1]),
}


@pytest.mark.parametrize("name", WIREGUARD)
def test_wireguard_cases(name: str) -> None:
    frames, expected = WIREGUARD[name]
    for skip in (0, 14):
        results = offload.coalesce([f.build()[skip:] for f in frames], udp=True, l2=not skip)
        assert [
            -(-(len(frame) - header.hdr_len) // header.gso_size) if header.gso_type else 1
            for header, frame in results
        ] == expected


# ---- the header of a result


def test_headers_of_results() -> None:
    frames = [f.build() for f in [*run(100, 3), *run(0, 1, seq=300, ident=3)]]
    bad = replace(F(), sport=9, payload=b"x", bad_l4=True).build()
    merged, ack, wrong = offload.coalesce([*frames, bad])
    assert merged[0] == VnetHdr(1, 1, 54, 100, 34, 16)
    assert ack == (VnetHdr(flags=2), frames[3])
    assert wrong == (VnetHdr(), bad)
    assert ECE  # the kernel's ECN type is for CWR, which never merges
    together = [replace(f, flags=ACK | ECE).build() for f in run(100, 3)]
    assert offload.coalesce(together)[0][0].gso_type == 1


def test_udp_is_opt_in() -> None:
    frames = [f.build() for f in run(100, 3, proto=UDP)]
    assert sizes(offload.coalesce(frames)) == [1, 1, 1]
    assert [header for header, _ in offload.coalesce(frames)] == [VnetHdr()] * 3
    ((header, frame),) = offload.coalesce(frames, udp=True)
    assert header == VnetHdr(1, 5, 42, 100, 34, 6)
    assert len(frame) == 42 + 300


def test_results_in_order_of_first_frames() -> None:
    a, b = run(10, 3), run(10, 3, sport=7)
    frames = [f.build() for f in (a[0], b[0], b[1], a[1], b[2], a[2])]
    results = offload.coalesce(frames)
    assert [flow_of(frame) for _, frame in results] == [flow_of(frames[0]), flow_of(frames[1])]


def test_limits_of_arguments() -> None:
    frames = [f.build() for f in run(100, 8)]
    assert sizes(offload.coalesce(frames, max_length=576)) == [5, 3]
    for length in (575, 65536):
        with pytest.raises(ValueError, match="max_length must be 576"):
            offload.coalesce(frames, max_length=length)
    with pytest.raises(ValueError, match=r"frame 0 has 131073 bytes"):
        offload.coalesce([bytes((1 << 17) + 1)])
    with pytest.raises(TypeError):
        offload.coalesce(["no bytes"])  # type: ignore[list-item]
    assert offload.coalesce([]) == []
    assert offload.coalesce(iter(frames[:1])) == [(VnetHdr(flags=2), frames[0])]


def test_vnet_hdr() -> None:
    header = VnetHdr(1, 4, 74, 1440, 54, 16)
    assert header.pack() == bytes.fromhex("01044a00a00536001000")
    assert VnetHdr.unpack(header.pack() + b"frame") == header
    assert VnetHdr().pack() == bytes(10)
    with pytest.raises(ValueError, match="10 bytes, got 9"):
        VnetHdr.unpack(bytes(9))
    with pytest.raises(ValueError, match="out of range"):
        VnetHdr(gso_size=65536).pack()
