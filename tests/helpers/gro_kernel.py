# SPDX-License-Identifier: BSD-3-Clause
"""The kernel's own GRO as an oracle.

Frames are written one by one to a TAP device with IFF_NAPI, where the kernel coalesces them. They
are read back as super-frames, with virtio-net headers, from another device on the same bridge.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import time
from collections.abc import Iterator

from patience import patient
from rigs import add_bridge
from support import ip, quiet_netns
from this_kernel import no_uso

from rtap import NetNS
from rtap.control import tun
from rtap.control.tun import QueueFlag, TunFeature

#: How long the kernel holds a super-frame that waits for more frames. A frame that comes later than
#: this after the one before it, or in another tick of the kernel's clock than the first frame of
#: its train, starts a new one.
HOLD_NS = 1_000_000

#: Older kernels split super-frames of UDP again, before they hand them to a TAP.
UDP_TOO = not no_uso()
USO = TunFeature.USO4 | TunFeature.USO6
FEATURES = (
    TunFeature.CSUM
    | TunFeature.TSO4
    | TunFeature.TSO6
    | TunFeature.TSO_ECN
    | (USO if UDP_TOO else TunFeature(0))
)

_GRO = """
mount -t sysfs none /sys
echo {hold} > /sys/class/net/a0/gro_flush_timeout
ethtool -K a0 gro on {udp}
"""


class KernelGro:
    """``a`` takes plain frames, and ``b`` returns what the kernel made of them."""

    def __init__(self, ns: NetNS, a: int, b: int) -> None:
        self.ns, self.a, self.b = ns, a, b

    def _read(self, timeout: float) -> tuple[bytes, bytes] | None:
        if not select.select([self.b], [], [], timeout)[0]:
            return None
        data = os.read(self.b, 1 << 17)
        return data[: tun.VNET_HDR_LEN], data[tun.VNET_HDR_LEN :]

    def coalesce(self, frames: list[bytes], timeout: float = 5) -> list[tuple[bytes, bytes]]:
        """(virtio-net header, frame) for each frame or super-frame that the kernel returns.

        TimeoutError when some of ``frames`` do not come out.
        """
        write, a = os.write, self.a
        with uninterrupted():
            for frame in frames:
                write(a, frame)
        got: list[tuple[bytes, bytes]] = []
        seen = 0
        deadline = time.monotonic() + patient(timeout)
        while seen < len(frames):
            one = self._read(max(0.0, deadline - time.monotonic()))
            if one is None:
                raise TimeoutError(f"{seen} of {len(frames)} frames came out of the kernel's GRO")
            got.append(one)
            seen += segments(*one)
        return got


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Runs this thread ahead of all ordinary ones, if that is allowed."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def segments(header: bytes, frame: bytes) -> int:
    """How many frames a super-frame was made of."""
    _, gso_type, _, size, start, _ = struct.unpack("<BBHHHH", header)
    if gso_type == 0:
        return 1
    l4 = 8 if gso_type & 0x7F == 5 else (frame[start + 12] >> 4) * 4
    return -(-(len(frame) - start - l4) // size)


def _open(ns: NetNS, name: str, flags: QueueFlag) -> int:
    def attach() -> int:
        fd = os.open(tun.DEV_PATH, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        request = struct.pack("16sH", name.encode(), flags).ljust(40, b"\0")
        fcntl.ioctl(fd, tun.TUNSETIFF, request)
        return fd

    return ns.call(attach)


def _gro(hold_ns: int) -> str:
    return _GRO.format(hold=hold_ns, udp="rx-udp-gro-forwarding on" if UDP_TOO else "")


@contextlib.contextmanager
def kernel_gro(hold_ns: int = HOLD_NS) -> Iterator[KernelGro]:
    """The rig, in a namespace of its own."""
    plain = QueueFlag.TAP | QueueFlag.NO_PI
    with quiet_netns() as ns, contextlib.ExitStack() as stack:
        add_bridge(ns)
        a = _open(ns, "a0", plain | QueueFlag.NAPI)
        stack.callback(os.close, a)
        b = _open(ns, "b0", plain | QueueFlag.VNET_HDR)
        stack.callback(os.close, b)
        fcntl.ioctl(b, tun.TUNSETOFFLOAD, FEATURES)
        for name in ("a0", "b0"):
            ip(ns, "link", "set", name, "master", "br0")
            ip(ns, "link", "set", name, "multicast", "off")
            ip(ns, "link", "set", name, "mtu", "9000", "up")
        ns.run(["unshare", "-m", "sh", "-ec", _gro(hold_ns)], check=True)
        yield KernelGro(ns, a, b)
