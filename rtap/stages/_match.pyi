# SPDX-License-Identifier: BSD-3-Clause
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeAlias

from rtap.stages._stage import DROP as DROP
from rtap.stages._stage import Stage

_Network: TypeAlias = str | IPv4Address | IPv4Network | IPv6Address | IPv6Network
_Ports: TypeAlias = int | tuple[int, int]

class Match(Stage):
    def __init__(
        self,
        protocol: str | int | None = None,
        *,
        source: _Network | None = None,
        destination: _Network | None = None,
        source_port: _Ports | None = None,
        destination_port: _Ports | None = None,
        action: int | None = ...,
        otherwise: int | None = None,
        l2: bool = True,
    ) -> None: ...
