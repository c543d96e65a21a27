# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint8_t, uint32_t

from rtap._core.pool cimport mbuf_t
from rtap._frames.segment cimport plan_t


cdef uint32_t gso_bytes(const mbuf_t *m, const plan_t *plan, const uint8_t *headers, uint32_t first,
                        uint8_t *out, uint32_t room, uint32_t *lengths,
                        uint32_t most) noexcept nogil
cdef int plan_inside(const mbuf_t *m, plan_t *plan) noexcept nogil
