# SPDX-License-Identifier: BSD-3-Clause
"""Sends 64-byte frames, no two alike, in bursts of 64: Python with rtap against C.

The subjects each have a TAP of their own in one namespace, and all run on one core:

rtap numpy      a plain Python loop; NumPy stamps a sequence number into each row of a (64, 64)
                array, ``pool.alloc_burst(64, data=array)`` copies it, ``dev.tx_burst`` sends it
rtap no numpy   the same over a bytearray and the standard library
rtap send       ``dev.send(frame)``, one frame at a time
os.write        Python without rtap
c write         write(2) from C, the baseline: non-blocking descriptor, no virtio-net header
c write block   the same on a blocking descriptor, which takes a slower path in the kernel
c uring         64 writes per io_uring_enter from C: the upper bound of rtap's engine
net_tap         DPDK's driver, testpmd txonly (its frames are all alike)

The kernel counts the frames (rx_packets of the interface), never the sender. Before the
measurement, a packet socket checks that the frames of the rtap loops arrive whole and that no two
are alike.
"""

from __future__ import annotations

import argparse
import array
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bench import dpdk
from bench.measure import Sample, Subject, alternate, bench_cpu, loop_until, pinned, write_report
from bench.rig import ETHERTYPE, FRAME, HEADER, SEQ_OFFSET, Counters, c_sender, frame, namespace
from rtap import NetNS

BURST = 64

Step = Callable[[], int]


def numpy_step(dev: Any) -> Step:
    """One burst a call, stamped with NumPy."""
    import numpy as np

    frames = np.zeros((BURST, FRAME), np.uint8)
    frames[:, : len(HEADER)] = np.frombuffer(HEADER, np.uint8)
    seqs = frames[:, SEQ_OFFSET : SEQ_OFFSET + 8].view(np.uint64)[:, 0]
    seqs[:] = np.arange(BURST)
    add, stride = np.add, np.uint64(BURST)  # avoids converting an int in each call
    alloc, send = dev.pool.alloc_burst, dev.tx_burst

    def step() -> int:
        add(seqs, stride, seqs)
        return int(send(0, alloc(BURST, data=frames)))

    return step


def plain_step(dev: Any) -> Step:
    """One burst a call, stamped with the standard library."""
    buffer = bytearray(frame(0) * BURST)
    rows = memoryview(buffer).cast("B", (BURST, FRAME))
    seqs = memoryview(buffer).cast("Q")[SEQ_OFFSET // 8 :: FRAME // 8]
    alloc, send = dev.pool.alloc_burst, dev.tx_burst
    seq = 0

    def step() -> int:
        nonlocal seq
        seqs[:] = array.array("Q", range(seq, seq + BURST))
        seq += BURST
        return int(send(0, alloc(BURST, data=rows)))

    return step


def single_step(dev: Any) -> Step:
    """64 calls of ``dev.send`` a call."""
    buffer = bytearray(frame(0))
    send, stamp = dev.send, struct.Struct("=Q").pack_into
    seq = 0

    def step() -> int:
        nonlocal seq
        sent = 0
        for value in range(seq, seq + BURST):
            stamp(buffer, SEQ_OFFSET, value)
            sent += send(buffer)
        seq += BURST
        return sent

    return step


def os_write_step(fd: int) -> Step:
    """64 calls of ``os.write`` a call."""
    import os

    buffer = bytearray(frame(0))
    write, stamp = os.write, struct.Struct("=Q").pack_into
    seq = 0

    def step() -> int:
        nonlocal seq
        for value in range(seq, seq + BURST):
            stamp(buffer, SEQ_OFFSET, value)
            write(fd, buffer)
        seq += BURST
        return BURST

    return step


def counted(step: Step, counters: Counters, ifname: str) -> Subject:
    """A subject that runs ``step``; the kernel's rx_packets count its frames.

    RuntimeError when the kernel counted other than the loop sent.
    """

    def run(seconds: float) -> Sample:
        before = counters.read(ifname)["rx_packets"]
        sample = loop_until(step, seconds, 4)
        moved = counters.read(ifname)["rx_packets"] - before
        if moved != sample.frames:
            raise RuntimeError(f"{ifname}: {sample.frames} sent, the kernel counted {moved}")
        return Sample(moved, sample.seconds, sample.cpu_ns)

    return run


def check_distinct(ns: NetNS, ifname: str, step: Step, bursts: int = 10) -> None:
    """RuntimeError unless all frames of ``bursts`` bursts arrive, whole and no two alike."""
    sock = ns.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        ns.call(sock.bind, (ifname, ETHERTYPE))
        sock.settimeout(1)
        sent = sum(step() for _ in range(bursts))
        seen = {sock.recv(2048) for _ in range(sent)}
    wrong = [data for data in seen if len(data) != FRAME or data[: len(HEADER)] != HEADER]
    if sent != bursts * BURST or len(seen) != sent or wrong:
        raise RuntimeError(f"{ifname}: {sent} sent, {len(seen)} distinct, {len(wrong)} malformed")


def rtap_subjects(stack: ExitStack, ns: NetNS, engine: str) -> dict[str, Subject]:
    """The Python loops, each over a device of its own and checked."""
    import rtap

    counters = stack.enter_context(Counters(ns))
    subjects: dict[str, Subject] = {}
    steps: list[tuple[str, Callable[[Any], Step]]] = [
        ("rtap numpy", numpy_step),
        ("rtap no numpy", plain_step),
        ("rtap send", single_step),
    ]
    for i, (name, make) in enumerate(steps):
        ifname = f"py{i}"
        dev = stack.enter_context(ns.call(rtap.open, ifname, nb_mbufs=512, engine=engine))
        step = make(dev)
        check_distinct(ns, ifname, step)
        subjects[name] = counted(step, counters, ifname)
    return subjects


def os_write_subject(stack: ExitStack, ns: NetNS) -> Subject:
    """``os.write`` to a TAP opened by hand, non-blocking."""
    import fcntl
    import os

    def make() -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        # TUNSETIFF, IFF_TAP | IFF_NO_PI
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"oswrite0", 0x0002 | 0x1000))
        with socket.socket() as sock:
            # SIOCSIFFLAGS, IFF_UP
            fcntl.ioctl(sock, 0x8914, struct.pack("16sH22x", b"oswrite0", 1))
        return fd

    fd = ns.call(make)
    stack.callback(os.close, fd)
    return counted(os_write_step(fd), stack.enter_context(Counters(ns)), "oswrite0")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 when the figures are valid, 1 when the control voids them."""
    parser = argparse.ArgumentParser(prog="bench.send64", description=__doc__.partition("\n")[0])
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per slice (default 0.1)")
    parser.add_argument("--engine", default="auto", help="rtap's engine: auto, uring or syscall")
    parser.add_argument("--no-rtap", action="store_true", help="only what rtap is compared with")
    parser.add_argument("--no-dpdk", action="store_true", help="leave net_tap out")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)

    with ExitStack() as stack:
        ns = stack.enter_context(namespace())
        subjects: dict[str, Subject] = {}
        skipped = dpdk.available() if not args.no_dpdk else "--no-dpdk"
        if skipped is None:
            pmd = stack.enter_context(dpdk.txonly(ns))
        stack.enter_context(pinned(bench_cpu()))
        if not args.no_rtap:
            subjects.update(rtap_subjects(stack, ns, args.engine))
        subjects["os.write"] = os_write_subject(stack, ns)
        for name, mode, options in (
            ("c write", "write", ()),
            ("c write block", "write", ("--blocking",)),
            ("c uring", "uring", ()),
        ):
            sender = c_sender(ns, mode, f"c{len(subjects)}", *options)
            subjects[name] = stack.enter_context(sender).slice
        if skipped is None:
            subjects["net_tap"] = pmd.slice
        begun = time.perf_counter()
        rounds = alternate(
            subjects,
            control="c write" if args.no_rtap else "rtap numpy",
            slices=args.slices,
            seconds=args.seconds,
            progress=lambda line: print(line, file=sys.stderr),
        )
        took = time.perf_counter() - begun

    lines = [f"64-byte sends, bursts of {BURST}, {took:.0f} s", rounds.table("c write")]
    if skipped is not None:
        lines.append(f"net_tap skipped: {skipped}")
    result: dict[str, Any] = {"benchmark": "send64", **rounds.to_json("c write")}
    result["skipped"] = {"net_tap": skipped} if skipped else {}
    if not args.no_rtap:
        targets = {
            f"rtap numpy / {other}": rounds.ratio("rtap numpy", other)
            for other in ("c write", "c write block", "net_tap", "os.write")
            if other in subjects
        }
        lines += [f"{name}: {ratio:.3f}" for name, ratio in targets.items()]
        result["targets"] = {name: ratio.to_json() for name, ratio in targets.items()}
    write_report(args.json, result, "\n".join(lines))
    return 1 if rounds.void else 0


if __name__ == "__main__":
    raise SystemExit(main())
