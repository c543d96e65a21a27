# SPDX-License-Identifier: BSD-3-Clause
"""Devices as arguments of multiprocessing: a child of the spawn or forkserver context attaches.

The socket's name and key are in the data that only this child gets.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any

from rtap.ethdev.device import EthDev
from rtap.sharing.attach import attach
from rtap.sharing.share import share, share_of

__all__ = ["for_child"]


def _attached(path: str, key: str) -> EthDev:
    return attach(path, key=key)


def for_child(dev: EthDev) -> tuple[Callable[..., EthDev], tuple[Any, ...]]:
    """What a child makes its device of (:meth:`object.__reduce__`)."""
    shared = share_of(dev)
    if shared is None:
        key = secrets.token_hex(16)
        shared = share(dev, name=f"{dev.name}.{os.getpid()}", key=key)
    return _attached, (shared.path, shared.key)
