# SPDX-License-Identifier: BSD-3-Clause
"""What the running kernel lacks, for tests that run on older ones as well (``make kernels``)."""

from __future__ import annotations

import os

import pytest


def kernel() -> tuple[int, int]:
    """The kernel's version: (6, 12)."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor.partition("-")[0])


def no_uso() -> str:
    """Why large datagrams do not pass the kernel's tun driver whole; "" when they do."""
    return "" if kernel() >= (6, 2) else "needs Linux 6.2 for large datagrams on TAP devices (USO)"


def skip_without_uso() -> None:
    if no_uso():
        pytest.skip(no_uso())


def skip_without_short_ring_bursts() -> None:
    if kernel() < (6, 4):
        pytest.skip("needs Linux 6.4: before it, short bursts read without the ring")
