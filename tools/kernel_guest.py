# SPDX-License-Identifier: BSD-3-Clause
"""A kernel booted under QEMU's software emulation, with this machine's files, and tests run in it.

virtme-ng boots it. It gives the guest the machine's root read-only; only the directory of results
can be written to. Without a cache each look at a file would be a question to the host, so the guest
mounts the same root once more, with one, and an overlay in memory over it, and lives there.

What the guest prints is lost with its console: everything it has to say is in files of the results.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_packages import Kernel, Unavailable

ROOT = Path(__file__).resolve().parent.parent
TAG = "machine"  # of the second mount
CPUS = 2
MEMORY = "3G"
#: Later ones emulate more than the tests need: five levels of pages, wide vectors.
CPU = "Nehalem"
#: So much slower are tests there: for their time-outs.
SLOWER = 15

#: What a test needs that the kernel does not load by itself.
MODULES = ("tun",)

#: The guest's first program, as root: gives itself a faster root and runs the other one there.
_OUTER = """#!/bin/sh
cd {results}
exec >guest.log 2>&1
set -eu
uname -r >release
modprobe -a {modules}
new=/run/machine
mkdir -p $new/lower $new/upper $new/work $new/root
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose {tag} $new/lower
mount -t overlay -o lowerdir=$new/lower,upperdir=$new/upper,workdir=$new/work machine $new/root
for d in proc sys dev; do mount --rbind /$d $new/root/$d; done
mount -t tmpfs run $new/root/run
modules=$(readlink -f /lib/modules/$(uname -r))
mkdir -p $new/root/lib/modules $new/root/run/old $new/root{results}
mount -t tmpfs modules $new/root/lib/modules
ln -s $modules $new/root/lib/modules/
mount --bind {results} $new/root{results}
cd $new/root
# A chroot would do, but may not make user namespaces.
exec unshare --mount --propagation private \\
    sh -euc 'pivot_root . run/old && exec sh "$1"' sh {results}/inner.sh
"""
_INNER = """#!/bin/sh
cd {tree}
env {environment} {command} >{results}/output 2>&1 </dev/null
echo $? >{results}/status
"""


@dataclass(frozen=True)
class Run:
    """How a boot ended: the kernel's own version, and the command's exit status, if it came so
    far; else what is known of why not."""

    release: str
    status: int | None
    why: str


def write_scripts(results: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """The programs of a guest that runs a command in this tree."""
    outer = _OUTER.format(results=shlex.quote(str(results)), tag=TAG, modules=" ".join(MODULES))
    inner = _INNER.format(
        results=shlex.quote(str(results)),
        tree=shlex.quote(str(ROOT)),
        environment=shlex.join(f"{name}={value}" for name, value in environment.items()),
        command=shlex.join(command),
    )
    (results / "outer.sh").write_text(outer)
    (results / "inner.sh").write_text(inner)


def _vng(kernel: Kernel, results: Path) -> list[str]:
    share = f"local,id={TAG},path=/,security_model=none,readonly=on,multidevs=remap"
    return [
        *("vng", "--run", str(kernel.image), "--disable-kvm", "--verbose"),
        *("--cpus", str(CPUS), "--memory", MEMORY, "--rwdir", str(results)),
        # Emulated, each of them costs much: guards of processors, and looks at other clocks.
        *("--append", "mitigations=off", "--append", "tsc=reliable"),
        f"--qemu-opts=-cpu {CPU} -fsdev {share} -device virtio-9p-pci,fsdev={TAG},mount_tag={TAG}",
        *("--", f"sh {shlex.quote(str(results / 'outer.sh'))}"),
    ]


def _runs(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def end(process: subprocess.Popen[bytes], grace: float = 10) -> None:
    """Ends virtme-ng and the QEMU that it started, which are a session of their own: kills what
    does not end within that many seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):  # a stopped one ends with the second alone
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            process.poll()
            if not _runs(process.pid):
                return
            time.sleep(0.05)


def _wait(command: Sequence[str], console: Path, limit: float) -> bool:
    """Whether it ended within that many seconds."""
    binaries = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}:{os.environ.get('PATH', os.defpath)}"}
    with console.open("wb") as log:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise Unavailable("virtme-ng is missing: make kernels installs it.") from None
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return False
        finally:
            end(process)
    return True


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip() if path.exists() else ""


def run(
    kernel: Kernel,
    results: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    limit: float,
) -> Run:
    """Boots a kernel, and runs a command in this tree there, for so many seconds at the most."""
    write_scripts(results, command, environment)
    ended = _wait(_vng(kernel, results), results / "console", limit)
    release, status = _text(results / "release"), _text(results / "status")
    if status:
        return Run(release, int(status), "")
    said = _text(results / "guest.log") or _text(results / "console") or "it printed nothing"
    where = "the guest" if release else "the kernel did not boot, and"
    what = "ended early" if ended else f"did not end within {limit / 60:g} minutes"
    return Run(release, None, f"{where} {what}: {said.splitlines()[-1]}")
