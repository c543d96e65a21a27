# SPDX-License-Identifier: BSD-3-Clause
"""Nothing here is cimported."""
