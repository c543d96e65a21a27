# SPDX-License-Identifier: BSD-3-Clause
"""Commands of words and arguments, and the messages about other lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rtap.cli.errors import CommandError

__all__ = ["Argument", "Command", "parse"]


@dataclass(frozen=True)
class Argument:
    """A place in a command: `name` in its description, `what` in messages about it.

    `read` makes a value of the word, or raises ValueError for a word that does not fit.
    """

    name: str
    what: str
    read: Callable[[str], Any]


@dataclass(frozen=True)
class Command:
    """Literal words and arguments; `run` is called with the arguments' values."""

    words: tuple[str | Argument, ...]
    text: str
    run: Callable[..., None]

    def __str__(self) -> str:
        return " ".join(w if isinstance(w, str) else w.name for w in self.words)


def _either(alternatives: Sequence[str]) -> str:
    unique = list(dict.fromkeys(alternatives))
    if len(unique) == 1:
        return unique[0]
    return f"{', '.join(unique[:-1])} or {unique[-1]}"


def parse(commands: Sequence[Command], line: str) -> tuple[Command, list[Any]]:
    """The command on a line, with its values.

    CommandError says where a line goes wrong, and what was expected there.
    """
    fitting: list[tuple[Command, list[Any]]] = [(command, []) for command in commands]
    words = line.split()
    for position, word in enumerate(words):
        there = [(c, values) for c, values in fitting if len(c.words) > position]
        before = " ".join(words[:position])
        if not there:
            raise CommandError(f"{before}: nothing is expected after it, got {word!r}")
        fitting = _step(there, position, word)
        if not fitting:
            expected = _either([_name(c.words[position]) for c, _ in there])
            where = f"{before}: " if before else ""
            raise CommandError(f"{where}{expected} is expected, got {word!r}")
    whole = [(c, values) for c, values in fitting if len(c.words) == len(words)]
    if whole:
        return whole[0]
    expected = _either([_name(c.words[len(words)]) for c, _ in fitting])
    raise CommandError(f"{line}: {expected} is expected after it")


def _name(word: str | Argument) -> str:
    return word if isinstance(word, str) else word.what


def _step(
    there: list[tuple[Command, list[Any]]], position: int, word: str
) -> list[tuple[Command, list[Any]]]:
    """The commands that go on with `word`; literal words come before arguments."""
    literal = [(c, values) for c, values in there if c.words[position] == word]
    if literal:
        return literal
    out = []
    for command, values in there:
        expected = command.words[position]
        if isinstance(expected, Argument):
            try:
                out.append((command, [*values, expected.read(word)]))
            except ValueError:
                continue
    return out
