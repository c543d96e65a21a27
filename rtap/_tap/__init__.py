# SPDX-License-Identifier: BSD-3-Clause
"""Burst loops on a descriptor, for both engines, and the rings of the uring engine."""
