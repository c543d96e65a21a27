# SPDX-License-Identifier: BSD-3-Clause
"""Counts instructions per frame over net_null, and the share of the frame counters in them.

Rates are too noisy to show a few nanoseconds; instruction counts are the same in each run. A small
driver receives and sends bursts under ``valgrind --tool=callgrind``, which collects only inside the
burst functions, so the figures include neither Python nor start-up.

``--check`` compares with the figures in bench/baseline.json, as tests/house/test_instructions.py
does. They depend on the compiler, so a build by another compiler may exceed them by more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import rtap
from bench.measure import columns, write_report

BASELINE = Path(__file__).with_name("baseline.json")
NULL_RX = "__pyx_f_4rtap_7_queues_4null_null_rx"
NULL_TX = "__pyx_f_4rtap_7_queues_4null_null_tx"
COUNT_FRAMES = "__pyx_f_4rtap_5_core_7traffic_count_frames"
#: The driver calls this around each measurement, and callgrind then writes what it collected.
MARK = "getppid"
BURSTS = 200
TIMEOUT_S = 300


class Phase(NamedTuple):
    """Bursts of `burst` frames of `size` bytes to `destination`."""

    size: int
    burst: int
    destination: str = "02" * 6


PHASES = {
    "64 bytes": Phase(64, 64),
    "64 bytes, one by one": Phase(64, 1),
    "1500 bytes": Phase(1500, 64),
    "64 bytes, broadcast": Phase(64, 64, "ff" * 6),
}


def drive() -> None:
    """The program that runs under callgrind."""
    for size, n, destination in PHASES.values():
        with rtap.Mempool(256) as pool, rtap.probe(f"net_null0,size={size}") as dev:
            pool.alloc_burst(256, bytes.fromhex(destination) + bytes(58)).free()
            dev.configure()
            dev.rx_queue_setup(0, 64, pool)
            dev.tx_queue_setup(0, 64)
            dev.start()
            dev.tx_burst(0, dev.rx_burst(0, n))  # the first burst fills the pool's cache
            os.getppid()
            for _ in range(BURSTS):
                dev.tx_burst(0, dev.rx_burst(0, n))
            os.getppid()


def unavailable() -> str:
    """Why this machine cannot measure, in one phrase; "" when it can."""
    return "" if shutil.which("valgrind") else "needs valgrind (Debian's package valgrind)"


def compiler() -> str:
    """The compiler of rtap, such as "gcc 12"; "unknown" when the modules do not say."""
    package = Path(rtap.__file__).parent
    for path in package.glob("_core/traffic*.so"):
        found = re.search(rb"(GCC: \([^)]*\)|clang version) (\d+)", path.read_bytes())
        if found:
            return f"{'gcc' if found[1].startswith(b'GCC') else 'clang'} {found[2].decode()}"
    return "unknown"


def cost_of(report: str, function: str) -> int:
    """Instructions of a function and its callees, from a callgrind report with full names."""
    total, inside = 0, False
    for line in report.splitlines():
        if line.startswith("fn="):
            inside = line[3:] == function
        elif inside and line[:1].isdigit():
            total += int(line.split()[1])
    return total


def summary(report: str) -> int:
    """The total of a report."""
    (found,) = re.findall(r"^summary: (\d+)$", report, re.MULTILINE)
    return int(found)


def measure() -> dict[str, float]:
    """Instructions by name; RuntimeError when valgrind fails or does not see our functions."""
    with tempfile.TemporaryDirectory(prefix="rtap-callgrind-") as scratch:
        out = Path(scratch) / "out"
        argv = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
        argv += ["--compress-strings=no", "--compress-pos=no", f"--dump-before={MARK}"]
        argv += [f"--toggle-collect={name}" for name in (NULL_RX, NULL_TX)]
        done = subprocess.run(
            [*argv, sys.executable, "-c", "from bench.instructions import drive; drive()"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            cwd=Path(__file__).resolve().parents[1],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        reports = [Path(f"{out}.{2 * part + 2}") for part in range(len(PHASES))]
        if done.returncode != 0 or not all(path.exists() for path in reports):
            raise RuntimeError(f"valgrind failed ({done.returncode}): {done.stderr[-1000:]}")
        figures = {}
        for (name, phase), path in zip(PHASES.items(), reports, strict=True):
            frames = phase.burst * BURSTS
            report = path.read_text()
            counting = cost_of(report, COUNT_FRAMES)
            if counting == 0:
                raise RuntimeError(f"callgrind has not seen {COUNT_FRAMES}")
            # Each frame is counted twice: when it is received and when it is sent.
            figures[f"counting a frame, {name}"] = round(counting / (2 * frames), 2)
            figures[f"receiving and sending a frame, {name}"] = round(summary(report) / frames, 2)
    return figures


def allowance(baseline: dict[str, Any]) -> float:
    """By how much a figure may exceed the baseline, as a ratio."""
    same = baseline["compiler"] == compiler()
    tolerance: float = baseline["tolerance" if same else "tolerance_of_other_compilers"]
    return tolerance


def excess(figures: dict[str, float], baseline: dict[str, Any]) -> list[str]:
    """One sentence for each figure that exceeds what the baseline allows."""
    allowed = allowance(baseline)
    return [
        f"{name}: {figures[name]:g} instructions, the baseline is {held:g} + {allowed:.0%}"
        for name, held in baseline["instructions"].items()
        if figures[name] > held * (1 + allowed)
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 when ``--check`` finds a figure too high or nothing can be measured."""
    parser = argparse.ArgumentParser(
        prog="bench.instructions", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--baseline", metavar="FILE", type=Path, default=BASELINE)
    parser.add_argument("--check", action="store_true", help="fail when above the baseline")
    parser.add_argument("--record", action="store_true", help="write a new baseline")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)
    if unavailable():
        print(unavailable(), file=sys.stderr)
        return 1
    figures = measure()
    baseline: dict[str, Any] = json.loads(args.baseline.read_text())
    held = baseline["instructions"]
    rows = [("instructions", "now", "baseline")]
    rows += [(name, f"{n:.2f}", f"{held.get(name, 0):.2f}") for name, n in figures.items()]
    body = {"benchmark": "instructions", "compiler": compiler(), "instructions": figures}
    write_report(args.json, body, "\n".join([f"compiled by {compiler()}", *columns(rows)]))
    if args.record:
        baseline |= {"compiler": compiler(), "machine": platform.machine(), "instructions": figures}
        args.baseline.write_text(json.dumps(baseline, indent=2) + "\n")
        return 0
    complaints = excess(figures, baseline) if args.check else []
    for line in complaints:
        print(line, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
