# SPDX-License-Identifier: BSD-3-Clause
from rtap.stages._stage import Stage

class Gro(Stage):
    def __init__(
        self,
        *,
        udp: bool = False,
        max_length: int = 65535,
        fixed_id: bool = False,
        l2: bool = True,
    ) -> None: ...
