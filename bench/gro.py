# SPDX-License-Identifier: BSD-3-Clause
"""Measures the cost of software receive coalescing, beside a memcpy of the same bytes.

45 TCP frames with 1460 bytes of payload become a super-frame of 44 and a frame. They are in the
cache, checksums are verified, and no Python objects are involved:

memcpy          45 * 1514 bytes in one piece
chain           coalesced; the super-frame is a chain of the frames' payloads
copy            coalesced; the payloads are copied into one 64 KiB slot

44 frames, coalesced and written to a TAP device with virtio-net headers:

frames          one write for each frame
send chain      one writev of the chain
send copy       one write of the slot
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from bench import native
from bench.measure import Sample, Subject, alternate, bench_cpu, pinned, write_report
from bench.rig import namespace, run
from rtap.control import tun

COUNT, SIZE = 45, 1460
#: How many of the frames fit into one IP packet.
FITTING = 44


def ones_sum(data: bytes) -> int:
    """The Internet checksum (RFC 1071), not complemented."""
    total = int.from_bytes(data + b"\0" * (len(data) % 2), "big")
    return total % 0xFFFF or (0xFFFF if total else 0)


def tcp_frames(count: int = COUNT, size: int = SIZE) -> list[bytes]:
    """Frames of one flow from a sender whose MTU is ``size`` + 40."""
    out = []
    pseudo = bytes([10, 0, 0, 1, 10, 0, 0, 2])
    for n in range(count):
        payload = os.urandom(size)
        tcp = struct.pack("!HHIIBBHHH", 1, 2, n * size, 1, 0x50, 0x10, 500, 0, 0)
        total = ones_sum(pseudo + struct.pack("!HH", 6, 20 + size) + tcp + payload)
        tcp = tcp[:16] + (~total & 0xFFFF).to_bytes(2, "big") + tcp[18:]
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 40 + size, n, 0x4000, 64, 6, 0) + pseudo
        ip = ip[:10] + (~ones_sum(ip) & 0xFFFF).to_bytes(2, "big") + ip[12:]
        out.append(bytes.fromhex("020000000b01020000000a010800") + ip + tcp + payload)
    return out


def timed(step: Callable[[int], object], batch: int) -> Subject:
    """A subject whose frames are trains and whose seconds are the thread's CPU time.

    Nothing here waits, and other load on the machine should not count.
    """

    def subject(seconds: float) -> Sample:
        done = 0
        cpu = time.thread_time_ns()
        start = now = time.perf_counter()
        while now - start < seconds:
            step(batch)
            done += batch
            now = time.perf_counter()
        cpu = time.thread_time_ns() - cpu
        return Sample(done, cpu / 1e9, cpu)

    return subject


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 when the figures are valid, 1 when the control voids them."""
    parser = argparse.ArgumentParser(prog="bench.gro", description=__doc__.partition("\n")[0])
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per slice (default 0.1)")
    parser.add_argument("--engine", default="auto", help="ignored; bench.run passes it")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)

    loops: Any = native.load("gro_loops")
    train, fitting = loops.Train(tcp_frames()), loops.Train(tcp_frames(FITTING))
    assert train.rounds("chain", 1) == train.rounds("copy", 1) == 2
    assert fitting.rounds("chain", 1) == fitting.rounds("copy", 1) == 1
    results: dict[str, Any] = {"benchmark": "gro", "unit": "trains/s"}
    lines = []
    with pinned(bench_cpu()), namespace() as ns:
        kernels = alternate(
            {
                how: timed(lambda n, how=how: train.rounds(how, n), 1000)  # type: ignore[misc]
                for how in ("memcpy", "chain", "copy", "restore")
            },
            slices=args.slices,
            seconds=args.seconds,
            progress=lambda line: print(line, file=sys.stderr),
        )
        lines += [
            f"coalescing {COUNT} x {SIZE} bytes",
            kernels.table("memcpy", "k trains/s", 1e3),
        ]
        results["kernels"] = kernels.to_json("memcpy")
        for how in ("chain", "copy"):
            lines.append(f"{how} takes {kernels.ratio('memcpy', how):.2f} times a memcpy")
        results["targets"] = {"chain / memcpy": kernels.ratio("chain", "memcpy").to_json()}

        fd, _ = ns.call(tun.open_queue, "gro0", "tap", vnet_hdr=True)
        try:
            run(ns, "ip link set gro0 up")
            sends = alternate(
                {
                    name: timed(lambda n, how=how: fitting.send(fd, how, n), 20)  # type: ignore[misc]
                    for name, how in (
                        ("frames", "frames"),
                        ("send chain", "chain"),
                        ("send copy", "copy"),
                    )
                },
                slices=args.slices,
                seconds=args.seconds,
                progress=lambda line: print(line, file=sys.stderr),
            )
        finally:
            os.close(fd)
        lines += ["", "and written to a TAP device", sends.table("frames", "k trains/s", 1e3)]
        results["sends"] = sends.to_json("frames")
        against = sends.ratio("send chain", "send copy")
        lines.append(f"send chain / send copy: {against:.3f}")
        results["targets"]["send chain / send copy"] = against.to_json()
    write_report(args.json, results, "\n".join(lines))
    return 1 if kernels.void or sends.void else 0


if __name__ == "__main__":
    raise SystemExit(main())
