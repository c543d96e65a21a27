# SPDX-License-Identifier: BSD-3-Clause
"""Fails a test that leaves native objects behind. Only checked builds count them.

conftest.py loads this as a plugin. Objects that fixtures of a module or a class hold were there
before the test, so they may stay.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

import rtap
from rtap._core import live

#: Seconds for objects that another thread removes shortly after the test.
GRACE_S = 5.0

FAILED = pytest.StashKey[bool]()


def there() -> dict[str, int]:
    """The number of live objects of each kind."""
    numbers = live.counts()
    # The main thread keeps its ring from its first burst on.
    numbers["threads with a ring"] = max(1, numbers["threads with a ring"])
    # The first test that uses a module's queue and pool registers them in the ring; they stay.
    if numbers["rx queues"] + numbers["tx queues"]:
        numbers["descriptors in rings"] = 0
    if numbers["arenas"]:
        numbers["arenas in rings"] = 0
    numbers["devices"] = len(rtap.devices())
    return numbers


def left_since(before: dict[str, int]) -> dict[str, int]:
    return {kind: n - before[kind] for kind, n in there().items() if n > before[kind]}


if live.counts():

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
        report = yield
        # The traceback of a failure keeps the test's objects alive.
        if report.failed or hasattr(report, "wasxfail"):
            item.stash[FAILED] = True
        return report

    @pytest.fixture(autouse=True)
    def nothing_is_left(
        request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
    ) -> Iterator[None]:
        gc.collect()
        before = there()
        yield
        if request.node.stash.get(FAILED, False):
            return
        # All fixtures have ended by now, and only pytest still holds their values.
        request.node.funcargs.clear()
        for phase in ("setup", "call"):  # a traceback in the log keeps its frames alive
            caplog.get_records(phase).clear()
        deadline = time.monotonic() + GRACE_S
        while left_since(before):
            gc.collect()
            left = left_since(before)
            if left and time.monotonic() > deadline:
                pytest.fail(
                    "left behind: " + ", ".join(f"{n} {kind}" for kind, n in left.items()),
                    pytrace=False,
                )
            time.sleep(0.005)
