# SPDX-License-Identifier: BSD-3-Clause
"""What is inside frames: headers, checksums, super-frames. Knows no device."""
