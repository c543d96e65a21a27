# SPDX-License-Identifier: BSD-3-Clause
"""Devices of one process used by others: what is lent, and to whom."""
