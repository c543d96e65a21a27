# SPDX-License-Identifier: BSD-3-Clause
"""Rules of the source tree that no other linter knows.

Every source file names its licence in the first line. Every .pyx has its .pyi. No text names a
local path or the host of a package registry. No merge conflict is left in a file. No module
imports from a higher layer (tools/layers.py). A file that is too long to read in one sitting is
only mentioned.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from layers import arrows_up

ROOT = Path(__file__).resolve().parent.parent
SPDX = "SPDX-License-Identifier: BSD-3-Clause"
SOURCE = {".py", ".pyx", ".pxd", ".pyi", ".c", ".h", ".sh", ".toml", ".yml", ".yaml"}
SOURCE_NAMES = {"Makefile"}
LONG = 600

LOCAL = re.compile(
    r"(?<![\w.$}~])/(?:work|root|home|opt/\w+)\b(?!/?\*)"
    r"|\b(?:pypi|pythonhosted|crates|npmjs)\.(?:org|io|com)\b"
    r"|\b(?:proxy\.golang|deb\.debian|archive\.ubuntu|registry\.\w+|docker|ghcr|quay)\.\w+\b"
    r"|--(?:extra-)?index-url"
)
#: The lines with which git marks a merge conflict.
CONFLICT = re.compile(r"(?:<{7}|>{7}) \S|={7}$")


def tree() -> list[Path]:
    """Files that git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return sorted(path for path in paths if path.is_file())


def is_source(path: Path, first: str) -> bool:
    return path.suffix in SOURCE or path.name in SOURCE_NAMES or first.startswith("#!")


def faults(path: Path) -> Iterator[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return
    # An empty file has nothing to license.
    if lines and is_source(path, lines[0]) and not any(SPDX in line for line in lines[:2]):
        yield 1, f"the first line is not: {SPDX}"
    if path.suffix == ".pyx" and not path.with_suffix(".pyi").exists():
        yield 1, "has no .pyi beside it"
    for number, line in enumerate(lines, 1):
        if found := LOCAL.search(line):
            yield number, f"names a local path or a registry: {found.group()}"
        if CONFLICT.match(line):
            yield number, "is left over from a merge conflict"
    if len(lines) > LONG and path.suffix in SOURCE:
        print(f"{path.relative_to(ROOT)}: notice: {len(lines)} lines, more than {LONG}")


def main() -> int:
    bad = 0
    for path in tree():
        for number, text in faults(path):
            print(f"{path.relative_to(ROOT)}:{number}: {text}")
            bad += 1
    for path, number, text in arrows_up(ROOT / "rtap"):
        print(f"{path.relative_to(ROOT)}:{number}: {text}")
        bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
