# SPDX-License-Identifier: BSD-3-Clause
"""Debian's kernels: which packages hold them, fetched and unpacked below ``build/kernels``.

They come through an apt of its own (sources list, state and cache below ``build/kernels/apt``) from
the mirrors that this machine's apt uses, with the suite's name changed, and apt verifies them:
nothing of the machine's apt changes. RTAP_MIRROR names another Debian mirror.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

#: The suite of Debian with each kernel. Of sid it is whatever is newest there.
SUITES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", "sid": "sid"}
#: Depends on the newest kernel of its suite.
META = "linux-image-amd64"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TARGETS = "$(REPO_URI) $(RELEASE) $(COMPONENT)"

#: A package that apt would install, if it holds a part of a kernel. Since 7.x a kernel is in
#: linux-binary-, linux-modules- and linux-base-, and linux-image- depends on these.
_PART = re.compile(r"^Inst (linux-(?:image|binary|modules|base)-\d\S*) ", re.MULTILINE)


class Unavailable(Exception):
    """A kernel cannot be had or booted here; the text says why, in one sentence."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked one: what it was asked for by, and its image, in the tree of its packages."""

    name: str
    image: Path


def sources(targets: str, suite: str, mirror: str = "") -> list[str]:
    """Lines of a sources.list for `suite`, from what `apt-get indextargets` says in the format
    TARGETS. The mirror of security updates is used as well, where this machine has one."""
    lines = []
    for uri, release, component in (line.split() for line in targets.splitlines()):
        if component != "main":
            continue
        if re.fullmatch(r"[a-z]+", release) and uri.rstrip("/").endswith("/debian"):
            found = f"{mirror or uri} {suite}"
        elif re.fullmatch(r"[a-z]+-security", release) and "debian" in uri and suite != "sid":
            found = f"{uri} {suite}-security"
        else:
            continue
        line = f"deb [signed-by={KEYRING}] {found} main"
        if line not in lines:
            lines.append(line)
    return lines


def parts(simulation: str) -> list[str]:
    """The packages with a kernel in them, from what `apt-get -s install` would install."""
    return sorted(set(_PART.findall(simulation)))


def unpacked(name: str, place: Path) -> Kernel | None:
    """The kernel in a directory, if its packages are unpacked there."""
    images = sorted([*place.glob("boot/vmlinuz-*"), *place.glob("usr/lib/modules/*/vmlinuz")])
    return Kernel(name, images[-1]) if images else None


class Apt:
    """apt-get with directories of its own, for an architecture."""

    def __init__(self, root: Path, arch: str = "amd64") -> None:
        self._root, self._arch = root, arch
        for name in ("state/lists/partial", "cache/archives/partial"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "status").touch()

    def _options(self) -> Iterator[str]:
        for name, value in (
            ("Dir::Etc::SourceList", self._root / "sources.list"),
            ("Dir::Etc::SourceParts", "/dev/null"),
            ("Dir::Etc::Preferences", "/dev/null"),
            ("Dir::Etc::PreferencesParts", "/dev/null"),
            ("Dir::State", self._root / "state"),
            ("Dir::State::status", self._root / "status"),
            ("Dir::Cache", self._root / "cache"),
            ("Acquire::Languages", "none"),
            ("APT::Architecture", self._arch),
            ("APT::Architectures::", self._arch),
            ("APT::Sandbox::User", ""),
        ):
            yield f"-o{name}={value}"

    def use(self, lines: Sequence[str]) -> None:
        """Takes those sources, and reads what they have now."""
        (self._root / "sources.list").write_text("".join(f"{line}\n" for line in lines))
        self.run("update")

    def run(self, *words: str, cwd: Path | None = None) -> str:
        command = ["apt-get", "-qq", *self._options(), *words]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or "no reason").splitlines()[-1]
            raise Unavailable(f"apt-get {words[0]} failed: {said}")
        return done.stdout


def _machine_targets() -> str:
    """What this machine's apt reads, as TARGETS says."""
    command = ["apt-get", "indextargets", "--format", TARGETS, "Created-By: Packages"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sources_of(suite: str) -> list[str]:
    if shutil.which("apt-get") is None or not KEYRING.exists():
        raise Unavailable("there is no apt-get with Debian's keys (debian-archive-keyring) here.")
    mirror = os.environ.get("RTAP_MIRROR", "")
    lines = sources(_machine_targets(), suite, mirror)
    if mirror and not lines:
        lines = sources(f"{mirror.rstrip('/')} {suite} main", suite)
    if not lines:
        raise Unavailable("this machine's apt has no Debian mirror: name one in RTAP_MIRROR.")
    return lines


def fetch_packages(apt: Apt, packages: Sequence[str], place: Path) -> None:
    """Unpacks packages into a directory, in the place of what it has."""
    fresh = place.with_name(f"{place.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    apt.run("download", *packages, cwd=fresh)
    for package in sorted(fresh.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, fresh], check=True)
        package.unlink()
    # Only now, so that one cut short is not taken for one that is there.
    shutil.rmtree(place, ignore_errors=True)
    fresh.rename(place)


def fetch(name: str, below: Path) -> Kernel:
    """The newest kernel of that name, unpacked below a directory; Unavailable says why not."""
    suite, place = SUITES[name], below / name
    apt = Apt(below / "apt" / suite)
    apt.use(sources_of(suite))
    packages = parts(apt.run("-s", "--no-install-recommends", "install", META))
    if not packages:
        raise Unavailable(f"{META} of {suite} depends on no kernel that is known here.")
    fetch_packages(apt, packages, place)
    kernel = unpacked(name, place)
    if kernel is None:
        raise Unavailable(f"{', '.join(packages)} hold no kernel image.")
    return kernel
