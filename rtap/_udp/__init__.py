# SPDX-License-Identifier: BSD-3-Clause
"""Burst loops on UDP sockets, and the table of their peers."""
