# SPDX-License-Identifier: BSD-3-Clause
"""A bridge for sending with checksum and segmentation requests, and the counters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from rigs import Bridge, Shape, bridged, label
from support import ENGINES, settle, skip_without_devices, skip_without_engine

from rtap import EthDev, TxOffload

OFFLOADS = TxOffload.UDP_CKSUM | TxOffload.TCP_CKSUM | TxOffload.TCP_TSO | TxOffload.UDP_TSO


@dataclass
class Rig:
    bridge: Bridge
    header: bool
    engine: str

    @property
    def dev(self) -> EthDev:
        return self.bridge.a


def rigs(*headers: bool) -> list[Any]:
    return [
        pytest.param((engine, header), id=f"{engine}-{'header' if header else 'plain'}")
        for engine in ENGINES
        for header in headers
    ]


def made(param: tuple[str, bool]) -> Iterator[Rig]:
    """A bridge whose near device has virtio-net headers or none, for a fixture."""
    skip_without_devices()
    engine, header = param
    skip_without_engine(engine)
    offloads = OFFLOADS if header else TxOffload(0)
    with bridged(
        a={"engine": engine, "tx_offloads": offloads, "nb_mbufs": 256, "data_room": 66000},
        b={"engine": "syscall"},
    ) as bridge:
        assert bridge.a.info().vnet_hdr is header
        yield Rig(bridge, header, engine)
        assert settle(bridge.a.pool) == 0


SHAPES = [
    Shape(version, proto, vlans, options)
    for version in (4, 6)
    for proto in ("tcp", "udp")
    for vlans in (0, 1, 2)
    for options in (False, True)
]


shapes = pytest.mark.parametrize("shape", SHAPES, ids=label)


def counters(dev: EthDev) -> tuple[int, int, int]:
    """(opackets, oerrors, refused)"""
    stats = dev.stats()
    return stats.opackets, stats.oerrors, txq_counters(dev)["refused"]


def txq_counters(dev: EthDev) -> dict[str, int]:
    queue: Any = dev.tx_queue(0)
    found: dict[str, int] = queue.counters()
    return found
