# SPDX-License-Identifier: BSD-3-Clause
"""The contents of frames: headers, checksums, super-frames. Knows no device."""
