# SPDX-License-Identifier: BSD-3-Clause
"""Segmentation and finished checksums, compared byte for byte with the kernel's."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

import pytest
from oracle import PARTIAL_FRAMES, SUPER_FRAMES, Maker, Oracle, Super, ones_sum, oracle
from patience import fewer
from support import skip_without_devices
from this_kernel import no_uso

from rtap import offload

pytestmark = pytest.mark.root

ZERO_SUMS = fewer(1000)
#: Older kernels take no super-frames of UDP from a TAP.
UDP_TOO = not no_uso()


@pytest.fixture(scope="module")
def kernel() -> Iterator[Oracle]:
    skip_without_devices()
    with oracle() as rig:
        yield rig


def differences(mine: list[bytes], theirs: list[bytes]) -> str:
    if len(mine) != len(theirs):
        return f"{len(mine)} frames, the kernel makes {len(theirs)}"
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if len(a) != len(b):
            return f"frame {i}: {len(a)} bytes, the kernel's has {len(b)}"
        if a != b:
            where = [n for n in range(len(a)) if a[n] != b[n]]
            return f"frame {i} differs from the kernel's at {where[:20]}"
    return ""


def compare(kernel: Oracle, question: Super, mine: list[bytes]) -> None:
    difference = differences(mine, kernel.ask(question, len(mine)))
    assert not difference, f"{question.about}: {difference}\n{question.frame.hex()}"


def test_super_frames(kernel: Oracle) -> None:
    """Both IP versions, TCP and UDP, tags, options, extension headers, every flag, odd sizes."""
    maker = Maker(20, udp=UDP_TOO)
    seen: Counter[str] = Counter()
    for _ in range(SUPER_FRAMES):
        question = maker.super_frame()
        mine = offload.segment(question.frame, kernel.as_taken(question.hdr))
        compare(kernel, question, mine)
        seen[question.about[:18]] += 1
        seen["frames"] += len(mine)
    assert len(seen) == (5 if UDP_TOO else 3)
    assert min(seen.values()) > SUPER_FRAMES / 10
    assert seen["frames"] > (9 if UDP_TOO else 7) * SUPER_FRAMES


def test_partial_checksums(kernel: Oracle) -> None:
    maker = Maker(21)
    for _ in range(PARTIAL_FRAMES):
        question = maker.partial_frame()
        compare(kernel, question, [offload.complete(question.frame, question.hdr)])


def with_sum_of_zero(frame: bytes, word: int, checksum: int) -> bytes:
    """The frame with the 16-bit word at an even offset set so that `checksum` becomes 0."""
    value = ones_sum(frame[word : word + 2] + struct.pack("!H", checksum))
    return frame[:word] + struct.pack("!H", value) + frame[word + 2 :]


def test_sums_of_zero(kernel: Oracle) -> None:
    """UDP writes 0xffff, since 0 means "none"; for TCP only skb_checksum_help does so."""
    maker = Maker(22, udp=UDP_TOO)
    fields: Counter[tuple[str, int, bytes]] = Counter()
    for _ in range(ZERO_SUMS):
        whole = maker.super_frame()
        udp = whole.hdr.csum_offset == 6
        start = whole.hdr.csum_start
        at = start + whole.hdr.csum_offset
        taken = kernel.as_taken(whole.hdr)
        first = offload.segment(whole.frame, taken)[0]
        (checksum,) = struct.unpack_from("!H", first, at)
        word = start + (8 if udp else (whole.frame[start + 12] >> 4) * 4)
        if taken.gso_size > 1:
            frame = with_sum_of_zero(whole.frame, word, checksum)
            mine = offload.segment(frame, taken)
            compare(kernel, Super(frame, whole.hdr, whole.about), mine)
            fields["split", udp, mine[0][at : at + 2]] += 1

        part = maker.partial_frame()
        udp = part.hdr.csum_offset == 6
        at = part.hdr.csum_start + part.hdr.csum_offset
        (checksum,) = struct.unpack_from("!H", offload.complete(part.frame, part.hdr), at)
        frame = with_sum_of_zero(part.frame, part.hdr.csum_start, checksum)
        mine = [offload.complete(frame, part.hdr)]
        compare(kernel, Super(frame, part.hdr, part.about), mine)
        fields["finished", udp, mine[0][at : at + 2]] += 1
    assert set(fields) == {
        ("split", False, b"\0\0"),
        *([("split", True, b"\xff\xff")] if UDP_TOO else []),
        ("finished", False, b"\xff\xff"),
        ("finished", True, b"\xff\xff"),
    }


def test_the_rig_sees_a_difference(kernel: Oracle) -> None:
    question = Maker(23, udp=UDP_TOO).super_frame()
    mine = offload.segment(question.frame, kernel.as_taken(question.hdr))
    wrong = [*mine[:-1], mine[-1][:-1] + bytes([mine[-1][-1] ^ 1])]
    with pytest.raises(AssertionError, match="differs from the kernel's"):
        compare(kernel, question, wrong)
