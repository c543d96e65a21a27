# SPDX-License-Identifier: BSD-3-Clause
"""Lists the lines of rtap that no test runs: Python by coverage.py, Cython by gcov.

The compiler counts the native lines, so lines that run without the GIL or on any thread count too.
A process that is killed by a signal loses its counts. So does a child that ends by os._exit after
it has changed its root or its user: it cannot write them. Other children keep theirs.

Arguments go to pytest. The lines are written to build/coverage/gaps.txt. A table of files is
printed, with the most unrun lines first.
"""

from __future__ import annotations

import json
import os
import re
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

#: Runs first in every process that has the build's directory on its path. os._exit ends a process
#: without writing the compiler's counts, so C's exit takes its place; the interpreter does not end.
AT_START = f"""
import atexit, ctypes, os, sys

@atexit.register
def hide():
    # A child of another root or user cannot write its counts. The compiler's code would complain.
    if not os.access({str(OBJECTS)!r}, os.W_OK):
        sys.stderr.flush()
        os.close(2)

def counted_exit(status, kill=os._exit, end=ctypes.CDLL(None).exit):
    if os.access({str(OBJECTS)!r}, os.W_OK):
        try:
            current = sys.modules["coverage"].Coverage.current()
            current.save()
        finally:
            end(status & 0xFF)
    kill(status)

os._exit = counted_exit
"""

#: A pytest plugin. pytest-xdist kills a worker that has not ended 10 s after its last test. On a
#: busy machine the counts take longer to write.
LONG_EXIT = """
from xdist.workermanage import NodeManager

NodeManager.EXIT_TIMEOUT = 300
"""

#: The comment in which Cython names the source line of the C code below it, and the functions that
#: hold such code.
ORIGIN = re.compile(r'\s*/\* "([^"]+)":([0-9]+)$')
TRANSLATED = ("__pyx_f_", "__pyx_pf_", "__pyx_pw_", "__pyx_gb_", "__pyx_pymod_exec_")

LANGUAGES = {"Python": (".py",), "Cython": (".pyx", ".pxd"), "C headers": (".h",)}

#: How often each executable line ran, by file below the root.
Lines = Mapping[str, Mapping[int, int]]


def run_tests(args: list[str]) -> int:
    """Run the suite on the coverage build and return its exit status."""
    for old in (*OBJECTS.rglob("*.gcda"), *(ROOT / BUILD).glob("python.*")):
        old.unlink()
    (ROOT / BUILD / "sitecustomize.py").write_text(AT_START)
    (ROOT / BUILD / "long_exit.py").write_text(LONG_EXIT)
    env = os.environ | {"PYTHONPATH": str(ROOT / BUILD), "RTAP_TEST_BUILD": BUILD}
    jobs = str(2 * len(os.sched_getaffinity(0)))
    command = [str(BIN / "coverage"), "run", str(BIN / "pytest"), "-p", "long_exit", "-n", jobs]
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


def origins(path: Path, functions: Iterable[Mapping[str, Any]]) -> dict[int, tuple[str, int]]:
    """The source file and line of each line of a C file that translates a statement.

    Code that Cython adds by itself (types, constants, the module) is in other functions and has no
    source line.
    """
    found: dict[int, tuple[str, int]] = {}
    text = path.read_text().splitlines()
    for function in functions:
        if not function["name"].startswith(TRANSLATED):
            continue
        first, last = function["start_line"], function["end_line"]
        # The comment of the line that defines a function is in front of it.
        while first > 1 and not ORIGIN.match(text[first - 1]) and text[first - 1] != "}":
            first -= 1
        here = None
        for number in range(first, last + 1):
            if origin := ORIGIN.match(text[number - 1]):
                here = origin[1], int(origin[2])
            elif here:
                found[number] = here
    return found


def native_lines() -> Lines:
    """gcov's counts of .pyx and .pxd files, summed over all modules that include them, and of
    headers."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for report in reports():
        for file in report["files"]:
            path = Path(report["current_working_directory"], file["file"])
            name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ""
            if name.startswith("rtap/"):
                for line in file["lines"]:
                    found[name][line["line_number"]] += line["count"]
            elif name.startswith("build/"):
                comes_from = origins(path, file["functions"])
                for line in file["lines"]:
                    source, number = comes_from.get(line["line_number"], ("", 0))
                    if source.startswith("rtap/"):
                        found[source][number] += line["count"]
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
    table = [f"{n:6} of {of:5} lines never ran  {path}" for n, of, path in sorted(rows)[::-1] if n]
    for language, kinds in LANGUAGES.items():
        chosen = [row for row in rows if row[2].endswith(kinds)]
        missed, total = sum(row[0] for row in chosen), sum(row[1] for row in chosen)
        share = 100 * (total - missed) / max(total, 1)
        table.append(f"{language}: {share:.1f} % of {total} lines ran, {missed} did not")
    return "\n".join([*table, f"which these are: {BUILD}/gaps.txt"])


def main(args: list[str]) -> int:
    if shutil.which("gcov") is None:
        print("coverage: needs gcov, which comes with gcc", file=sys.stderr)
        return 1
    status = run_tests(args)
    print(report({**python_lines(), **native_lines()}))
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
