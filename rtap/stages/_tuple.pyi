# SPDX-License-Identifier: BSD-3-Clause
from rtap.stages._stage import Stage

class FiveTupleSwap(Stage):
    def __init__(self) -> None: ...
