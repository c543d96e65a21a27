# SPDX-License-Identifier: BSD-3-Clause
"""Queues without a kernel behind them, and queues that wrap another one."""
