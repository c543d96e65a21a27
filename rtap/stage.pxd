# SPDX-License-Identifier: BSD-3-Clause
"""The older name of ``rtap.native``."""

from rtap.native cimport RTAP_DROP, RTAP_STAGE_ABI, rtap_burst
