# SPDX-License-Identifier: BSD-3-Clause
"""The ``rtap`` command.

A sub-command is a module of this package with ``NAME``, ``HELP``, ``add_arguments(parser)`` and
``run(args) -> int``; it is listed in ``_COMMANDS``. A CommandError, OSError, ValueError or
MemoryError that it raises becomes one sentence on standard error and exit status 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Protocol

import rtap
from rtap.cli import demo, ps, serve, testpmd
from rtap.cli.errors import CommandError, Interrupted, sentence

__all__ = ["main"]


class _Command(Protocol):
    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


_COMMANDS: list[_Command] = [demo, testpmd, serve, ps]


class _Version(argparse.Action):
    # Not action="version", which needs the string when the parser is made: getting it is slow.
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"rtap {rtap.__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rtap", description="Ethernet frames between programs and Linux TAP devices."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        sub = commands.add_parser(command.NAME, help=command.HELP, description=command.__doc__)
        command.add_arguments(sub)
        sub.set_defaults(command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (``sys.argv[1:]`` by default) and return the exit status.

    0 when the command succeeded, 1 when it failed, 2 for a wrong command line (argparse exits
    itself, with SystemExit), 128 + N when signal N ended it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [testpmd.NAME]:
        words = testpmd.prepare(words)
    args = _parser().parse_args(words)
    command: _Command = args.command
    try:
        status = command.run(args)
        sys.stdout.flush()
    except Interrupted as stop:
        return _say(command, f"stopped by {stop}", 128 + stop.signum)
    except KeyboardInterrupt:
        return _say(command, "stopped by SIGINT", 128 + signal.SIGINT)
    except BrokenPipeError:
        # Python flushes standard output once more on its way out, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (CommandError, OSError, ValueError, MemoryError) as exc:
        return _say(command, sentence(exc), 1)
    return status


def _say(command: _Command, text: str, status: int) -> int:
    print(f"rtap {command.NAME}: {text}", file=sys.stderr)
    return status
