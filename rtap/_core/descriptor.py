# SPDX-License-Identifier: BSD-3-Clause
"""Descriptors that belong to an object from the moment on that they are open.

A signal handler may raise between any two steps of Python: a number that is in nobody's hands then
stays open for ever, and one in two hands is closed twice.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Descriptor"]

_D = TypeVar("_D", bound="Descriptor")


class Descriptor(io.FileIO):
    """An open descriptor that is closed once, at the latest when forgotten."""

    # Not a function of Python, at the beginning of which a signal handler may raise.
    __del__ = io.FileIO.close

    @classmethod
    def of(cls: type[_D], function: Callable[..., int], *args: Any) -> _D:
        """What `function`, which has to be a built-in one, opens: the two are one step."""
        return next(map(cls, map(function, *((arg,) for arg in args))))
