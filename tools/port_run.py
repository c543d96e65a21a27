# SPDX-License-Identifier: BSD-3-Clause
"""A command run in a tree of another architecture, which sees this source tree, read-only.

What is mounted for it is so in a mount namespace of its own: it is gone with the command, however
that ends.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import session
from port_tree import Tree

ROOT = Path(__file__).resolve().parent.parent
#: Where the source tree and the results are, in the tree of the architecture.
SOURCE = "/srv/rtap"
RESULTS = "/srv/results"

#: The first process of its namespaces: its end ends all others. The command is another one, since
#: a first process has to wait for orphans, and timeout(1) refuses to be it.
_SCRIPT = """set -eu
mount --bind {tree} {tree}
cd {tree}
mkdir -p .{source} .{results}
mount --bind {root} .{source}
mount -o remount,bind,ro .{source}
mount --bind {out} .{results}
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs tmp tmp
mount -t tmpfs run run
mount -t tmpfs -o mode=755 dev dev
for name in null zero full random urandom tty {devices}; do
    mkdir -p "dev/$(dirname $name)"
    touch dev/$name
    mount --bind /dev/$name dev/$name
done
mkdir -m 1777 dev/shm
mount -t tmpfs shm dev/shm
mkdir dev/pts
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mkdir -p run/machine
pivot_root . run/machine
# A chroot would do, but may not make user namespaces.
status=0
chroot . env -i {environment} sh -c '
    umount --lazy /run/machine && cd {source} && exec "$@"' sh {command} || status=$?
exit $status
"""


def script(
    tree: Path,
    results: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    devices: Sequence[str] = (),
) -> str:
    """The program that runs a command in a tree, with those of this machine's devices."""
    return _SCRIPT.format(
        tree=shlex.quote(str(tree)),
        root=shlex.quote(str(ROOT)),
        out=shlex.quote(str(results)),
        source=SOURCE,
        results=RESULTS,
        devices=shlex.join(devices),
        environment=shlex.join(f"{name}={value}" for name, value in environment.items()),
        command=shlex.join(command),
    )


def run(
    tree: Tree,
    results: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    devices: Sequence[str],
    limit: float,
) -> int | None:
    """The command's exit status, or None when it did not end in so many seconds; what it prints
    is in the results."""
    text = script(tree.path, results, command, environment, devices)
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    return session.run([*unshare, "sh", "-c", text], results / "output", limit)


def asked(tree: Tree, *command: str) -> str:
    """What a program of the tree prints."""
    done = subprocess.run(
        ["chroot", str(tree.path), *command], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
