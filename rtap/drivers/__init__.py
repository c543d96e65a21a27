# SPDX-License-Identifier: BSD-3-Clause
"""The drivers; importing this package registers them."""

from rtap.drivers import net_af_packet, net_null, net_rtap

__all__ = ["net_af_packet", "net_null", "net_rtap"]
