# SPDX-License-Identifier: BSD-3-Clause
"""The output of ``rtap demo`` while it measures: a growing table on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Display", "Lines", "RichTable", "choose", "terminal"]

#: Seconds between two figures of a running slice.
LIVE_S = 0.25
LINE_S = 0.5

WARM_UP = -1


class Display:
    """The base of all displays; shows nothing itself.

    A slice is one path ("rtap" or "veth") in one pair, counted from 0, or in the WARM_UP. Rates
    are in Gb/s and packets per second.
    """

    def begin(self, title: str, pairs: int) -> None:
        """Before the first slice."""

    def interval(self, seconds: float) -> float:
        """Seconds between two figures of a slice of `seconds`."""
        return LIVE_S

    def live(self, pair: int, path: str, gbps: float, pps: float) -> None:
        """The present rates of a slice."""

    def done(self, pair: int, path: str, gbps: float, pps: float) -> None:
        """The result of a slice."""

    def summary(self, lines: list[str]) -> None:
        """After the last slice."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def _label(pair: int, pairs: int) -> str:
    return "warm-up" if pair == WARM_UP else f"{pair + 1}/{pairs}"


class Lines(Display):
    """Plain lines, at once, for pipes, files and dumb terminals."""

    def __init__(self) -> None:
        self._pairs = 0

    def begin(self, title: str, pairs: int) -> None:
        self._pairs = pairs
        print(title, flush=True)

    def interval(self, seconds: float) -> float:
        return max(LINE_S, seconds / 10)

    def _line(self, pair: int, path: str, gbps: float, pps: float, end: str) -> None:
        label = _label(pair, self._pairs)
        print(f"{label:>8} {path} {gbps:7.2f} Gb/s {pps:10,.0f} packets/s{end}", flush=True)

    def live(self, pair: int, path: str, gbps: float, pps: float) -> None:
        self._line(pair, path, gbps, pps, " ...")

    def done(self, pair: int, path: str, gbps: float, pps: float) -> None:
        self._line(pair, path, gbps, pps, "")

    def summary(self, lines: list[str]) -> None:
        print("\n".join(lines), flush=True)


class RichTable(Display):
    """A row for each pair, with figures that change while it runs."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._cells: dict[tuple[int, str], tuple[float, float]] = {}
        self._running: tuple[int, str] | None = None
        self._pairs = 0
        # We draw it when there is something new: a separate thread would compete for a core.
        self._live = Live(console=console, auto_refresh=False)

    def begin(self, title: str, pairs: int) -> None:
        self._console.print(title, highlight=False)
        self._pairs = pairs
        self._live.start()
        self._draw()

    def live(self, pair: int, path: str, gbps: float, pps: float) -> None:
        self._running = (pair, path)
        self._cells[pair, path] = (gbps, pps)
        self._draw()

    def done(self, pair: int, path: str, gbps: float, pps: float) -> None:
        self._running = None
        self._cells[pair, path] = (gbps, pps)
        self._draw()

    def _figures(self, pair: int, path: str) -> list[str]:
        if (pair, path) not in self._cells:
            return ["", ""]
        gbps, pps = self._cells[pair, path]
        # Not a result yet: shown in another colour.
        style = "[cyan]{}[/]" if self._running == (pair, path) else "{}"
        return [style.format(f"{gbps:.2f}"), style.format(f"{pps:,.0f}")]

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD)
        for head in ("", "rtap Gb/s", "packets/s", "veth Gb/s", "packets/s", "ratio"):
            table.add_column(head, justify="right")
        for pair in range(WARM_UP, self._pairs):
            ours, theirs = self._cells.get((pair, "rtap")), self._cells.get((pair, "veth"))
            both = ours and theirs and pair != WARM_UP and self._running != (pair, "veth")
            ratio = f"{ours[0] / theirs[0]:.2f}" if both and ours and theirs else ""
            style = "dim" if pair == WARM_UP else None
            row = [*self._figures(pair, "rtap"), *self._figures(pair, "veth")]
            table.add_row(_label(pair, self._pairs), *row, ratio, style=style)
        return table

    def _draw(self) -> None:
        self._live.update(self._table(), refresh=True)

    def summary(self, lines: list[str]) -> None:
        self._live.stop()
        for line in lines:
            self._console.print(line, highlight=False, soft_wrap=True)

    def __exit__(self, *exc: object) -> None:
        self._live.stop()


def terminal() -> Console | None:
    """The console of this standard output, if tables can be redrawn on it."""
    if not sys.stdout.isatty():
        return None
    from rich.console import Console

    console = Console()
    return console if console.is_terminal and not console.is_dumb_terminal else None


def choose(json: bool) -> Display:
    """The display for this standard output; with `json` none."""
    if json:
        return Display()
    console = terminal()
    return Lines() if console is None else RichTable(console)
