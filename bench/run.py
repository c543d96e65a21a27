# SPDX-License-Identifier: BSD-3-Clause
"""Runs the benchmarks one after the other, each in a process of its own, and collects results.

It writes a JSON file with every result, the machine and the commands, and a Markdown table of the
ratios beside it. ``--quick`` takes few short slices: it shows that things run, not how fast.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measure import columns, environment

ROOT = Path(__file__).resolve().parents[1]
QUICK = {
    "offload": ["--slices=5", "--seconds=0.05"],
    "send64": ["--slices=5", "--seconds=0.05"],
    "closed_loop": ["--slices=5", "--seconds=0.05"],
    "processes": ["--slices=3", "--seconds=0.05"],
    "worker_idle": ["--slices=5", "--seconds=0.05", "--frames=200"],
    "worker_routes": ["--slices=3", "--seconds=0.05", "--routes=8"],
    "worker_wait": ["--frames=100", "--seconds=1"],
    "stages": ["--slices=3", "--seconds=0.05"],
    "af_packet": ["--slices=3", "--seconds=0.05"],
    "ring_ways": ["--slices=3", "--seconds=0.05"],
    "gro": ["--slices=5", "--seconds=0.05"],
    "tcp": ["--slices=3", "--attempts=1"],
    "testpmd": ["--slices=3", "--seconds=0.05", "--attempts=1"],
    "shm_ring": ["--slices=3", "--seconds=0.05", "--turns=100"],
    "soak": ["--frames=1e6", "--cycles=50"],
}
SUITE = (
    "send64",
    "closed_loop",
    "processes",
    "worker_idle",
    "worker_routes",
    "worker_wait",
    "stages",
    "af_packet",
    "ring_ways",
    "shm_ring",
    "tcp",
    "testpmd",
    "offload",
    "gro",
)
TARGETS = {
    "rtap numpy / c write": 1.2,
    "rtap numpy / net_tap": 1.2,
    "python / worker": 0.9,
    "python beside / python": 0.4,
    "worker / c uring": 0.95,
    "thread beside / thread": 0.9,
    "128 queues / 1 queue": 0.8,
    "rtap / veth": 0.8,
    "rtap plain / net_tap": 1.5,
    "rtap frames / rtap plain": 2.0,
    "chain / memcpy": 1 / 3,
    "checksum / c loop": 5,
    "segment / memcpy": 1 / 3,
    **{
        f"{mode} {size}: rtap / net_tap": 1.0
        for mode in ("io", "macswap", "txonly", "rxonly")
        for size in (64, 1500)
    },
}
"""The ratios that the project aims for."""


def run_one(name: str, options: list[str]) -> dict[str, Any]:
    """Run one benchmark; return its report, or what went wrong under "error"."""
    with tempfile.TemporaryDirectory(prefix="rtap-bench-") as scratch:
        report = Path(scratch) / "report.json"
        argv = [sys.executable, "-m", f"bench.{name}", *options, "--json", str(report)]
        print(f"== {shlex.join(['python', *argv[1:-2]])}", flush=True)
        done = subprocess.run(argv, cwd=ROOT, check=False)
        if not report.exists():
            return {"error": f"ended with status {done.returncode} and no report"}
        result: dict[str, Any] = json.loads(report.read_text())
        return result


def summary(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of ratio, interval, target and verdict from every report."""
    rows: list[tuple[str, ...]] = [("ratio", "median", "95 % interval", "target", "")]
    for report in results.values():
        void = any(
            part.get("void") for part in (report, *report.values()) if isinstance(part, dict)
        )
        for name, ratio in report.get("targets", {}).items():
            target = TARGETS.get(name)
            low, high = ratio["ci95"]
            if void:
                verdict = "void"
            elif target is None:
                verdict = ""
            else:
                verdict = "reached" if ratio["median"] >= target else "missed"
            rows.append(
                (
                    name,
                    f"{ratio['median']:.3f}",
                    f"{low:.3f}-{high:.3f}",
                    f"{target:g}" if target is not None else "",
                    verdict,
                )
            )
    return rows


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The rows as a Markdown table."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the suite; 0 when every benchmark gave a report that is not void."""
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"which ones (default {' '.join(SUITE)})")
    parser.add_argument("--quick", action="store_true", help="few short slices: a smoke test")
    parser.add_argument("--engine", default="auto", help="rtap's engine: auto, uring or syscall")
    parser.add_argument(
        "--json", metavar="FILE", default=str(ROOT / "build" / "bench" / "results.json")
    )
    args = parser.parse_args(argv)
    names = args.names or list(SUITE)
    for name in names:
        if name not in QUICK:
            parser.error(f"no benchmark {name!r}; there are {', '.join(QUICK)}")

    results: dict[str, Any] = {}
    for name in names:
        results[name] = run_one(name, [f"--engine={args.engine}", *(QUICK[name] * args.quick)])
    rows = summary(results)
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "results": results}, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(rows))
    print("\n".join(["", *columns(rows), "", f"written to {path} and {path.with_suffix('.md')}"]))
    failed = [name for name, report in results.items() if "error" in report or report.get("void")]
    for name in failed:
        print(f"{name}: {results[name].get('error', 'void')}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
