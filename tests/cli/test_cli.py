# SPDX-License-Identifier: BSD-3-Clause
"""The ``rtap`` command line: how it handles arguments, and how failing commands end."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from support import skip_without_devices

import rtap
from rtap.cli import main
from rtap.cli.errors import Interrupted, Stop, sentence


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


def cli(*argv: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "rtap", *argv)


def test_version() -> None:
    done = cli("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"rtap {rtap.__version__}\n"
    try:
        assert rtap.__version__ == version("rtap")
    except PackageNotFoundError:
        assert rtap.__version__.startswith("0")


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "demo" in out
    assert "testpmd" in out


def test_help_of_demo_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["demo", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for option in ("--seconds", "--pairs", "--no-offload", "--engine", "--mtu", "--json"):
        assert option in out


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["demo", "--seconds", "0"], "--seconds"),
        (["demo", "--seconds", "soon"], "'soon'"),
        (["demo", "--pairs", "2"], "3 to"),
        (["demo", "--mtu", "67"], "68 to"),
        (["demo", "--mtu", "65522"], "65521"),
        (["demo", "--engine", "steam"], "steam"),
        (["demo", "there"], "there"),
    ],
)
def test_wrong_arguments_are_a_usage_error(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert complaint in captured.err


def fails_in_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("rtap demo: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


WITHOUT_CAPABILITIES = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for capability in range(64):
    libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.executable, [sys.executable, "-m", "rtap", *sys.argv[1:]])
"""


def test_without_privileges_demo_says_what_it_needs() -> None:
    fails_in_one_sentence(
        run(sys.executable, "-c", WITHOUT_CAPABILITIES, "demo"), "needs root", "unshare -Urn"
    )


@pytest.mark.root
def test_without_the_tun_device_demo_says_what_is_missing() -> None:
    skip_without_devices()
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1)")
    hide = 'mount -t tmpfs none /dev/net && exec "$@"'
    done = run("unshare", "-m", "sh", "-c", hide, "-", sys.executable, "-m", "rtap", "demo")
    fails_in_one_sentence(done, "/dev/net/tun", "No such file")


@pytest.mark.root
def test_a_missing_iperf3_is_said_when_it_was_asked_for() -> None:
    skip_without_devices()
    done = run(
        "env", "PATH=/nonexistent", sys.executable, "-m", "rtap", "demo", "--client", "iperf3"
    )
    fails_in_one_sentence(done, "iperf3 is not installed", "--client builtin")


@pytest.mark.parametrize(
    ("exc", "text"),
    [
        (OSError(13, "open /dev/net/tun: Permission denied"), "open /dev/net/tun: Permission"),
        (FileNotFoundError(2, "No such file or directory", "/x"), "/x: No such file or directory"),
        (ValueError("two\n  lines"), "two lines"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_exception_becomes_a_sentence(exc: BaseException, text: str) -> None:
    assert sentence(exc).startswith(text)
    assert "Errno" not in sentence(exc)


def test_a_signal_is_noted_and_raised_at_a_check() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop().installed() as stop:
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM") as caught:
            stop.check()
        assert caught.value.signum == signal.SIGTERM
        # A second signal would end it without a check.
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before
