# SPDX-License-Identifier: BSD-3-Clause
"""The output of ``rtap testpmd`` while it forwards: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rtap.cli.display import terminal
from rtap.cli.testpmd.forwarding import Forwarding, difference
from rtap.cli.testpmd.ports import Port
from rtap.ethdev.ops import Stats

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Display", "Lines", "LiveTable", "Rates", "Sampler", "choose"]


@dataclass(frozen=True)
class Rates:
    """Rates of a port, or of one of its queues, per second: packets, bits, dropped frames."""

    rx_pps: float
    rx_bps: float
    tx_pps: float
    tx_bps: float
    drops: float


@dataclass(frozen=True)
class _Look:
    at: float
    stats: list[Stats]
    lost: dict[tuple[Port, int], int]


class Sampler:
    """Rates between two readings of the ports' counters."""

    def __init__(self, forwarding: Forwarding) -> None:
        self._forwarding = forwarding
        self._last = self._look()

    def _look(self) -> _Look:
        forwarding = self._forwarding
        stats = [port.dev.stats() for port in forwarding.ports]
        return _Look(time.monotonic(), stats, forwarding.tx_dropped())

    def sample(self) -> list[tuple[Port, Rates, list[Rates]]]:
        """For each port its rates and those of its queues, since the last call.

        Frames that the kernel dropped because nobody read them in time are known only for a port.
        """
        last, now = self._last, self._look()
        self._last = now
        seconds = max(now.at - last.at, 1e-6)
        out = []
        for index, port in enumerate(self._forwarding.ports):
            stats = difference(now.stats[index], last.stats[index])
            queues = []
            for q in range(max(len(stats.q_ipackets), len(stats.q_opackets))):
                lost = now.lost.get((port, q), 0) - last.lost.get((port, q), 0)
                queues.append(
                    Rates(
                        _at(stats.q_ipackets, q) / seconds,
                        _at(stats.q_ibytes, q) * 8 / seconds,
                        _at(stats.q_opackets, q) / seconds,
                        _at(stats.q_obytes, q) * 8 / seconds,
                        (_at(stats.q_errors, q) + lost) / seconds,
                    )
                )
            total = Rates(
                stats.ipackets / seconds,
                stats.ibytes * 8 / seconds,
                stats.opackets / seconds,
                stats.obytes * 8 / seconds,
                stats.imissed / seconds + sum(queue.drops for queue in queues),
            )
            out.append((port, total, queues))
        return out


def _at(values: list[int], index: int) -> int:
    return values[index] if index < len(values) else 0


class Display:
    """The base of all displays; shows nothing itself."""

    def begin(self, lines: list[str]) -> None:
        """Before forwarding starts."""

    def show(self, seconds: float, sample: list[tuple[Port, Rates, list[Rates]]]) -> None:
        """The rates, so many seconds after the start."""

    def end(self, lines: list[str]) -> None:
        """After forwarding has ended."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def _rows(
    sample: list[tuple[Port, Rates, list[Rates]]],
) -> list[tuple[str, Rates]]:
    """Ports, and their queues if there are several."""
    rows = []
    for port, total, queues in sample:
        rows.append((f"port {port.number}", total))
        if len(queues) > 1:
            rows += [(f"port {port.number} queue {q}", rates) for q, rates in enumerate(queues)]
    return rows


class Lines(Display):
    """Plain lines, at once, for pipes, files and dumb terminals."""

    def begin(self, lines: list[str]) -> None:
        print("\n".join(lines), flush=True)

    def show(self, seconds: float, sample: list[tuple[Port, Rates, list[Rates]]]) -> None:
        for name, rates in _rows(sample):
            print(
                f"{seconds:8.1f} s {name}: "
                f"rx {rates.rx_pps:,.0f} packets/s {rates.rx_bps / 1e9:.3f} Gb/s, "
                f"tx {rates.tx_pps:,.0f} packets/s {rates.tx_bps / 1e9:.3f} Gb/s, "
                f"drops {rates.drops:,.0f}/s",
                flush=True,
            )

    def end(self, lines: list[str]) -> None:
        print("\n".join(lines), flush=True)


class LiveTable(Display):
    """A row for each port and queue, with figures that change while it runs."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        # We draw it when there is something new: a separate thread would compete for a core.
        self._live = Live(console=console, auto_refresh=False)

    def begin(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._live.start()

    def show(self, seconds: float, sample: list[tuple[Port, Rates, list[Rates]]]) -> None:
        self._live.update(self._table(seconds, sample), refresh=True)

    @staticmethod
    def _table(seconds: float, sample: list[tuple[Port, Rates, list[Rates]]]) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD)
        table.add_column(f"{seconds:.0f} s")
        for head in ("rx packets/s", "rx Gb/s", "tx packets/s", "tx Gb/s", "drops/s"):
            table.add_column(head, justify="right")
        for name, rates in _rows(sample):
            drops = f"{rates.drops:,.0f}"
            table.add_row(
                name,
                f"{rates.rx_pps:,.0f}",
                f"{rates.rx_bps / 1e9:.3f}",
                f"{rates.tx_pps:,.0f}",
                f"{rates.tx_bps / 1e9:.3f}",
                f"[red]{drops}[/]" if rates.drops else drops,
                style="dim" if "queue" in name else None,
            )
        return table

    def end(self, lines: list[str]) -> None:
        self._live.stop()
        for line in lines:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __exit__(self, *exc: object) -> None:
        self._live.stop()


def choose(json: bool) -> Display:
    """The display for this standard output; with `json` none."""
    if json:
        return Display()
    console = terminal()
    return Lines() if console is None else LiveTable(console)
