# SPDX-License-Identifier: BSD-3-Clause
"""Arrangements of devices around a real kernel, and checks of frames with scapy.

The oracle for offloads is the kernel. Device A requests them, and a bridge leads to device B, which
has none, so B reads what the kernel made of the frames.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from patience import patient
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, PadN
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet
from support import ip, quiet_netns, skip_without_devices

import rtap
from rtap import EthDev, MacAddr, Mbuf, MbufFlag, NetNS

MAC_A = "02:00:00:00:00:0a"
MAC_B = "02:00:00:00:00:0b"
#: Hosts that a bridge does not know, so it floods their frames.
HOST_A = "02:00:00:00:01:0a"
HOST_B = "02:00:00:00:01:0b"

SOL_UDP, UDP_SEGMENT = 17, 103  # linux/udp.h


def iproute(ns: NetNS, line: str) -> str:
    """``ip LINE`` in a namespace."""
    return ip(ns, *line.split())


def write_in(ns: NetNS, path: str, value: str) -> None:
    """Writes a file under ``/proc/sys/net`` as seen from a namespace."""

    def write() -> None:
        with open(path, "w") as f:
            f.write(value)

    ns.call(write)


def talk(
    ns: NetNS, dev: EthDev, payload: bytes, source: str = "10.9.0.1", *, segment: int = 0
) -> None:
    """Sends a UDP datagram, or several that the kernel cuts, from the namespace by the device."""
    peer = source.rpartition(".")[0] + ".99"
    ip(ns, "addr", "replace", f"{source}/24", "dev", dev.ifname)
    if dev.info().mode == "tap":
        ip(ns, "neigh", "replace", peer, "lladdr", HOST_A, "dev", dev.ifname)
    with ns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as s:
        if segment:
            s.setsockopt(SOL_UDP, UDP_SEGMENT, segment)
        s.sendto(payload, (peer, 9))


def redirect(ns: NetNS, source: str, target: str, rate: str = "") -> None:
    """Redirects frames that enter the kernel on one interface to another, at a limited rate.

    Until a frame leaves, it counts against the send buffer of the device that sent it.
    """
    commands = [
        f"qdisc add dev {source} ingress",
        # some kernels have no matchall
        f"filter add dev {source} parent ffff: protocol all u32 match u32 0 0 "
        f"action mirred egress redirect dev {target}",
    ]
    if rate:
        commands.insert(0, f"qdisc add dev {target} root tbf rate {rate} burst 3000 limit 10000000")
    for command in commands:
        ns.run(["tc", *command.split()], check=True)


# ---- the bridge


class Bridge:
    """Devices ``a`` and ``b`` on a bridge: what is sent on one is read from the other."""

    def __init__(self, ns: NetNS, a: EthDev, b: EthDev) -> None:
        self.ns, self.a, self.b = ns, a, b

    def arriving(self, n: int, timeout: float = 5) -> list[bytes]:
        """The next ``n`` frames at ``b``, or those that came within ``timeout`` seconds."""
        got: list[bytes] = []
        deadline = time.monotonic() + patient(timeout)
        while len(got) < n and (left := deadline - time.monotonic()) > 0:
            got += map(bytes, self.b.rx_burst(0, 64, left))
        return got

    def nothing_arrives(self) -> bool:
        """Whether ``b`` has received nothing: a frame sent now is the first that it sees."""
        mark = bytes(MacAddr(HOST_B)) + bytes(MacAddr(HOST_A)) + b"\x88\xb6" + bytes(46)
        assert self.a.send(mark)
        return self.arriving(1) == [mark]


def add_bridge(ns: NetNS, name: str = "br0") -> None:
    """A bridge that forwards all frames, without a delay at the start."""
    iproute(ns, f"link add {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0")
    for table in ("iptables", "ip6tables"):
        with contextlib.suppress(FileNotFoundError):  # present where br_netfilter is loaded
            write_in(ns, f"/proc/sys/net/bridge/bridge-nf-call-{table}", "0")
    ip(ns, "link", "set", name, "up")


@contextlib.contextmanager
def bridged(
    *, a: dict[str, Any] | None = None, b: dict[str, Any] | None = None
) -> Iterator[Bridge]:
    """A namespace with devices a and b on a bridge, opened with these options."""
    skip_without_devices()
    with quiet_netns() as ns:
        add_bridge(ns)
        with (
            rtap.open("a0", netns=ns, mac=MAC_A, **(a or {})) as dev_a,
            rtap.open("b0", netns=ns, mac=MAC_B, **(b or {})) as dev_b,
        ):
            for dev in (dev_a, dev_b):
                ip(ns, "link", "set", dev.ifname, "master", "br0")
            yield Bridge(ns, dev_a, dev_b)


# ---- two ends of a wire


class Wire:
    """Two namespaces, each with an address and a device; a worker may forward between them."""

    def __init__(self, left: NetNS, right: NetNS, a: EthDev, b: EthDev) -> None:
        self.left, self.right, self.a, self.b = left, right, a, b

    def transfer(self, n_bytes: int, *, back: bool = False, timeout: float = 20) -> None:
        """Sends this many bytes over one TCP connection and compares what arrives."""
        timeout = patient(timeout)
        sender, receiver = (self.right, self.left) if back else (self.left, self.right)
        address = "10.9.0.1" if back else "10.9.0.2"
        data = hashlib.shake_128(str(n_bytes).encode()).digest(1 << 16)
        data *= n_bytes // len(data) + 1
        data = data[:n_bytes]

        def push(client: socket.socket) -> None:
            with client:
                client.sendall(data)

        with receiver.call(socket.create_server, (address, 0)) as server:
            server.settimeout(timeout)
            client = sender.call(socket.create_connection, server.getsockname(), timeout)
            connection, _ = server.accept()
            connection.settimeout(timeout)
            thread = threading.Thread(target=push, args=(client,))
            thread.start()
            digest, got = hashlib.sha256(), 0
            with connection:
                while piece := connection.recv(1 << 18):
                    digest.update(piece)
                    got += len(piece)
            thread.join()
        assert got == n_bytes
        assert digest.digest() == hashlib.sha256(data).digest()


@contextlib.contextmanager
def wire(*, a: dict[str, Any] | None = None, b: dict[str, Any] | None = None) -> Iterator[Wire]:
    """Two devices with options ``a`` and ``b``, up, with addresses 10.9.0.1 and 10.9.0.2."""
    skip_without_devices()
    with (
        quiet_netns() as left,
        quiet_netns() as right,
        rtap.open("a0", netns=left, **{"mac": MAC_A, **(a or {})}) as dev_a,
        rtap.open("b0", netns=right, **{"mac": MAC_B, **(b or {})}) as dev_b,
    ):
        for ns, dev, address in ((left, dev_a, "10.9.0.1"), (right, dev_b, "10.9.0.2")):
            ip(ns, "addr", "add", f"{address}/24", "dev", dev.ifname)
        yield Wire(left, right, dev_a, dev_b)


# ---- frames to finish

TX_L4 = {"tcp": MbufFlag.TX_TCP_CKSUM, "udp": MbufFlag.TX_UDP_CKSUM}
TX_SEG = {"tcp": MbufFlag.TX_TCP_SEG, "udp": MbufFlag.TX_UDP_SEG}


@dataclass
class Shape:
    """How a frame is built: IP version, transport, tags, options."""

    version: int = 4
    proto: str = "tcp"
    vlans: int = 0
    l3_options: bool = False
    tcp_flags: str = "A"
    fields: dict[str, Any] = field(default_factory=dict)

    def packet(self, payload: bytes, **l4: Any) -> Packet:
        packet = Ether(src=HOST_A, dst=HOST_B)
        for tag in range(self.vlans):
            packet /= Dot1Q(vlan=100 + tag, type=0x8100)
        if self.version == 4:
            options = [IPOption_NOP()] * 8 if self.l3_options else []
            packet /= IP(src="10.0.0.1", dst="10.0.0.2", id=0xFFFE, options=options)
        else:
            packet /= IPv6(src="fd00::1", dst="fd00::2", fl=0x12345)
            if self.l3_options:
                packet /= IPv6ExtHdrDestOpt(options=[PadN(optdata=b"abcd")])
        if self.proto == "tcp":
            options = [("Timestamp", (1, 2))]
            packet /= TCP(
                sport=1111, dport=2222, seq=0xFFFFF000, ack=9, flags=self.tcp_flags, options=options
            )
        else:
            packet /= UDP(sport=1111, dport=2222)
        for name, value in {**self.fields, **l4}.items():
            setattr(packet[TCP if self.proto == "tcp" else UDP], name, value)
        packet /= payload
        if self.vlans:
            packet[Dot1Q : self.vlans].type = 0x0800 if self.version == 4 else 0x86DD
        return packet

    def finished(self, payload: bytes) -> bytes:
        """The frame as it must arrive."""
        return bytes(self.packet(payload))

    def unfinished(self, payload: bytes) -> bytes:
        """The same frame with wrong checksums."""
        packet = Ether(self.finished(payload))
        for layer in (IP, TCP, UDP):
            if layer in packet:
                packet[layer].chksum = 0xBEEF
        return bytes(packet)

    @property
    def l2_len(self) -> int:
        return 14 + 4 * self.vlans

    @property
    def l3_len(self) -> int:
        if self.version == 4:
            return 28 if self.l3_options else 20
        return 48 if self.l3_options else 40

    @property
    def l4_len(self) -> int:
        return 32 if self.proto == "tcp" else 8

    @property
    def flags(self) -> MbufFlag:
        if self.version == 4:
            return TX_L4[self.proto] | MbufFlag.TX_IPV4 | MbufFlag.TX_IP_CKSUM
        return TX_L4[self.proto] | MbufFlag.TX_IPV6

    def request(self, mbuf: Mbuf, segsz: int = 0) -> Mbuf:
        mbuf.ol_flags = self.flags | (TX_SEG[self.proto] if segsz else 0)
        mbuf.l2_len, mbuf.l3_len, mbuf.l4_len = self.l2_len, self.l3_len, self.l4_len
        mbuf.tso_segsz = segsz
        return mbuf

    def segments(self, payload: bytes, segsz: int) -> list[bytes]:
        """The segments after splitting at ``segsz``."""
        pieces = [payload[i : i + segsz] for i in range(0, len(payload), segsz)]
        out = []
        for n, piece in enumerate(pieces):
            packet = self.packet(piece)
            if self.version == 4:
                packet[IP].id = (0xFFFE + n) & 0xFFFF
            if self.proto == "tcp":
                tcp = packet[TCP]
                tcp.seq = (tcp.seq + n * segsz) & 0xFFFFFFFF
                flags = set(self.tcp_flags)
                if n > 0:
                    flags -= {"C"}
                if n + 1 < len(pieces):
                    flags -= {"F", "P"}
                tcp.flags = "".join(flags)
            out.append(bytes(packet))
        return out


def label(value: object) -> str | None:
    if not isinstance(value, Shape):
        return None
    extra = "-options" if value.l3_options else ""
    return f"ipv{value.version}-{value.proto}-{value.vlans}tags{extra}"


# ---- scapy


def parse(frame: bytes, l2: bool = True) -> Packet:
    """The frame's layers; ``l2`` is False for what a TUN device carries."""
    if l2:
        return Ether(frame)
    return IP(frame) if frame[0] >> 4 == 4 else IPv6(frame)


def wrong_checksums(frame: bytes, l2: bool = True) -> list[str]:
    """Checksums that differ from what scapy computes for the same frame, as readable text.

    Linux writes 0xffff for a TCP sum of zero, as for UDP: in ones' complement they are equal.
    """
    packet = parse(frame, l2)
    stated = {
        layer.__name__: packet[layer].chksum for layer in (IP, TCP, UDP) if packet.haslayer(layer)
    }
    if not stated:
        raise AssertionError(f"no checksum to look at in {packet!r}")
    for layer in (IP, TCP, UDP):
        if packet.haslayer(layer):
            del packet[layer].chksum
    fresh = parse(bytes(packet), l2)
    computed = {layer.__name__: fresh[layer].chksum for layer in (IP, TCP, UDP) if layer in fresh}
    return [
        f"{name}: {stated[name]:#06x}, expected {computed[name]:#06x}"
        for name in stated
        if stated[name] != computed[name]
        and (name, stated[name], computed[name]) != ("TCP", 0xFFFF, 0)
    ]
