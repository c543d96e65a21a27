# SPDX-License-Identifier: BSD-3-Clause
"""How soon processors have to wake: the kernel's PM QoS, as used by ``rte_power_qos``.

Source: Documentation/power/pm_qos_interface.rst. A request through ``/dev/cpu_dma_latency`` ends
with its descriptor, however its holder ends; the limits of single processors in sysfs do not.
"""

from __future__ import annotations

import os
import struct

__all__ = ["limit_resume_latency"]

_DEVICE = "/dev/cpu_dma_latency"


def limit_resume_latency(microseconds: int) -> int:
    """Return a descriptor: until it is closed no processor idles in a state that takes longer to
    leave.

    0 keeps processors from halting. OSError says what was tried if that is not allowed.
    """
    try:
        fd = os.open(_DEVICE, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as exc:
        why = f"resume_latency={microseconds} needs {_DEVICE}: {exc.strerror}"
        raise type(exc)(exc.errno, why) from None
    try:
        os.write(fd, struct.pack("=i", microseconds))
    except BaseException:
        os.close(fd)
        raise
    return fd
