# SPDX-License-Identifier: BSD-3-Clause
"""The foundation: buffers, bursts, and the code that all queues share."""
