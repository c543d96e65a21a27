# SPDX-License-Identifier: BSD-3-Clause
"""The layers of the package, and a check that no import or cimport reaches a higher layer.

Each line of LAYERS is a layer, the lowest first; ARCHITECTURE.md says what each is for. A module
may import from its own layer and those below. Imports that only a type checker sees do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

#: Modules and folders of rtap/, by layer.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "ether", "flags", "ptypes", "vnethdr"),
    ("_core",),
    ("native", "stage"),
    ("_frames", "_offload", "offload"),
    ("stages",),
    ("_tap", "_ring", "_udp"),
    ("_queues",),
    ("_work",),
    ("control",),
    ("ethdev",),
    ("drivers",),
    ("sharing",),
    ("__init__",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SUFFIXES = (".py", ".pyi", ".pyx", ".pxd")

IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<source>rtap[\w.]*)[ \t]+c?import[ \t]*(?P<names>\([^)]*\)|[^\n(]*)"
    r"|c?import[ \t]+(?P<module>rtap[\w.]*))",
    re.MULTILINE,
)
FOR_TYPES = re.compile(r"^if TYPE_CHECKING:\n(?:[ \t]+[^\n]*\n|\n)+", re.MULTILINE)


def room(module: str) -> str:
    """The part of a dotted name that LAYERS lists: "_core" of "rtap._core.pool"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of each import of the package in a file's text."""
    # Keep the number of lines, so that line numbers stay right.
    source = FOR_TYPES.sub(lambda found: "\n" * found.group().count("\n"), source)
    for found in IMPORT.finditer(source):
        line = source.count("\n", 0, found.start()) + 1
        module = found["source"] or found["module"]
        if module != "rtap":
            yield line, module
            continue
        names = re.findall(r"\w+(?=[ \t]+as\b|[ \t]*(?:,|\)|#|$))", found["names"] or "")
        rooms = [name for name in names if name in RANK]
        yield from ((line, f"rtap.{name}") for name in rooms)
        if not names or len(rooms) < len(names):
            yield line, "rtap"


def arrows_up(package: Path) -> Iterator[tuple[Path, int, str]]:
    """File, line and message for each import from a higher layer."""
    for path in sorted(package.rglob("*")):
        if path.suffix not in SUFFIXES:
            continue
        own = path.relative_to(package).parts[0].partition(".")[0]
        if own not in RANK:
            yield path, 1, f"rtap/{own} is in no layer of tools/layers.py"
            continue
        for line, module in imported(path.read_text(encoding="utf-8")):
            other = room(module)
            if other not in RANK:
                yield path, line, f"{module} is in no layer of tools/layers.py"
            elif RANK[other] > RANK[own]:
                yield path, line, f"imports {module} from a layer above its own"
