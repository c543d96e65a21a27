# SPDX-License-Identifier: BSD-3-Clause
"""What children of multiprocessing do in a test; they import it by this name."""

from __future__ import annotations

from typing import Any

from rtap import EthDev


def work(dev: EthDev, number: int, results: Any) -> None:
    """Sends a frame on a pair of the parent's device."""
    results.put((number, dev.send(b"x" * 60, queue=number)))
    dev.close()
