# SPDX-License-Identifier: BSD-3-Clause
"""Measures the offload kernels: loops over mbufs, without Python objects.

*checksum* sums the 1500-byte frames of a burst, against a plain C loop over 16-bit words at -O2.
*segment* splits a super-frame of 64 KiB at 1460 bytes into mbufs, with all checksums, and frees
them, against a memcpy of the same bytes in the cache.
"""

from __future__ import annotations

import argparse
import struct
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType

import rtap
from bench import native
from bench.measure import Rounds, Sample, Subject, alternate, bench_cpu, pinned, write_report

BURST = 64
FRAME = 1500
SUPER = 65535
MSS = 1460


def timed(step: Callable[[int], int]) -> Subject:
    """A subject that runs `step` for as many rounds as fit; it first measures how many.

    Its frames are bytes, and its seconds are the thread's CPU time: nothing here waits, and other
    load on the machine should not count.
    """
    rounds = 1
    while True:
        start = time.thread_time_ns()
        step(rounds)
        if (took := time.thread_time_ns() - start) > 10_000_000:
            break
        rounds *= 4
    per_second = rounds / took * 1e9

    def run(seconds: float) -> Sample:
        start = time.thread_time_ns()
        n = step(max(1, int(per_second * seconds)))
        cpu = time.thread_time_ns() - start
        return Sample(n, cpu / 1e9, cpu)

    return run


def super_frame() -> bytes:
    """TCP over IPv4 with a timestamp option, as long as a frame may be."""
    payload = SUPER - 20 - 32
    ip = struct.pack("!BBHHHBBH", 0x45, 0, SUPER, 1, 0x4000, 64, 6, 0) + bytes(8)
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 0x80, 0x18, 500, 0, 0) + b"\1\1\x08\x0a" + bytes(8)
    return bytes(12) + b"\x08\x00" + ip + tcp + bytes(i * 7 & 0xFF for i in range(payload))


def checksums(module: ModuleType) -> Mapping[str, Subject]:
    """Subjects over one burst of frames in slots of 2 KiB."""
    pool = rtap.Mempool(BURST, 2048)
    data = [bytes((i * j) & 0xFF for j in range(FRAME)) for i in range(1, BURST + 1)]
    burst = pool.alloc_burst(BURST, data)
    return {
        "checksum": timed(partial(module.checksum_loop, burst, False)),
        "C u16 loop": timed(partial(module.checksum_loop, burst, True)),
    }


def splits(module: ModuleType, gso_size: int, data_room: int) -> Mapping[str, Subject]:
    """Subjects over one super-frame in a slot of 64 KiB."""
    pool = rtap.Mempool(1, 1 << 17)
    frame = pool.alloc(super_frame())
    frame.ol_flags = rtap.MbufFlag.TX_TCP_SEG
    frame.tso_segsz = gso_size
    target = rtap.Mempool(256, data_room)
    return {
        "segment": timed(partial(module.segment_loop, frame, target)),
        "memcpy": timed(partial(module.copy_loop, len(frame))),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 0 when no run is void."""
    parser = argparse.ArgumentParser(prog="bench.offload", description=__doc__.partition("\n")[0])
    parser.add_argument("--slices", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--engine", help="ignored: nothing here goes through a device")
    parser.add_argument("--gso-size", type=int, default=MSS)
    parser.add_argument("--data-room", type=int, default=2048, help="data room of the mbufs")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    module = native.load("offload_loops", "sum16.c", level="-O2")
    with pinned(bench_cpu()):
        parts = {
            "checksum": (checksums(module), "C u16 loop"),
            "segment": (splits(module, args.gso_size, args.data_room), "memcpy"),
        }
        results: dict[str, Rounds] = {
            name: alternate(subjects, slices=args.slices, seconds=args.seconds)
            for name, (subjects, _) in parts.items()
        }
    text = []
    report = {}
    for name, rounds in results.items():
        baseline = parts[name][1]
        text += [f"{name}, GB/s of one core", rounds.table(baseline, unit="GB/s", scale=1e9)]
        text.append("")
        report[name] = rounds.to_json(baseline)
    cost = results["segment"].ratio("memcpy", "segment")
    text.append(f"segmenting takes {cost:.2f} times a hot memcpy")
    report["targets"] = {
        "checksum / c loop": results["checksum"].ratio("checksum", "C u16 loop").to_json(),
        "segment / memcpy": results["segment"].ratio("segment", "memcpy").to_json(),
    }
    write_report(args.json, report, "\n".join(text))
    return 1 if any(rounds.void for rounds in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
