# SPDX-License-Identifier: BSD-3-Clause
"""For stages written in Cython: what rtap_stage.h declares.

    from rtap.stage cimport RTAP_DROP, rtap_burst

    cdef api int stage(void *ctx, rtap_burst *burst) noexcept nogil: ...
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "rtap_stage.h" nogil:
    const uint32_t RTAP_STAGE_ABI
    const uint32_t RTAP_DROP

    struct rtap_burst:
        uint32_t abi
        uint32_t n
        uint32_t n_targets
        uint32_t reserved
        uint8_t **data
        const uint32_t *len
        uint64_t *ol_flags
        uint32_t *verdict
        void *const *frames
