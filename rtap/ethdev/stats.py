# SPDX-License-Identifier: BSD-3-Clause
"""Figures of a device's queues."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

from rtap.ethdev.ops import Stats

__all__ = ["queue_stats", "queue_xstats"]


class Counted(Protocol):
    """The part of a queue that has its figures."""

    def counters(self) -> dict[str, int]: ...
    def xcounters(self) -> dict[str, int]: ...


@lru_cache(maxsize=1024)
def _prefixed(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(prefix + name for name in names)


def queue_stats(
    rxqs: Mapping[int, Counted], txqs: Mapping[int, Counted], nb_rx: int, nb_tx: int
) -> Stats:
    """The basic statistics of a device with so many queues; the driver gives `imissed`.

    A queue that is not set up has zeros in the lists, so that these can be indexed.
    """
    stats = Stats(
        q_ipackets=[0] * nb_rx,
        q_ibytes=[0] * nb_rx,
        q_errors=[0] * nb_rx,
        q_opackets=[0] * nb_tx,
        q_obytes=[0] * nb_tx,
    )
    for q, rxq in rxqs.items():
        rx = rxq.counters()
        stats.q_ipackets[q] = rx["packets"]
        stats.q_ibytes[q] = rx["bytes"]
        stats.q_errors[q] = rx["errors"]
        stats.rx_nombuf += rx["nombuf"]
    for q, txq in txqs.items():
        tx = txq.counters()
        stats.q_opackets[q] = tx["packets"]
        stats.q_obytes[q] = tx["bytes"]
        stats.oerrors += tx["errors"]
    stats.ipackets = sum(stats.q_ipackets)
    stats.ibytes = sum(stats.q_ibytes)
    stats.ierrors = sum(stats.q_errors)
    stats.opackets = sum(stats.q_opackets)
    stats.obytes = sum(stats.q_obytes)
    return stats


def queue_xstats(rxqs: Mapping[int, Counted], txqs: Mapping[int, Counted]) -> dict[str, int]:
    """The extended statistics of a device's queues under the C driver's names: all of receive
    queue 0, then of 1, and so on, then the transmit queues (``rx_q0_size_64_packets``, ...)."""
    out: dict[str, int] = {}
    for prefix, queues in (("rx_q", rxqs), ("tx_q", txqs)):
        for number, queue in sorted(queues.items()):
            counts = queue.xcounters()
            names = _prefixed(f"{prefix}{number}_", tuple(counts))
            out.update(zip(names, counts.values(), strict=True))
    return out
