# SPDX-License-Identifier: BSD-3-Clause
# Nothing for Python; see _rewrite.pxd.
