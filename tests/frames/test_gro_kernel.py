# SPDX-License-Identifier: BSD-3-Clause
"""Software receive coalescing against the kernel's own GRO, byte for byte.

Known differences have names (docs/offload.md has the reasons). Each is a predicate that selects
frames, and the rest of a train must come out the same.
"""

from __future__ import annotations

import random
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from gro_kernel import UDP_TOO, KernelGro, kernel_gro
from patience import SLOW
from support import skip_without_devices
from this_kernel import kernel as kernel_version
from this_kernel import skip_without_uso
from trains import (
    ACK,
    CWR,
    DF,
    DSTOPTS,
    ECE,
    FRAGMENT,
    MF,
    PSH,
    RESERVED,
    TCP,
    TIMESTAMP,
    UDP,
    V6,
    F,
    Train,
    flow_of,
    ones_sum,
    random_train,
    regular,
)

from rtap._frames.coalesce import coalesce_bytes

pytestmark = pytest.mark.root

#: (NEEDS_CSUM, gso_type, gso_size, csum_start, csum_offset) and the frame.
Result = tuple[tuple[int, int, int, int, int], bytes]

TRAINS = 2400
BATCHES = 8


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelGro]:
    skip_without_devices()
    with kernel_gro() as rig:
        yield rig


def by_flow(results: Sequence[Result]) -> dict[bytes, list[Result]]:
    found: dict[bytes, list[Result]] = defaultdict(list)
    for result in results:
        found[flow_of(result[1])].append(result)
    return found


def of_kernel(results: list[tuple[bytes, bytes]]) -> list[Result]:
    out: list[Result] = []
    for header, frame in results:
        flags, gso_type, _, size, start, offset = struct.unpack("<BBHHHH", header)
        assert flags in (0, 1, 2)
        # hdr_len is the kernel's hint: the whole linear part.
        out.append(((flags & 1, gso_type, size, start, offset), frame))
    return out


def unfinished(frame: bytes) -> Result:
    """An untagged TCP frame over IPv4 with an unfinished checksum."""
    tcp = frame[34:]
    seed = ones_sum(frame[26:34] + struct.pack("!HH", TCP, len(tcp)))
    return (1, 0, 0, 34, 16), frame[:50] + seed.to_bytes(2, "big") + frame[52:]


def ours(frames: list[bytes]) -> list[Result]:
    """rtap's result with fixed IDs allowed, as in the kernel.

    TCP super-frames with fixed IDs are split again: a virtio-net header cannot express them, and
    the kernel hands over their frames one by one.
    """
    out: list[Result] = []
    waiting = by_flow([((0, 0, 0, 0, 0), frame) for frame in frames])
    for (flags, gso_type, hdr_len, size, start, offset), frame in coalesce_bytes(
        frames, udp=True, fixed_id=True
    ):
        count = -(-(len(frame) - hdr_len) // size) if gso_type else 1
        queue = waiting[flow_of(frame)]
        parts, queue[:] = queue[:count], queue[count:]
        if count == 1:
            assert [frame] == [part[1] for part in parts]
            out.append(((0, 0, 0, 0, 0), frame))
        elif gso_type == 1 and parts[0][1][18:20] == parts[1][1][18:20]:
            out += [unfinished(part) for _, part in parts]
        else:
            assert flags == 1
            assert hdr_len == start + (8 if gso_type == 5 else (frame[start + 12] >> 4) * 4)
            out.append(((flags, gso_type, size, start, offset), frame))
    assert not any(waiting.values())
    return out


# ---- differences

#: Frames that the kernel passes on at once, ahead of those it holds of their flow. rtap passes on
#: the held ones first, so that no frame overtakes another of its flow.
OVERTAKES: dict[str, Callable[[F], bool]] = {
    "bad L4 checksum": lambda f: f.bad_l4,
    "bad IP checksum": lambda f: f.bad_l3,
    "IPv4 options": lambda f: bool(f.ip_options),
    "IPv4 fragment": lambda f: f.version == 4 and f.frag & 0x3FFF != 0,
    "IPv6 fragment": lambda f: any(kind == FRAGMENT for kind, _ in f.extensions),
    "padded datagram": lambda f: f.proto == UDP and bool(f.padding),
    "empty datagram": lambda f: f.proto == UDP and not f.payload,
    "UDP without checksum": lambda f: f.proto == UDP and f.no_checksum,
    "UDP length": lambda f: f.proto == UDP and f.ulen is not None,
}


def rules(train: Train) -> dict[int, str]:
    """The named rule for each frame of a train to which one applies."""
    return {
        n: name
        for n, f in enumerate(train.frames)
        for name, speaks_of in OVERTAKES.items()
        if speaks_of(f)
    } | {
        # For the kernel these are a separate flow beside the one with the same ports.
        n: "other extension headers"
        for n, name in train.odd.items()
        if name == "extension"
    }


def difference(train: Train, kernel_made: list[Result]) -> str:
    """How the kernel's result differs from rtap's beyond the named rules; "" if not at all."""
    frames = train.bytes()
    ruled = rules(train)
    apart = Counter(frames[n] for n in ruled)
    rest = [frame for n, frame in enumerate(frames) if n not in ruled]
    alone = Counter(frame for head, frame in kernel_made if head[1] == 0)
    if apart - alone:
        return f"not passed on alone: {[ruled[n] for n in ruled]}"
    kept = []
    for result in reversed(kernel_made):  # the last one counts if a frame occurs twice
        if result[0][1] == 0 and apart[result[1]]:
            apart[result[1]] -= 1
        else:
            kept.append(result)
    kept.reverse()
    expected, got = by_flow(ours(rest)), by_flow(kept)
    for flow in {*expected, *got}:
        if expected[flow] != got[flow]:
            lengths = [[len(frame) for _, frame in side[flow]] for side in (expected, got)]
            return f"{flow.hex()}: rtap {lengths[0]}, kernel {lengths[1]}, odd {train.odd}"
    return ""


def agrees(kernel: KernelGro, train: Train) -> str:
    """As ``difference``, but the kernel gets another try: its clock may have ticked in between."""
    frames = train.bytes()
    found = ""
    for _ in range(60):
        found = difference(train, of_kernel(kernel.coalesce(frames)))
        if not found:
            break
    return found


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_trains(kernel: KernelGro, batch: int) -> None:
    merged = supers = 0
    for number in range(batch, TRAINS, BATCHES):
        train = random_train(random.Random(number), udp=UDP_TOO)
        if kernel_version() < (6, 15) and "CWR" in train.odd.values():
            continue  # an older kernel merges what follows a frame with CWR into it
        if kernel_version() < (6, 1) and "ttl" in train.odd.values():
            continue  # in 5.10 a frame with another TTL is a flow of its own, and overtakes others
        if kernel_version() >= (7, 0) and list(train.odd.values()).count("CWR") > 1:
            continue  # a newer one merges these with each other, as in test_cwr
        assert agrees(kernel, train) == "", f"train {number}"
        for head, _ in ours(train.bytes()):
            supers += head[1] != 0
        merged += len(train.frames)
    assert supers > 300
    assert merged > 3000


def test_the_rules_are_met(kernel: KernelGro) -> None:
    """Each named difference occurs in the trains; otherwise it would not be needed."""
    seen: Counter[str] = Counter()
    for number in range(TRAINS):
        seen.update(rules(random_train(random.Random(number), udp=UDP_TOO)).values())
    of_udp = {name for name in OVERTAKES if "UDP" in name or "datagram" in name}
    wanted = {*OVERTAKES, "other extension headers"}
    assert set(seen) == (wanted if UDP_TOO else wanted - of_udp)


# ---- each named difference, alone


def train_of(first: F, count: int = 6, size: int = 100) -> list[F]:
    return list(regular(first, [size] * count, random.Random(count)))


def lengths(results: Sequence[Result]) -> list[int]:
    return [len(frame) for _, frame in results]


def settled(kernel: KernelGro, frames: list[bytes], expected: list[int]) -> bool:
    """Whether the kernel's result has those lengths; retries in case its clock ticks."""
    return any(lengths(of_kernel(kernel.coalesce(frames))) == expected for _ in range(60))


def plain(frames: list[bytes]) -> list[int]:
    return [len(frame) for _, frame in coalesce_bytes(frames, udp=True)]


DUP = {  # the overtaking frame uses no sequence number, so the flow could go on
    "bad L4 checksum": {"bad_l4": True},
    "bad IP checksum": {"bad_l3": True},
    "IPv4 options": {"ip_options": b"\1\1\1\1"},
    "IPv4 fragment": {"frag": MF},
}


@pytest.mark.parametrize("name", DUP)
def test_what_overtakes_in_the_kernel(kernel: KernelGro, name: str) -> None:
    good = train_of(F())
    odd = replace(good[3], **DUP[name])
    frames = [f.build() for f in [*good[:3], odd, *good[3:]]]
    alone = len(frames[3])
    assert settled(kernel, frames, [alone, 54 + 600])
    assert plain(frames) == [54 + 300, alone, 54 + 300]


def test_other_extension_headers(kernel: KernelGro) -> None:
    good = train_of(F(**V6))
    odd = replace(good[3], extensions=((DSTOPTS, b"\1\4" + bytes(4)),))
    frames = [f.build() for f in [*good[:3], odd, *good[3:]]]
    assert settled(kernel, frames, [74 + 600, 74 + 8 + 100])
    assert plain(frames) == [74 + 300, 74 + 8 + 100, 74 + 300]


def test_urgent_pointer_without_urg(kernel: KernelGro) -> None:
    """The kernel clears a pointer without meaning; rtap leaves frames as they are."""
    good = train_of(F())
    frames = [f.build() for f in [*good[:3], replace(good[3], urgent=5), *good[4:]]]
    assert settled(kernel, frames, [54 + 600])
    assert plain(frames) == [54 + 300, 54 + 100, 54 + 200]


def test_fixed_ids(kernel: KernelGro) -> None:
    """rtap merges them on request.

    The kernel merges TCP, and splits it again for a virtio-net header. It merges UDP, and counts
    the ID up when it splits that.
    """
    for proto, alone, kernel_makes in ((TCP, 154, [154] * 6), (UDP, 142, [42 + 600])):
        if proto == UDP and not UDP_TOO:
            continue
        frames = [replace(f, ident=77).build() for f in train_of(F(proto=proto))]
        assert settled(kernel, frames, kernel_makes)
        assert plain(frames) == [alone] * 6
        ((_, frame),) = coalesce_bytes(frames, udp=True, fixed_id=True)
        assert len(frame) == alone + 500


def test_cwr(kernel: KernelGro) -> None:
    """The kernel merges frames that all have CWR (AccECN), and splits them again for a TAP."""
    frames = [replace(f, flags=ACK | CWR | ECE).build() for f in train_of(F())]
    assert settled(kernel, frames, [154] * 6)
    assert plain(frames) == [154] * 6


def test_reserved_bit_of_the_ipv4_header(kernel: KernelGro) -> None:
    """Neither the kernel nor rtap merges frames that all have it."""
    train = Train(train_of(F(frag=DF | RESERVED)))
    assert agrees(kernel, train) == ""
    assert plain(train.bytes()) == [154] * 6


def skip_if_udp(first: F) -> None:
    if first.proto == UDP:
        skip_without_uso()


@pytest.mark.parametrize("first", [F(), F(**V6), F(proto=UDP), F(proto=UDP, **V6)])
def test_vlan_tags(kernel: KernelGro, first: F) -> None:
    """Tagged frames merge like untagged ones, even where the kernel has no 8021q."""
    skip_if_udp(first)
    tagged = [replace(f, tags=((0x88A8, 5), (0x8100, 6))).build() for f in train_of(first)]
    untagged = [f.build() for f in train_of(first)]
    (head, frame), *rest = coalesce_bytes(tagged, udp=True)
    ((plain_head, plain_frame),) = coalesce_bytes(untagged, udp=True)
    assert rest == []
    assert frame[:12] + frame[20:] == plain_frame
    assert frame[12:20] == bytes.fromhex("88a8000581000006")
    assert head == (
        *plain_head[:2],
        plain_head[2] + 8,
        plain_head[3],
        plain_head[4] + 8,
        plain_head[5],
    )
    assert any(
        by_flow(of_kernel(kernel.coalesce(untagged)))
        == by_flow([((1, *plain_head[1:2], *plain_head[3:]), plain_frame)])
        for _ in range(60)
    )


# ---- limits


@pytest.mark.parametrize(
    ("first", "size", "count"),
    [
        (F(options=TIMESTAMP), 1448, 47),
        (F(), 1460, 46),
        (F(), 1000, 70),
        (F(), 8948, 9),
        (F(**V6), 1440, 50),
        (F(proto=UDP), 1, 70),
        (F(proto=UDP), 100, 130),
        (F(proto=UDP, **V6), 1400, 50),
        (F(proto=UDP), 1400, 50),
        (F(), 1, 300),
    ],
)
def test_limits(kernel: KernelGro, first: F, size: int, count: int) -> None:
    skip_if_udp(first)
    if SLOW > 1:
        count = min(count, 100)  # a train has to pass within a tick of the kernel's clock
    train = Train(list(regular(first, [size] * count, random.Random(size))))
    assert agrees(kernel, train) == ""


def test_ends_of_a_super_frame(kernel: KernelGro) -> None:
    """Every position of a short frame, PSH or FIN."""
    for proto in (TCP, UDP) if UDP_TOO else (TCP,):
        for at in range(6):
            train = Train(
                list(regular(F(proto=proto), [10] * at + [7] + [10] * (5 - at), random.Random(at)))
            )
            assert agrees(kernel, train) == "", (proto, at)
    for flag in (PSH, 1, PSH | 1):
        for at in range(6):
            train = Train(train_of(F()))
            train.frames[at] = replace(train.frames[at], flags=ACK | flag)
            assert agrees(kernel, train) == "", (flag, at)
