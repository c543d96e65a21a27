# SPDX-License-Identifier: BSD-3-Clause
from rtap._core.mempool import Mempool
from rtap.stages._stage import Stage

class Gso(Stage):
    def __init__(self, pool: Mempool | None = None, *, l2: bool = True) -> None: ...
