# SPDX-License-Identifier: BSD-3-Clause
"""Forward real TCP between two network namespaces, and compare with the kernel's veth pair.

Makes anonymous namespaces with a TAP device in each, forwards between them with one
worker, and pushes one TCP stream through. Then it does the same over a veth pair between two more
namespaces, and so on in turn. It changes nothing outside these namespaces, and leaves nothing
behind.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass

import rtap
from rtap.cli import tcp
from rtap.cli.arguments import whole
from rtap.cli.display import WARM_UP, Display, choose
from rtap.cli.errors import Stop
from rtap.cli.testbed import Path, RtapPath, rtap_path, veth_path
from rtap.control.netlink import MAX_MTU, MIN_MTU
from rtap.ethdev.ops import ENGINES

NAME = "demo"
HELP = "forward TCP between two network namespaces and compare with a veth pair"

MIN_PAIRS = 3
WARM_UP_S = 1


@dataclass(frozen=True)
class Pair:
    """Two slices, one after the other: TCP payload in Gb/s, packets of both directions."""

    rtap_gbps: float
    veth_gbps: float
    ratio: float
    rtap_packets_per_second: int
    veth_packets_per_second: int


@dataclass(frozen=True)
class Result:
    """The output of ``--json``. Rates and the ratio are medians over the pairs.

    The ratio is the median of the pairs' ratios, so a load that slows both slices of a pair does
    not change it. The packet counts are those of the devices, from the warm-up on, in both
    directions. Errors are frames that could not be read or sent. ``imissed``, frames that the
    kernel dropped because nobody read them in time, is not an error: it is how TCP notices a full
    queue.
    """

    throughput_gbps: float
    veth_gbps: float
    ratio: float
    packets_per_second: int
    rx_packets: int
    tx_packets: int
    errors: int
    imissed: int
    engine: str
    engine_reason: str
    client: str
    offload: bool
    mtu: int
    seconds: int
    pairs: list[Pair]
    kernel: str
    cpus: int
    version: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rtap demo``."""
    parser.add_argument(
        "--seconds",
        type=whole(1, 3600),
        default=1,
        metavar="N",
        help="length of one slice, of which there are two in a pair (default %(default)s)",
    )
    parser.add_argument(
        "--pairs",
        type=whole(MIN_PAIRS, 1000),
        default=5,
        metavar="N",
        help=f"how often to measure rtap, then veth; at least {MIN_PAIRS} (default %(default)s)",
    )
    parser.add_argument(
        "--no-offload",
        dest="offload",
        action="store_false",
        help="forward frames of the MTU, with every checksum computed (veth keeps its offloads)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="how frames move between rtap and the kernel (default: the faster that works here)",
    )
    parser.add_argument(
        "--mtu",
        type=whole(MIN_MTU, MAX_MTU),
        default=1500,
        metavar="BYTES",
        help="of all four interfaces (default %(default)s)",
    )
    parser.add_argument(
        "--client",
        choices=tcp.CLIENTS,
        default="auto",
        help="the program that sends TCP (default: iperf3 if installed, else a built-in one)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


class _Measurement:
    def __init__(self, client: tcp.Client, display: Display, stop: Stop) -> None:
        self._client = client
        self._display = display
        self._stop = stop

    def slice(self, path: Path, pair: int, seconds: int) -> tuple[float, int]:
        """One slice over `path`: Gb/s and packets per second."""
        first = last = path.traffic()
        interval = self._display.interval(seconds)
        started = since = 0.0

        def tick() -> None:
            nonlocal last, started, since
            self._stop.check()
            path.check()
            now = time.monotonic()
            # A rate includes neither the time until the client is connected nor the time after it
            # has sent.
            if last == first:
                last, started, since = path.traffic(), now, now
            elif now - since >= interval and now - started < seconds:
                traffic = path.traffic()
                gbps = (traffic.n_bytes - last.n_bytes) * 8 / (now - since) / 1e9
                pps = (traffic.packets - last.packets) / (now - since)
                self._display.live(pair, path.name, gbps, pps)
                last, since = traffic, now

        gbps = self._client.run(path, seconds, tick)
        pps = round((path.traffic().packets - first.packets) / seconds)
        self._display.done(pair, path.name, gbps, pps)
        # The output should not claim more precision than it has.
        return round(gbps, 3), pps


def _summary(result: Result) -> list[str]:
    times = f"median of {len(result.pairs)}"
    reason = f" ({result.engine_reason})" if result.engine_reason else ""
    return [
        f"rtap {result.throughput_gbps:.2f} Gb/s, veth {result.veth_gbps:.2f} Gb/s, "
        f"ratio {result.ratio:.2f} ({times}), {result.packets_per_second:,} packets/s through rtap",
        f"{result.rx_packets:,} packets in, {result.tx_packets:,} out, {result.errors} errors, "
        f"engine {result.engine}{reason}",
    ]


def _measure(args: argparse.Namespace, display: Display, stop: Stop) -> Result:
    client = tcp.find_client(args.client)
    with (
        rtap_path(offload=args.offload, engine=args.engine, mtu=args.mtu) as ours,
        veth_path(args.mtu) as theirs,
    ):
        stop.check()
        info = ours.devices[0].info()
        display.begin(
            f"TCP between two namespaces, {client.name}, MTU {args.mtu}, "
            f"offloads {'on' if args.offload else 'off'}, engine {info.engine}",
            args.pairs,
        )
        measurement = _Measurement(client, display, stop)
        for path in (ours, theirs):
            measurement.slice(path, WARM_UP, WARM_UP_S)
        pairs = []
        for number in range(args.pairs):
            rtap_gbps, rtap_pps = measurement.slice(ours, number, args.seconds)
            veth_gbps, veth_pps = measurement.slice(theirs, number, args.seconds)
            ratio = round(rtap_gbps / veth_gbps, 4)
            pairs.append(Pair(rtap_gbps, veth_gbps, ratio, rtap_pps, veth_pps))
        return _result(args, client, ours, pairs)


def _result(
    args: argparse.Namespace, client: tcp.Client, path: RtapPath, pairs: list[Pair]
) -> Result:
    path.worker.stop()
    drops = path.worker.stats().drops  # including those that the kernel refused (oerrors)
    stats = [dev.stats() for dev in path.devices]
    info = path.devices[0].info()
    return Result(
        throughput_gbps=statistics.median(pair.rtap_gbps for pair in pairs),
        veth_gbps=statistics.median(pair.veth_gbps for pair in pairs),
        ratio=statistics.median(pair.ratio for pair in pairs),
        packets_per_second=round(statistics.median(pair.rtap_packets_per_second for pair in pairs)),
        rx_packets=sum(s.ipackets for s in stats),
        tx_packets=sum(s.opackets for s in stats),
        errors=sum(s.ierrors for s in stats) + drops,
        imissed=sum(s.imissed for s in stats),
        engine=info.engine,
        engine_reason=info.engine_reason,
        client=client.name,
        offload=args.offload,
        mtu=args.mtu,
        seconds=args.seconds,
        pairs=pairs,
        kernel=os.uname().release,
        cpus=len(os.sched_getaffinity(0)),
        version=rtap.__version__,
    )


def run(args: argparse.Namespace) -> int:
    """Run ``rtap demo`` with parsed arguments."""
    with Stop().installed() as stop:
        with choose(args.json) as display:
            result = _measure(args, display, stop)
            display.summary(_summary(result))
        if args.json:
            print(json.dumps(asdict(result)))
    return 0
