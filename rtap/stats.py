# SPDX-License-Identifier: BSD-3-Clause
"""Figures of a worker and its routes."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RouteStats", "WorkerStats"]


@dataclass(frozen=True)
class RouteStats:
    """One route's totals since the worker was last started, in frames.

    `drops` are frames the target did not take and frames in hand when the route ended, `retries`
    bursts that were tried again. `error` is empty while the route runs and after a normal end.
    """

    source: str
    target: str
    rx_packets: int
    tx_packets: int
    drops: int
    retries: int
    error: str


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
