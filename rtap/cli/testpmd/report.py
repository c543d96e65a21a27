# SPDX-License-Identifier: BSD-3-Clause
"""The reports of ``rtap testpmd`` about ports and forwarding, as text and for --json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import rtap
from rtap.cli.testpmd.forwarding import Forwarding, PortForward
from rtap.cli.testpmd.options import Options
from rtap.cli.testpmd.ports import Port
from rtap.ethdev.ops import LINK_SPEED_UNKNOWN, Stats
from rtap.flags import RxOffload, TxOffload, flag_names

__all__ = [
    "config",
    "forward_statistics",
    "json_report",
    "port_info",
    "port_statistics",
    "port_summary",
    "port_xstats",
]

WIDTH = 76


def _title(text: str, fill: str) -> str:
    return "  " + f" {text} ".center(WIDTH, fill)


def _end(fill: str) -> str:
    return "  " + fill * WIDTH


def _columns(*pairs: tuple[str, object]) -> str:
    return "  " + "".join(f"{f'{name}: {value}':<26}" for name, value in pairs).rstrip()


def _switch(on: bool) -> str:
    return "on" if on else "off"


# ---- forwarding


def _forward(counts: PortForward, rule: str, checked: bool) -> list[str]:
    lines = [
        _columns(
            ("RX-packets", counts.rx_packets),
            ("RX-dropped", counts.rx_dropped),
            ("RX-total", counts.rx_total),
        )
    ]
    if checked:
        lines += [
            _columns(
                ("Bad-ipcsum", counts.bad_ipcsum),
                ("Bad-l4csum", counts.bad_l4csum),
                ("Bad-outer-l4csum", counts.bad_outer_l4csum),
            ),
            _columns(("Bad-outer-ipcsum", counts.bad_outer_ipcsum)),
        ]
    if counts.rx_errors or counts.rx_nombuf:
        lines.append(_columns(("RX-errors", counts.rx_errors), ("RX-nombufs", counts.rx_nombuf)))
    lines.append(
        _columns(
            ("TX-packets", counts.tx_packets),
            ("TX-dropped", counts.tx_dropped),
            ("TX-total", counts.tx_total),
        )
    )
    lines.append(_end(rule))
    return lines


def forward_statistics(forwarding: Forwarding) -> list[str]:
    """Each port's share of the forwarded frames, then the sum."""
    lines = []
    statistics = forwarding.statistics()
    checked = forwarding.mode.name == "csum"
    for port, counts in zip(forwarding.ports, statistics, strict=True):
        lines.append(_title(f"Forward statistics for port {port.number}", "-"))
        lines += _forward(counts, "-", checked)
        lines.append("")
    lines.append(_title("Accumulated forward statistics for all ports", "+"))
    lines += _forward(_total(statistics), "+", checked)
    if forwarding.held:
        lines.append(f"  {forwarding.held} frames were still held back, and are lost.")
    return lines


def _total(statistics: Sequence[PortForward]) -> PortForward:
    return PortForward(
        *(
            sum(getattr(counts, name) for counts in statistics)
            for name in PortForward.__dataclass_fields__
        )
    )


def json_report(forwarding: Forwarding, options: Options) -> dict[str, Any]:
    """The object of --json: forwarding's counts, by port and in total, in frames and bytes."""
    ports = []
    for port, counts in zip(forwarding.ports, forwarding.statistics(), strict=True):
        info = port.dev.info()
        ports.append(
            {
                "port": port.number,
                "device": port.dev.name,
                "ifname": info.ifname,
                "engine": info.engine,
                **_counts(counts),
                "stats": asdict(port.dev.stats()),
            }
        )
    return {
        "forward_mode": forwarding.mode.name,
        "seconds": round(forwarding.seconds, 6),
        "burst": options.burst,
        "rxq": options.rxq,
        "txq": options.txq,
        "nb_cores": options.nb_cores,
        "ports": ports,
        "total": _counts(_total(forwarding.statistics())),
        "held_back": forwarding.held,
        "ended": forwarding.ended(),
        "kernel": os.uname().release,
        "version": rtap.__version__,
    }


def _counts(counts: PortForward) -> dict[str, int]:
    return asdict(counts) | {"rx_total": counts.rx_total, "tx_total": counts.tx_total}


def config(forwarding: Forwarding, options: Options) -> list[str]:
    """Mode and streams, present or of the next start."""
    shares = forwarding.shares()
    streams = sum(map(len, shares))
    lines = [
        f"{options.forward_mode} packet forwarding - ports={len(forwarding.ports)} - "
        f"cores={len(shares)} - streams={streams} - burst={options.burst}"
    ]
    for number, share in enumerate(shares):
        cpu = f" on CPU {options.cpus[number % len(options.cpus)]}" if options.cpus else ""
        lines.append(f"Core {number}{cpu} forwards on {len(share)} streams:")
        lines += [
            f"  RX P={s.rx.number}/Q={s.queue} -> TX P={s.tx.number}/Q={s.queue} peer={s.tx.peer}"
            for s in share
        ]
    return lines


# ---- ports


def port_statistics(
    port: Port, stats: Stats, rates: tuple[float, float, float, float]
) -> list[str]:
    """The port's counters, and packets and bits per second (rx, tx) since they were last shown."""
    rx_pps, rx_bps, tx_pps, tx_bps = rates
    return [
        _title(f"NIC statistics for port {port.number}", "#"),
        _columns(
            ("RX-packets", stats.ipackets),
            ("RX-missed", stats.imissed),
            ("RX-bytes", stats.ibytes),
        ),
        _columns(("RX-errors", stats.ierrors), ("RX-nombuf", stats.rx_nombuf)),
        _columns(
            ("TX-packets", stats.opackets),
            ("TX-errors", stats.oerrors),
            ("TX-bytes", stats.obytes),
        ),
        "",
        "  Throughput (since last show)",
        _columns(("Rx-pps", round(rx_pps)), ("Rx-bps", round(rx_bps))),
        _columns(("Tx-pps", round(tx_pps)), ("Tx-bps", round(tx_bps))),
        _end("#"),
    ]


def port_xstats(port: Port) -> list[str]:
    """The port's extended statistics, a name and a number on each line."""
    lines = [_title(f"NIC extended statistics for port {port.number}", "#")]
    lines += [f"  {name}: {value}" for name, value in port.dev.xstats().items()]
    return lines


def _speed(mbps: int) -> str:
    return "unknown" if mbps == LINK_SPEED_UNKNOWN else f"{mbps} Mbps"


def port_info(port: Port) -> list[str]:
    """Facts about the port and its set-up."""
    dev = port.dev
    info, link = dev.info(), dev.link()
    rx = ", ".join(flag_names(info.rx_offloads, RxOffload)) or "none"
    tx = ", ".join(flag_names(info.tx_offloads, TxOffload)) or "none"
    facts: list[tuple[str, object]] = [
        ("MAC address", dev.app_mac),
        ("Peer address", port.peer),
        ("Device name", dev.name),
        ("Driver name", info.driver_name),
        ("Interface", f"{info.ifname} ({info.mac})" if info.ifname else "none"),
        ("Engine", f"{info.engine} ({info.engine_reason})" if info.engine_reason else info.engine),
        ("State", info.state),
        ("Link status", "up" if link.link_status else "down"),
        ("Link speed", _speed(link.link_speed)),
        ("Link duplex", "full-duplex" if link.link_duplex else "half-duplex"),
        ("MTU", info.mtu),
        ("Promiscuous mode", _switch(dev.promiscuous)),
        ("Allmulticast mode", _switch(dev.allmulticast)),
        ("Maximum number of MAC addresses", info.max_mac_addrs),
        ("Minimum size of RX buffer", info.min_rx_bufsize),
        ("Maximum length of RX packet", info.max_rx_pktlen),
        ("RX queues", f"{info.nb_rx_queues} of {info.max_rx_queues}"),
        ("TX queues", f"{info.nb_tx_queues} of {info.max_tx_queues}"),
        ("RX offloads", rx),
        ("TX offloads", tx),
    ]
    lines = [_title(f"Infos for port {port.number}", "*")]
    return lines + [f"  {name}: {value}" for name, value in facts]


def port_summary(ports: Sequence[Port]) -> list[str]:
    """A line for each port."""
    lines = [f"Number of available ports: {len(ports)}"]
    lines.append(f"{'Port':<5} {'MAC Address':<17} {'Name':<16} {'Driver':<12} {'Status':<7} Link")
    for port in ports:
        info, link = port.dev.info(), port.dev.link()
        status = "up" if link.link_status else "down"
        lines.append(
            f"{port.number:<5} {port.dev.app_mac:<17} {port.dev.name:<16} {info.driver_name:<12} "
            f"{info.state:<7} {status}"
        )
    return lines
