# SPDX-License-Identifier: BSD-3-Clause
"""The drivers; importing this package registers them."""

from rtap.drivers import net_null, net_rtap

__all__ = ["net_null", "net_rtap"]
