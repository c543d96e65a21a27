# SPDX-License-Identifier: BSD-3-Clause
from rtap.ether import MacAddr
from rtap.stages._stage import Stage

class MacSwap(Stage):
    def __init__(self) -> None: ...

class MacRewrite(Stage):
    def __init__(
        self,
        destination: MacAddr | str | bytes | None = None,
        source: MacAddr | str | bytes | None = None,
    ) -> None: ...
