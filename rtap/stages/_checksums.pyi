# SPDX-License-Identifier: BSD-3-Clause
from rtap.stages._stage import Stage

class ChecksumFill(Stage):
    def __init__(self, l2: bool = True) -> None: ...

class ChecksumVerify(Stage):
    def __init__(self, drop: bool = True, l2: bool = True) -> None: ...
