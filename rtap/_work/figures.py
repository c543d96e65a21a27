# SPDX-License-Identifier: BSD-3-Clause
"""Figures of workers, of their routes, and of the stages and targets of these."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RouteStats", "StageStats", "TargetStats", "WorkerStats"]


@dataclass(frozen=True)
class TargetStats:
    """One target of a route: frames and bytes sent, frames it did not take or that were in hand
    when the route ended (`drops`), bursts that were tried again (`retries`).

    `target` says which transmit queue it is with the interface's present name, of which each
    network namespace may have one. `device` is the device's name, unique in the process, `port` its
    number, as `Mbuf.port`, and `queue` the queue's."""

    target: str
    packets: int
    bytes: int
    drops: int
    retries: int
    device: str = ""
    port: int = -1
    queue: int = -1


@dataclass(frozen=True)
class StageStats:
    """One stage of a route: frames and bytes that came to it, frames it dropped, how many more
    there were where it split some (`split`) and how many fewer where it merged some (`merged`), and
    what it took of the processor's time-stamp counter. `stage` is the stage's `name`."""

    stage: str
    packets: int
    bytes: int
    drops: int
    split: int
    merged: int
    cycles: int

    @property
    def name(self) -> str:
        return self.stage


@dataclass(frozen=True)
class RouteStats:
    """One route's totals since the worker was last started, in frames.

    `cycles` is the processor's time-stamp counter over bursts that moved frames. `idle` while the
    queue has nothing and waits out of the pass. `error` names the queue or the stage that ended the
    route and says why, a Python stage's with what it raised; empty while it runs and after a normal
    end. `source`, `device`, `port` and `queue` are as in :class:`TargetStats`. Every frame received
    is sent, in hand, or in the drops of a target or a stage, if none of these splits or merges.
    """

    source: str
    rx_packets: int
    rx_bytes: int
    cycles: int
    idle: bool
    error: str
    targets: list[TargetStats]
    stages: list[StageStats]
    device: str = ""
    port: int = -1
    queue: int = -1

    @property
    def target(self) -> str:
        """All targets, in words."""
        return ", ".join(target.target for target in self.targets)

    @property
    def tx_packets(self) -> int:
        return sum(target.packets for target in self.targets)

    @property
    def tx_bytes(self) -> int:
        return sum(target.bytes for target in self.targets)

    @property
    def drops(self) -> int:
        """Frames that targets did not take; what stages drop is counted there."""
        return sum(target.drops for target in self.targets)

    @property
    def retries(self) -> int:
        return sum(target.retries for target in self.targets)


@dataclass(frozen=True)
class WorkerStats:
    """A worker's totals over its `routes`."""

    routes: list[RouteStats] = field(default_factory=list)

    @property
    def rx_packets(self) -> int:
        return sum(route.rx_packets for route in self.routes)

    @property
    def tx_packets(self) -> int:
        return sum(route.tx_packets for route in self.routes)

    @property
    def drops(self) -> int:
        return sum(route.drops for route in self.routes)
