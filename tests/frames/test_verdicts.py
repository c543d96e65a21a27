# SPDX-License-Identifier: BSD-3-Clause
"""The checksums of all frames from the segmentation tests, checked by scapy and Wireshark."""

from __future__ import annotations

from collections.abc import Iterator

from frames import CASES
from oracle import PARTIAL_FRAMES, SUPER_FRAMES, Maker
from verdicts import BAD, GOOD, scapy_disagrees, tshark, wrong

from rtap import offload

#: scapy is slow, so it gets only the first, the second and the last of this many frames.
FOR_SCAPY = 500


def split() -> Iterator[list[bytes]]:
    maker = Maker(20)
    for _ in range(SUPER_FRAMES):
        question = maker.super_frame()
        yield offload.segment(question.frame, question.hdr)


def finished() -> Iterator[bytes]:
    maker = Maker(21)
    for _ in range(PARTIAL_FRAMES):
        question = maker.partial_frame()
        yield offload.complete(question.frame, question.hdr)


def test_segments_in_wireshark() -> None:
    found = tshark(piece for pieces in split() for piece in pieces)
    assert wrong(found) == {}
    assert found.total() > 10 * SUPER_FRAMES
    assert min(found.values()) > SUPER_FRAMES


def test_finished_checksums_in_wireshark() -> None:
    found = tshark(finished())
    assert wrong(found) == {}
    assert found.total() == PARTIAL_FRAMES


def test_filled_frames_in_wireshark() -> None:
    plain = [case for case in CASES.values() if not case.headers.outer_l2_len]
    filled = [case for case in plain if case.headers.l4_len and case.status]
    found = tshark(offload.fill(case.frame) for case in filled)
    assert wrong(found) == {}


def test_wireshark_sees_a_wrong_checksum() -> None:
    right = CASES["tcp"].frame
    assert tshark([right, right[:-1] + b"?"]) == {(GOOD, GOOD, ""): 1, (GOOD, BAD, ""): 1}


def test_segments_in_scapy() -> None:
    for _, pieces in zip(range(FOR_SCAPY), split(), strict=False):
        for piece in {pieces[0], pieces[1], pieces[-1]}:
            assert scapy_disagrees(piece) == []


def test_finished_checksums_in_scapy() -> None:
    for _, frame in zip(range(FOR_SCAPY), finished(), strict=False):
        assert scapy_disagrees(frame) == []


def test_scapy_sees_a_wrong_checksum() -> None:
    for name in ("tcp", "udp6", "segment routing"):
        right = CASES[name].frame
        assert scapy_disagrees(right) == []
        assert scapy_disagrees(right[:-1] + b"?") != []
