# SPDX-License-Identifier: BSD-3-Clause
"""Lists the lines of rtap that no test runs: Python by coverage.py, Cython by gcov.

The compiler counts the native lines, so lines that run without the GIL or on any thread count too.
A process that is killed by a signal, or that ends by os._exit, loses its native counts.

Arguments go to pytest. The lines are written to build/coverage/gaps.txt. A table of files is
printed, with the most unrun lines first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = "build/coverage"
OBJECTS = ROOT / "build/gcov"
BIN = Path(sys.executable).parent

#: How often each executable line ran, by file below the root.
Lines = Mapping[str, Mapping[int, int]]


def run_tests(args: list[str]) -> int:
    """Run the suite on the coverage build and return its exit status."""
    for old in (*OBJECTS.rglob("*.gcda"), *(ROOT / BUILD).glob("python.*")):
        old.unlink()
    env = os.environ | {"PYTHONPATH": str(ROOT / BUILD), "RTAP_TEST_BUILD": BUILD}
    jobs = str(2 * len(os.sched_getaffinity(0)))
    command = [str(BIN / "coverage"), "run", str(BIN / "pytest"), "-n", jobs]
    # This build takes half as long again, so the time-out is long; a hanging test still ends.
    return subprocess.run(
        [*command, "--dist=worksteal", "-p", "no:cacheprovider", "--timeout=600", *args],
        cwd=ROOT,
        env=env,
        check=False,
    ).returncode


def python_lines() -> Lines:
    """The counts of coverage.py."""
    out = ROOT / BUILD / "python.json"
    for step in (["combine", "-q"], ["json", "-q", "-o", str(out)]):
        subprocess.run([BIN / "coverage", *step], cwd=ROOT, check=True)
    found: dict[str, dict[int, int]] = {}
    for path, what in json.loads(out.read_text())["files"].items():
        name = str(Path(path).resolve().relative_to(ROOT / BUILD))
        found[name] = dict.fromkeys(what["missing_lines"], 0)
        found[name].update(dict.fromkeys(what["executed_lines"], 1))
    return found


def reports() -> Iterator[dict[str, Any]]:
    """gcov's report for each object; where no process left counts, no line ran."""
    for notes in OBJECTS.rglob("*.gcno"):
        done = subprocess.run(
            ["gcov", "--json-format", "--stdout", str(notes)],
            cwd=notes.parent,
            capture_output=True,
            check=True,
        )
        for line in done.stdout.splitlines():
            yield json.loads(line)


def native_lines() -> Lines:
    """gcov's counts of .pyx files and of the files they include, summed over all includers."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for report in reports():
        for file in report["files"]:
            path = Path(report["current_working_directory"], file["file"])
            name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ""
            if name.startswith("rtap/"):
                for line in file["lines"]:
                    found[name][line["line_number"]] += line["count"]
    return found


def is_code(path: str, numbers: Iterable[int]) -> list[int]:
    """Whether a line does something: Cython also emits code for lines that only declare."""
    text = (ROOT / path).read_text().splitlines()
    declares = ("cdef class", "cdef extern", "cimport ", "from ", "import ", "@", '"""', "#", ")")
    return [
        n
        for n in numbers
        if n <= len(text) and text[n - 1].strip() and not text[n - 1].strip().startswith(declares)
    ]


def ranges(numbers: Iterable[int]) -> str:
    """ "3-5, 9" of 3, 4, 5, 9."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def report(lines: Lines) -> str:
    """Write the gaps to a file and return the table."""
    rows, gaps = [], []
    for path, counts in lines.items():
        code = is_code(path, counts)
        missing = [n for n in code if not counts[n]]
        rows.append((len(missing), len(code), path))
        if missing:
            text = (ROOT / path).read_text().splitlines()
            gaps.append(f"{path}: {ranges(missing)}")
            gaps += [f"{n:6} {text[n - 1]}" for n in sorted(missing)]
    (ROOT / BUILD / "gaps.txt").write_text("\n".join(gaps) + "\n")
    missed, total = sum(row[0] for row in rows), sum(row[1] for row in rows)
    table = [f"{n:6} of {of:5} lines never ran  {path}" for n, of, path in sorted(rows)[::-1] if n]
    share = 100 * (total - missed) / max(total, 1)
    return "\n".join([*table, f"{share:.1f} % of {total} lines ran; the others: {BUILD}/gaps.txt"])


def main(args: list[str]) -> int:
    if shutil.which("gcov") is None:
        print("coverage: needs gcov, which comes with gcc", file=sys.stderr)
        return 1
    status = run_tests(args)
    print(report({**python_lines(), **native_lines()}))
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
