# SPDX-License-Identifier: BSD-3-Clause
"""Import of the package: works anywhere, is quick, and reports what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import child_environment, python, skip_without_devices

import rtap

PACKAGE = Path(rtap.__file__).resolve().parent

# Calls that work without privileges, and calls that cannot.
UNPRIVILEGED = """
import os, sys
import rtap
assert os.geteuid() != 0, "this was to run without root"
with rtap.Mempool(8) as pool:
    burst = pool.alloc_burst(3, [b"a", b"bb", b"ccc"])
    assert [bytes(m) for m in burst] == [b"a", b"bb", b"ccc"]
    assert list(burst.lengths) == [1, 2, 3]
    del burst
assert rtap.devices() == []
assert rtap.MacAddr("02:00:00:00:00:01").peer() == "82:00:00:00:00:01"
worker = rtap.Worker()
for call in (
    lambda: rtap.open("t0"),
    lambda: rtap.probe("net_rtap0,iface=t0"),
    rtap.NetNS,
):
    try:
        call()
    except OSError as exc:
        print(type(exc).__name__, exc)
    else:
        raise SystemExit("that should not have worked")
assert rtap.devices() == []
"""


def unprivileged(prelude: str) -> list[str]:
    """Runs the code as an unprivileged user, after a shell command as root."""
    skip_without_devices()
    done = subprocess.run(
        [
            *("unshare", "-m", "sh", "-c", f'{prelude} exec unshare -U "$@"', "sh"),
            *(sys.executable, "-W", "error", "-c", UNPRIVILEGED),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_without_root() -> None:
    opened, probed, namespace = unprivileged("")
    for line in (opened, probed):
        assert line.startswith("PermissionError")
        assert "t0" in line
        assert "CAP_NET_ADMIN" in line
    assert namespace.startswith("PermissionError")
    assert "network namespace" in namespace


def test_without_root_and_without_the_tun_device() -> None:
    opened, probed, namespace = unprivileged("mount -t tmpfs none /dev/net &&")
    for line in (opened, probed):
        assert line.startswith("FileNotFoundError")
        assert "/dev/net/tun" in line
        assert "modprobe tun" in line
    assert namespace.startswith("PermissionError")


def test_a_tun_device_that_nobody_may_open() -> None:
    prelude = (
        "mount -t tmpfs none /dev/net && mknod /dev/net/tun c 10 200 && chmod 0 /dev/net/tun && "
        "chown 12345 /dev/net/tun &&"
    )
    opened, probed, _ = unprivileged(prelude)
    for line in (opened, probed):
        assert line.startswith("PermissionError")
        assert "the device's mode does not admit this user" in line


def test_a_file_that_is_no_tun_device() -> None:
    opened, _, _ = unprivileged(
        "mount -t tmpfs none /dev/net && touch /dev/net/tun && chmod 666 /dev/net/tun &&"
    )
    assert opened.startswith("OSError")
    assert "/dev/net/tun is not the tun driver's device" in opened


@pytest.mark.parametrize("flags", [["-O"], ["-OO"], ["-W", "error", "-bb"], ["-I"], ["-X", "dev"]])
def test_import_with_interpreter_flags(flags: list[str]) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
import rtap
rtap.Mempool(4).alloc(b"x")
"""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        env=child_environment(),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_import_loads_only_what_it_needs() -> None:
    done = python(
        """
        import sys
        before = set(sys.modules)
        import rtap
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(*sorted(new & {"pyroute2", "asyncio", "numpy", "scapy", "rich", "Cython", "pytest",
                             "importlib.metadata", "setuptools", "email", "multiprocessing"}))
        assert "rtap.cli" not in sys.modules
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_import_opens_and_starts_nothing() -> None:
    done = python(
        """
        import os, threading
        before = len(os.listdir("/proc/self/fd"))
        import rtap
        assert len(os.listdir("/proc/self/fd")) == before
        assert threading.active_count() == 1
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- names


def test_all_is_there_and_sorted() -> None:
    assert rtap.__all__ == sorted(rtap.__all__)
    for name in rtap.__all__:
        assert getattr(rtap, name) is not None
    assert "open" not in rtap.__all__
    namespace: dict[str, object] = {}
    exec("from rtap import *", namespace)
    assert set(rtap.__all__) <= set(namespace)
    assert "open" not in namespace


def test_public_names_say_what_they_are() -> None:
    for name in rtap.__all__:
        thing = getattr(rtap, name)
        assert thing.__doc__, name
        if isinstance(thing, type):
            for attribute, value in vars(thing).items():
                if (
                    not attribute.startswith("_")
                    and callable(value)
                    and name in ("EthDev", "NetNS")
                ):
                    assert value.__doc__, f"{name}.{attribute}"


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 7.8.9")
    assert rtap.__version__ == "rtap 7.8.9"

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert rtap.__version__ == "0+unknown"


def test_other_attributes_are_missing() -> None:
    with pytest.raises(AttributeError, match="module 'rtap' has no attribute 'colour'"):
        rtap.colour  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(rtap, "__path_of_nothing__")


# ---- files


def test_include_directory() -> None:
    include = Path(rtap.get_include())
    assert include.is_absolute()
    assert (include / "rtap_compat.h").is_file()


def test_stubs_and_declarations_are_beside_the_modules() -> None:
    """There are py.typed, a .pyi for each extension, and .pxd files for cimport."""
    assert (PACKAGE / "py.typed").exists()
    modules = sorted(p.with_name(p.name.partition(".")[0]) for p in PACKAGE.rglob("*.so"))
    assert len(modules) > 30
    for module in modules:
        assert module.with_suffix(".pyi").is_file(), module
    for name in ("pool", "mbuf", "burst", "mempool", "queue", "compat", "linux"):
        assert (PACKAGE / "_core" / f"{name}.pxd").is_file(), name
    for name in ("_ring", "native", "stage"):
        assert (PACKAGE / f"{name}.pxd").is_file(), name


def test_the_tests_run_on_this_package() -> None:
    build = os.environ.get("RTAP_TEST_BUILD", "")
    assert build in str(PACKAGE)
