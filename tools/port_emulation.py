# SPDX-License-Identifier: BSD-3-Clause
"""Programs of another architecture run here: by the machine itself, or by QEMU's user emulation.

The kernel hands a program to QEMU when binfmt_misc has a rule for it. A machine with the rules of
Debian's packages has them for good; where there is none, one is made for as long as it is needed.
The rule keeps QEMU open (flag F), so that it runs in other roots as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kernel_packages import Unavailable

BINFMT = Path("/proc/sys/fs/binfmt_misc")
#: Where Debian's packages keep the rules that they would register.
RULES = Path("/usr/lib/binfmt.d")
#: The name of a rule that was made here begins so.
OURS = "rtap-"
#: Rules are the machine's: one run of this at a time.
LOCK = Path("/run/lock/rtap-ports")


def runs(arch: str, *options: str) -> bool:
    """Whether this machine runs programs of a Debian architecture now; with -n: by itself."""
    command = ["arch-test", *options, arch]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def rule(text: str, name: str) -> str:
    """The rule for binfmt_misc in one of Debian's files, with that name."""
    found = re.search(r"^:[^:]+(:M:.*:[A-Z]*F[A-Z]*)$", text, re.MULTILINE)
    if found is None:
        raise Unavailable("the rule for binfmt_misc of qemu-user-static has an unknown form.")
    return f":{name}{found.group(1)}"


def _debian_rule(cpu: str, name: str) -> str:
    path = RULES / f"qemu-{cpu}.conf"
    if not path.exists():
        raise Unavailable(f"there is no QEMU that runs programs for {cpu} here (qemu-user-static).")
    return rule(path.read_text(), name)


@contextlib.contextmanager
def _mounted() -> Iterator[None]:
    """binfmt_misc is mounted for this long."""
    if (BINFMT / "register").exists():
        yield
        return
    command = ["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"binfmt_misc cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        # Lazily: something else may be looking into it at the moment.
        subprocess.run(["umount", "--lazy", str(BINFMT)], check=True)


@contextlib.contextmanager
def _registered(text: str, name: str) -> Iterator[None]:
    entry = BINFMT / name
    if not entry.exists():  # else it is from a run that was killed
        try:
            (BINFMT / "register").write_text(text)
        except OSError as exc:
            raise Unavailable(f"binfmt_misc refuses the rule of QEMU: {exc.strerror}") from None
    try:
        yield
    finally:
        entry.write_text("-1")


@contextlib.contextmanager
def running(arch: str, cpu: str) -> Iterator[bool]:
    """Programs of the architecture run here for this long. The value says whether it is QEMU that
    runs them, which knows the processor by another name."""
    name = f"{OURS}{arch}"
    with contextlib.ExitStack() as stack:
        fcntl.flock(stack.enter_context(LOCK.open("w")), fcntl.LOCK_EX)
        if (BINFMT / name).exists() or not runs(arch):
            stack.enter_context(_mounted())
            stack.enter_context(_registered(_debian_rule(cpu, name), name))
            if not runs(arch):
                raise Unavailable(f"QEMU does not run programs for {arch} here.")
        yield not runs(arch, "-n")
