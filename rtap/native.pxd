# SPDX-License-Identifier: BSD-3-Clause
"""The names for users' Cython code to cimport: the C interface of stages, and frames without the
GIL.

    from rtap.native cimport RTAP_DROP, rtap_burst

    cdef api int stage(void *ctx, rtap_burst *burst) noexcept nogil: ...

A :class:`rtap.Burst` has ``burst.n`` frames in ``burst.v``.  The functions on ``mbuf_t`` work on a
frame.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap._core.burst cimport Burst
from rtap._core.mbuf cimport Mbuf
from rtap._core.mempool cimport Mempool
from rtap._core.pool cimport (
    mbuf_data, mbuf_free, mbuf_free_bulk, mbuf_is_private, mbuf_read, mbuf_ref, mbuf_reset, mbuf_t,
    mbuf_tailroom, mbuf_window, mbuf_write, pool_available, pool_get, pool_t,
)

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
