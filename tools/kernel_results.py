# SPDX-License-Identifier: BSD-3-Clause
"""What came of tests on several kernels: read from pytest's junit files, shown as one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree


@dataclass
class Counts:
    """Tests of one file on one kernel."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped
        )

    def __str__(self) -> str:
        others = {"failed": self.failed, "skipped": self.skipped}
        return ", ".join([str(self.passed), *(f"{n} {what}" for what, n in others.items() if n)])


@dataclass
class Outcome:
    """Tests on one kernel: the name it was asked for by, and its own version."""

    name: str
    release: str = ""
    why: str = ""  # why there are no results, or not all
    files: dict[str, Counts] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skips: Counter[str] = field(default_factory=Counter)

    @property
    def title(self) -> str:
        return self.release or self.name

    @property
    def good(self) -> bool:
        return bool(self.files) and not self.why and not self.failures

    def cell(self, path: str) -> str:
        return str(self.files[path]) if path in self.files else "-"

    def sum(self) -> str:
        return str(sum(self.files.values(), Counts())) if self.files else "-"


def file_of(classname: str) -> str:
    """The file of a test, from the dotted name that junit has: "tests.tap.test_ring"."""
    parts = classname.split(".")
    last = next((n for n, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
    return "/".join(parts[: last + 1]) + ".py"


def first_line(element: ElementTree.Element) -> str:
    text = (element.get("message") or element.text or "").strip()
    return text.partition("\n")[0]


def read(name: str, release: str, xml: str) -> Outcome:
    """The outcome on a kernel, from what pytest's --junitxml wrote."""
    outcome = Outcome(name, release)
    for case in ElementTree.fromstring(xml).iter("testcase"):
        path = file_of(case.get("classname", ""))
        bad = [element for element in case if element.tag in ("failure", "error")]
        skips = [element for element in case if element.tag == "skipped"]
        one = Counts(passed=1)
        if bad:
            one = Counts(failed=1)
            outcome.failures.append(f"{path}::{case.get('name')}: {first_line(bad[0])}")
        elif skips:
            one = Counts(skipped=1)
            outcome.skips[first_line(skips[0])] += 1
        outcome.files[path] = outcome.files.get(path, Counts()) + one
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """Test files by kernels: how many tests passed, failed and were skipped."""
    rows = [["", *(outcome.title for outcome in outcomes)]]
    for path in sorted({path for outcome in outcomes for path in outcome.files}):
        rows.append([path, *(outcome.cell(path) for outcome in outcomes)])
    rows.append(["all", *(outcome.sum() for outcome in outcomes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def details(outcome: Outcome) -> list[str]:
    """What the table does not say of a kernel: reasons, one a line."""
    lines = [f"{outcome.title}: {outcome.why}"] if outcome.why else []
    lines += [f"{outcome.title}: FAILED {failure}" for failure in outcome.failures]
    for reason, n in sorted(outcome.skips.items()):
        lines.append(f"{outcome.title}: {n} skipped: {reason}")
    return lines


def report(outcomes: Sequence[Outcome]) -> str:
    """Prints the table and the details; returns what they come to, in one sentence."""
    print(f"\n{table(outcomes)}\n")
    for outcome in outcomes:
        for line in details(outcome):
            print(line)
    bad = [outcome.title for outcome in outcomes if not outcome.good]
    return f"FAILED on {', '.join(bad)}." if bad else "passed on all."
