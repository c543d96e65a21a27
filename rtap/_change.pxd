# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint8_t

from rtap._wrapped cimport WrappedRxQueue, wrapped_t


cdef struct change_t:
    wrapped_t wrapped
    int change
    uint8_t addresses[12]       # destination and source


cdef class ChangeRxQueue(WrappedRxQueue):
    cdef change_t changes
