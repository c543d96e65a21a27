# SPDX-License-Identifier: BSD-3-Clause
"""The forwarding modes: where a stream's frames come from, what happens to them, where they go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["MODES", "NOISY_MODES", "Ends", "Mode"]


@dataclass(frozen=True)
class Ends:
    """Addresses for what leaves a port: its own, and its peer's."""

    source: str
    destination: str


Stages = Callable[[Ends], list[object]]


def _unchanged(_: Ends) -> list[object]:
    return []


@dataclass(frozen=True)
class Mode:
    """One forwarding mode.

    `receives` frames from ports, `forwards` them (or frees them), `generates` frames of its own
    with so many flows. `returns` sends out of the port that received.
    """

    name: str
    text: str
    stages: Stages = _unchanged
    receives: bool = True
    forwards: bool = True
    generates: bool = False
    returns: bool = False


MODES = {
    mode.name: mode
    for mode in (
        Mode("io", "frames as they are"),
        Mode("rxonly", "receive and free", forwards=False),
        Mode("txonly", "send generated frames", receives=False, forwards=False, generates=True),
        Mode("flowgen", "send generated flows, free what comes", forwards=False, generates=True),
        Mode("noisy", "forward late and with memory accesses, as a busy function does"),
    )
}

#: What mode noisy can do to frames.
NOISY_MODES = tuple(name for name in ("io", "mac", "macswap", "5tswap") if name in MODES)
