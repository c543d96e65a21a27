# SPDX-License-Identifier: BSD-3-Clause
"""Checks the equations of docs/statistics.md and docs/stages.md; AssertionError if one fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from rtap import RouteStats


def merge(queues: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Sum the counters of several queues; none may be negative."""
    out: Counter[str] = Counter()
    for counters in queues:
        for name, value in counters.items():
            if value < 0:
                raise AssertionError(f"{name} is {value}")
            out[name] += value
    return out


def _equal(left: int, right: int, law: str, what: str) -> None:
    if left != right:
        raise AssertionError(f"{law}: {left} is not {right}: {what}")


def _parts(c: Mapping[str, int], l2: bool, what: str) -> None:
    """Each frame has one size and one destination."""
    sizes = sum(value for name, value in c.items() if name.startswith("size_"))
    _equal(c["packets"], sizes, "packets = their sizes", what)
    if l2:
        kinds = sum(c[f"{kind}_packets"] for kind in ("broadcast", "multicast", "unicast"))
        _equal(c["packets"], kinds, "packets = their destinations", what)


def check_received(
    c: Mapping[str, int], kernel: Mapping[str, int], got: int, l2: bool, what: str
) -> None:
    """Compare a device's receive counters with the kernel's, and with what bursts returned."""
    filtered = c["filtered_unicast_packets"] + c["filtered_multicast_packets"]
    read = c["packets"] + c["errors"] - c["read_errors"] + filtered + c["purged_packets"]
    _equal(kernel["tx_packets"], read, "read from the kernel = received + dropped", what)
    parts = ("truncated_packets", "bad_header_packets", "gso_too_long_packets", "read_errors")
    _equal(c["errors"], sum(c[part] for part in parts), "errors = their reasons", what)
    made = c["packets"] - c["gso_super_packets"] + c["gso_split_packets"] - c["stopped_packets"]
    _equal(got, made, "returned by bursts = received and made", what)
    _parts(c, l2, what)


def check_sent(
    c: Mapping[str, int], kernel: Mapping[str, int], probes: int, blind: bool, l2: bool, what: str
) -> None:
    """Compare a device's send counters with the kernel's.

    The kernel also counted rtap's probes: `probes` of them were seen, others maybe not (`blind`).
    """
    more = kernel["rx_packets"] - c["packets"]
    if not blind or not c["software_gso_packets"]:
        _equal(more, probes, "taken by the kernel = sent", what)
    elif more < probes:
        raise AssertionError(f"the kernel took fewer frames than were sent: {what}")
    parts = ("bad_request", "kernel_refused", "link_down", "unsent")
    reasons = sum(c[f"{part}_packets"] for part in parts)
    _equal(c["errors"], reasons, "errors = their reasons", what)
    _parts(c, l2, what)


def check_route(route: RouteStats) -> None:
    """Check a route that has ended: every frame that came went to a target or was dropped."""
    came = route.rx_packets
    for n, stage in enumerate(route.stages):
        _equal(stage.packets, came, f"came to stage {n} = left the one before", str(route))
        came += stage.split - stage.merged - stage.drops
    _equal(came, route.tx_packets + route.drops, "left the stages = sent + dropped", str(route))
