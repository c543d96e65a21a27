# SPDX-License-Identifier: BSD-3-Clause
"""The control plane: TUN/TAP ioctls (:mod:`.tun`) and rtnetlink (:mod:`.netlink`)."""
