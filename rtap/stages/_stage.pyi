# SPDX-License-Identifier: BSD-3-Clause
from rtap._core.burst import Burst

DROP: int

class Stage:
    @property
    def name(self) -> str: ...
    def __call__(self, burst: Burst, targets: int = 1) -> memoryview: ...
