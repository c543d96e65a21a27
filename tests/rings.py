# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of single queues have in common."""

from __future__ import annotations

from rtap import Burst
from rtap._ring import RxQueue, TxQueue

#: For a packet socket that must not lose anything.
BIG = 64 << 20


def send_all(tx: TxQueue, burst: Burst) -> None:
    while len(burst):
        assert tx.tx_burst(burst) > 0


def receive(rx: RxQueue, n: int, at_once: int = 64, timeout: float = 5) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < n:
        burst = rx.rx_burst(at_once, timeout)
        if not len(burst):
            break
        got += [bytes(m) for m in burst]
    return got
