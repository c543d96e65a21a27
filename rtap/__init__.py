# SPDX-License-Identifier: BSD-3-Clause
"""rtap moves Ethernet frames between Python and the Linux kernel, in bursts, over TAP devices.

    import rtap

    with rtap.open("tap0") as dev:
        while True:
            burst = dev.rx_burst(0, timeout=None)
            dev.tx_burst(0, burst)

:func:`open` returns a started device; :func:`probe` one to configure step by step, as in DPDK.
"""

from rtap._burst import Burst
from rtap._mbuf import Mbuf
from rtap._mempool import Mempool
from rtap._worker import Worker
from rtap.errors import DeviceGone, DeviceStateError, PoolEmpty
from rtap.ethdev import EthDev
from rtap.ether import MacAddr
from rtap.flags import MbufFlag, RxOffload, TxOffload
from rtap.netns import NetNS
from rtap.ops import DevInfo, EthConf, Link, Stats
from rtap.registry import device, devices, probe
from rtap.stats import RouteStats, WorkerStats

# Registers the driver. Left out of __all__: a star import should not replace the builtin.
from rtap.drivers.net_rtap import open as open  # noqa: A004  # isort: skip

__all__ = [
    "Burst",
    "DevInfo",
    "DeviceGone",
    "DeviceStateError",
    "EthConf",
    "EthDev",
    "Link",
    "MacAddr",
    "Mbuf",
    "MbufFlag",
    "Mempool",
    "NetNS",
    "PoolEmpty",
    "RouteStats",
    "RxOffload",
    "Stats",
    "TxOffload",
    "Worker",
    "WorkerStats",
    "device",
    "devices",
    "probe",
]
