# SPDX-License-Identifier: BSD-3-Clause
"""How long tests wait before they fail. RTAP_TEST_SLOW makes that longer on a slow machine."""

from __future__ import annotations

import os

#: How many times slower this machine is than the one the tests were written for.
SLOW = float(os.environ.get("RTAP_TEST_SLOW") or 1)


def patient(seconds: float) -> float:
    """The time to wait for what takes much less, on a machine of this speed."""
    return seconds * SLOW


def fewer(cases: int) -> int:
    """How many random cases to try on a machine of this speed."""
    return max(1, round(cases / SLOW))


def rate(mbit: float) -> str:
    """For tc(8): as slow for a machine of this speed as `mbit` Mb/s is for others."""
    return f"{mbit * 1000 / SLOW:.0f}kbit"
