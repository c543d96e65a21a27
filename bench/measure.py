# SPDX-License-Identifier: BSD-3-Clause
"""The measuring method: alternating slices, medians of paired ratios, an A/A control.

A shared or virtual machine changes speed from one second to the next (frequency, neighbours, host
scheduling). So a rate measured alone says little, and two rates measured one after the other say
less. Here every figure is a *ratio* from short rounds. In each round every subject runs for one
slice, in random order, and the ratio of two subjects is the median over at least 31 rounds. One
subject runs twice a round, as itself and as its own control. When the median ratio of this subject
to itself is not within 2 % of 1, the machine was too noisy, and the run is void.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONTROL = "(control)"

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


@dataclass(frozen=True, slots=True)
class Sample:
    """What one subject did in one slice."""

    frames: int
    """Frames moved, from a count that the subject does not make itself (interface counters); or
    bits, where a stream is measured."""
    seconds: float
    """Wall time of the slice."""
    cpu_ns: int = 0
    """CPU time of the thread that moved the frames, in nanoseconds; 0 when unknown."""

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.frames / self.seconds

    @property
    def cpu_ns_per_frame(self) -> float:
        """Thread CPU nanoseconds per frame (nan when nothing moved)."""
        return self.cpu_ns / self.frames if self.frames else math.nan


Subject = Callable[[float], Sample]
"""Runs for about that many seconds and returns what it did."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and how far the rounds lie from it."""

    median: float
    q1: float
    q3: float
    low: float
    """Lower end of the distribution-free 95 % confidence interval of the median."""
    high: float
    """Upper end of that interval."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, quartiles and confidence interval (order statistics) of ``values``."""
        if not values:
            raise ValueError("a spread needs at least one value")
        ordered = sorted(values)
        n = len(ordered)
        q1, _, q3 = statistics.quantiles(ordered, n=4) if n > 1 else [ordered[0]] * 3
        # Ranks of the binomial(n, 1/2) interval, normal approximation; the extremes for small n.
        reach = 0.98 * math.sqrt(n)
        low = max(0, math.floor((n - 1) / 2 - reach))
        high = min(n - 1, math.ceil((n - 1) / 2 + reach))
        return cls(statistics.median(ordered), q1, q3, ordered[low], ordered[high], n)

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.median:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def to_json(self) -> dict[str, JsonValue]:
        """The fields as a JSON object."""
        return {
            "median": self.median,
            "q1": self.q1,
            "q3": self.q3,
            "ci95": [self.low, self.high],
            "n": self.n,
        }


@dataclass(slots=True)
class Rounds:
    """Samples of several subjects, round by round, with one subject's A/A control."""

    samples: dict[str, list[Sample]]
    controlled: str
    tolerance: float
    attempts: int = 1

    def rate(self, name: str) -> Spread:
        """Frames a second of one subject."""
        return Spread.of([s.rate for s in self.samples[name]])

    def cpu_ns_per_frame(self, name: str) -> Spread | None:
        """Thread CPU nanoseconds per frame of one subject, None when it was not measured."""
        values = [s.cpu_ns_per_frame for s in self.samples[name] if s.cpu_ns and s.frames]
        return Spread.of(values) if values else None

    def ratio(self, a: str, b: str) -> Spread:
        """Rate of ``a`` over rate of ``b``, paired within the rounds (above 1: a is faster)."""
        pairs = zip(self.samples[a], self.samples[b], strict=True)
        return Spread.of([x.rate / y.rate for x, y in pairs])

    @property
    def control(self) -> Spread:
        """The controlled subject against itself."""
        return self.ratio(self.controlled, CONTROL)

    @property
    def void(self) -> bool:
        """Whether the control is outside the tolerance, so that the figures mean nothing."""
        return abs(self.control.median - 1) > self.tolerance

    @property
    def subjects(self) -> list[str]:
        """The subjects' names, without the control."""
        return [name for name in self.samples if name != CONTROL]

    def table(self, baseline: str, unit: str = "M/s", scale: float = 1e6) -> str:
        """A text table of all subjects: rate over ``scale``, CPU cost, ratio to ``baseline``."""
        head = (
            "subject",
            unit,
            "95 % interval",
            "cpu ns/frame",
            f"x {baseline}",
            "95 % interval",
        )
        rows = [head]
        for name in self.subjects:
            rate, cpu = self.rate(name), self.cpu_ns_per_frame(name)
            ratio = self.ratio(name, baseline)
            rows.append(
                (
                    name,
                    f"{rate.median / scale:.3f}",
                    f"{rate.low / scale:.3f}-{rate.high / scale:.3f}",
                    f"{cpu.median:.0f}" if cpu else "-",
                    f"{ratio.median:.3f}",
                    f"{ratio.low:.3f}-{ratio.high:.3f}",
                )
            )
        lines = columns(rows)
        n = len(self.samples[self.controlled])
        verdict = "VOID, " if self.void else ""
        lines.append(
            f"{verdict}A/A control of {self.controlled}: {self.control:.3f}, {n} rounds, "
            f"attempt {self.attempts}"
        )
        return "\n".join(lines)

    def to_json(self, baseline: str | None = None) -> dict[str, JsonValue]:
        """Everything :meth:`table` shows, as a JSON object."""
        subjects: dict[str, JsonValue] = {}
        for name in self.subjects:
            cpu = self.cpu_ns_per_frame(name)
            entry: dict[str, JsonValue] = {
                "rate": self.rate(name).to_json(),
                "cpu_ns_per_frame": cpu.to_json() if cpu else None,
                "frames": sum(s.frames for s in self.samples[name]),
            }
            if baseline is not None:
                entry["ratio"] = self.ratio(name, baseline).to_json()
            subjects[name] = entry
        return {
            "void": self.void,
            "control": self.control.to_json(),
            "controlled": self.controlled,
            "attempts": self.attempts,
            "baseline": baseline,
            "subjects": subjects,
        }


def alternate(
    subjects: Mapping[str, Subject],
    *,
    control: str | None = None,
    slices: int = 31,
    seconds: float = 0.1,
    attempts: int = 3,
    tolerance: float = 0.02,
    seed: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Rounds:
    """Run all subjects in rounds of one slice each, in random order.

    ``control`` (default: the first subject) runs twice a round; see :attr:`Rounds.void`. A void
    attempt is thrown away and repeated with twice as many rounds, ``attempts`` times at most; the
    result of the last attempt is returned whether void or not.

    Raises ValueError without subjects, or for fewer than 1 slice.
    """
    if not subjects:
        raise ValueError("nothing to measure")
    if slices < 1:
        raise ValueError(f"slices must be at least 1, not {slices}")
    controlled = control if control is not None else next(iter(subjects))
    members: dict[str, Subject] = {**subjects, CONTROL: subjects[controlled]}
    rng = random.Random(seed)
    for run in subjects.values():
        run(min(seconds, 0.02))
    rounds = Rounds({}, controlled, tolerance)
    for attempt in range(1, attempts + 1):
        samples: dict[str, list[Sample]] = {name: [] for name in members}
        order = list(members)
        for _ in range(slices):
            rng.shuffle(order)
            for name in order:
                samples[name].append(members[name](seconds))
        rounds = Rounds(samples, controlled, tolerance, attempt)
        if not rounds.void:
            break
        if progress is not None and attempt < attempts:
            progress(f"A/A control {rounds.control:.3f} is outside {tolerance:.0%}, again")
        slices *= 2
    return rounds


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two subjects: the ratio of their rates, and whether it is valid."""

    ratio: Spread
    control: Spread
    void: bool
    rounds: Rounds = field(repr=False)

    def __str__(self) -> str:
        note = " VOID" if self.void else ""
        return f"ratio {self.ratio:.3f}, A/A {self.control:.3f}{note}"


def compare(
    a: Subject,
    b: Subject,
    slices: int = 31,
    seconds: float = 0.1,
    *,
    attempts: int = 3,
    tolerance: float = 0.02,
) -> Comparison:
    """How much faster ``a`` is than ``b``: median ratio over alternating slices.

    ``a`` is also run against itself in the same rounds; a control outside ``tolerance`` voids the
    run, which is then repeated with more slices up to ``attempts`` times.
    """
    rounds = alternate(
        {"a": a, "b": b}, slices=slices, seconds=seconds, attempts=attempts, tolerance=tolerance
    )
    return Comparison(rounds.ratio("a", "b"), rounds.control, rounds.void, rounds)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a text table: first column left-aligned, others right-aligned, a ruled head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def loop_until(step: Callable[[], int], seconds: float, batch: int = 1) -> Sample:
    """Call ``step``, which returns frames moved, until the time is over.

    The CPU time is the calling thread's. The clock is read once every ``batch`` calls.
    """
    frames = 0
    cpu = time.thread_time_ns()
    start = now = time.perf_counter()
    deadline = start + seconds
    while now < deadline:
        for _ in range(batch):
            frames += step()
        now = time.perf_counter()
    return Sample(frames, now - start, time.thread_time_ns() - cpu)


@contextlib.contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Pin the calling thread, and the processes it starts, to one CPU (None: do not pin)."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def bench_cpu() -> int:
    """The CPU that benchmarks are pinned to: the last one, since the first takes interrupts."""
    return max(os.sched_getaffinity(0))


def environment() -> dict[str, JsonValue]:
    """What a reader needs to know about the machine that a figure came from."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.lower().startswith(("model name", "cpu model"))
        ),
        platform.machine(),
    )
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()),
    }


def write_report(path: str | None, body: Mapping[str, Any], text: str) -> None:
    """Print ``text``, and write ``body`` with the environment as JSON.

    ``path`` None writes no JSON; ``-`` prints the JSON instead of the text.
    """
    report = json.dumps({"environment": environment(), **body}, indent=2)
    if path == "-":
        print(report)
        return
    print(text)
    if path is not None:
        Path(path).write_text(report + "\n")
