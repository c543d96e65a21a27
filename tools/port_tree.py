# SPDX-License-Identifier: BSD-3-Clause
"""A Debian tree of another architecture: made once below ``build/ports``, and what is known of it.

mmdebstrap makes it from the mirrors that this machine's apt uses (kernel_packages.py). It has what
compiles rtap and what the tests import, all from Debian. The packages are unpacked and not
configured, which would run programs of that architecture for ten minutes: the few things that their
scripts would do are done here.
"""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import session
from kernel_packages import KEYRING, Unavailable, sources_of

#: The first release of Debian whose pytest is new enough for the suite, and the next one, for when
#: a mirror has not all of the first: of the rarer architectures packages may be missing for days.
SUITES = ("trixie", "forky")
#: For mmdebstrap's apt. A mirror that lags behind is good enough: what it has is signed as well.
APT = (
    'Acquire::Languages "none"',
    'Acquire::Check-Valid-Until "false"',
)
#: What dpkg leaves out.
UNNEEDED = ("/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*")
#: What compiles rtap there, what it imports, and what its tests do.
PACKAGES = (
    *("python3-dev", "liburing-dev", "gcc", "libc6-dev"),
    *("python3-pyroute2", "python3-rich", "python3-numpy", "python3-cffi"),
    *("python3-pytest", "python3-pytest-timeout", "python3-pytest-xdist"),
    *("python3-hypothesis", "python3-scapy"),
    *("ethtool", "iproute2", "iputils-ping", "kmod", "mount", "procps"),
)
#: Written last, so that a tree cut short is not taken for one that is there.
DONE = "var/lib/rtap-tree"


@dataclass(frozen=True)
class Architecture:
    """One that Debian has: its name there, that of QEMU, and those of its compiler and its
    directories."""

    name: str
    cpu: str
    compiler: str
    multiarch: str
    stands_for: str
    #: The processor that QEMU emulates; "" for the newest.
    model: str = ""


#: In the order of what they are most likely to show.
ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("s390x", "s390x", "s390x-linux-gnu-gcc", "s390x-linux-gnu", "big-endian"),
        Architecture("i386", "i386", "i686-linux-gnu-gcc", "i386-linux-gnu", "32 bits"),
        Architecture(
            "armhf", "arm", "arm-linux-gnueabihf-gcc", "arm-linux-gnueabihf", "32 bits, weak order"
        ),
        # One without signed pointers: Debian's programs sign all over, which emulated takes most of
        # the time.
        Architecture(
            *("arm64", "aarch64", "aarch64-linux-gnu-gcc", "aarch64-linux-gnu", "weak order"),
            model="neoverse-n1",
        ),
        Architecture(
            *("ppc64el", "ppc64le", "powerpc64le-linux-gnu-gcc", "powerpc64le-linux-gnu"),
            "weak order",
        ),
    )
}


@dataclass(frozen=True)
class Tree:
    """One that is there."""

    arch: Architecture
    path: Path

    def _one(self, pattern: str) -> Path:
        found = sorted(self.path.glob(pattern))
        if not found:
            raise Unavailable(f"the tree of {self.arch.name} has no {pattern}: remove {self.path}.")
        return found[-1]

    @property
    def stamp(self) -> str:
        """Changes when the tree is made anew."""
        return (self.path / DONE).read_text()

    @property
    def release(self) -> str:
        """Of Debian: 13.2, or forky/sid while that has no number."""
        return (self.path / "etc/debian_version").read_text().strip()

    @property
    def python_variables(self) -> Mapping[str, Any]:
        """How its Python was compiled, and compiles extensions: what sysconfig says there."""
        data = self._one(f"usr/lib/python3.*/_sysconfigdata_*{self.arch.multiarch}.py")
        variables: Mapping[str, Any] = runpy.run_path(str(data))["build_time_vars"]
        return variables

    @property
    def python_headers(self) -> Path:
        return self._one("usr/include/python3.*/Python.h").parent


def ready(arch: Architecture, place: Path) -> Tree | None:
    """The tree in a directory, if it is complete and has today's packages."""
    done = place / DONE
    if done.exists() and done.read_text().splitlines()[1:] == list(PACKAGES):
        return Tree(arch, place)
    return None


def release_sources(suite: str) -> list[str]:
    """The release itself: nothing here has to be the safest version, and one mirror is enough."""
    return [line for line in sources_of(suite) if f" {suite}-security " not in line]


def why(log: str) -> str:
    """What mmdebstrap, or a program that it ran, said first of what went wrong."""
    found = re.search(r"^E: (.*)$", log, re.MULTILINE)
    return found.group(1) if found else (log.strip() or "it printed nothing").splitlines()[-1]


def configure(tree: Path, arch: Architecture) -> None:
    """What the scripts of the packages would do of what is needed."""
    for name in ("passwd", "group"):
        master = tree / f"usr/share/base-passwd/{name}.master"
        (tree / "etc" / name).write_text(master.read_text())
    libraries = tree / "usr/lib" / arch.multiarch
    for name in ("blas", "lapack"):
        (libraries / f"lib{name}.so.3").symlink_to(f"{name}/lib{name}.so.3")
    (tree / "usr/bin/cc").symlink_to("gcc")


def make(arch: Architecture, suite: str, place: Path, log: Path) -> Tree:
    """A new tree in that directory; Unavailable says why there is none."""
    fresh = place.with_name(f"{place.name}.new")
    remove(fresh)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *("mmdebstrap", "--mode=root", "--variant=extract", f"--architectures={arch.name}"),
        f"--keyring={KEYRING}",
        *(f"--aptopt={option}" for option in APT),
        *(f"--dpkgopt=path-exclude={path}" for path in UNNEEDED),
        *("--include=?essential", f"--include={','.join(PACKAGES)}"),
        *(suite, str(fresh), *release_sources(suite)),
    ]
    try:
        if session.run(command, log) != 0:
            raise Unavailable(
                f"mmdebstrap made no tree of {suite} for {arch.name}: {why(log.read_text())}"
            )
        configure(fresh, arch)
    except BaseException:
        remove(fresh)
        raise
    # The first line tells this tree from the next one.
    (fresh / DONE).write_text("\n".join([time.ctime(), *PACKAGES]) + "\n")
    remove(place)
    fresh.rename(place)
    return Tree(arch, place)


def remove(place: Path) -> None:
    """Removes a tree, but nothing that is mounted in it."""
    if place.exists():
        if (mounts := mounted_below(place)) != []:
            raise Unavailable(f"{mounts[0]} is still mounted.")
        shutil.rmtree(place)


def mounted_below(place: Path) -> list[str]:
    command = ["findmnt", "--list", "--noheadings", "--output", "TARGET"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    return [path for path in found if path.startswith(f"{place.resolve()}/")]
