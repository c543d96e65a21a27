# SPDX-License-Identifier: BSD-3-Clause
"""What everything else stands on: buffers, bursts, and what all queues share."""
