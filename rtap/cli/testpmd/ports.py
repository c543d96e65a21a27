# SPDX-License-Identifier: BSD-3-Clause
"""The ports of ``rtap testpmd``: devices by their arguments, one pool, and the topology."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import rtap
from rtap.cli.errors import CommandError
from rtap.cli.testpmd.modes import Ends
from rtap.cli.testpmd.options import DEFAULT_HEADROOM, Options
from rtap.ethdev.control import STARTED
from rtap.ethdev.ops import DevInfo, EthConf
from rtap.ether import MacAddr
from rtap.flags import RxOffload

__all__ = ["Port", "forwards_to", "open_ports", "started"]

DEFAULT_DATA_ROOM = 2048
_LRO = RxOffload.TCP_LRO | RxOffload.UDP_LRO


@dataclass(eq=False)
class Port:
    """One port: its number, counted from 0 in the order of --vdev, and its device."""

    number: int
    dev: rtap.EthDev
    peer: MacAddr

    def ends(self) -> Ends:
        """Addresses of frames that leave here: the port's own address is the application's."""
        return Ends(source=self.dev.app_mac, destination=self.peer)

    @property
    def running(self) -> bool:
        return self.dev.state == STARTED


def forwards_to(number: int, ports: int, topology: str) -> int:
    """The port that sends the frames that port `number` receives.

    With an odd number of ports the last one is its own pair.
    """
    if topology == "loop":
        return number
    if topology == "chained":
        return (number + 1) % ports
    other = number ^ 1
    return other if other < ports else number


def _peer(number: int, options: Options) -> MacAddr:
    return options.eth_peers.get(number) or MacAddr(f"02:00:00:00:00:{number & 0xFF:02x}")


def _data_room(infos: list[DevInfo], options: Options) -> int:
    if options.mbuf_size is not None:
        return options.mbuf_size - DEFAULT_HEADROOM
    if options.rx_offloads & _LRO and not options.rx_offloads & RxOffload.SCATTER:
        return max(info.max_rx_pktlen for info in infos) + 1
    return max(DEFAULT_DATA_ROOM, *(info.min_rx_bufsize for info in infos))


def _pool_size(options: Options, room: int) -> int:
    """Enough mbufs for a few bursts in hand on every queue, and for frames held back in buffers.

    The memory is only reserved: memory that is never touched is never used.
    """
    if options.total_num_mbufs is not None:
        return options.total_num_mbufs
    burst = max(options.burst, options.rxd or 64)
    queues = options.rxq * len(options.vdevs)
    least = 4096 if room <= 4096 else 512
    return max(least, queues * (4 * burst + options.noisy.tx_sw_buffer_size))


@contextlib.contextmanager
def open_ports(options: Options) -> Iterator[list[Port]]:
    """The ports, started. At the end they are closed, and interfaces that do not persist are
    gone."""
    with contextlib.ExitStack() as stack:
        ports = []
        for number, vdev in enumerate(options.vdevs):
            try:
                dev = rtap.probe(vdev)
            except ValueError as exc:
                raise CommandError(f"--vdev={vdev}: {exc}") from None
            ports.append(Port(number, stack.enter_context(dev), _peer(number, options)))
        conf = EthConf(options.rx_offloads, options.tx_offloads, engine=options.engine)
        for port in ports:
            try:
                port.dev.configure(options.rxq, options.txq, conf)
            except ValueError as exc:
                raise CommandError(f"port {port.number} ({port.dev.name}): {exc}") from None
        room = _data_room([port.dev.info() for port in ports], options)
        pool = rtap.Mempool(
            _pool_size(options, room), room, headroom=DEFAULT_HEADROOM, name="testpmd"
        )
        for port in ports:
            _set_up(port, pool, options)
        yield ports


def _set_up(port: Port, pool: rtap.Mempool, options: Options) -> None:
    info = port.dev.info()
    rxd = options.rxd or info.default_rxportconf.ring_size
    txd = options.txd or info.default_txportconf.ring_size
    try:
        for queue in range(options.rxq):
            port.dev.rx_queue_setup(queue, rxd, pool)
        for queue in range(options.txq):
            port.dev.tx_queue_setup(queue, txd)
    except ValueError as exc:
        room = f" with --mbuf-size={pool.data_room + pool.headroom}"
        raise CommandError(f"port {port.number} ({port.dev.name}){room}: {exc}") from None
    port.dev.start()


def started(ports: list[Port]) -> None:
    """CommandError unless all ports are started."""
    stopped = [str(port.number) for port in ports if not port.running]
    if stopped:
        raise CommandError(
            f"port {', '.join(stopped)} is stopped: port start {stopped[0]} starts it"
        )
