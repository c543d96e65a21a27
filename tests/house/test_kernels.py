# SPDX-License-Identifier: BSD-3-Clause
"""make kernels takes the right packages, and its table says what came of the tests.

Its kernels themselves are booted by make kernels alone.
"""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import eventually

ROOT = Path(__file__).resolve().parents[2]

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="5">
<testcase classname="tests.tap.test_ring" name="test_a[uring]" time="0.1" />
<testcase classname="tests.tap.test_ring" name="test_a[syscall]" time="0.1" />
<testcase classname="tests.tap.test_ring.TestB" name="test_b" time="0.1">
<failure message="OSError: refused&#10;at line 3">traceback</failure></testcase>
<testcase classname="tests.work.test_worker" name="test_c" time="0.1">
<skipped type="pytest.skip" message="needs io_uring">somewhere</skipped></testcase>
<testcase classname="tests.work.test_worker" name="test_d" time="0.1">
<error message="failed on teardown">traceback</error></testcase>
</testsuite></testsuites>
"""


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module(name)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Any:
    return tool("kernel_packages", monkeypatch)


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Any:
    return tool("kernel_guest", monkeypatch)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    return tool("kernel_results", monkeypatch)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    return tool("kernels", monkeypatch)


# ---- packages


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["kmod", "linux-base", "linux-image-6.1.0-57-amd64", "linux-image-amd64"],
            ["linux-image-6.1.0-57-amd64"],
        ),
        (
            [
                *("linux-base", "linux-base-7.2.1+deb14-amd64", "linux-binary-7.2.1+deb14-amd64"),
                *("linux-modules-7.2.1+deb14-amd64", "linux-image-7.2.1+deb14-amd64"),
                *("linux-base-amd64", "linux-image-amd64"),
            ],
            [
                *("linux-base-7.2.1+deb14-amd64", "linux-binary-7.2.1+deb14-amd64"),
                *("linux-image-7.2.1+deb14-amd64", "linux-modules-7.2.1+deb14-amd64"),
            ],
        ),
        (["kmod"], []),
    ],
    ids=["one", "split", "none"],
)
def test_packages_of_a_kernel(packages: Any, names: list[str], expected: list[str]) -> None:
    lines = [f"Inst {name} (1.2-3 Debian:12/oldstable [amd64])\n" for name in names]
    lines += [f"Conf {name} (1.2-3 Debian:12/oldstable [amd64])\n" for name in names]
    assert packages.parts("".join(lines)) == expected


TARGETS = """http://a.example/debian/ bookworm main
http://a.example/debian/ bookworm contrib
http://a.example/debian/ bookworm-updates main
http://b.example/debian-security/ bookworm-security main
http://c.example/python nodistro main
"""


def test_sources_are_the_machines_with_another_suite(packages: Any) -> None:
    signed = f"deb [signed-by={packages.KEYRING}]"
    assert packages.sources(TARGETS, "trixie") == [
        f"{signed} http://a.example/debian/ trixie main",
        f"{signed} http://b.example/debian-security/ trixie-security main",
    ]
    assert packages.sources(TARGETS, "sid") == [f"{signed} http://a.example/debian/ sid main"]
    assert packages.sources(TARGETS, "sid", "http://m.example/debian") == [
        f"{signed} http://m.example/debian sid main"
    ]
    assert packages.sources("http://c.example/ubuntu jammy main\n", "sid") == []


@pytest.mark.parametrize(
    "image", ["boot/vmlinuz-6.1.0-57-amd64", "usr/lib/modules/7.2.1+deb14-amd64/vmlinuz"]
)
def test_the_image_of_an_unpacked_kernel(packages: Any, tmp_path: Path, image: str) -> None:
    assert packages.unpacked("6.1", tmp_path) is None
    (tmp_path / image).parent.mkdir(parents=True)
    (tmp_path / image).touch()
    assert packages.unpacked("6.1", tmp_path).image == tmp_path / image


# ---- results


def test_table(results: Any) -> None:
    one = results.read("6.1", "6.1.0-57-amd64", JUNIT)
    none = results.Outcome("sid", why="the kernel did not boot")
    assert not one.good
    assert not none.good
    assert results.table([one, none]).splitlines() == [
        "                           6.1.0-57-amd64          sid",
        "tests/tap/test_ring.py     2, 1 failed             -",
        "tests/work/test_worker.py  0, 1 failed, 1 skipped  -",
        "all                        2, 2 failed, 1 skipped  -",
    ]
    assert results.details(one) == [
        "6.1.0-57-amd64: FAILED tests/tap/test_ring.py::test_b: OSError: refused",
        "6.1.0-57-amd64: FAILED tests/work/test_worker.py::test_d: failed on teardown",
        "6.1.0-57-amd64: 1 skipped: needs io_uring",
    ]
    assert results.details(none) == ["sid: the kernel did not boot"]


def test_nothing_run_is_nothing_passed(results: Any) -> None:
    outcome = results.read("6.1", "6.1.0", "<testsuites><testsuite /></testsuites>")
    assert not outcome.good
    passed = '<testsuite><testcase classname="tests.test_a" name="test_b" /></testsuite>'
    assert results.read("6.1", "6.1.0", passed).good


def test_a_guest_that_ends_early_fails(kernels: Any, guest: Any, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    outcome = kernels.outcome_of("6.1", guest.Run("", None, "the kernel did not boot"), junit)
    assert (outcome.why, outcome.good) == ("the kernel did not boot", False)
    # Some of its tests have results; that the others have none is a failure.
    junit.write_text('<testsuite><testcase classname="tests.test_a" name="test_b" /></testsuite>')
    assert kernels.outcome_of("6.1", guest.Run("6.1.0", 0, ""), junit).good
    assert not kernels.outcome_of("6.1", guest.Run("6.1.0", 2, ""), junit).good
    assert not kernels.outcome_of("6.1", guest.Run("6.1.0", 124, ""), junit).good
    assert not kernels.outcome_of("6.1", guest.Run("6.1.0", None, "did not end"), junit).good


@pytest.mark.parametrize("how", ["sleep 60", "kill -STOP $$"])
def test_nothing_is_left_of_a_guest(guest: Any, how: str) -> None:
    """QEMU is a child of the process that is known here, and may outlive it."""
    script = f"sh -c '{how}' & echo $!; wait"
    with subprocess.Popen(
        ["sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        eventually(lambda: Path(f"/proc/{child}").exists(), "the child is there")
        guest.end(process, grace=0.5)
        assert process.returncode is not None
    eventually(lambda: not Path(f"/proc/{child}").exists(), "the child is gone")


# ---- what is run


def test_scripts_of_a_guest(guest: Any, tmp_path: Path) -> None:
    """A shell reads back the very words of the command, whatever is in them."""
    words = ["printf", "%s\\n", "not timed", "it's", "$HOME", 'a"b']
    place = tmp_path / "with space"
    place.mkdir()
    guest.write_scripts(place, words, {"A": "x y"})
    for script in ("outer.sh", "inner.sh"):
        subprocess.run(["sh", "-n", str(place / script)], check=True)
    subprocess.run(["sh", str(place / "inner.sh")], check=True)
    assert (place / "output").read_text().splitlines() == words[2:]
    assert (place / "status").read_text() == "0\n"


def test_selection(kernels: Any) -> None:
    chosen = [*kernels.CORE, *kernels.MORE]
    assert len(set(chosen)) == len(chosen)
    assert [path for path in chosen if not (ROOT / path).exists()] == []
    assert kernels.arguments([]).kernels == ["5.10", "6.1", "6.12", "sid"]
    assert kernels.arguments(["6.1", "--core"]).tests == list(kernels.CORE)
    assert kernels.arguments(["6.1", "--tests", "tests/tap"]).tests == ["tests/tap"]


def test_an_unknown_kernel_is_refused(kernels: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.arguments(["6.2"])
    assert "there is no kernel 6.2: 5.10, 6.1, 6.12, sid" in capsys.readouterr().err
