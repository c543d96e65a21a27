# SPDX-License-Identifier: BSD-3-Clause
# The stage is in __pyx_capi__.
