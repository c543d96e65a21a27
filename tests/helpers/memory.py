# SPDX-License-Identifier: BSD-3-Clause
"""How much memory this process has."""

from __future__ import annotations

import resource

MB = 1 << 20


def memory() -> tuple[int, int]:
    """Bytes of mapped and of resident memory of this process.

    Without what is reserved and no more: malloc sets 64 MiB of it aside for a new thread now and
    then, which says nothing about us.
    """
    size = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, access, *_ = line.split()
            start, end = (int(address, 16) for address in span.split("-"))
            size += (end - start) * (access != "---p")
    with open("/proc/self/statm") as f:
        resident = int(f.read().split()[1]) * resource.getpagesize()
    return size, resident
