# SPDX-License-Identifier: BSD-3-Clause
"""Worker threads: the loop, the thread that runs it, and the routes."""
