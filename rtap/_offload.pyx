# SPDX-License-Identifier: BSD-3-Clause
"""Checksums, segmentation and coalescing over frames in memory.

The work is done by kernels over pointers: ``_vnet`` and ``_request`` for what is negotiated with
the kernel.
"""
