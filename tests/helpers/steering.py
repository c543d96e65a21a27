# SPDX-License-Identifier: BSD-3-Clause
"""Hosts that share an address, a worker that steers their traffic, and its rules.

Each rule is written three times: as a Match stage, and as filters for tcpdump and tshark.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captures import Capture, frames_of
from clients import enable_ipv6
from rigs import MAC_A, MAC_B, iproute
from support import PacketSocket, Task, add_ipv6, eventually, netdev, quiet_netns

import rtap
from rtap import NetNS, Worker, stages
from rtap.stages import DROP

MAIN, NAMES, WEB = range(3)
CLIENT, SERVER, CLIENT6, SERVER6 = "10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2"
#: The same on VLAN 7, where no host answers.
TAGGED, TAGGED_SERVER = "10.7.0.1", "10.7.0.2"
#: Addresses of NAMES and of WEB alone, and one of the client that no host answers.
OTHER6, PREFIX6, UNHEARD = "fd09::3", "fd09:0:0:1", "10.66.0.1"

# Wireshark's names for the layers of a frame, from the outside.
_L2 = r"^eth:ethertype:((vlan|ieee8021ad):ethertype:)*"
_V6 = r"ipv6(:(ipv6\.[a-z]+|ah))*"


def _layers(pattern: str) -> str:
    return f'frame.protocols matches r"{_L2}{pattern}(:|$)"'


def _ports(proto: str, condition: str) -> str:
    """Fragments have no ports, not even the first, for which Wireshark shows them."""
    fragment = "ip.flags.mf#1 == 1 || ip.frag_offset#1 > 0 || ipv6.fraghdr"
    return f"{_layers(f'(ip|{_V6}):{proto}')} && {condition} && !({fragment})"


def _bpf_ports(condition: str) -> str:
    return f"{condition} and (ip6 or ip[6:2] & 0x3fff = 0)"


@dataclass
class Rule:
    action: int
    match: dict[str, Any]
    tshark: str
    tcpdump: str

    @property
    def stage(self) -> stages.Match:
        return stages.Match(**self.match, action=self.action)

    @property
    def with_tags(self) -> str:
        """tcpdump looks behind a VLAN tag only when told to."""
        return f"({self.tcpdump}) or (vlan and ({self.tcpdump}))"


RULES = [
    Rule(
        NAMES,
        {"protocol": "udp", "destination_port": 53},
        _ports("udp", "udp.dstport#1 == 53"),
        _bpf_ports("udp dst port 53"),
    ),
    Rule(
        WEB,
        {"protocol": "tcp", "destination_port": (80, 89)},
        _ports("tcp", "tcp.dstport#1 >= 80 && tcp.dstport#1 <= 89"),
        _bpf_ports("tcp dst portrange 80-89"),
    ),
    Rule(
        WEB,
        {"destination": f"{PREFIX6}::/64"},
        f"{_layers('ipv6(:.*)?')} && ipv6.dst#1 == {PREFIX6}::/64",
        f"ip6 dst net {PREFIX6}::/64",
    ),
    Rule(
        NAMES,
        {"protocol": "icmpv6", "destination": OTHER6},
        f"ipv6.dst#1 == {OTHER6} && ({_layers(f'{_V6}:icmpv6')} || ipv6.fraghdr.nxt#1 == 58)",
        f"ip6 dst host {OTHER6} and (icmp6 or ip6[6] = 44 and ip6[40] = 58)",
    ),
    Rule(
        WEB,
        {"protocol": "icmpv6", "destination": "ff02::16"},
        f"ipv6.dst#1 == ff02::16 && {_layers(f'{_V6}:icmpv6')}",
        "ip6 dst host ff02::16 and ip6[6] = 0 and ip6[40] = 58",
    ),
    Rule(
        DROP,
        {"protocol": "tcp", "destination_port": 23},
        _ports("tcp", "tcp.dstport#1 == 23"),
        _bpf_ports("tcp dst port 23"),
    ),
    Rule(
        DROP,
        {"source": "10.66.0.0/16"},
        f"{_layers('ip(:.*)?')} && ip.src#1 == 10.66.0.0/16",
        "ip src net 10.66.0.0/16",
    ),
    Rule(
        WEB,
        {"protocol": "udp", "source": "10.9.0.0/24", "source_port": (20000, 20999)},
        _ports("udp", "ip.src#1 == 10.9.0.0/24 && udp.srcport#1 >= 20000 && udp.srcport#1 < 21000"),
        _bpf_ports("ip src net 10.9.0.0/24 and udp src portrange 20000-20999"),
    ),
    Rule(
        NAMES,
        {"protocol": "sctp", "source_port": 1},
        _ports("sctp", "sctp.srcport#1 == 1"),
        _bpf_ports("sctp src port 1"),
    ),
    Rule(
        DROP,
        {"protocol": 47},
        f"{_layers(f'(ip|{_V6}):gre')} || {_layers('ip:.*')} && ip.proto#1 == 47",
        "ip proto 47 or ip6 proto 47",
    ),
]


def dealt_out(says: list[set[int]], frames: list[bytes]) -> list[list[bytes]]:
    """The frames for each target, in order.

    The last rule that takes a frame decides, but no later rule sees a frame that was dropped.
    """
    targets: list[list[bytes]] = [[], [], []]
    for n, frame in enumerate(frames):
        target = MAIN
        for rule, taken in zip(RULES, says, strict=True):
            if n in taken:
                target = rule.action
                if target == DROP:
                    break
        if target != DROP:
            targets[target].append(frame)
    return targets


def neighbour(ns: NetNS, address: str, mac: str, ifname: str) -> None:
    iproute(ns, f"neigh replace {address} lladdr {mac} dev {ifname} nud permanent")


@contextmanager
def tagged(ns: NetNS, ifname: str) -> Iterator[None]:
    """An interface for VLAN 7, since some kernels have no VLAN devices.

    Frames that are sent on it leave by the other interface, tagged.
    """
    with rtap.open("vlan7", netns=ns, mac=MAC_A) as dev, PacketSocket(ns, ifname) as out:
        iproute(ns, f"addr add {TAGGED}/24 dev vlan7")
        neighbour(ns, TAGGED_SERVER, MAC_B, "vlan7")
        done = threading.Event()

        def forward() -> None:
            while not done.is_set():
                for mbuf in dev.rx_burst(0, 64, 0.02):
                    out.send(mbuf[:12] + b"\x81\x00\x60\x07" + mbuf[12:])

        task = Task(forward)
        try:
            yield
            eventually(
                lambda: netdev(ns, "vlan7")["tx_packets"] == dev.stats().ipackets, "all left"
            )
        finally:
            done.set()
            task.result()


class Steered:
    """A client behind ``a0``, and three hosts with one address to which a worker sends its frames.

    Frames that no rule takes go to MAIN, which therefore answers ARP and neighbour requests.
    """

    def __init__(self, stack: ExitStack, engine: str, directory: Path) -> None:
        self.client = stack.enter_context(quiet_netns())
        self.hosts = [stack.enter_context(quiet_netns()) for _ in range(3)]
        opened = {"engine": engine, "txqueuelen": 20000}
        a = stack.enter_context(rtap.open("a0", netns=self.client, mac=MAC_A, **opened))
        outs = [
            stack.enter_context(rtap.open(f"b{n}", netns=ns, mac=MAC_B, **opened))
            for n, ns in enumerate(self.hosts)
        ]

        def capture(ns: NetNS, ifname: str, way: str) -> Capture:
            return stack.enter_context(
                closing(Capture(ns, ifname, way, directory / f"{ifname}.pcap"))
            )

        self._before = capture(self.client, "a0", "out")
        self._after = [capture(ns, f"b{n}", "in") for n, ns in enumerate(self.hosts)]
        self._device = a
        self.worker = Worker()
        self.worker.forward(
            (a, 0),
            [(dev, 0) for dev in outs],
            stages=[rule.stage for rule in RULES],
            on_full="retry",
        )
        for dev in outs:
            self.worker.forward((dev, 0), (a, 0), on_full="retry")
        stack.enter_context(self.worker)

    def give_addresses(self) -> None:
        """Gives all interfaces IPv4 and IPv6 addresses."""
        self._interface(self.client, "a0", [CLIENT, CLIENT6, f"{PREFIX6}::1"])
        iproute(self.client, f"addr add {UNHEARD}/32 dev a0")
        for n, ns in enumerate(self.hosts):
            self._interface(ns, f"b{n}", [SERVER, SERVER6])
        # The client's answers about its neighbours go to MAIN, so the others get static entries.
        for n in (NAMES, WEB):
            for address in (CLIENT, CLIENT6, f"{PREFIX6}::1"):
                neighbour(self.hosts[n], address, MAC_A, f"b{n}")
        add_ipv6(self.hosts[NAMES], f"b{NAMES}", OTHER6)
        add_ipv6(self.hosts[WEB], f"b{WEB}", f"{PREFIX6}::2")
        for address in (OTHER6, f"{PREFIX6}::2"):
            neighbour(self.client, address, MAC_B, "a0")

    @staticmethod
    def _interface(ns: NetNS, ifname: str, addresses: list[str]) -> None:
        enable_ipv6(ns, ifname)
        for address in addresses:
            if ":" in address:
                add_ipv6(ns, ifname, address)
            else:
                iproute(ns, f"addr add {address}/24 dev {ifname}")

    def captured(self, path: Path) -> tuple[list[bytes], list[list[bytes]]]:
        """Frames before the stages and frames at each target, once both have all the client sent.

        The frames before the stages are also written to ``path``.
        """
        found: list[Any] = []

        def complete() -> bool:
            route = self.worker.stats().routes[0]
            before = self._before.path.read_bytes()
            path.write_bytes(before)
            found[:] = frames_of(path), [capture.frames() for capture in self._after]
            drops = sum(stage.drops for stage in route.stages)
            return (
                netdev(self.client, "a0")["tx_packets"] == route.rx_packets == len(found[0])
                and route.rx_packets == route.tx_packets + drops
                and [target.packets for target in route.targets] == [*map(len, found[1])]
            )

        eventually(complete, "all is captured", 20)
        assert self._device.stats().imissed == 0
        return found[0], found[1]


def in_words(frame: bytes) -> str:
    """The frame's first bytes, for a report."""
    return re.sub("(.{8})", r"\1 ", frame[:96].hex())
