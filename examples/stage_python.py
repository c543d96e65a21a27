# SPDX-License-Identifier: BSD-3-Clause
"""A stage in Python. It takes the GIL once for each burst."""

import sample

import rtap
from rtap import stages

count = 0


def swap_and_steer(burst: rtap.Burst) -> list[int]:
    global count
    count += len(burst)
    verdicts = []
    for mbuf in burst:
        if len(mbuf) < 36 or mbuf[12:14] != b"\x08\x00":
            verdicts.append(stages.DROP)
            continue
        mbuf[0:12] = mbuf[6:12] + mbuf[0:6]
        verdicts.append(mbuf[35:36][0] & 1)
    return verdicts


stage = stages.Call(swap_and_steer)
sample.show(stage)
print("frames:", count)
sample.run(stage)
