# SPDX-License-Identifier: BSD-3-Clause
"""A stage compiled by numba."""

import numpy as np
import sample
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from rtap import stages

DROP = stages.DROP


@intrinsic
def pointer(context, address):
    """Cast an integer to a pointer, for which numba has no function."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@cfunc("int32(voidptr, voidptr)")
def swap_and_steer(ctx, burst):
    words = carray(burst, 4, np.uint32)  # abi, n, n_targets, reserved
    arrays = carray(burst, 6, np.uint64)  # the four words above, then data, len, ol_flags, verdict
    if words[0] != 1:
        return -71  # EPROTO
    n = words[1]
    data = carray(pointer(arrays[2]), n, np.uint64)
    length = carray(pointer(arrays[3]), n, np.uint32)
    verdict = carray(pointer(arrays[5]), n, np.uint32)
    for i in range(n):
        p = carray(pointer(data[i]), 36, np.uint8)
        if length[i] < 36 or p[12] != 8 or p[13] != 0:
            verdict[i] = DROP
            continue
        for k in range(6):
            kept = p[k]
            p[k] = p[6 + k]
            p[6 + k] = kept
        verdict[i] = p[35] & 1
    carray(ctx, 1, np.uint64)[0] += n
    return 0


count = np.zeros(1, np.uint64)
stage = stages.Native(swap_and_steer, count)
sample.show(stage)
print("frames:", count[0])
sample.run(stage)
