# SPDX-License-Identifier: BSD-3-Clause
"""The forwarding modes: where a stream's frames come from, what happens to them, where they go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rtap import stages
from rtap.stages import Stage

__all__ = ["MODES", "NOISY_MODES", "Ends", "Mode"]


@dataclass(frozen=True)
class Ends:
    """Addresses for frames that leave a port: its own, and its peer's."""

    source: str
    destination: str


@dataclass(frozen=True)
class Mode:
    """One forwarding mode.

    `receives` frames from ports, sends them through `stages`, `forwards` them (or frees them),
    `generates` frames of its own. `returns` sends out of the port that received.
    """

    name: str
    text: str
    stages: Callable[[Ends], list[Stage]] = lambda _: []
    receives: bool = True
    forwards: bool = True
    generates: bool = False
    returns: bool = False


def _mac(ends: Ends) -> list[Stage]:
    return [stages.MacRewrite(ends.destination, ends.source)]


def _csum(ends: Ends) -> list[Stage]:
    return [stages.ChecksumVerify(drop=False), *_mac(ends), stages.ChecksumFill()]


def _echo(ends: Ends) -> list[Stage]:
    return [stages.Echo(ends.source)]


MODES = {
    mode.name: mode
    for mode in (
        Mode("io", "frames as they are"),
        Mode("mac", "to the peer, from the port", _mac),
        Mode("macswap", "addresses exchanged", lambda _: [stages.MacSwap()]),
        Mode("flowgen", "send generated flows, free what comes", forwards=False, generates=True),
        Mode("rxonly", "receive and free", forwards=False),
        Mode("txonly", "send generated frames", receives=False, forwards=False, generates=True),
        Mode("csum", "as mac, and every checksum is checked and written", _csum),
        Mode("icmpecho", "answer ARP, neighbour and echo requests", _echo, returns=True),
        Mode("noisy", "forward late and with memory accesses, as a busy function does"),
        Mode("5tswap", "addresses and ports exchanged", lambda _: [stages.FiveTupleSwap()]),
    )
}

#: The modes that mode noisy can apply to frames.
NOISY_MODES = ("io", "mac", "macswap", "5tswap")
