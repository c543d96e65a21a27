# SPDX-License-Identifier: BSD-3-Clause
"""The options of ``rtap testpmd``: testpmd's own names, checked one by one."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass

from rtap.cli.arguments import whole
from rtap.cli.testpmd.modes import MODES, NOISY_MODES
from rtap.ether import MacAddr
from rtap.flags import RxOffload, TxOffload

__all__ = ["DEFAULT_HEADROOM", "HEADER_LEN", "Noisy", "Options", "add_arguments", "lengths"]

DEFAULT_HEADROOM = 128
#: Ethernet, IPv4 and UDP: the headers of the frames of txonly and flowgen.
HEADER_LEN = 42
MAX_BURST = 512
TOPOLOGIES = ("paired", "chained", "loop")
WAITS = ("poll", "sleep", "adaptive")


@dataclass(frozen=True)
class Noisy:
    """The additional work of mode noisy."""

    tx_sw_buffer_size: int = 0
    tx_sw_buffer_flushtime: int = 0
    lkup_memory: int = 0
    lkup_num_reads: int = 0
    lkup_num_writes: int = 0
    lkup_num_reads_writes: int = 0
    forward_mode: str = "io"


@dataclass
class Options:
    """A checked command line. The prompt may change the options that it can set."""

    vdevs: list[str]
    forward_mode: str
    rxq: int
    txq: int
    rxd: int | None
    txd: int | None
    burst: int
    nb_cores: int
    cpus: list[int]
    wait: str
    port_topology: str
    stats_period: float
    duration: float | None
    txpkts: list[int]
    txonly_multi_flow: bool
    flowgen_flows: int
    tx_first: bool
    rx_offloads: RxOffload
    tx_offloads: TxOffload
    engine: str
    mbuf_size: int | None
    total_num_mbufs: int | None
    eth_peers: dict[int, MacAddr]
    noisy: Noisy
    interactive: bool
    auto_start: bool
    json: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """Options from the result of argparse; ValueError if two of them disagree."""
        if not args.vdev:
            raise ValueError(
                "--vdev: at least one device is needed, for instance --vdev=net_rtap0,iface=foo0"
            )
        if args.json and args.interactive:
            raise ValueError("--json is for runs without a prompt, and so not with --interactive")
        if args.duration is not None and args.interactive:
            raise ValueError("--duration is for runs without a prompt, and so not with -i")
        peers = dict(args.eth_peer)
        beyond = [port for port in peers if port >= len(args.vdev)]
        if beyond:
            raise ValueError(
                f"--eth-peer: port {beyond[0]} does not exist, the last of {len(args.vdev)} is "
                f"{len(args.vdev) - 1}"
            )
        noisy = Noisy(
            **{name: getattr(args, f"noisy_{name}") for name in Noisy.__dataclass_fields__}
        )
        lookups = noisy.lkup_num_reads + noisy.lkup_num_writes + noisy.lkup_num_reads_writes
        if lookups and not noisy.lkup_memory:
            raise ValueError("--noisy-lkup-num-...: --noisy-lkup-memory says what to look up in")
        if noisy.tx_sw_buffer_flushtime and not noisy.tx_sw_buffer_size:
            raise ValueError(
                "--noisy-tx-sw-buffer-flushtime: --noisy-tx-sw-buffer-size makes the buffer"
            )
        return cls(
            vdevs=args.vdev,
            forward_mode=args.forward_mode,
            rxq=args.rxq,
            txq=args.txq,
            rxd=args.rxd,
            txd=args.txd,
            burst=args.burst,
            nb_cores=args.nb_cores,
            cpus=args.coremask,
            wait=args.wait,
            port_topology=args.port_topology,
            stats_period=args.stats_period,
            duration=args.duration,
            txpkts=args.txpkts,
            txonly_multi_flow=args.txonly_multi_flow,
            flowgen_flows=args.flowgen_flows,
            tx_first=args.tx_first,
            rx_offloads=RxOffload(args.rx_offloads | (RxOffload.SCATTER * args.enable_scatter)),
            tx_offloads=TxOffload(args.tx_offloads),
            engine=args.engine,
            mbuf_size=args.mbuf_size,
            total_num_mbufs=args.total_num_mbufs,
            eth_peers=peers,
            noisy=noisy,
            interactive=args.interactive,
            auto_start=args.auto_start,
            json=args.json,
        )


# ---- values


def seconds(text: str) -> float:
    """A finite number of seconds, not negative."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"seconds are expected, got {text!r}") from None
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"seconds are expected, got {text!r}")
    return value


def hexadecimal(text: str) -> int:
    """A bit mask, in hexadecimal with or without 0x in front, as testpmd reads it."""
    try:
        value = int(text, 16)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(
            f"a hexadecimal bit mask of up to 64 bits is expected, got {text!r}"
        )
    return value


def coremask(text: str) -> list[int]:
    """The CPUs of a mask, which this process must be allowed to use."""
    mask = hexadecimal(text)
    cpus = [bit for bit in range(64) if mask >> bit & 1]
    there = os.sched_getaffinity(0)
    if not cpus or not there.issuperset(cpus):
        raise argparse.ArgumentTypeError(
            f"a hexadecimal mask of the CPUs {', '.join(map(str, sorted(there)))} is expected, "
            f"got {text!r}"
        )
    return cpus


def lengths(text: str) -> list[int]:
    """Bytes of a frame's segments, "64" or "64,128"; the first holds the headers."""
    out = []
    for piece in text.split(","):
        try:
            out.append(int(piece, 10))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"lengths like 64 or 64,128 are expected, got {piece!r} in {text!r}"
            ) from None
    if out[0] < HEADER_LEN:
        raise argparse.ArgumentTypeError(
            f"the first segment holds the headers and has at least {HEADER_LEN} bytes, got {out[0]}"
        )
    if min(out) < 1 or sum(out) > 65535 or len(out) > 64:
        raise argparse.ArgumentTypeError(
            f"1 to 64 segments of together at most 65535 bytes are expected, got {text!r}"
        )
    return out


def eth_peer(text: str) -> tuple[int, MacAddr]:
    """``PORT,XX:XX:XX:XX:XX:XX``."""
    number, _, address = text.partition(",")
    try:
        if not number.isdecimal():
            raise ValueError(number)
        return int(number), MacAddr(address)
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"PORT,XX:XX:XX:XX:XX:XX is expected, got {text!r}"
        ) from None


# ---- the parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rtap testpmd``, in groups."""
    _add_devices(parser.add_argument_group("devices"))
    _add_forwarding(parser.add_argument_group("forwarding"))
    _add_noisy(parser.add_argument_group("forwarding mode noisy"))
    _add_running(parser.add_argument_group("running"))


def _add_devices(group: argparse._ArgumentGroup) -> None:
    def count(name: str, low: int, high: int, default: int | None, text: str) -> None:
        group.add_argument(name, type=whole(low, high), default=default, metavar="N", help=text)

    group.add_argument(
        "--vdev",
        action="append",
        default=[],
        metavar="DEVARGS",
        help="a port: net_rtap0,iface=foo0 or net_null0,size=64; may be given several times",
    )
    count("--rxq", 1, 128, 1, "receive queues of each port (default %(default)s)")
    count("--txq", 1, 128, 1, "transmit queues of each port (default %(default)s)")
    count("--rxd", 1, 32768, None, "frames taken from the kernel at a time, at most")
    count("--txd", 1, 32768, None, "frames given to the kernel at a time, at most")
    group.add_argument(
        "--rx-offloads",
        type=hexadecimal,
        default=0,
        metavar="0xMASK",
        help="bits of rtap.RxOffload, which are DPDK's; 0x1c is UDP, TCP checksum and LRO",
    )
    group.add_argument(
        "--tx-offloads",
        type=hexadecimal,
        default=0,
        metavar="0xMASK",
        help="bits of rtap.TxOffload, which are DPDK's",
    )
    group.add_argument(
        "--enable-scatter", action="store_true", help="receive long frames in several mbufs"
    )
    count("--mbuf-size", 256, 1 << 20, None, "bytes of an mbuf, headroom included")
    count("--total-num-mbufs", 64, 1 << 24, None, "mbufs in the ports' pool")
    group.add_argument(
        "--engine",
        choices=("auto", "uring", "syscall"),
        default="auto",
        help="how frames move between rtap and the kernel (default: the faster that works here)",
    )


def _add_forwarding(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--forward-mode",
        choices=tuple(MODES),
        default="io",
        metavar="MODE",
        help=f"one of {', '.join(MODES)} (default %(default)s)",
    )
    group.add_argument(
        "--port-topology",
        choices=TOPOLOGIES,
        default="paired",
        help="port 0 to port 1 and back, 2 to 3; each to the next; or each to itself",
    )
    group.add_argument(
        "--burst",
        type=whole(1, MAX_BURST),
        default=32,
        metavar="N",
        help="most frames moved at a time (default %(default)s)",
    )
    group.add_argument(
        "--nb-cores",
        type=whole(1, 128),
        default=1,
        metavar="N",
        help="forwarding threads (default %(default)s)",
    )
    group.add_argument(
        "--coremask",
        type=coremask,
        default=[],
        metavar="0xMASK",
        help="CPUs that the threads are pinned to, in turn",
    )
    group.add_argument(
        "--wait",
        choices=WAITS,
        default="adaptive",
        help="what threads do when nothing arrives (default %(default)s)",
    )
    group.add_argument(
        "--txpkts",
        type=lengths,
        default=[64],
        metavar="N[,N...]",
        help="bytes of the segments of the frames that txonly and flowgen make (default 64)",
    )
    group.add_argument(
        "--txonly-multi-flow", action="store_true", help="txonly varies the source address"
    )
    group.add_argument(
        "--flowgen-flows",
        type=whole(1, 0x7FFFFFFF),
        default=1024,
        metavar="N",
        help="flows that flowgen makes (default %(default)s)",
    )
    group.add_argument(
        "--no-flush-rx",
        action="store_true",
        help="accepted for DPDK's scripts: frames that wait at the start are always forwarded",
    )
    group.add_argument(
        "--eth-peer",
        action="append",
        type=eth_peer,
        default=[],
        metavar="PORT,MAC",
        help="destination of made and rewritten frames (default 02:00:00:00:00:PORT)",
    )


def _add_noisy(group: argparse._ArgumentGroup) -> None:
    for name, high, text in (
        ("tx-sw-buffer-size", 1 << 20, "frames that a buffer behind each receive queue holds back"),
        ("tx-sw-buffer-flushtime", 3_600_000, "ms after which a buffer that rests is emptied"),
        ("lkup-memory", 1 << 16, "MiB of memory to look up in"),
        ("lkup-num-writes", 1 << 20, "random writes for each frame"),
        ("lkup-num-reads", 1 << 20, "random reads for each frame"),
        ("lkup-num-reads-writes", 1 << 20, "random places read and written for each frame"),
    ):
        group.add_argument(
            f"--noisy-{name}", type=whole(0, high), default=0, metavar="N", help=text
        )
    group.add_argument(
        "--noisy-forward-mode",
        choices=NOISY_MODES,
        default="io",
        help="what happens to the frames (default %(default)s)",
    )


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-i", "--interactive", action="store_true", help="ask for commands")
    group.add_argument(
        "-a", "--auto-start", action="store_true", help="forward before the first command"
    )
    group.add_argument(
        "--tx-first", action="store_true", help="send a burst out of every port to begin with"
    )
    group.add_argument(
        "--stats-period",
        type=seconds,
        default=1.0,
        metavar="SECONDS",
        help="seconds between two reports of the rates, 0 for none (default 1; not at a prompt)",
    )
    group.add_argument(
        "--duration",
        type=seconds,
        metavar="SECONDS",
        help="how long to forward; until Ctrl-C when not given",
    )
    group.add_argument(
        "--json", action="store_true", help="print the statistics as one JSON object, nothing else"
    )
