# SPDX-License-Identifier: BSD-3-Clause
"""Settings of the whole suite: which build is tested, and what may be skipped."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from _pytest.config import create_terminal_writer
from hypothesis import HealthCheck, settings

BUILD = os.environ.get("RTAP_TEST_BUILD")
# pyproject.toml puts these helpers on the path. Rewrite their assertions like those of tests.
HELPERS = Path(__file__).with_name("helpers")
pytest.register_assert_rewrite(*(path.stem for path in HELPERS.glob("*.py")))
pytest_plugins = ["support", "fakes", "workers", "sharing", "live_objects"]
SANITIZED = (BUILD or "").endswith("sanitize")
# Under the sanitizers, their findings are checked.
collect_ignore = [] if SANITIZED else ["house/test_sanitizers.py"]

NO_SKIPS = os.environ.get("RTAP_NO_SKIPS", "") not in ("", "0")

# Modules whose tests share nothing, so that pytest-run-parallel can run each test in several
# threads at once.
PARALLEL = {"test_checksum", "test_ether", "test_flags", "test_gro"}

# No deadline: times on a shared machine say nothing about the code.
settings.register_profile(
    "rtap", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", parent=settings.get_profile("rtap"), max_examples=20_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "rtap"))

skipped: list[str] = []


def encodable(value: Any) -> Any:
    """The value, with every lone surrogate in its texts escaped."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {encodable(key): encodable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(encodable, value))
    return value


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is a pytest-xdist worker."""
    return hasattr(config, "workerinput")


def has_workers(config: pytest.Config) -> bool:
    """Whether pytest-xdist workers run the tests for this process."""
    return config.getoption("dist", "no") != "no" and not is_worker(config)


def package_directory() -> Path:
    spec = find_spec("rtap")
    if spec is None or spec.origin is None:
        raise pytest.UsageError("rtap cannot be imported: run make build")
    return Path(spec.origin).resolve().parent


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background jobs ignore SIGINT, and so would the children that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if is_worker(config):
        # pytest-timeout reports what hung on standard output, which nothing reads in a worker.
        writer = create_terminal_writer(config, sys.__stderr__)
        config.get_terminal_writer = lambda: writer  # type: ignore[method-assign]
    found = package_directory()
    if not BUILD:
        return
    wanted = (config.rootpath / BUILD).resolve()
    if found.parent != wanted:
        raise pytest.UsageError(f"the tests should run on {wanted}, but rtap comes from {found}")
    # Workers start in this process's directory and find the tests from there.
    if not has_workers(config):
        # Children that a test runs with python -c or -m search this directory first.
        os.chdir(wanted)


def pytest_report_header(config: pytest.Config) -> str:
    return f"rtap: {Path(BUILD or 'release').name} build in {package_directory()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" not in config.getoption("markexpr"):
        long = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=long)
    for item in items:
        if item.path.stem not in PARALLEL and not item.get_closest_marker("thread_unsafe"):
            reason = "its fixtures are for one thread"
            item.add_marker(pytest.mark.thread_unsafe(reason=reason))
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        skipped.append(report.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        skipped.append(report.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Escapes what a test printed: it reaches the reporting process only as UTF-8."""
    return encodable((yield))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over what a worker that has ended skipped during collection."""
    # A worker that crashed has no output; it fails the run anyway.
    skipped.extend(set(getattr(node, "workeroutput", {}).get("skipped", ())) - set(skipped))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if is_worker(session.config):
        # The main process gets the reports of tests, but not of skipped modules.
        session.config.workeroutput["skipped"] = skipped  # type: ignore[attr-defined]
    elif NO_SKIPS and skipped and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if NO_SKIPS and skipped:
        terminalreporter.section("skipped, where none may be (RTAP_NO_SKIPS)", sep="=", red=True)
        for nodeid in skipped:
            terminalreporter.line(nodeid)
