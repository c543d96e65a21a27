# SPDX-License-Identifier: BSD-3-Clause
"""The forwarding modes: where a stream's frames come from, what happens to them, where they go."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODES", "NOISY_MODES", "Ends", "Mode"]


@dataclass(frozen=True)
class Ends:
    """Addresses for what leaves a port: its own, and its peer's."""

    source: str
    destination: str


@dataclass(frozen=True)
class Mode:
    """One forwarding mode.

    `receives` frames from ports, does `change` to them (see :mod:`rtap._change`), `forwards` them
    (or frees them), `generates` frames of its own. `returns` sends out of the port that received.
    """

    name: str
    text: str
    change: str = ""
    receives: bool = True
    forwards: bool = True
    generates: bool = False
    returns: bool = False


MODES = {
    mode.name: mode
    for mode in (
        Mode("io", "frames as they are"),
        Mode("mac", "to the peer, from the port", change="mac"),
        Mode("macswap", "addresses exchanged", change="macswap"),
        Mode("flowgen", "send generated flows, free what comes", forwards=False, generates=True),
        Mode("rxonly", "receive and free", forwards=False),
        Mode("txonly", "send generated frames", receives=False, forwards=False, generates=True),
        Mode("csum", "as mac, and every checksum is written", change="csum"),
        Mode(
            "icmpecho", "answer ARP, neighbour and echo requests", change="icmpecho", returns=True
        ),
        Mode("noisy", "forward late and with memory accesses, as a busy function does"),
        Mode("5tswap", "addresses and ports exchanged", change="5tswap"),
    )
}

#: What mode noisy can do to frames.
NOISY_MODES = ("io", "mac", "macswap", "5tswap")
