# SPDX-License-Identifier: BSD-3-Clause
"""Millions of numbered frames of many flows, and a check of their order.

Flow n has two streams, 2 n and 2 n + 1, one for each direction. At :data:`RECORD`, a frame has the
number of its stream, its own number in the stream, and the complement of that. So the checksums
are those of the template, whatever the number is.
"""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from typing import Any

import numpy as np
from trains import TCP, UDP, V6, F

from rtap import Burst, Mempool

#: Behind the longest headers, and even, as the checksums need it.
RECORD = 84
SIZES = (96, 128, 300, 1000)
SHARES = (0.5, 0.3, 0.15, 0.05)
#: Offset of the source address's last byte, where a hop marks which way a frame came.
MARK = 11

Numbers = np.ndarray[Any, np.dtype[np.int64]]


def _ends(flow: int, chance: random.Random) -> F:
    """One direction of a flow; some flows differ only in a port, some in everything."""
    host, peer = flow // 3, chance.randrange(4)
    proto, port = chance.choice((TCP, UDP)), chance.choice((53, 443))
    tags = chance.choice(((), (), ((0x8100, 7),), ((0x88A8, 7), (0x8100, 8))))
    f = F(proto=proto, sport=20000 + flow, dport=port, tags=tags)
    if chance.random() < 0.5:
        return replace(f, src=bytes((10, 1, host >> 8, host & 0xFF)), dst=bytes((10, 9, 0, peer)))
    net: bytes = V6["src"][:14]
    return replace(f, **{**V6, "src": net + struct.pack("!H", host), "dst": net + bytes((9, peer))})


def _back(f: F) -> F:
    there = (f.src_mac, f.dst_mac, f.src, f.dst, f.sport, f.dport)
    names = ("dst_mac", "src_mac", "dst", "src", "dport", "sport")
    back: dict[str, Any] = dict(zip(names, there, strict=True))
    return replace(f, **back)


def _template(f: F, stream: int, size: int) -> bytes:
    record = struct.pack("!III", stream, 0, 0xFFFFFFFF)
    body = bytes(RECORD - len(f.build())) + record + bytes(size - RECORD - len(record))
    return replace(f, payload=body).build()


class Streams:
    """``total`` frames of that many flows, in random order and of random lengths."""

    def __init__(self, flows: int, total: int, seed: int = 1) -> None:
        chance = random.Random(seed)
        ends = [_ends(n, chance) for n in range(flows)]
        both = [f for there in ends for f in (there, _back(there))]
        self.n = len(both)
        self.total = total
        self._templates = [
            np.array([list(_template(f, k, size)) for k, f in enumerate(both)], np.uint8)
            for size in SIZES
        ]
        draw = np.random.default_rng(seed)
        self.stream = draw.integers(0, self.n, total, np.uint16)
        self._size = draw.choice(len(SIZES), total, p=SHARES).astype(np.uint8)
        #: The number of frames of each stream.
        self.counts = np.bincount(self.stream, minlength=self.n)
        starts = np.cumsum(self.counts) - self.counts
        order = np.argsort(self.stream, kind="stable")
        self.number = np.empty(total, np.uint32)
        self.number[order] = np.arange(total) - starts[self.stream[order]]

    def burst(self, pool: Mempool, start: int, end: int) -> Burst:
        """The frames from ``start`` up to ``end``."""
        sizes = self._size[start:end]
        burst, places = Burst(), []
        for size, templates in enumerate(self._templates):
            (place,) = np.nonzero(sizes == size)
            frames = templates[self.stream[start:end][place]]
            number = self.number[start:end][place]
            for at, value in ((RECORD + 4, number), (RECORD + 8, ~number)):
                frames[:, at : at + 4] = value.astype(">u4").view(np.uint8).reshape(-1, 4)
            burst.extend(pool.alloc_burst(len(place), data=frames))
            places.append(place)
        return burst.select(np.argsort(np.concatenate(places)))


class Arrivals:
    """Stream, number and mark of each frame, in order of arrival."""

    def __init__(self) -> None:
        self.n = 0
        self._records: list[np.ndarray[Any, Any]] = []
        self._marks: list[np.ndarray[Any, Any]] = []

    def take(self, burst: Burst) -> None:
        self.n += len(burst)
        self._records.append(np.asarray(burst.gather(RECORD, 12)))
        self._marks.append(np.asarray(burst.gather(MARK, 1)))

    def arrays(self) -> tuple[Numbers, Numbers, Numbers]:
        records = np.concatenate(self._records).view(">u4").astype(np.int64)
        assert np.all(records[:, 1] + records[:, 2] == 0xFFFFFFFF), "a frame has changed"
        return records[:, 0], records[:, 1], np.concatenate(self._marks)[:, 0].astype(np.int64)


def faults(streams: Streams, stream: Numbers, number: Numbers, mark: Numbers) -> list[str]:
    """What is wrong with the order of arrival; missing frames are not a fault.

    When there are no faults, the number of missing frames is the number sent less those arrived.
    """
    strange = (stream >= streams.n) | (number >= streams.counts[stream % streams.n])
    order = np.argsort(stream, kind="stable")
    stream, number, mark = stream[order], number[order], mark[order]
    same = stream[1:] == stream[:-1]
    flow = stream // 2
    found = {
        "never sent": strange,
        "overtaken": same & (number[1:] < number[:-1]),
        "twice": same & (number[1:] == number[:-1]),
        "on another target": (flow[1:] == flow[:-1]) & (mark[1:] != mark[:-1]),
    }
    return [f"{what}: {np.count_nonzero(where)}" for what, where in found.items() if where.any()]
