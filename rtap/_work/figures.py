# SPDX-License-Identifier: BSD-3-Clause
"""Figures of workers, of their routes, and of the stages and targets of these."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RouteStats", "StageStats", "TargetStats", "WorkerStats"]


@dataclass(frozen=True)
class TargetStats:
    """One target of a route.

    `packets` and `bytes` were sent. `drops` are frames that it did not take, or that were in hand
    when the route ended. `retries` are bursts that were tried again.

    `target` names the transmit queue by the interface's present name, which each network
    namespace may have once. `device` is the device's name, unique in the process, `port` its
    number, as in `Mbuf.port`, and `queue` the queue's number.
    """

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
    """One stage of a route.

    `packets` and `bytes` came to it, `drops` are frames that it dropped. If it splits, `split` says
    how many more frames left it than came; if it merges, `merged` says how many fewer. `cycles` is
    its time by the processor's time-stamp counter. `stage` is the stage's `name`.
    """

    stage: str
    packets: int
    bytes: int
    drops: int
    split: int
    merged: int
    cycles: int

    @property
    def name(self) -> str:
        """The same as `stage`."""
        return self.stage


@dataclass(frozen=True)
class RouteStats:
    """One route's totals since the worker was last started, in frames.

    `rx_packets` and `rx_bytes` were received; `targets` has a :class:`TargetStats` for each target,
    `stages` a :class:`StageStats` for each stage. Every frame received was sent, is in hand, or is
    in the drops of a target or a stage, if no stage splits or merges.

    `cycles` is the processor's time-stamp counter over bursts that moved frames. `idle` is True
    while the queue is empty and the worker leaves it out of its passes. `error` names the queue
    or the stage that ended the route and says why; for a Python stage it has the exception. It is
    empty while the route runs and after a normal end. `source` is the receive queue; `device`,
    `port` and `queue` identify it as in :class:`TargetStats`.
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
        """Frames sent, on all targets."""
        return sum(target.packets for target in self.targets)

    @property
    def tx_bytes(self) -> int:
        """Bytes sent, on all targets."""
        return sum(target.bytes for target in self.targets)

    @property
    def drops(self) -> int:
        """Frames that targets did not take; stages count their own drops."""
        return sum(target.drops for target in self.targets)

    @property
    def retries(self) -> int:
        """Bursts that were tried again, on all targets."""
        return sum(target.retries for target in self.targets)


@dataclass(frozen=True)
class WorkerStats:
    """A worker's totals over its `routes`."""

    routes: list[RouteStats] = field(default_factory=list)

    @property
    def rx_packets(self) -> int:
        """Frames received, on all routes."""
        return sum(route.rx_packets for route in self.routes)

    @property
    def tx_packets(self) -> int:
        """Frames sent, on all routes."""
        return sum(route.tx_packets for route in self.routes)

    @property
    def drops(self) -> int:
        """Frames that targets did not take, on all routes, without those that stages dropped."""
        return sum(route.drops for route in self.routes)
