# SPDX-License-Identifier: BSD-3-Clause
from collections.abc import Callable, Sequence
from typing import Any

from rtap._core.burst import Burst
from rtap.stages._stage import Stage

class Native(Stage):
    def __init__(self, function: Any, ctx: Any = 0) -> None: ...

class Call(Stage):
    def __init__(self, function: Callable[[Burst], Sequence[int] | None]) -> None: ...
    @property
    def exception(self) -> BaseException | None: ...
