# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the Cython modules of rtap; all that is not about compiling is in pyproject.toml.

Environment: RTAP_DEBUG=1 makes the checked build (bounds checks, assertions, RTAP_CHECKED=1),
RTAP_DEBUG=tsan makes a build for the race detector, RTAP_DEBUG=asan the checked build under
AddressSanitizer and UBSan, RTAP_DEBUG=gcov one that counts which lines run (make coverage).
RTAP_JOBS sets the number of parallel jobs. CC, CFLAGS and PKG_CONFIG mean what they mean
everywhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("RTAP_DEBUG", "").lower()
TSAN = DEBUG == "tsan"
ASAN = DEBUG == "asan"
GCOV = DEBUG == "gcov"
CHECKED = DEBUG not in ("", "0", "no", "false", "tsan", "gcov")
VARIANT = DEBUG if TSAN or ASAN or GCOV else "checked" if CHECKED else "release"

LIBURING_MIN = (2, 0)
CYTHON_MIN = (3, 1)

# Packet bytes are read and written through pointers of several types: -fno-strict-aliasing.
# The -Werror= ones make a wrong extern declaration fail the build with every compiler, as the
# newer ones do by themselves.
CFLAGS = [
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wno-unused-function",
    "-Wno-unused-variable",
    "-Wno-sign-compare",
    "-Werror=implicit-function-declaration",
    "-Werror=incompatible-pointer-types",
    "-Werror=int-conversion",
]
CHECKED_CFLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-UNDEBUG"]
RELEASE_CFLAGS = ["-O3", "-g1", "-DNDEBUG"]
# GCC resolves the clones of a checksum loop before the sanitizer is ready.
SANITIZE = ["-fsanitize=thread"] if TSAN else ["-fsanitize=address,undefined"] if ASAN else []
TSAN_CFLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-DRTAP_NO_CLONES", *SANITIZE]
# What is left out: words in packets lie at any address (see -fno-strict-aliasing), and bursts of no
# frame copy nothing from or to no address, which C allows from C2y on (N3322).
ASAN_CFLAGS = [
    "-fno-sanitize-recover=all",
    "-fno-sanitize=alignment,nonnull-attribute",
    "-DRTAP_NO_CLONES",
]
RELEASE_MACROS: list[tuple[str, str | None]] = [("CYTHON_WITHOUT_ASSERTIONS", "1")]
CHECKED_MACROS: list[tuple[str, str | None]] = [("RTAP_CHECKED", "1")]

OPTIMISE = TSAN_CFLAGS if TSAN else CHECKED_CFLAGS if CHECKED else RELEASE_CFLAGS
LINK = SANITIZE
if ASAN:
    OPTIMISE = [*CHECKED_CFLAGS, *SANITIZE, *ASAN_CFLAGS]
if GCOV:
    # The compiler counts, not Cython, whose line tracing needs the GIL.
    LINK = ["--coverage"]
    OPTIMISE = ["-O0", "-g1", "-DNDEBUG", "-fprofile-update=prefer-atomic", *LINK]

DIRECTIVES: dict[str, Any] = {
    "language_level": 3,
    "binding": True,
    "embedsignature": True,
    "embedsignature.format": "python",
    "auto_pickle": False,
    # sys.unraisablehook has the traceback, too. Printed beside it, a SystemExit that a noexcept
    # function cannot raise would end the process.
    "unraisable_tracebacks": False,
    "autotestdict": False,
    "boundscheck": CHECKED,
    "initializedcheck": CHECKED,
    "wraparound": False,
    "cdivision": True,
    # What is shared is locked or owned, and how is in docs/freethreading.md.
    "freethreading_compatible": True,
}

# header -> Debian package, Fedora package
HEADERS = {
    "stdlib.h": ("libc6-dev", "glibc-devel"),
    "linux/if_tun.h": ("linux-libc-dev", "kernel-headers"),
    "liburing.h": ("liburing-dev", "liburing-devel"),
    "Python.h": ("python3-dev", "python3-devel"),
}


def lacking(what: str, debian: str, fedora: str) -> SystemExit:
    """The one sentence with which a build ends on a machine that lacks something."""
    return SystemExit(
        f"rtap cannot be compiled, {what}: install {debian} (Debian, Ubuntu) or {fedora} (Fedora)."
    )


def version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def liburing() -> tuple[list[str], list[str]]:
    """Compiler flags and linker flags for the installed liburing."""
    command = shlex.split(os.environ.get("PKG_CONFIG") or "pkg-config")

    def ask(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *args, "liburing"], capture_output=True, text=True, check=False
        )

    if shutil.which(command[0]) is None:
        raise lacking(f"{command[0]} is missing", "pkg-config", "pkgconf-pkg-config")
    found = ask("--modversion")
    if found.returncode:
        raise lacking("liburing is missing", "liburing-dev", "liburing-devel")
    version = found.stdout.strip()
    if version_tuple(version) < LIBURING_MIN:
        least = ".".join(map(str, LIBURING_MIN))
        raise lacking(
            f"liburing {version} is older than {least}",
            "a newer liburing-dev",
            "a newer liburing-devel",
        )
    return shlex.split(ask("--cflags").stdout), shlex.split(ask("--libs").stdout)


def cython_version() -> str:
    least = ".".join(map(str, CYTHON_MIN))
    try:
        version = importlib.metadata.version("Cython")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version_tuple(version) < CYTHON_MIN:
        what = f"Cython {version} is too old" if version else "Cython is missing"
        raise SystemExit(f"rtap cannot be compiled, {what}: pip install 'Cython>={least}'.")
    return version


def compiler() -> list[str]:
    """The command that runs the C compiler."""
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if shutil.which(command[0]) is None:
        raise lacking(f"the C compiler {command[0]} is missing", "build-essential", "gcc")
    return command


def check_headers(cc: list[str], cflags: list[str]) -> None:
    paths = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    flags = [*cflags, *(f"-I{path}" for path in sorted(paths))]
    for header, packages in HEADERS.items():
        done = subprocess.run(
            [*cc, *flags, "-E", "-x", "c", "-", "-o", os.devnull],
            input=f"#include <{header}>\n",
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise lacking(f"the C header {header} is missing", *packages)


def extensions() -> list[Extension]:
    return [
        Extension(
            ".".join(path.with_suffix("").parts),
            [str(path)],
            include_dirs=["rtap/include"],
            define_macros=CHECKED_MACROS if CHECKED else RELEASE_MACROS,
            extra_compile_args=CFLAGS + OPTIMISE,
            extra_link_args=LINK,
        )
        for path in sorted(Path("rtap").rglob("*.pyx"))
    ]


class Build(build):
    """Keeps the objects of other builds apart from those of the release build."""

    def initialize_options(self) -> None:
        super().initialize_options()
        if VARIANT != "release":
            self.build_base = f"build/{VARIANT}"


class BuildExt(build_ext):
    """Runs Cython with its output below build/, after asking what the machine has.

    Both happen in run() and no earlier: an sdist needs neither a compiler nor liburing.
    """

    RECIPES = Path("build/recipes.json")

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # Not a directory that is thrown away: the next in-place build goes on from there.
            permanent = Build(self.distribution)
            permanent.ensure_finalized()
            self.build_lib, self.build_temp = permanent.build_platlib, permanent.build_temp

    def run(self) -> None:
        if not self.extensions:
            return
        jobs = int(os.environ.get("RTAP_JOBS") or len(os.sched_getaffinity(0)))
        if self.parallel is None and jobs > 1:
            self.parallel = jobs
        cython = cython_version()
        cc = compiler()
        cflags, libs = liburing()
        # All that a compiled file depends on beside the sources.
        facts = (VARIANT, cython, cc, cflags, libs, os.environ.get("CFLAGS"))
        recipe = hashlib.sha256(repr(facts).encode() + Path("setup.py").read_bytes()).hexdigest()
        with self.one_at_a_time():
            c_dir = f"build/cython-{VARIANT}"
            if self.recipes().get(c_dir) != recipe:
                check_headers(cc, cflags)
                shutil.rmtree(c_dir, ignore_errors=True)
                self.remember(c_dir, recipe)
            target = "inplace" if self.inplace else str(self.build_lib)
            target += sysconfig.get_config_var("EXT_SUFFIX")
            if self.recipes().get(target) != recipe:
                self.force = True
            self.cythonize(c_dir, jobs)
            for extension in self.extensions:
                # What the user asks for comes last, so that it wins.
                extension.extra_compile_args += [
                    *cflags,
                    *shlex.split(os.environ.get("CFLAGS", "")),
                ]
                extension.extra_link_args += libs
            super().run()
            self.remember(target, recipe)

    def cythonize(self, c_dir: str, jobs: int) -> None:
        from Cython.Build import cythonize
        from Cython.Compiler.Errors import CompileError

        try:
            translated = cythonize(
                self.extensions,
                build_dir=c_dir,
                compiler_directives=DIRECTIVES,
                nthreads=jobs if jobs > 1 else 0,
                quiet=True,
            )
        except CompileError as error:
            # Cython has printed where and why.
            raise SystemExit(f"rtap: Cython stopped: {error}") from None
        # Not the list itself: setuptools keeps notes on its own Extension objects.
        headers = {str(path) for path in Path("rtap/include").glob("*.h")}
        new = {extension.name: extension for extension in translated}
        for extension in self.extensions:
            extension.sources = new[extension.name].sources
            extension.depends = sorted({*headers, *new[extension.name].depends})

    def recipes(self) -> dict[str, str]:
        """The recipe by which each directory was last filled."""
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(self.RECIPES.read_text()))
        return {}

    def remember(self, directory: str, recipe: str) -> None:
        self.RECIPES.write_text(json.dumps(self.recipes() | {directory: recipe}, indent=1))

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Builds that share a source tree take turns."""
        Path("build").mkdir(exist_ok=True)
        with open("build/.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


# Also make ports reads this file: for the flags.
if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build": Build, "build_ext": BuildExt})
