# SPDX-License-Identifier: BSD-3-Clause
from rtap.ether import MacAddr
from rtap.stages._stage import Stage

class Echo(Stage):
    def __init__(self, mac: MacAddr | str | bytes, *, others: int | None = None) -> None: ...
