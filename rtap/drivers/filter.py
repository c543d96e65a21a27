# SPDX-License-Identifier: BSD-3-Clause
"""The destinations that a device receives: the state behind promiscuous mode and the like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rtap._ring import RxQueue
from rtap.ether import MacAddr

__all__ = ["MAX_GROUPS", "MAX_MAC_ADDRS", "RxFilter"]

#: Together they are as many as one queue has room for.
MAX_MAC_ADDRS = 32
MAX_GROUPS = 32


@dataclass
class RxFilter:
    """Unicast addresses by index (0 is the application's own) and subscribed groups."""

    promiscuous: bool = True
    allmulticast: bool = False
    addresses: dict[int, MacAddr] = field(default_factory=dict)
    groups: Sequence[MacAddr] = ()

    def apply(self, rxq: RxQueue) -> None:
        """Make `rxq` keep only wanted frames, from its next frame on."""
        rxq.set_filter(
            not self.promiscuous,
            allmulticast=self.allmulticast,
            addresses=[bytes(mac) for mac in (*self.addresses.values(), *self.groups)],
        )
