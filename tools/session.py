# SPDX-License-Identifier: BSD-3-Clause
"""A command in a session of its own, which ends with all that it started."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from kernel_guest import end


def run(command: Sequence[str], log: Path, limit: float | None = None) -> int | None:
    """The command's exit status, or None when it did not end within that many seconds. What it
    prints goes to the file. It ends also when this raises, as at Ctrl-C."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)
