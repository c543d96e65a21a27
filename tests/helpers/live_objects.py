# SPDX-License-Identifier: BSD-3-Clause
"""Fails a test that leaves native objects behind, on builds that count them: the checked ones.

Loaded as a plugin by conftest.py. What fixtures of a module or a class hold was there before the
test, and stays.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

import rtap
from rtap._core import live

#: For what ends on another thread a moment after the test that asked for it.
GRACE_S = 5.0

FAILED = pytest.StashKey[bool]()


def there() -> dict[str, int]:
    """Objects by kind."""
    numbers = live.counts()
    # The main thread has one from its first burst on, for good.
    numbers["threads with a ring"] = max(1, numbers["threads with a ring"])
    # What a module's queue and pool have registered there, the first test to use them has.
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
        # The traceback of a failure keeps what the test had.
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
        # All fixtures have ended by now, and their values are nobody's but pytest's.
        request.node.funcargs.clear()
        for phase in ("setup", "call"):  # a traceback in the log keeps its frames
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
