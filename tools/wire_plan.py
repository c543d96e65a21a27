# SPDX-License-Identifier: BSD-3-Clause
"""What one run of the wire fuzzer does, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields
from typing import Any

from rtap import RxOffload, TxOffload

LRO = RxOffload.CHECKSUM | RxOffload.TCP_LRO | RxOffload.UDP_LRO
TSO = TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM | TxOffload.TCP_TSO | TxOffload.UDP_TSO
EVENTS = ("", "", "", "carrier", "admin", "restart", "queue", "close", "worker")


@dataclass
class Plan:
    """All choices of one run."""

    seed: int
    r: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        r = self.r = random.Random(self.seed)
        self.mode = r.choice(["tap", "tap", "tun"])
        self.engine = r.choice(["uring", "syscall"])
        self.mtu = r.choice([1500, 1500, 576, 9000, 24000])
        self.queues = r.choice([1, 1, 2, 4])
        self.worker = r.random() < 0.7
        self.hostile = r.choice([0.0, 0.3, 0.7])
        self.vnet = r.random() < 0.5  # the packet sockets send virtio-net headers
        self.paced = r.random() < 0.8
        self.event = r.choice(EVENTS)
        self.targets = r.choice([1, 1, 2, 3])
        self.back = r.random() < 0.3
        self.on_full = r.choice(["drop", "retry"])
        self.wait = r.choice(["poll", "sleep", "adaptive"])
        self.burst = r.choice([1, 8, 64, 256])
        self.narrow = r.random() < 0.1  # frames that the targets send leave slowly
        self.untouched = r.random() < 0.4  # no stage and no request changes a byte
        self.asked = not self.worker and not self.untouched  # rtap sends frames of its own
        self.filtered = r.choice([0, 0, 0, 1, 2]) if self.mode == "tap" else 0
        self.a, self.b = self.device(), self.device()

    def device(self) -> dict[str, Any]:
        r = self.r
        rx = r.choice([RxOffload(0), RxOffload(0), RxOffload.CHECKSUM, LRO, LRO])
        options: dict[str, Any] = {"rx_gso": r.random() < 0.25 and not rx & LRO}
        options["tx_gro"] = r.random() < 0.3
        room = 2048
        if r.random() < 0.3:
            rx |= RxOffload.SCATTER
            room = r.choice([600, 2048, 5000])
            options["data_room"] = room
        longest = 66000 if rx & LRO == LRO else self.mtu + 30
        least = -(-longest // room) if rx & RxOffload.SCATTER else 1
        few = r.choice([least + 2, 3 * least, 8 * least, 64 * least])  # stages hold up to two
        options["nb_mbufs"] = r.choice([None, None, max(few, 3)])
        options["rx_offloads"] = rx
        options["tx_offloads"] = r.choice([TxOffload(0), TSO, TSO | TxOffload.VLAN_INSERT])
        options["nb_desc"] = r.choice([1, 8, 64, 64, 512])
        options["sndbuf"] = r.choice([None, None, None, 20_000])
        options["txqueuelen"] = r.choice([1000, 1000, 10_000, 20])
        return options

    def __str__(self) -> str:
        known = {f.name for f in fields(self)}
        words = []
        for name, value in sorted(vars(self).items()):
            if name not in known:
                words.append(f"{name}={value}")
        return ", ".join(words)
