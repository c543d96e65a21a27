# SPDX-License-Identifier: BSD-3-Clause
"""The simplest super-frame of each kind, to ask the kernel whether it splits any."""

from libc.stdint cimport uint8_t, uint32_t


cdef enum:
    PROBE_MAX = 128             # bytes of the longest, virtio-net header included


cdef uint32_t probe_frame(uint8_t *out, uint8_t gso_type, bint l2) noexcept nogil
