# SPDX-License-Identifier: BSD-3-Clause
"""Stages: they handle frames in a worker's route, between its source and its targets.

Each works in a route, ``worker.forward(source, target, stages=[...])``, without the GIL, and on a
burst, ``stage(burst)``.
"""

from rtap.stages._answer import Echo
from rtap.stages._checksums import ChecksumFill, ChecksumVerify
from rtap.stages._count import Counter
from rtap.stages._mac import MacRewrite, MacSwap
from rtap.stages._match import Match
from rtap.stages._merge import Gro
from rtap.stages._native import Call, Native
from rtap.stages._split import Gso
from rtap.stages._spread import Spread
from rtap.stages._stage import DROP, Stage
from rtap.stages._tuple import FiveTupleSwap

__all__ = [
    "DROP",
    "Call",
    "ChecksumFill",
    "ChecksumVerify",
    "Counter",
    "Echo",
    "FiveTupleSwap",
    "Gro",
    "Gso",
    "MacRewrite",
    "MacSwap",
    "Match",
    "Native",
    "Spread",
    "Stage",
]
