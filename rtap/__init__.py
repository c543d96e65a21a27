# SPDX-License-Identifier: BSD-3-Clause
"""rtap moves Ethernet frames between Python and the Linux kernel, in bursts, over TAP devices.

    import rtap

    with rtap.open("tap0") as dev:
        while True:
            burst = dev.rx_burst(0, timeout=None)
            dev.tx_burst(0, burst)

:func:`open` returns a started device; :func:`probe` one to configure step by step, as in DPDK.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rtap import stages
from rtap._core.burst import Burst
from rtap._core.mbuf import Mbuf
from rtap._core.mempool import Mempool
from rtap._work.figures import RouteStats, StageStats, TargetStats, WorkerStats
from rtap._work.worker import Worker
from rtap.control.netns import NetNS
from rtap.errors import DeviceGone, DeviceStateError, PoolEmpty
from rtap.ethdev.device import EthDev
from rtap.ethdev.events import EthEvent, EventHandle, callback_register
from rtap.ethdev.ops import DevInfo, EthConf, Link, Stats
from rtap.ethdev.registry import device, devices, probe, register_driver
from rtap.ether import MacAddr
from rtap.flags import MbufFlag, RxOffload, TxOffload

# Registers the driver. Not in __all__: a star import should not replace the builtin.
from rtap.drivers.open_tap import open as open  # noqa: A004  # isort: skip

__version__: str

__all__ = [
    "Burst",
    "DevInfo",
    "DeviceGone",
    "DeviceStateError",
    "EthConf",
    "EthDev",
    "EthEvent",
    "EventHandle",
    "Lease",
    "Link",
    "MacAddr",
    "Mbuf",
    "MbufFlag",
    "Mempool",
    "NetNS",
    "PoolEmpty",
    "RouteStats",
    "RxOffload",
    "Share",
    "ShmRing",
    "StageStats",
    "Stats",
    "TargetStats",
    "TxOffload",
    "Worker",
    "WorkerStats",
    "attach",
    "callback_register",
    "device",
    "devices",
    "get_include",
    "open_udp",
    "probe",
    "register_driver",
    "share",
    "stages",
]


def get_include() -> str:
    """The directory of the C headers that the installed ``.pxd`` files refer to.

    A project that cimports from rtap passes it to its extension: ``Extension(...,
    include_dirs=[rtap.get_include()])``. liburing's headers have to be there as well.
    """
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "include")


#: Names that few programs need, and the modules that have them: imported with their first use.
_LATER = {
    "Lease": "rtap.sharing.share",
    "Share": "rtap.sharing.share",
    "ShmRing": "rtap.sharing.ring",
    "attach": "rtap.sharing.attach",
    "open_udp": "rtap.drivers.open_udp",
    "share": "rtap.sharing.share",
}

if TYPE_CHECKING:  # type checkers would take every misspelt name for one of those below
    from rtap.drivers.open_udp import open_udp
    from rtap.sharing.attach import attach
    from rtap.sharing.ring import ShmRing
    from rtap.sharing.share import Lease, Share, share
else:

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            found = globals()[name] = getattr(import_module(_LATER[name]), name)
            return found
        # Looked up only when needed, since it takes tens of milliseconds. A tree that was only
        # built in place has no metadata.
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("rtap")
        except PackageNotFoundError:
            return "0+unknown"

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
