# SPDX-License-Identifier: BSD-3-Clause
"""Descriptors that belong to an object from the moment they are opened.

A signal handler may raise between any two steps of Python. A descriptor without an owner then
stays open for ever, and a descriptor with two owners is closed twice.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Descriptor"]

_D = TypeVar("_D", bound="Descriptor")


class Descriptor(io.FileIO):
    """An open descriptor that is closed once, at the latest when forgotten."""

    # Not a Python function: a signal handler may raise at the start of one.
    __del__ = io.FileIO.close

    @classmethod
    def of(cls: type[_D], function: Callable[..., int], *args: Any) -> _D:
        """Opens with `function`, a built-in one, and takes ownership, in one step."""
        return next(map(cls, map(function, *((arg,) for arg in args))))
