# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3
"""The stage of examples/sample.py in Cython; its context is a uint64_t."""

from libc.errno cimport EPROTO
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from rtap.native cimport RTAP_DROP, RTAP_STAGE_ABI, rtap_burst


cdef api int stage(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef uint8_t kept[6]
    cdef uint8_t *p
    cdef uint32_t i
    if burst.abi != RTAP_STAGE_ABI:
        return -EPROTO
    for i in range(burst.n):
        p = burst.data[i]
        if burst.len[i] < 36 or p[12] != 8 or p[13] != 0:
            burst.verdict[i] = RTAP_DROP
            continue
        memcpy(kept, p, 6)
        memcpy(p, p + 6, 6)
        memcpy(p + 6, kept, 6)
        burst.verdict[i] = p[35] & 1
    (<uint64_t *>ctx)[0] += burst.n
    return 0
