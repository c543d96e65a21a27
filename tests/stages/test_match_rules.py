# SPDX-License-Identifier: BSD-3-Clause
"""Match's own limits: how far it parses, and what it does when a header is missing."""

from __future__ import annotations

from functools import reduce
from operator import truediv
from typing import Any

from frames import DESTINATION
from odd_frames import ETHER, HEADLESS, LONG, QUERY, V4, V6
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, PadN
from scapy.layers.l2 import Dot1Q
from scapy.packet import Packet

from rtap import Mempool
from rtap.stages import Match


def times(n: int, layer: Packet) -> Packet:
    return reduce(truediv, [layer] * n)


def matched(frames: list[bytes], segment: int = 2048, **rule: Any) -> list[bool]:
    """The frames that a rule takes, in segments of that length."""
    pool = Mempool(1024, segment)
    verdicts = Match(**rule, action=1)(pool.alloc_burst(len(frames), frames), 2)
    return [verdict == 1 for verdict in verdicts]


def test_without_a_whole_ip_header_nothing_matches() -> None:
    assert not any(matched(HEADLESS))


def test_tags_that_are_looked_behind() -> None:
    """Match looks behind eight tags."""
    frames = [bytes(ETHER / times(n, Dot1Q(vlan=1)) / V4 / QUERY) for n in range(1, 11)]
    assert matched(frames, destination_port=53) == [True] * 8 + [False] * 2


def test_extension_headers_that_are_looked_behind() -> None:
    """Match looks behind sixteen extension headers."""
    frames = [bytes(ETHER / V6 / times(n, DESTINATION) / QUERY) for n in range(1, 19)]
    assert matched(frames, destination_port=53) == [True] * 16 + [False] * 2
    assert matched(frames, source="fd09::/64") == [True] * 18


def test_headers_in_several_segments() -> None:
    """Over several segments, Match reads up to the 256th byte; in one segment, up to its end."""
    frames = [bytes(ETHER / V6 / times(n, DESTINATION) / QUERY / LONG) for n in range(1, 17)]
    frames.append(bytes(ETHER / V6 / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(190))]) / QUERY))
    assert matched(frames, destination_port=53) == [True] * 17
    assert matched(frames, 80, destination_port=53) == [True] * 16 + [False]
    assert matched(frames, 80, source="fd09::/64") == [True] * 17
