# SPDX-License-Identifier: BSD-3-Clause
"""A Debian arm64 kernel booted under QEMU's software emulation, with the tree of arm64 as its root.

What the user emulation has not, io_uring and TAP devices, is there: it is that kernel's. The kernel
has 9p and overlays in modules, so an initial RAM disk with Debian's busybox loads these. The guest
sees the tree and this source tree read-only, under an overlay in its own memory, and writes only to
the results.
"""

from __future__ import annotations

import lzma
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import session
from kernel_guest import Run
from kernel_packages import Apt, Kernel, Unavailable, fetch_packages, parts, sources_of, unpacked
from port_run import RESULTS, SOURCE
from port_tree import SUITES, Tree

ROOT = Path(__file__).resolve().parent.parent
META = "linux-image-arm64"
#: For the initial RAM disk, which has no other program.
BUSYBOX = "busybox-static"
PROGRAM = "qemu-system-aarch64"
CPUS = 2
MEMORY = "3G"
#: One without signed pointers, see port_tree.
CPU = "neoverse-n1"
#: What the guest needs before it has its root, and tun. Each comes after those that it needs.
MODULES = ("9p", "9pnet_virtio", "overlay", "tun")

#: The guest's first program.
_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /bin
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for name in {modules}; do insmod /modules/$name; done
share=trans=virtio,version=9p2000.L,msize=512000
mkdir /lower /upper /new
mount -t 9p -o ro,$share,cache=loose tree /lower
mount -t tmpfs upper /upper
mkdir /upper/upper /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work tree /new
cd /new
mkdir -p .{source} .{results} lib/modules proc sys dev tmp run
mount -t 9p -o ro,$share,cache=loose source .{source}
mount -t 9p -o rw,$share results .{results}
mount -t 9p -o ro,$share,cache=loose modules lib/modules
uname -r >.{results}/release
for name in proc sys dev; do mount --move /$name $name; done
mount -t tmpfs tmp tmp
mount -t tmpfs run run
mkdir -p dev/shm dev/pts
mount -t tmpfs shm dev/shm
mount -t devpts devpts dev/pts
ifconfig lo up
exec switch_root . /bin/sh -c '. {results}/run.sh'
"""
_RUN = """cd {source}
env -i {environment} {command} >{results}/output 2>&1 </dev/null
echo $? >{results}/status
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


def kernel_of(place: Path) -> Kernel:
    """The newest kernel for arm64, with busybox, unpacked in that directory."""
    kernel = unpacked("arm64", place)
    if kernel is None:
        apt = Apt(place.with_name("apt"), "arm64")
        apt.use(sources_of(SUITES[0]))
        packages = parts(apt.run("-s", "--no-install-recommends", "install", META))
        fetch_packages(apt, [*packages, BUSYBOX], place)
        kernel = unpacked("arm64", place)
    if kernel is None:
        raise Unavailable(f"{META} has no kernel image.")
    return kernel


def needed(dependencies: str, names: Sequence[str]) -> list[str]:
    """Files of those modules and of what these need, in the order to load them; from the text of
    modules.dep."""
    needs = {}
    for line in dependencies.splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {Path(path).name.split(".")[0]: path for path in needs}
    ordered: list[str] = []
    for name in names:
        if name not in by_name:
            raise Unavailable(f"the kernel has no module {name}.")
        path = by_name[name]
        # modules.dep lists what is needed by all of the others last.
        ordered += [each for each in [*reversed(needs[path]), path] if each not in ordered]
    return ordered


def _initrd(place: Path, kernel: Kernel, scratch: Path) -> Path:
    """The initial RAM disk for that kernel."""
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "bin").mkdir(parents=True)
    (scratch / "modules").mkdir()
    shutil.copy2(place / "usr/bin/busybox", scratch / "bin/busybox")
    release = kernel.image.name.removeprefix("vmlinuz-")
    if not (place / "lib").exists():
        (place / "lib").symlink_to("usr/lib")
    subprocess.run(["depmod", "-b", place, release], check=True)
    modules = place / "lib/modules" / release
    names = []
    for path in needed((modules / "modules.dep").read_text(), MODULES):
        data = (modules / path).read_bytes()
        names.append(Path(path).name.removesuffix(".xz"))
        (scratch / "modules" / names[-1]).write_bytes(
            lzma.decompress(data) if path.endswith(".xz") else data
        )
    init = scratch / "init"
    init.write_text(_INIT.format(modules=" ".join(names), source=SOURCE, results=RESULTS))
    init.chmod(0o755)
    out = scratch.with_suffix(".cpio")
    listed = "\0".join(str(path.relative_to(scratch)) for path in sorted(scratch.rglob("*")))
    with out.open("wb") as image:
        subprocess.run(
            ["cpio", "--null", "--quiet", "-o", "-H", "newc"],
            input=listed.encode(),
            stdout=image,
            cwd=scratch,
            check=True,
        )
    return out


def _qemu(tree: Path, kernel: Kernel, initrd: Path, results: Path) -> list[str]:
    command = [
        *(PROGRAM, "-M", "virt", "-cpu", CPU, "-smp", str(CPUS), "-m", MEMORY),
        *("-accel", "tcg,thread=multi", "-display", "none", "-no-reboot", "-nic", "none"),
        *("-serial", f"file:{results}/console"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd)),
        *("-append", "console=ttyAMA0 panic=-1 mitigations=off"),
    ]
    for tag, path, mode in (
        ("tree", tree, "readonly=on"),
        ("source", ROOT, "readonly=on"),
        ("modules", kernel.image.parents[1] / "usr/lib/modules", "readonly=on"),
        ("results", results, "readonly=off"),
    ):
        share = f"local,id={tag},path={path},security_model=none,multidevs=remap,{mode}"
        command += ["-fsdev", share, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return command


def boot(
    tree: Tree,
    results: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    limit: float,
) -> Run:
    """Runs a command in the tree, on a kernel for it, for so many seconds at the most."""
    missing = [name for name in (PROGRAM, "cpio", "depmod") if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"this machine lacks {', '.join(missing)}.")
    place = tree.path.with_name("kernel")
    kernel = kernel_of(place)
    words = shlex.join(f"{name}={value}" for name, value in environment.items())
    (results / "run.sh").write_text(
        _RUN.format(source=SOURCE, results=RESULTS, environment=words, command=shlex.join(command))
    )
    initrd = _initrd(place, kernel, tree.path.with_name("initrd"))
    session.run(_qemu(tree.path, kernel, initrd, results), results / "qemu", limit)
    status, release = results / "status", results / "release"
    version = release.read_text().strip() if release.exists() else ""
    if status.exists():
        return Run(version, int(status.read_text()), "")
    console = results / "console"
    said = console.read_text(errors="replace").strip() if console.exists() else ""
    last = (said or "it printed nothing").splitlines()[-1]
    return Run(version, None, f"the guest did not end within {limit / 60:g} minutes: {last}")
