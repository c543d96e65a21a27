# SPDX-License-Identifier: BSD-3-Clause
"""Real programs between network namespaces, and the kernel's counters for them."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from typing import Any

from patience import patient
from rigs import Wire, write_in
from support import add_ipv6, eventually

from rtap import EthDev, NetNS

IPERF3_PORT = 5201


def proc_net(ns: NetNS, name: str) -> str:
    """A file of /proc/net in the namespace."""

    def read() -> str:
        with open(f"/proc/thread-self/net/{name}") as f:
            return f.read()

    text: str = ns.call(read)
    return text


def netstat(ns: NetNS) -> dict[str, int]:
    """The counters of TCP and IP beyond their MIBs, as in nstat(8): "TcpExtTCPOFOQueue" etc."""
    return _figures(proc_net(ns, "netstat"))


def snmp(ns: NetNS) -> dict[str, int]:
    """The MIB counters of IPv4, ICMP, TCP and UDP: "UdpInDatagrams" etc."""
    return _figures(proc_net(ns, "snmp"))


def _figures(text: str) -> dict[str, int]:
    lines = text.splitlines()
    found: dict[str, int] = {}
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        (prefix, *keys), (_, *numbers) = names.split(), values.split()
        found |= zip((prefix.rstrip(":") + k for k in keys), map(int, numbers), strict=True)
    return found


def enable_ipv6(ns: NetNS, *ifnames: str) -> None:
    for name in ("all", "default", *ifnames):
        write_in(ns, f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "0")


def six(w: Wire) -> None:
    """Give the ends of a wire the addresses fd09::1 and fd09::2."""
    for ns, dev, address in ((w.left, w.a, "fd09::1"), (w.right, w.b, "fd09::2")):
        enable_ipv6(ns, dev.ifname)
        add_ipv6(ns, dev.ifname, address)


#: The most bytes of a flow in flight after `at_any_speed`: twice the size of both buffers.
ON_ITS_WAY = 4 << 20


def at_any_speed(w: Wire) -> None:
    """Make TCP at the ends of a wire behave the same on slow and fast machines.

    It sends super-frames of full length, whatever the rate of the flow, and its buffers hold a
    megabyte each.
    """
    for ns in (w.left, w.right):
        for name, value in (
            ("tcp_min_tso_segs", "44"),
            ("tcp_rmem", "4096 131072 1048576"),
            ("tcp_wmem", "4096 16384 1048576"),
        ):
            write_in(ns, f"/proc/sys/net/ipv4/{name}", value)


def assert_nothing_lost(w: Wire) -> None:
    """Each device of a wire sent exactly what the other received, and nothing was dropped."""

    def passed_on(there: EthDev, back: EthDev) -> bool:
        came, left = there.stats(), back.stats()
        return (came.ipackets, came.ibytes) == (left.opackets, left.obytes)

    for there, back in ((w.a, w.b), (w.b, w.a)):
        eventually(partial(passed_on, there, back), "all that was received is sent")
    for dev in (w.a, w.b):
        stats = dev.stats()
        assert (stats.ierrors, stats.oerrors, stats.imissed) == (0, 0, 0)


def listening(ns: NetNS, port: int) -> bool:
    """Whether a TCP port is open: a socket in state TCP_LISTEN."""
    lines = proc_net(ns, "tcp").splitlines() + proc_net(ns, "tcp6").splitlines()
    return any(f":{port:04X} " in line and " 0A " in line for line in lines)


def iperf3(
    client: NetNS, server: NetNS, address: str, *options: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The final reports of the client and of the server."""
    process = server.popen(["iperf3", "-s", "-1", "-J"], stdout=subprocess.PIPE, text=True)
    try:
        eventually(lambda: listening(server, IPERF3_PORT), "iperf3 listens", 20)
        done = client.run(
            ["iperf3", "-J", "-c", address, *options],
            capture_output=True,
            text=True,
            timeout=patient(60),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        received, _ = process.communicate(timeout=patient(20))
        assert process.returncode == 0, received
    finally:
        process.kill()
        process.communicate()
    return json.loads(done.stdout)["end"], json.loads(received)["end"]
