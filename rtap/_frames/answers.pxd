# SPDX-License-Identifier: BSD-3-Clause
"""Answers to ARP, ICMP and ICMPv6."""

from libc.stdint cimport uint8_t

from rtap._core.pool cimport mbuf_t


cdef bint make_answer(mbuf_t *m, const uint8_t *mac) noexcept nogil
