# SPDX-License-Identifier: BSD-3-Clause
"""Measures TCP between two namespaces through rtap, the kernel's veth pair and DPDK's net_tap.

One iperf3 stream at MTU 1500 runs over five paths, which exist side by side and take turns:

veth            a veth pair with nothing in between: the kernel by itself
rtap            TAP - rtap.Worker - TAP with checksum and segmentation offloads (super-frames)
rtap plain      the same without offloads: every 1500-byte frame is forwarded
rtap frames     the same with rx_gso and tx_gro: rtap splits the super-frames that the kernel hands
                over, forwards the 1500-byte frames, and merges them again for the kernel
net_tap         TAP - dpdk-testpmd (io forwarding on one core) - TAP

The scheduler places sender, receiver and forwarder on the machine's cores, as it would for a user.
Rates are what iperf3's server received.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bench import dpdk
from bench.measure import Rounds, Sample, Subject, alternate, write_report
from bench.rig import namespace, run
from rtap import NetNS

ADDRESSES = ("10.64.0.1", "10.64.0.2")


def throughput(left: NetNS, right: NetNS) -> Subject:
    """A subject whose unit is bits: one iperf3 stream of at least a second."""

    def subject(seconds: float) -> Sample:
        if seconds < 0.5:
            return Sample(1, 1.0)  # the warm-up of alternate(); iperf3 counts in whole seconds
        rate = dpdk.iperf3(left, right, ADDRESSES[1], seconds)
        return Sample(round(rate * seconds), seconds)

    return subject


def address(ns: NetNS, ifname: str, end: int) -> None:
    """Give an interface its end's address and bring it up."""
    run(ns, f"ip addr add {ADDRESSES[end]}/24 dev {ifname}")
    run(ns, f"ip link set {ifname} up")


def veth(stack: ExitStack) -> Subject:
    """Two namespaces joined by a veth pair."""
    left, right = (stack.enter_context(namespace()) for _ in range(2))
    run(left, f"ip link add v0 type veth peer name v1 netns {right.path}")
    address(left, "v0", 0)
    address(right, "v1", 1)
    return throughput(left, right)


def forwarded(
    stack: ExitStack, engine: str, offload: bool, options: dict[str, Any] | None = None
) -> Subject:
    """Two namespaces with a TAP each; an rtap worker forwards in both directions."""
    import rtap

    rx: Any = 0
    tx: Any = 0
    if offload:
        rx = rtap.RxOffload.TCP_LRO | rtap.RxOffload.TCP_CKSUM | rtap.RxOffload.UDP_CKSUM
        tx = rtap.TxOffload.TCP_TSO | rtap.TxOffload.TCP_CKSUM | rtap.TxOffload.UDP_CKSUM
        tx |= rtap.TxOffload.MULTI_SEGS
    sides = [stack.enter_context(namespace()) for _ in range(2)]
    devs: list[Any] = []
    for end, ns in enumerate(sides):
        dev = ns.call(
            rtap.open,
            f"tap{end}",
            rx_offloads=rx,
            tx_offloads=tx,
            engine=engine,
            **(options or {}),
        )
        devs.append(stack.enter_context(dev))
        address(ns, f"tap{end}", end)
    worker: Any = rtap.Worker()
    worker.forward((devs[0], 0), (devs[1], 0))
    worker.forward((devs[1], 0), (devs[0], 0))
    stack.enter_context(worker)
    return throughput(*sides)


def net_tap(stack: ExitStack) -> Subject:
    """Two namespaces joined by testpmd, which forwards only during slices."""
    left, right, pmd = stack.enter_context(dpdk.tcp_path())
    plain = throughput(left, right)

    def subject(seconds: float) -> Sample:
        pmd.start()
        try:
            return plain(seconds)
        finally:
            pmd.stop()

    return subject


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 when the figures are valid, 1 when the control voids them."""
    parser = argparse.ArgumentParser(prog="bench.tcp", description=__doc__.partition("\n")[0])
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per slice (default 1)")
    parser.add_argument("--attempts", type=int, default=2, help="tries for a valid control")
    parser.add_argument("--engine", default="auto", help="rtap's engine: auto, uring or syscall")
    parser.add_argument("--no-rtap", action="store_true", help="only what rtap is compared with")
    parser.add_argument("--paths", help="comma-separated names of the paths to measure")
    parser.add_argument("--no-plain", action="store_true", help="leave out rtap without offloads")
    parser.add_argument("--no-dpdk", action="store_true", help="leave net_tap out")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)

    skipped = dpdk.available() if not args.no_dpdk else "--no-dpdk"
    makers: dict[str, Callable[[ExitStack], Subject]] = {"veth": veth}
    if not args.no_rtap:
        makers["rtap"] = lambda stack: forwarded(stack, args.engine, True)
    if not args.no_rtap and not args.no_plain:
        makers["rtap plain"] = lambda stack: forwarded(stack, args.engine, False)
        makers["rtap frames"] = lambda stack: forwarded(
            stack, args.engine, False, {"rx_gso": True, "tx_gro": True}
        )
    if skipped is None:
        makers["net_tap"] = net_tap
    if args.paths:
        wanted = args.paths.split(",")
        for name in wanted:
            if name not in makers:
                parser.error(f"no path {name!r}; there are {', '.join(makers)}")
        makers = {name: makers[name] for name in wanted}
    first = next(iter(makers))
    with ExitStack() as stack:
        rounds: Rounds = alternate(
            {name: make(stack) for name, make in makers.items()},
            slices=args.slices,
            seconds=args.seconds,
            attempts=args.attempts,
            progress=lambda line: print(line, file=sys.stderr),
        )
    lines = ["TCP between two namespaces", rounds.table(first, "Gb/s", 1e9)]
    result: dict[str, Any] = {"benchmark": "tcp", "unit": "bit/s", **rounds.to_json(first)}
    if skipped is not None:
        lines.append(f"net_tap skipped: {skipped}")
    result["skipped"] = {"net_tap": skipped} if skipped else {}
    targets = {
        f"{a} / {b}": rounds.ratio(a, b)
        for a, b in (
            ("rtap", "veth"),
            ("rtap plain", "net_tap"),
            ("rtap frames", "rtap plain"),
        )
        if a in makers and b in makers
    }
    lines += [f"{name}: {ratio:.3f}" for name, ratio in targets.items()]
    result["targets"] = {name: ratio.to_json() for name, ratio in targets.items()}
    write_report(args.json, result, "\n".join(lines))
    return 1 if rounds.void else 0


if __name__ == "__main__":
    raise SystemExit(main())
