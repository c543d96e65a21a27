# SPDX-License-Identifier: BSD-3-Clause
"""Wireshark's verdicts on checksums, for tens of thousands of frames."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable

import pytest
from scapy.layers.inet import IP, TCP, UDP, in4_chksum
from scapy.layers.inet6 import IPv6, in6_chksum
from scapy.layers.l2 import Ether
from scapy.utils import checksum as scapy_checksum

#: The protocols in the tests' frames; tshark dissects no others.
PROTOCOLS = (
    "eth ethertype vlan ieee8021ad ip ipv6 ipv6.hopopts ipv6.routing ipv6.dstopts tcp udp data"
)
LAYERS = ("ip", "tcp", "udp")
#: What tshark prints in the field checksum.status.
BAD, GOOD, UNVERIFIED, NOT_PRESENT = "0", "1", "2", "3"
_PREFERENCES = (
    "ip.check_checksum:TRUE",
    "tcp.check_checksum:TRUE",
    "udp.check_checksum:TRUE",
    "tcp.desegment_tcp_streams:FALSE",
    "tcp.analyze_sequence_numbers:FALSE",
)


def tshark(frames: Iterable[bytes]) -> Counter[tuple[str, str, str]]:
    """How many frames have which status of their IPv4, TCP and UDP checksums.

    The status is "" where there is no such header. Skips the test if tshark is missing.
    """
    program = shutil.which("tshark")
    if program is None:
        pytest.skip("needs tshark (Debian's package tshark)")
    command = [program, "-n", "-r", "-", "--disable-protocol", "ALL"]
    for name in PROTOCOLS.split():
        command += ["--enable-protocol", name]
    for preference in _PREFERENCES:
        command += ["-o", preference]
    command += ["-T", "fields"]
    for layer in LAYERS:
        command += ["-e", f"{layer}.checksum.status"]
    n = 0
    with tempfile.TemporaryFile() as capture:
        capture.write(struct.pack("=IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, 1))
        for frame in frames:
            capture.write(struct.pack("=IIII", n, 0, len(frame), len(frame)) + frame)
            n += 1
        capture.seek(0)
        done = subprocess.run(command, stdin=capture, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: Counter[tuple[str, str, str]] = Counter()
    for line in done.stdout.splitlines():
        ip, tcp, udp = line.split("\t")
        found[ip, tcp, udp] += 1
    assert found.total() == n, done.stderr
    return found


def wrong(found: Counter[tuple[str, str, str]]) -> dict[tuple[str, str, str], int]:
    """How many frames have a wrong checksum, or none in TCP and UDP, by status."""
    fine = ("", GOOD)
    return {
        status: n
        for status, n in found.items()
        if any(value not in fine for value in status) or not any(status[1:])
    }


def scapy_disagrees(frame: bytes) -> list[str]:
    """Checksums that differ from scapy's, computed over the same bytes."""
    packet = Ether(frame)
    ip = packet.getlayer(IP) or packet.getlayer(IPv6)
    number, at = (6, 16) if packet.haslayer(TCP) else (17, 6)
    found = []
    if isinstance(ip, IP):
        start = frame.index(b"\x08\x00", 12) + 2
        header = frame[start : start + 4 * ip.ihl]
        if scapy_checksum(header) != 0:
            found.append("IP")
        body = frame[start + 4 * ip.ihl : start + ip.len]
        expected = in4_chksum(number, ip, body[:at] + b"\0\0" + body[at + 2 :])
    else:
        start = frame.index(b"\x86\xdd", 12) + 2
        end = start + 40 + ip.plen
        extensions, layer = 0, ip.payload
        while not isinstance(layer, (TCP, UDP)):
            extensions += len(layer) - len(layer.payload)
            layer = layer.payload
        body = frame[start + 40 + extensions : end]
        expected = in6_chksum(number, layer.underlayer, body[:at] + b"\0\0" + body[at + 2 :])
    (stated,) = struct.unpack_from("!H", body, at)
    if stated % 0xFFFF != expected % 0xFFFF:
        found.append(f"{stated:#06x}, expected {expected:#06x}")
    return found
