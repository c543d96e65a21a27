# SPDX-License-Identifier: BSD-3-Clause
"""Measures the CPU time of a control call, in the caller's namespace and in another one.

``python -m bench.control`` prints the median over slices of 100 calls. Needs root.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import rtap

SLICES = 31
CALLS = 100


def cost_us(call: Callable[[], object]) -> float:
    """Median CPU microseconds of one call, over all threads of the process."""
    call()
    costs = []
    for _ in range(SLICES):
        before = time.process_time_ns()
        for _ in range(CALLS):
            call()
        costs.append((time.process_time_ns() - before) / CALLS / 1000)
    return statistics.median(costs)


def main() -> None:
    with rtap.NetNS() as own, rtap.NetNS() as other:
        for where in ("own", "other"):

            def measure(where: str = where) -> None:
                ns = None if where == "own" else other
                with rtap.open("c0", netns=ns) as dev:
                    for call in (dev.stats, dev.xstats, dev.link, dev.info):
                        print(f"{call.__name__:8} {where:6} {cost_us(call):6.1f} us")

            own.call(measure)


if __name__ == "__main__":
    main()
