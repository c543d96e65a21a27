# SPDX-License-Identifier: BSD-3-Clause
"""Frames for ``Gro`` in bursts: the input, the output, and the expected output."""

from __future__ import annotations

import random

from trains import F, regular

from rtap import Burst, MbufFlag
from rtap.offload import coalesce


def frames_of(first: F, count: int = 6, size: int = 100, *, at: int = 0) -> list[bytes]:
    """``count`` frames of a flow, starting with its frame ``at``."""
    flow = list(regular(first, [size] * (at + count), random.Random(size)))
    return [f.build() for f in flow[at:]]


def sent(burst: Burst) -> list[tuple[int, bytes]]:
    """(segment size, bytes) of each frame."""
    out = []
    for mbuf in burst:
        flags = MbufFlag(mbuf.ol_flags)
        assert bool(flags & MbufFlag.RX_LRO) == (mbuf.tso_segsz > 0)
        if mbuf.tso_segsz:
            assert flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_NONE
        out.append((mbuf.tso_segsz, bytes(mbuf)))
        assert mbuf.pkt_len == len(out[-1][1])
    return out


def expected(frames: list[bytes], udp: bool = True) -> list[tuple[int, bytes]]:
    return [(header.gso_size, frame) for header, frame in coalesce(frames, udp)]
