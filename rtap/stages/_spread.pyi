# SPDX-License-Identifier: BSD-3-Clause
from rtap.stages._stage import Stage

class Spread(Stage):
    def __init__(self, ports: bool = True, l2: bool = True, seed: int = 0) -> None: ...
