# SPDX-License-Identifier: BSD-3-Clause
"""rtap compiled for another architecture, by a cross compiler against that architecture's tree.

The C files are those that Cython made here (make build), the flags those of setup.py and of the
Python in the tree: what setup.py would compile there, without a compiler that is emulated.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_packages import Unavailable
from port_tree import Tree

ROOT = Path(__file__).resolve().parent.parent
C_FILES = ROOT / "build/cython-release"
#: What the package needs beside its compiled modules; see package-data in pyproject.toml.
SHIPPED = ("*.py", "*.pyi", "*.pxd", "*.h", "py.typed")


@functools.cache
def extensions() -> tuple[Any, ...]:
    """The native modules, as setup.py describes them."""
    spec = importlib.util.spec_from_file_location("rtap_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return tuple(module.extensions())
    finally:
        os.chdir(before)


def c_file(extension: Any) -> Path:
    return C_FILES / Path(extension.sources[0]).with_suffix(".c")


def target(extension: Any, suffix: str) -> Path:
    """Where a module goes, below the directory of the package."""
    return Path(*extension.name.split(".")).with_suffix(suffix)


def _words(variables: Mapping[str, Any], *names: str) -> Iterator[str]:
    for name in names:
        yield from shlex.split(variables.get(name) or "")


@dataclass(frozen=True)
class Step:
    """How one module is made: the commands that compile and that link it, in this order."""

    out: Path
    commands: tuple[list[str], list[str]]

    def take(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for command in self.commands:
            _run(command)
        self.out.with_suffix(".o").unlink()


def step(
    extension: Any,
    compiler: Sequence[str],
    variables: Mapping[str, Any],
    flags: tuple[Sequence[str], Sequence[str]],
    place: Path,
) -> Step:
    """For a Python with these variables of sysconfig; `flags` are more for the compiler and for the
    linker. They come in setuptools' order, so that the module's own win."""
    out = place / target(extension, variables["EXT_SUFFIX"])
    object_file = str(out.with_suffix(".o"))
    macros = [
        f"-D{name}" + (f"={value}" if value else "") for name, value in extension.define_macros
    ]
    includes = [f"-I{ROOT / path}" for path in extension.include_dirs]
    compiling = [*compiler, *_words(variables, "CFLAGS", "CCSHARED"), *macros, *includes, *flags[0]]
    compiling += ["-c", str(c_file(extension)), "-o", object_file, *extension.extra_compile_args]
    # The first word is the compiler's name there.
    linking = [*compiler, *list(_words(variables, "LDSHARED"))[1:], object_file, "-o", str(out)]
    return Step(out, (compiling, [*linking, *extension.extra_link_args, *flags[1]]))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "no reason").splitlines()
        errors = [line for line in said if "error" in line] or said
        raise Unavailable(f"{command[0]} failed: {errors[0]}")


def _liburing(tree: Tree) -> tuple[list[str], list[str]]:
    """Compiler flags and linker flags for the liburing in the tree."""
    directories = ("usr/lib/" + tree.arch.multiarch, "usr/share")
    environment = os.environ | {
        "PKG_CONFIG_LIBDIR": ":".join(str(tree.path / each / "pkgconfig") for each in directories),
        "PKG_CONFIG_SYSROOT_DIR": str(tree.path),
    }

    def ask(what: str) -> list[str]:
        command = [os.environ.get("PKG_CONFIG") or "pkg-config", what, "liburing"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"pkg-config found no liburing in {tree.path}.")
        return shlex.split(done.stdout)

    return ask("--cflags"), ask("--libs")


def _recipe(steps: Sequence[Step], tree: Tree) -> str:
    """Differs when the modules have to be compiled anew."""
    text = hashlib.sha256(repr((steps, tree.stamp)).encode())
    for path in sorted([*map(c_file, extensions()), *(ROOT / "rtap/include").glob("*.h")]):
        text.update(path.read_bytes())
    return text.hexdigest()


def _copy_sources(package: Path) -> None:
    """The files of the package that are not compiled; none stays that is gone from the tree."""
    for path in package.rglob("*"):
        if path.is_file() and path.suffix != ".so":
            path.unlink()
    for pattern in SHIPPED:
        for path in (ROOT / "rtap").rglob(pattern):
            there = package / path.relative_to(ROOT / "rtap")
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, there)


def build(tree: Tree, place: Path) -> None:
    """The package for that tree's Python, in that directory. It compiles only when it has to."""
    compiler = [tree.arch.compiler, f"--sysroot={tree.path}"]
    if shutil.which(compiler[0]) is None:
        raise Unavailable(f"this machine lacks {compiler[0]}.")
    if missing := [each.name for each in extensions() if not c_file(each).exists()]:
        raise Unavailable(f"there is no C file of {missing[0]}: run make build.")
    cflags, libs = _liburing(tree)
    flags = ([f"-I{tree.python_headers}", *cflags], libs)
    variables = tree.python_variables
    steps = [step(each, compiler, variables, flags, place) for each in extensions()]
    recipe, done = _recipe(steps, tree), place.with_name(f"{place.name}.recipe")
    if not done.exists() or done.read_text() != recipe:
        done.unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        jobs = int(os.environ.get("RTAP_JOBS") or len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(Step.take, steps))
        done.write_text(recipe)
    _copy_sources(place / "rtap")
