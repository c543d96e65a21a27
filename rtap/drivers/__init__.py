# SPDX-License-Identifier: BSD-3-Clause
"""The drivers; importing this package registers them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rtap.drivers import net_null, net_rtap
from rtap.ethdev.registry import register_driver

if TYPE_CHECKING:
    from rtap.ethdev.devargs import DevArgs
    from rtap.ethdev.events import Port
    from rtap.ethdev.ops import EthDevOps

__all__ = ["net_null", "net_rtap"]


def _packet_sockets(args: DevArgs, port: Port) -> EthDevOps:
    # Few programs use it, and its modules take long to import.
    from rtap.drivers import net_af_packet

    return net_af_packet.probe(args, port)


def _udp(args: DevArgs, port: Port) -> EthDevOps:
    from rtap.drivers import net_udp

    return net_udp.probe(args, port)


register_driver("net_udp", _udp)
register_driver("net_af_packet", _packet_sockets, aliases=("eth_af_packet",))
