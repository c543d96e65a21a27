# SPDX-License-Identifier: BSD-3-Clause
"""The prompt: testpmd's commonest commands, from a terminal or a script on standard input."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

from rtap.cli.arguments import whole
from rtap.cli.errors import CommandError, Interrupted, Stop, sentence
from rtap.cli.testpmd import report
from rtap.cli.testpmd.forwarding import Forwarding, difference
from rtap.cli.testpmd.grammar import Argument, Command, parse
from rtap.cli.testpmd.modes import MODES
from rtap.cli.testpmd.options import MAX_BURST, Options, lengths
from rtap.cli.testpmd.ports import Port
from rtap.ethdev.ops import Stats

__all__ = ["PROMPT", "Prompt"]

PROMPT = "testpmd> "
#: How long a prompt waits for a line before it checks for a signal.
SLICE_S = 0.1

T = TypeVar("T")


def _value(parse_text: Callable[[str], T]) -> Callable[[str], T]:
    """A command line option's parser, for a word of a command."""

    def read(text: str) -> T:
        try:
            return parse_text(text)
        except argparse.ArgumentTypeError as exc:
            raise ValueError(str(exc)) from None

    return read


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(text)
    return text == "on"


def _mode(text: str) -> str:
    if text not in MODES:
        raise ValueError(text)
    return text


class Prompt:
    """Reads commands and carries them out until quit, the end of the input or a signal."""

    def __init__(self, forwarding: Forwarding, options: Options, stop: Stop) -> None:
        self._forwarding = forwarding
        self._options = options
        self._stop = stop
        self._quit = False
        self._told: set[str] = set()
        self._shown: dict[Port, tuple[float, Stats]] = {}
        # Not the device's own reset: that would change forwarding's counts.
        self._zero: dict[Port, Stats] = {}
        self._commands = self._table()

    # -- reading

    def run(self) -> None:
        """Read commands until quit or the end of the input. Interrupted when a signal came."""
        for line in self._lines():
            try:
                self.command(line)
            except (CommandError, OSError, ValueError, RuntimeError, MemoryError) as exc:
                if isinstance(exc, BrokenPipeError):
                    raise
                sys.stdout.flush()
                print(sentence(exc), file=sys.stderr, flush=True)
            if self._quit:
                break

    def command(self, line: str) -> None:
        """Carry one line out; CommandError says what is wrong with it."""
        line = line.partition("#")[0].strip()
        if line:
            command, values = parse(self._commands, line)
            command.run(*values)
        for text in self._forwarding.ended():
            if text not in self._told:
                self._told.add(text)
                raise CommandError(text)

    def _lines(self) -> Iterator[str]:
        if sys.stdin.isatty() and sys.stdout.isatty():
            yield from self._typed()
        else:
            yield from self._script()

    def _typed(self) -> Iterator[str]:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() history and editing

        while True:
            try:
                with self._raising():
                    line = input(PROMPT)
            except EOFError:
                print()
                return
            yield line

    @contextlib.contextmanager
    def _raising(self) -> Iterator[None]:
        """Signals end input() at once: nothing is half done then."""

        def interrupt(signum: int, frame: FrameType | None) -> None:
            raise Interrupted(signum)

        before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        # A signal just before input() begins to wait would not end that wait; the next one does.
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, SLICE_S, SLICE_S)
        try:
            self._stop.check()
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _script(self) -> Iterator[str]:
        """Lines of a pipe or file, each after a prompt, so that the writer can wait for it."""
        descriptor, rest = sys.stdin.fileno(), b""
        while True:
            print(PROMPT, end="", flush=True)
            while b"\n" not in rest:
                self._stop.check()
                if not select.select([descriptor], [], [], SLICE_S)[0]:
                    continue
                piece = os.read(descriptor, 65536)
                if not piece:
                    if rest:
                        yield rest.decode(errors="replace")
                    print(flush=True)
                    return
                rest += piece
            line, _, rest = rest.partition(b"\n")
            yield line.decode(errors="replace")

    # -- the commands

    def _table(self) -> list[Command]:
        ports = Argument("N|all", self._ports_text(), self._ports)
        switch = Argument("on|off", "on or off", _switch)
        bursts = Argument("N", "a number of bursts", _value(whole(1, 1 << 20)))

        def show(what: str, text: str, run: Callable[..., None]) -> Command:
            return Command(("show", "port", what, ports), text, run)

        def setting(name: str, argument: Argument, text: str, run: Callable[..., None]) -> Command:
            return Command(("set", name, argument), text, run)

        return [
            Command(("start",), "start forwarding", self._start),
            Command(("start", "tx_first"), "the same after a burst from every port", self._first),
            Command(("start", "tx_first", bursts), "the same after so many", self._first),
            Command(("stop",), "stop forwarding and show what it did", self._stop_forwarding),
            show("stats", "counters, and rates since they were last shown", self._show_stats),
            show("xstats", "extended statistics", self._show_xstats),
            show("info", "what a port is and how it is set up", self._show_info),
            show("summary", "a line for each port", self._show_summary),
            Command(("show", "config", "fwd"), "mode and streams", self._show_config),
            Command(("show", "fwd", "stats", "all"), "forwarding so far", self._show_forward),
            Command(("clear", "port", "stats", ports), "set counters to zero", self._clear),
            Command(("clear", "port", "xstats", ports), "the extended ones", self._clear_xstats),
            setting(
                "fwd",
                Argument("MODE", f"one of {', '.join(MODES)}", _mode),
                "mode from the next start",
                self._fwd,
            ),
            setting(
                "burst",
                Argument("N", f"1 to {MAX_BURST}", _value(whole(1, MAX_BURST))),
                "frames at a time from the next start",
                self._burst,
            ),
            setting(
                "nbcore",
                Argument("N", "1 to 128", _value(whole(1, 128))),
                "forwarding threads from the next start",
                self._nbcore,
            ),
            setting(
                "txpkts",
                Argument("N[,N...]", "lengths like 64 or 64,128", _value(lengths)),
                "segments that txonly and flowgen make from the next start",
                self._txpkts,
            ),
            Command(("set", "promisc", ports, switch), "receive frames to anybody", self._promisc),
            Command(("set", "allmulti", ports, switch), "receive every group", self._allmulti),
            Command(("port", "start", ports), "start ports", self._port_start),
            Command(("port", "stop", ports), "stop ports, not while forwarding", self._port_stop),
            Command(("help",), "this list", self._help),
            Command(("quit",), "end", self._end),
        ]

    def _ports_text(self) -> str:
        last = len(self._forwarding.ports) - 1
        return "port 0 or all" if last == 0 else f"a port from 0 to {last} or all"

    def _ports(self, text: str) -> list[Port]:
        if text == "all":
            return self._forwarding.ports
        return [self._forwarding.ports[whole_port(text, len(self._forwarding.ports))]]

    def _start(self) -> None:
        self._first(0)

    def _first(self, bursts: int = 1) -> None:
        self._told.clear()
        self._forwarding.start(bursts)
        _print(report.config(self._forwarding, self._options))

    def _stop_forwarding(self) -> None:
        self._forwarding.stop()
        _print(report.forward_statistics(self._forwarding))

    def _show_stats(self, ports: Sequence[Port]) -> None:
        for port in ports:
            now, stats = time.monotonic(), port.dev.stats()
            if port in self._zero:
                stats = difference(stats, self._zero[port])
            _print(report.port_statistics(port, stats, self._rates(port, now, stats)))
            self._shown[port] = now, stats

    def _rates(self, port: Port, now: float, stats: Stats) -> tuple[float, float, float, float]:
        """Packets and bits per second, in and out, since the port was last shown."""
        before = self._shown.get(port)
        if before is None:
            return (0, 0, 0, 0)
        seconds = max(now - before[0], 1e-6)
        return (
            (stats.ipackets - before[1].ipackets) / seconds,
            (stats.ibytes - before[1].ibytes) * 8 / seconds,
            (stats.opackets - before[1].opackets) / seconds,
            (stats.obytes - before[1].obytes) * 8 / seconds,
        )

    def _show_xstats(self, ports: Sequence[Port]) -> None:
        for port in ports:
            _print(report.port_xstats(port))

    def _show_info(self, ports: Sequence[Port]) -> None:
        for port in ports:
            _print(report.port_info(port))

    def _show_summary(self, ports: Sequence[Port]) -> None:
        _print(report.port_summary(ports))

    def _show_config(self) -> None:
        _print(report.config(self._forwarding, self._options))

    def _show_forward(self) -> None:
        _print(report.forward_statistics(self._forwarding))

    def _clear(self, ports: Sequence[Port]) -> None:
        for port in ports:
            self._zero[port] = port.dev.stats()
            self._shown.pop(port, None)
            print(f"NIC statistics for port {port.number} cleared")

    def _clear_xstats(self, ports: Sequence[Port]) -> None:
        for port in ports:
            port.dev.xstats_reset()
            print(f"NIC extended statistics for port {port.number} cleared")

    def _fwd(self, mode: str) -> None:
        self._options.forward_mode = mode
        print(f"Set {mode} packet forwarding mode{self._later()}")

    def _burst(self, burst: int) -> None:
        self._options.burst = burst
        print(f"Number of packets per burst set to {burst}{self._later()}")

    def _nbcore(self, cores: int) -> None:
        self._options.nb_cores = cores
        print(f"Number of forwarding cores set to {cores}{self._later()}")

    def _txpkts(self, segments: list[int]) -> None:
        self._options.txpkts = segments
        print(f"TX packet segments set to {','.join(map(str, segments))}{self._later()}")

    def _later(self) -> str:
        return ", from the next start on" if self._forwarding.running else ""

    def _promisc(self, ports: Sequence[Port], on: bool) -> None:
        for port in ports:
            port.dev.promiscuous = on

    def _allmulti(self, ports: Sequence[Port], on: bool) -> None:
        for port in ports:
            port.dev.allmulticast = on

    def _port_start(self, ports: Sequence[Port]) -> None:
        for port in ports:
            port.dev.start()

    def _port_stop(self, ports: Sequence[Port]) -> None:
        if self._forwarding.running:
            raise CommandError("port stop: ports are forwarding, stop comes first")
        for port in ports:
            port.dev.stop()

    def _help(self) -> None:
        for command in self._commands:
            print(f"  {command!s:<30} {command.text}")

    def _end(self) -> None:
        self._quit = True


def whole_port(text: str, ports: int) -> int:
    """The number of one of so many ports; ValueError for anything else."""
    if not text.isdecimal() or int(text) >= ports:
        raise ValueError(text)
    return int(text)


def _print(lines: Sequence[Any]) -> None:
    print("\n".join(lines), flush=True)
