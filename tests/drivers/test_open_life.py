# SPDX-License-Identifier: BSD-3-Clause
"""An opened device: its link, traffic, counters, and an interface that changes hands."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from patience import patient
from rigs import iproute, write_in
from support import (
    PacketSocket,
    Tap,
    addresses,
    carrier,
    eventually,
    frame,
    ip,
    link,
    links,
    netdev,
    rename,
    seq_of,
    settle,
)

import rtap
from rtap import (
    DeviceGone,
    DeviceStateError,
    EthConf,
    Mempool,
    NetNS,
    PoolEmpty,
    RxOffload,
    TxOffload,
)

CHECKSUM_LRO = RxOffload.CHECKSUM | RxOffload.TCP_LRO


def routes(ns: NetNS) -> list[tuple[str, str, str]]:
    """The destination, gateway and interface of every route, IPv4 and IPv6."""
    found = json.loads(ip(ns, "-j", "route")) + json.loads(ip(ns, "-j", "-6", "route"))
    return sorted((r["dst"], r.get("gateway", ""), r["dev"]) for r in found)


# ---- link


def test_link_up_and_down(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine) as dev:
        assert dev.link().link_status
        for _ in range(3):
            dev.set_link_down()
            assert not dev.link().link_status
            assert not carrier(netns, "t0")
            assert "UP" in link(netns, "t0")["flags"]
            dev.set_link_up()
            assert dev.link().link_status
            assert carrier(netns, "t0")
        iproute(netns, "link set t0 down")
        assert not dev.link().link_status
        dev.set_link_up()
        assert dev.link().link_status
        link_ = dev.link()
        assert (link_.link_duplex, link_.link_autoneg, link_.link_speed) == (True, False, 2**32 - 1)


@pytest.mark.parametrize("ipv6", [False, True])
def test_addresses_and_routes_survive(netns: NetNS, ipv6: bool) -> None:
    if ipv6:
        for conf in ("all", "default"):
            write_in(netns, f"/proc/sys/net/ipv6/conf/{conf}/disable_ipv6", "0")
    with rtap.open("t0", netns=netns, queues=2) as dev:
        iproute(netns, "addr add 10.0.0.1/24 dev t0")
        iproute(netns, "route add 10.77.0.0/16 via 10.0.0.2")
        iproute(netns, "route add default via 10.0.0.3")
        iproute(netns, "neigh add 10.0.0.2 lladdr 02:00:00:00:00:09 dev t0")
        if ipv6:
            iproute(netns, "-6 addr add fd00::1/64 dev t0 nodad")
            iproute(netns, "-6 route add fd77::/64 via fd00::2")
            eventually(
                lambda: "tentative" not in ip(netns, "-6", "addr", "show", "dev", "t0"),
                "the link-local address is ready",
            )
        state = (addresses(netns, "t0"), routes(netns), dev.mac, dev.mtu)
        assert len(state[0]) == (3 if ipv6 else 1)
        assert len(state[1]) >= 3
        changes: dict[str, Callable[[], None]] = {
            "stop": dev.stop,
            "start": dev.start,
            "down": dev.set_link_down,
            "up": dev.set_link_up,
            "stop again": dev.stop,
            "headers": lambda: dev.configure(3, 3, EthConf(rx_offloads=RxOffload.CHECKSUM)),
            "no headers": lambda: dev.configure(1, 1),
            "tx headers": lambda: dev.configure(2, 2, EthConf(tx_offloads=TxOffload.TCP_TSO)),
        }
        for what, change in changes.items():
            change()
            now = (addresses(netns, "t0"), routes(netns), dev.mac, dev.mtu)
            assert now == state, what
        assert "10.0.0.2 lladdr 02:00:00:00:00:09" in ip(netns, "neigh", "show", "dev", "t0")


def test_header_negotiation_keeps_the_interface(netns: NetNS, engine: str) -> None:
    with Mempool(64, 66000) as pool, netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        iproute(netns, "addr add 10.0.0.1/24 dev t0")
        iproute(netns, "link set dev t0 address 02:00:00:00:00:05 mtu 1400 txqueuelen 77")
        index = dev.info().if_index
        for rx, tx in (
            (RxOffload(0), TxOffload(0)),
            (RxOffload.CHECKSUM, TxOffload(0)),
            (RxOffload.SCATTER, TxOffload.MULTI_SEGS),
            (RxOffload(0), TxOffload.TCP_CKSUM),
            (CHECKSUM_LRO, TxOffload.TCP_TSO),
            (RxOffload(0), TxOffload(0)),
        ):
            for queues in (1, 3):
                dev.configure(queues, queues, EthConf(rx, tx, engine=engine))
                info = dev.info()
                assert info.vnet_hdr is bool(rx & ~RxOffload.SCATTER or tx & ~TxOffload.MULTI_SEGS)
                assert (info.if_index, info.mtu, info.mac) == (index, 1400, "02:00:00:00:00:05")
                assert (info.rx_offloads, info.tx_offloads, info.persist) == (rx, tx, False)
                assert addresses(netns, "t0") == ["10.0.0.1/24 global"]
                shown = link(netns, "t0")
                assert shown["linkinfo"]["info_data"]["vnet_hdr"] is info.vnet_hdr
                assert shown["linkinfo"]["info_data"]["persist"] is False
                assert shown["txqlen"] == 77
                for q in range(queues):
                    dev.rx_queue_setup(q, 64, pool)
                    dev.tx_queue_setup(q, 64)
                dev.start()
                with PacketSocket(netns, "t0") as seen:
                    for q in range(queues):
                        assert dev.send(frame(q), queue=q)
                        assert seen.frames(1) == [frame(q)]
                    seen.send(frame(7))
                    got: list[bytes] = []
                    eventually(
                        lambda got=got, n=queues: bool(  # type: ignore[misc]
                            got.extend(bytes(m) for q in range(n) for m in dev.rx_burst(q)) or got
                        ),
                        "the frame on one of the queues",
                    )
                    assert got == [frame(7)]
                dev.stop()
    assert links(netns) == ["lo"]


def test_the_link_stays_down_while_headers_are_negotiated(netns: NetNS) -> None:
    """The kernel raises the carrier when the descriptor is closed and opened again."""
    with rtap.open("t0", netns=netns) as dev:
        dev.stop()
        assert not dev.link().link_status
        for offloads in (RxOffload.CHECKSUM, RxOffload(0)):
            dev.configure(1, 1, EthConf(rx_offloads=offloads))
            assert not dev.link().link_status


# ---- traffic


def test_frames_both_ways(netns: NetNS, engine: str) -> None:
    with (
        rtap.open("t0", netns=netns, engine=engine) as dev,
        PacketSocket(netns, "t0") as kernel,
    ):
        for n in range(100):
            assert dev.send(frame(n, 60))
            assert kernel.recv(2000) == frame(n, 60)
            kernel.send(frame(n, 80))
            assert dev.recv(5) == frame(n, 80)
        stats = dev.stats()
        assert (stats.ipackets, stats.ibytes) == (100, 8000)
        assert (stats.opackets, stats.obytes) == (100, 6000)
        assert (stats.q_ipackets, stats.q_opackets) == ([100], [100])
        counted = netdev(netns, "t0")
        assert (counted["rx_packets"], counted["tx_packets"]) == (100, 100)
        assert settle(dev.pool) == 0


def test_recv(netns: NetNS, engine: str) -> None:
    with (
        rtap.open("t0", netns=netns, engine=engine, queues=2) as dev,
        PacketSocket(netns, "t0") as kernel,
    ):
        assert dev.recv(0) == b""
        start = time.monotonic()
        assert dev.recv(0.05) == b""
        assert 0.04 < time.monotonic() - start < patient(5)
        for n in range(10):
            kernel.send(frame(n))
        queue = next(q for q in range(2) if dev.rx_queue(q).rx_burst(1, 0))
        # One frame at a time, in order, and none is lost between calls.
        assert [dev.recv(5, queue) for _ in range(9)] == [frame(n) for n in range(1, 10)]
        assert dev.recv(0, queue) == b""


def test_send_takes_anything_like_bytes(netns: NetNS, engine: str) -> None:
    data = frame(5, 64)
    with (
        rtap.open("t0", netns=netns, engine=engine) as dev,
        PacketSocket(netns, "t0") as kernel,
    ):
        forms: list[Any] = [
            data,
            bytearray(data),
            memoryview(data),
            array.array("B", data),
            np.frombuffer(data, np.uint8),
        ]
        for form in forms:
            assert dev.send(form) is True
            assert kernel.recv(2000) == data
        for wrong in ("text", 5, None, [1, 2]):
            with pytest.raises(TypeError):
                dev.send(wrong)  # type: ignore[arg-type]
        assert settle(dev.pool) == 0


def test_recv_and_send_with_an_empty_pool(netns: NetNS, engine: str) -> None:
    with (
        rtap.open("t0", netns=netns, engine=engine, nb_mbufs=4) as dev,
        PacketSocket(netns, "t0") as kernel,
    ):
        held = dev.pool.alloc_burst(4)
        with pytest.raises(PoolEmpty):
            dev.send(frame())
        with pytest.raises(PoolEmpty, match="no free mbuf in the pool of device net_rtap0"):
            dev.recv(0)
        kernel.send(frame(1))
        with pytest.raises(PoolEmpty):
            dev.recv(5)
        assert len(dev.rx_burst(0, timeout=5)) == 0
        stats = dev.stats()
        assert stats.rx_nombuf >= 1
        assert (stats.ipackets, stats.imissed) == (0, 0)
        held.free()
        assert dev.recv(5) == frame(1)


def test_ctrl_c_ends_recv(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine) as dev:
        sent: list[float] = []

        def interrupt() -> None:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(0.1, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            dev.recv()
        assert time.monotonic() - sent[0] < patient(1)
        timer.join()
        assert dev.send(frame())


def test_a_hundred_and_twenty_eight_queues(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=128) as dev:
        assert link(netns, "t0")["linkinfo"]["info_data"]["numqueues"] == 128
        with PacketSocket(netns, "t0") as kernel:
            for q in range(128):
                assert dev.send(frame(q), queue=q)
            assert sorted(seq_of(f) for f in kernel.frames(128)) == list(range(128))
        assert dev.stats().q_opackets == [1] * 128
        assert sum(len(dev.rx_burst(q)) for q in range(128)) == 0
        with pytest.raises(ValueError, match="queue must be 0 to 127, got 128"):
            dev.rx_burst(128)
    assert links(netns) == ["lo"]


@pytest.mark.parametrize("queues", [2, 8])
def test_flows_over_queues_are_accounted_for(netns: NetNS, engine: str, queues: int) -> None:
    """Every datagram arrives once, in order, on the queue of its flow; the counters agree."""
    flows, each = 64, 20
    with rtap.open("t0", netns=netns, engine=engine, queues=queues) as dev:
        iproute(netns, "addr add 10.9.0.1/24 dev t0")
        iproute(netns, "neigh add 10.9.0.2 lladdr 02:00:00:00:00:09 dev t0")
        with contextlib.ExitStack() as stack:
            sockets = [
                stack.enter_context(netns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM))
                for _ in range(flows)
            ]
            for n in range(each):
                for flow, s in enumerate(sockets):
                    s.sendto(bytes([flow, n]), ("10.9.0.2", 9))
        seen: list[list[tuple[int, int]]] = [[] for _ in range(queues)]
        n_bytes = 0
        for q in range(queues):
            while burst := dev.rx_burst(q):
                seen[q] += [(mbuf[42], mbuf[43]) for mbuf in burst]
                n_bytes += sum(burst.lengths)
        counts = Counter(item for q in seen for item in q)
        assert set(counts.values()) == {1}
        assert len(counts) == flows * each
        assert sum(1 for q in seen if q) > 1
        for queue in seen:
            for flow in {flow for flow, _ in queue}:
                assert [n for f, n in queue if f == flow] == list(range(each))
        stats = dev.stats()
        assert stats.q_ipackets == [len(q) for q in seen]
        assert (stats.ipackets, stats.ibytes, stats.imissed) == (flows * each, n_bytes, 0)
        assert sum(stats.q_ibytes) == n_bytes


# ---- counters


def test_imissed_is_what_the_kernel_dropped(netns: NetNS, engine: str) -> None:
    with (
        rtap.open("t0", netns=netns, engine=engine) as dev,
        PacketSocket(netns, "t0") as kernel,
    ):
        iproute(netns, "link set dev t0 txqueuelen 10")

        def push(n: int) -> None:
            for k in range(n):
                with contextlib.suppress(OSError):  # ENOBUFS is the drop itself
                    kernel.send(frame(k), socket.MSG_DONTWAIT)

        def pull() -> int:
            got = 0
            while burst := dev.rx_burst(0):
                got += len(burst)
            return got

        push(50)
        missed = dev.stats().imissed
        assert 30 <= missed < 50
        assert pull() + missed == 50
        assert dev.stats().ipackets == 50 - missed
        push(5)
        assert (pull(), dev.stats().imissed) == (5, missed)

        # Frames that come while the link is down or the device stopped do not count as missed.
        dev.set_link_down()
        push(50)
        assert dev.stats().imissed == missed
        dev.set_link_up()
        assert dev.stats().imissed == missed
        push(50)
        assert (more := dev.stats().imissed) > missed
        dev.stop()
        assert dev.stats().imissed == more
        push(50)
        dev.start()
        assert dev.stats().imissed == more
        assert pull() == 0  # frames queued before are thrown away
        dev.stats_reset()
        assert dev.stats().imissed == 0
        push(50)
        again = dev.stats().imissed
        assert again + pull() == 50


def test_counters_survive_stop_and_start_and_not_a_reset(netns: NetNS, engine: str) -> None:
    with (
        rtap.open("t0", netns=netns, engine=engine, queues=2) as dev,
        PacketSocket(netns, "t0") as kernel,
    ):
        assert dev.send(frame(1, 60), queue=1)
        kernel.send(frame(2, 70))
        eventually(lambda: any(len(dev.rx_burst(q)) for q in range(2)), "the frame")
        before = dev.stats()
        assert (before.ipackets, before.opackets, before.q_opackets) == (1, 1, [0, 1])
        for _ in range(3):
            dev.stop()
            assert dev.stats() == before
            dev.start()
            assert dev.stats() == before
        assert dev.send(frame(1, 60), queue=1)
        assert dev.stats().q_obytes == [0, 120]
        dev.stats_reset()
        zero = [0, 0]
        assert dev.stats() == rtap.Stats(
            q_ipackets=zero, q_opackets=zero, q_ibytes=zero, q_obytes=zero, q_errors=zero
        )
        assert dev.send(frame(1, 60))
        assert dev.stats().opackets == 1


def test_frames_longer_than_the_mtu_are_errors(netns: NetNS, engine: str) -> None:
    """When others raise the MTU and the buffers must stay, no frame arrives truncated."""
    with (
        rtap.open("t0", netns=netns, engine=engine, data_room=2048) as dev,
        PacketSocket(netns, "t0") as kernel,
    ):
        iproute(netns, "link set dev t0 mtu 9000")
        kernel.send(frame(1, 5000))
        kernel.send(frame(2, 100))
        assert dev.recv(5) == frame(2, 100)
        stats = dev.stats()
        assert (stats.ipackets, stats.ierrors, stats.q_errors) == (1, 1, [1])


# ---- the interface changes hands


def test_interface_deleted(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev:
        assert dev.send(frame())
        iproute(netns, "link del t0")
        calls: dict[str, Any] = {
            "rx_burst": lambda: dev.rx_burst(1, timeout=1),
            "recv": lambda: dev.recv(),
            "tx_burst": lambda: dev.tx_burst(0, dev.pool.alloc_burst(2, frame())),
            "send": lambda: dev.send(frame()),
            "mtu": lambda: dev.mtu,
            "mac": lambda: dev.mac,
            "info": dev.info,
            "link": dev.link,
            "ifname": lambda: dev.ifname,
            "up": dev.set_link_up,
        }
        for call in calls.values():
            with pytest.raises(DeviceGone) as caught:
                call()
            assert caught.value.ifname == "t0"
            assert caught.value.sent == 0
        assert dev.stats().opackets == 1
        assert repr(dev) == "<rtap.EthDev net_rtap0 (gone) started>"
        dev.stop()
        with rtap.open("t0", netns=netns) as again:
            assert again.send(frame())
            with pytest.raises(OSError, match="t0 is in use by another"):
                dev.start()
    assert links(netns) == ["lo"]


def test_interface_deleted_under_a_waiting_reader(netns: NetNS, engine: str) -> None:
    ends: list[BaseException] = []
    with rtap.open("t0", netns=netns, engine=engine) as dev:

        def wait() -> None:
            try:
                dev.recv()
            except BaseException as exc:  # noqa: BLE001 - checked below
                ends.append(exc)

        thread = threading.Thread(target=wait)
        thread.start()

        def waiting() -> bool:
            try:
                dev.rx_burst(0)
            except DeviceStateError:
                return True
            return False

        eventually(waiting, "the thread waits")
        iproute(netns, "link del t0")
        thread.join(5)
        assert not thread.is_alive()
    assert [type(exc) for exc in ends] == [DeviceGone]


def test_interface_renamed(netns: NetNS) -> None:
    with rtap.open("t0", netns=netns, queues=2) as dev:
        rename(netns, "t0", "other0")
        assert dev.ifname == dev.info().ifname == "other0"
        dev.mtu = 1400
        assert link(netns, "other0")["mtu"] == 1400
        dev.stop()
        dev.configure(4, 4)
        assert link(netns, "other0")["linkinfo"]["info_data"]["numqueues"] == 4
        with rtap.open("t0", netns=netns) as second:
            assert second.ifname == "t0"
    assert links(netns) == ["lo"]


def test_interface_moved_and_moved_back(netns: NetNS, netns2: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev:
        for here, there in ((netns, netns2), (netns2, netns)) * 2:
            iproute(here, f"link set t0 netns {there.path}")
            assert not dev.link().link_status  # a move takes the interface down
            dev.mtu = 1300
            assert link(there, "t0")["mtu"] == 1300
            dev.stop()
            dev.start()
            assert dev.link().link_status
            with PacketSocket(there, "t0") as kernel:
                assert dev.send(frame(3))
                assert kernel.frames(1) == [frame(3)]
            dev.stop()
            for queues in (3, 2):
                dev.configure(queues, queues, EthConf(engine=engine))
                assert link(there, "t0")["linkinfo"]["info_data"]["numqueues"] == queues
            pool = Mempool(64)
            for q in range(2):
                dev.rx_queue_setup(q, 64, pool)
                dev.tx_queue_setup(q, 64)
            dev.start()
        assert links(netns2) == ["lo"]
    assert links(netns) == ["lo"]


def test_closed_where_it_was_moved_to(netns: NetNS, netns2: NetNS) -> None:
    with rtap.open("t0", netns=netns):
        iproute(netns, f"link set t0 netns {netns2.path}")
        assert links(netns2) == ["lo", "t0"]
    assert links(netns) == links(netns2) == ["lo"]


def test_a_namesake_elsewhere_is_not_joined(netns: NetNS, netns2: NetNS) -> None:
    """After a move, new queues must attach to the interface, not to another with its old name."""
    with rtap.open("t0", netns=netns) as dev, Tap(netns2, "t0", multi_queue=True):
        iproute(netns, f"link set t0 netns {netns2.path} name t1")
        with Tap(netns, "t0", multi_queue=True):
            dev.stop()
            dev.configure(3, 3)
            assert dev.ifname == "t1"
            assert link(netns2, "t1")["linkinfo"]["info_data"]["numqueues"] == 3
            for ns in (netns, netns2):
                assert link(ns, "t0")["linkinfo"]["info_data"]["numqueues"] == 1


def test_another_process_sees_the_interface_go(netns: NetNS) -> None:
    """When close() returns, the interface is gone for other processes too."""
    for engine in ("auto", "syscall"):
        for _ in range(5):
            with rtap.open("t0", netns=netns, engine=engine, queues=4) as dev:
                for q in range(4):
                    dev.send(frame(), queue=q)
                    dev.rx_burst(q)
            assert subprocess.run(
                ["nsenter", f"--net={netns.path}", "ip", "link", "show", "t0"],
                capture_output=True,
                check=False,
            ).returncode
