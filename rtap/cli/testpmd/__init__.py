# SPDX-License-Identifier: BSD-3-Clause
"""Forward frames between devices as DPDK's testpmd does, with its option names.

Ports are devices named by --vdev. Without -i it forwards at once, shows the rates and, at the end
(--duration or Ctrl-C), the statistics. With -i it asks for commands, or reads them from a script on
standard input.
"""

from __future__ import annotations

import argparse
import json
import time

from rtap.cli.errors import CommandError, Interrupted, Stop
from rtap.cli.testpmd import report
from rtap.cli.testpmd.display import Display, Sampler, choose
from rtap.cli.testpmd.forwarding import Forwarding
from rtap.cli.testpmd.options import Options, add_arguments
from rtap.cli.testpmd.ports import open_ports
from rtap.cli.testpmd.prompt import Prompt

__all__ = ["HELP", "NAME", "add_arguments", "prepare", "run"]

NAME = "testpmd"
HELP = "forward frames between devices, with testpmd's options, modes and prompt"

#: Seconds between two checks for a signal.
TICK_S = 0.05


def prepare(argv: list[str]) -> list[str]:
    """The arguments without the ``--`` between EAL's options and testpmd's."""
    if "--" in argv:
        at = argv.index("--")
        return argv[:at] + argv[at + 1 :]
    return argv


def _tick(options: Options, until: float, shown: float) -> None:
    now = time.monotonic()
    wait = min(TICK_S, until - now)
    if options.stats_period:
        wait = min(wait, shown + options.stats_period - now)
    time.sleep(max(wait, 0))


def _watch(forwarding: Forwarding, options: Options, display: Display, stop: Stop) -> None:
    """Wait until the time is over, a signal comes, or nothing forwards any more."""
    sampler = Sampler(forwarding)
    started = shown = time.monotonic()
    until = started + options.duration if options.duration is not None else float("inf")
    while (now := time.monotonic()) < until and forwarding.alive:
        stop.check()
        if options.stats_period and now - shown >= options.stats_period:
            display.show(now - started, sampler.sample())
            shown = now
        _tick(options, until, shown)


def _unattended(forwarding: Forwarding, options: Options, stop: Stop) -> int:
    interrupted = None
    with choose(options.json) as display:
        display.begin(report.config(forwarding, options))
        forwarding.start(int(options.tx_first))
        try:
            _watch(forwarding, options, display, stop)
        except Interrupted as exc:
            interrupted = exc
        forwarding.stop()
        display.end(report.forward_statistics(forwarding))
    if options.json:
        print(json.dumps(report.json_report(forwarding, options)))
    if ended := forwarding.ended():
        raise CommandError("; ".join(ended))
    # Without a duration, a signal is the normal end.
    if interrupted is not None and options.duration is not None:
        raise interrupted
    return 0


def _attended(forwarding: Forwarding, options: Options, stop: Stop) -> int:
    if options.auto_start or options.tx_first:
        forwarding.start(int(options.tx_first))
        print("\n".join(report.config(forwarding, options)))
    try:
        Prompt(forwarding, options, stop).run()
    except Interrupted:
        print()
    if forwarding.running:
        forwarding.stop()
        print("\n".join(report.forward_statistics(forwarding)), flush=True)
    return 0


def run(args: argparse.Namespace) -> int:
    """Run ``rtap testpmd`` with parsed arguments."""
    options = Options.of(args)
    with Stop().installed() as stop, open_ports(options) as ports:
        stop.check()
        forwarding = Forwarding(ports, options)
        try:
            return (_attended if options.interactive else _unattended)(forwarding, options, stop)
        finally:
            forwarding.close()
