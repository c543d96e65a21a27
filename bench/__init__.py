# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks of rtap. Run one with ``python -m bench.send64`` from the source tree, as root."""
