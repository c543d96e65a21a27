# SPDX-License-Identifier: BSD-3-Clause
"""``net_af_packet``: frames through veth pairs, and the life of a device on one."""

from __future__ import annotations

import errno
import os
import select
import struct
import sys
from typing import Any

import pytest
from support import (
    BROADCAST,
    PacketSocket,
    Task,
    child_place,
    eventually,
    frame,
    ip,
    link,
    none_left,
    open_fds,
    rename,
)
from veths import await_link, device, modes, pair, promiscuity, start, started, veth

import rtap
from rtap import DeviceGone, DeviceStateError, EthConf, EthDev, EthEvent, MacAddr, Mempool, NetNS

pytestmark = pytest.mark.root


def tagged(data: bytes, *tags: tuple[int, int]) -> bytes:
    """The frame with VLAN tags (TPID, TCI) after its addresses, the outermost first."""
    return data[:12] + b"".join(struct.pack("!HH", *tag) for tag in tags) + data[12:]


def receive(dev: EthDev, n: int, queue: int = 0) -> list[bytes]:
    """The next `n` frames, or those received until 5 s pass without one."""
    got: list[bytes] = []
    while len(got) < n and (burst := dev.rx_burst(queue, n - len(got), 5)):
        got += map(bytes, burst)
    return got


def nothing_waits(sender: EthDev, receiver: EthDev) -> bool:
    """Whether the receiver has no frame waiting: the next that it sees is one sent now."""
    mark = frame(0xFFFF, dst=BROADCAST)
    assert sender.send(mark)
    return receive(receiver, 1) == [mark]


# ---- frames


def test_frames_of_every_length(netns: NetNS, engine: str) -> None:
    lengths = [14, 15, 46, 60, 64, 65, 1000, 1513, 1514]
    with pair(netns, engine=engine) as (a, b):
        assert a.info().engine == engine
        sent = [frame(n, length) for n, length in enumerate(lengths)]
        for there, back in ((a, b), (b, a)):
            burst = there.pool.alloc_burst(len(sent), sent)
            assert there.tx_burst(0, burst) == len(sent)
            assert receive(back, len(sent)) == sent
        for dev in (a, b):
            stats = dev.stats()
            assert (stats.ipackets, stats.opackets) == (len(sent), len(sent))
            assert stats.ibytes == stats.obytes == sum(lengths)
            assert (stats.ierrors, stats.oerrors, stats.imissed) == (0, 0, 0)


def test_many_frames_in_order(netns: NetNS, engine: str) -> None:
    with pair(netns, engine=engine) as (a, b):
        sent = [frame(n) for n in range(3000)]
        got: list[bytes] = []
        for at in range(0, len(sent), 100):
            burst = a.pool.alloc_burst(100, sent[at : at + 100])
            assert a.tx_burst(0, burst) == 100
            got += receive(b, 100)
        assert got == sent


@pytest.mark.parametrize(
    "tags",
    [
        [(0x8100, 5)],
        [(0x8100, 0xE000)],  # priority only
        [(0x8100, 0xFFFF)],
        [(0x88A8, 7)],
        [(0x88A8, 7), (0x8100, 5)],
        [(0x8100, 7), (0x8100, 5), (0x8100, 3)],
    ],
)
def test_vlan_tags_stay_in_their_frames(
    netns: NetNS, engine: str, tags: list[tuple[int, int]]
) -> None:
    """The kernel removes the outermost tag, and rtap restores it."""
    with pair(netns, engine=engine) as (a, b):
        sent = [tagged(frame(1), *tags), frame(2), tagged(frame(3, 1514), (0x8100, 9)), frame(4)]
        burst = a.pool.alloc_burst(4, sent)
        assert a.tx_burst(0, burst) == 4
        assert receive(b, 4) == sent
        assert b.stats().ibytes == sum(map(len, sent))


def test_a_frame_in_a_chain(netns: NetNS, engine: str) -> None:
    with pair(netns, engine=engine, data_room=64, rx_offloads=rtap.RxOffload.SCATTER) as (a, b):
        sent = [tagged(frame(n, 1000 + n), (0x8100, n)) for n in range(70)]
        for data in sent:
            assert a.send(data)
        assert receive(b, len(sent)) == sent


def test_what_the_kernel_refuses_is_counted(netns: NetNS, engine: str) -> None:
    with pair(netns, engine=engine) as (a, b):
        with pytest.raises(ValueError, match="a header of 14 bytes"):
            a.send(bytes(13))
        with pytest.raises(OSError, match="1600 bytes") as caught:
            a.send(frame(1, 1600))
        assert caught.value.errno == errno.EMSGSIZE
        burst = a.pool.alloc_burst(3, [frame(1), frame(2, 1600), frame(3)])
        assert a.tx_burst(0, burst) == 3
        assert receive(b, 2) == [frame(1), frame(3)]
        stats = a.stats()
        assert (stats.opackets, stats.oerrors) == (2, 2)
        assert a.xstats()["tx_q0_kernel_refused_packets"] == 2


def test_only_what_comes_in(netns: NetNS, engine: str) -> None:
    """The device receives neither frames sent on its interface nor those of another interface."""
    veth(netns, "w0", "w1")
    with pair(netns, engine=engine) as (a, b), PacketSocket(netns, "v1") as beside:
        with PacketSocket(netns, "w0") as other:
            other.send(frame(7))
        assert b.send(frame(8))
        beside.send(frame(9))
        assert receive(a, 2) == [frame(8), frame(9)]
        assert nothing_waits(a, b)


def test_nothing_from_before_a_start_or_while_stopped(netns: NetNS, engine: str) -> None:
    veth(netns, "v0", "v1")
    with device(netns, "v1") as dev, PacketSocket(netns, "v0") as peer:
        peer.send(frame(1))
        dev.configure(1, 1, EthConf(engine=engine))
        pool = Mempool(64)
        dev.rx_queue_setup(0, 8, pool)
        dev.tx_queue_setup(0, 8)
        peer.send(frame(2))
        for seq in (10, 20, 30):
            dev.start()
            peer.send(frame(seq))
            assert receive(dev, 1) == [frame(seq)]
            peer.send(frame(seq + 1))
            eventually(lambda: bool(select.select([intr(dev)], [], [], 0)[0]), "it has come")
            dev.stop()
            peer.send(frame(seq + 2))
        stats = dev.stats()
        assert (stats.ipackets, stats.imissed, stats.ierrors) == (3, 0, 0)
        assert dev.xstats()["rx_q0_purged_packets"] == 3
        assert pool.in_use == 0


def intr(dev: EthDev) -> int:
    dev.rx_queue_intr_enable(0)
    return dev.rx_queue_intr_fd(0)


def test_interrupts_and_waiting(netns: NetNS, engine: str) -> None:
    with pair(netns, engine=engine) as (a, b):
        fd = intr(b)
        assert not select.select([fd], [], [], 0)[0]
        assert a.send(frame(1))
        assert select.select([fd], [], [], 5)[0]
        b.rx_queue_intr_disable(0)
        assert not select.select([fd], [], [], 0)[0]
        assert receive(b, 1) == [frame(1)]
        waiter = Task(receive, b, 1)
        assert a.send(frame(2))
        assert waiter.result() == [frame(2)]


def test_frames_that_nobody_reads_are_missed(netns: NetNS, engine: str) -> None:
    """imissed is the kernel's exact count of frames that found the buffer full."""
    veth(netns, "v0", "v1")
    with (
        PacketSocket(netns, "v0", rcvbuf=1 << 22) as peer,
        PacketSocket(netns, "v1", rcvbuf=1 << 22) as beside,
        started(netns, "v1", "rcvbuf=20000", engine=engine) as dev,
    ):
        for seq in range(500):
            peer.send(frame(seq))
        assert len(beside.frames(500)) == 500  # the kernel serves sockets of one protocol last
        got = dev.rx_burst(0, 500)
        stats = dev.stats()
        assert 0 < stats.ipackets == len(got) < 500
        assert stats.imissed == 500 - len(got)
        assert dev.xstats()["rx_q0_missed_packets"] == stats.imissed
        assert list(map(bytes, got)) == [frame(n) for n in range(len(got))]
        dev.stop()
        assert dev.stats().imissed == 500 - len(got)
        dev.stats_reset()
        assert dev.stats().imissed == 0
        assert dev.xstats()["rx_q0_missed_packets"] == 500 - len(got)
        dev.xstats_reset()
        assert dev.xstats()["rx_q0_missed_packets"] == 0


# ---- which frames


def test_promiscuous_mode_is_the_interfaces(netns: NetNS) -> None:
    veth(netns, "v0", "v1")
    with started(netns, "v1") as dev:
        assert modes(netns, "v1") == (1, 0)
        dev.promiscuous = False
        assert modes(netns, "v1") == (0, 0)
        dev.allmulticast = True
        assert modes(netns, "v1") == (0, 1)
        dev.promiscuous = True
        assert modes(netns, "v1") == (1, 0)
        dev.stop()
        assert modes(netns, "v1") == (0, 0)
        dev.start()
        assert modes(netns, "v1") == (1, 0)
    assert modes(netns, "v1") == (0, 0)


def test_addresses_that_are_received(netns: NetNS, engine: str) -> None:
    group, other = bytes.fromhex("01005e000005"), bytes.fromhex("020000000077")
    with pair(netns, engine=engine) as (a, b):
        b.promiscuous = False
        assert b.app_mac == b.mac == MacAddr(link(netns, "v1")["address"])
        own = bytes(b.mac)

        def come(*destinations: bytes) -> list[bytes]:
            for dst in destinations:
                assert a.send(frame(1, dst=dst))
            assert a.send(frame(2, dst=BROADCAST))
            got: list[bytes] = []
            while not got or got[-1] != BROADCAST:
                got.append(receive(b, 1)[0][:6])
            return got[:-1]

        assert come(own, other, group) == [own]
        b.mac_addr_add(other)
        assert come(own, other, group) == [own, other]
        b.mc_addr_list = [group]
        assert come(own, other, group) == [own, other, group]
        assert group.hex(":") in ip(netns, "maddr", "show", "dev", "v1")
        b.mc_addr_list = []
        assert group.hex(":") not in ip(netns, "maddr", "show", "dev", "v1")
        b.mac_addr_remove(other)
        assert come(own, other, group) == [own]
        b.allmulticast = True
        assert come(own, other, group) == [own, group]
        assert b.xstats()["rx_q0_filtered_unicast_packets"] == 3


# ---- the interface


def test_what_it_tells_of_itself(netns: NetNS) -> None:
    veth(netns, "v0", "v1", mtu=2000)
    with started(netns, "v0") as dev:
        info = dev.info()
        state = link(netns, "v0")
        assert (info.driver_name, info.ifname, info.if_index) == (
            "net_af_packet",
            "v0",
            state["ifindex"],
        )
        assert (info.mtu, info.min_mtu, info.max_mtu) == (2000, 68, 65535)
        assert info.mac == dev.mac == MacAddr(state["address"])
        assert (info.max_rx_queues, info.max_tx_queues) == (128, 128)
        assert info.rx_gso  # the kernel's super-frames are split, since LRO was not requested
        assert dev.link().link_status


def test_link_and_what_is_sent_without(netns: NetNS, engine: str) -> None:
    with pair(netns, engine=engine) as (a, b):
        seen: list[tuple[EthEvent, Any]] = []
        b.callback_register(EthEvent.INTR_LSC, lambda dev, event, data: seen.append((event, data)))
        b.set_link_down()
        assert not b.link().link_status
        assert not (link(netns, "v1")["flags"].count("UP"))
        eventually(lambda: not a.link().link_status, "the other end has no carrier")
        eventually(lambda: not a.send(frame(1)), "it has been told")
        assert not b.send(frame(1))
        assert b.stats().oerrors == 1
        assert b.xstats()["tx_q0_link_down_packets"] == 1
        assert len(b.rx_burst(0)) == 0
        b.set_link_up()
        await_link((netns, "v0"), (netns, "v1"))
        eventually(lambda: a.send(frame(2)), "it has been told")
        assert receive(b, 1) == [frame(2)]
        assert b.stats().ierrors == 0
        eventually(lambda: [data.link_status for _, data in seen] == [False, True], "it was told")


def test_renamed_and_changed_by_others(netns: NetNS, engine: str) -> None:
    with pair(netns, engine=engine, data_room=9100) as (a, b):
        seen: list[tuple[EthEvent, Any]] = []
        for kind in (EthEvent.RENAME, EthEvent.MTU, EthEvent.MAC):
            b.callback_register(kind, lambda dev, event, data: seen.append((event, data)))
        rename(netns, "v1", "renamed")
        assert b.ifname == "renamed" or b.info().ifname == "renamed"
        ip(netns, "link", "set", "renamed", "address", "02:00:00:00:00:55")
        for name in ("v0", "renamed"):
            ip(netns, "link", "set", name, "mtu", "9000")
        eventually(lambda: len(seen) == 3, "all was told")
        assert dict(seen) == {
            EthEvent.RENAME: "renamed",
            EthEvent.MAC: MacAddr("02:00:00:00:00:55"),
            EthEvent.MTU: 9000,
        }
        assert b.app_mac == MacAddr("02:00:00:00:00:55")
        await_link((netns, "v0"), (netns, "renamed"))
        assert a.send(frame(1, 9014))
        assert receive(b, 1) == [frame(1, 9014)]
        b.mtu = 1400
        b.mac = "02:00:00:00:00:66"
        state = link(netns, "renamed")
        assert (state["mtu"], state["address"]) == (1400, "02:00:00:00:00:66")


def test_deleted_and_made_again(netns: NetNS, engine: str) -> None:
    with pair(netns, engine=engine) as (a, b):
        events: list[EthEvent] = []
        for kind in (EthEvent.INTR_RMV, EthEvent.RECOVERY_SUCCESS):
            b.callback_register(kind, lambda dev, event, data: events.append(event))
        waiter = Task(b.rx_burst, 0, 64, None)
        fd = intr(b)
        ip(netns, "link", "del", "v0")
        with pytest.raises(DeviceGone, match="v1"):
            waiter.result()
        assert select.select([fd], [], [], 5)[0]
        for call in (lambda: b.rx_burst(0), lambda: b.send(frame()), lambda: b.rx_burst(0, 1, 5)):
            for _ in range(2):  # the kernel reports it to a socket once
                with pytest.raises(DeviceGone, match="v1"):
                    call()
        with pytest.raises(DeviceGone):
            b.link()
        eventually(lambda: events == [EthEvent.INTR_RMV], "it was told")
        b.stop()
        with pytest.raises(DeviceGone, match="there is no interface v1"):
            b.start()
        assert b.state == "stopped"
        veth(netns, "v0", "v1")
        a.stop()
        for dev in (a, b):
            dev.start()
        eventually(lambda: a.send(frame(1)), "the link is up")
        assert receive(b, 1) == [frame(1)]
        assert promiscuity(netns, "v1") == 1
        eventually(lambda: events[1:] == [EthEvent.RECOVERY_SUCCESS], "it was told")


def test_moved_away(netns: NetNS, netns2: NetNS) -> None:
    """A packet socket stays in its namespace, so a move looks like a deletion."""
    with pair(netns) as (_, b):
        events: list[EthEvent] = []
        b.callback_register(EthEvent.INTR_RMV, lambda dev, event, data: events.append(event))
        ip(netns, "link", "set", "v1", "netns", netns2.path)
        with pytest.raises(DeviceGone):
            b.rx_burst(0, 1, 5)
        eventually(lambda: events == [EthEvent.INTR_RMV], "it was told")
        b.stop()
        ip(netns2, "link", "set", "v1", "netns", netns.path)
        b.start()
        assert "UP" in link(netns, "v1")["flags"]
        assert promiscuity(netns, "v1") == 1


def test_closing_leaves_nothing(netns: NetNS, engine: str) -> None:
    veth(netns, "v0", "v1")
    with started(netns, "v1", engine=engine, queues=2):
        pass  # makes what the process keeps
    before = open_fds()
    for _ in range(3):
        with started(netns, "v1", engine=engine, queues=3) as dev:
            dev.send(frame())
            intr(dev)
            dev.stop()
            dev.start()
        del dev
    none_left(before)
    assert "UP" in link(netns, "v1")["flags"]
    ip(netns, "link", "del", "v1")  # returns, since no ring holds the interface


def test_another_namespace_by_path(netns: NetNS) -> None:
    veth(netns, "v0", "v1")
    with rtap.probe(f"net_af_packet0,iface=v1,netns={netns.path}") as dev:
        start(dev)
        with PacketSocket(netns, "v0") as peer:
            peer.send(frame(1))
        assert receive(dev, 1) == [frame(1)]


def test_a_forked_child_lets_go(netns: NetNS) -> None:
    with pair(netns) as (a, b):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                b.rx_burst(0)
            except DeviceStateError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert a.send(frame(1))
        assert receive(b, 1) == [frame(1)]
        assert promiscuity(netns, "v1") == 1


# ---- arguments


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "net_af_packet needs iface=NAME"),
        (",iface=", "iface needs a value"),
        (",iface=a/b", "'iface=a/b'"),
        (",iface=v%d", "'iface=v%d'"),
        (",iface=lo,rcvbuf=0", "rcvbuf must be 1 to 2147483647, got '0'"),
        (",iface=lo,sndbuf=x", "sndbuf must be"),
        (",iface=lo,qdisc_bypass=1", "qdisc_bypass takes no value"),
        (",iface=lo,persist", "unknown device argument 'persist', expected iface=NAME, netns=NAME"),
    ],
)
def test_arguments_that_are_wrong(args: str, message: str) -> None:
    with pytest.raises(ValueError, match="net_af_packet0: ") as caught:
        rtap.probe("net_af_packet0" + args)
    assert message in str(caught.value)
    assert rtap.devices() == []


def test_interfaces_that_are_none(netns: NetNS) -> None:
    with pytest.raises(OSError, match="there is no interface nosuch") as caught:
        device(netns, "nosuch")
    assert caught.value.errno == errno.ENODEV
    ip(netns, "tuntap", "add", "tun0", "mode", "tun")
    with pytest.raises(OSError, match="the frames of tun0 are not Ethernet frames"):
        device(netns, "tun0")
    with pytest.raises(FileNotFoundError):
        rtap.probe("net_af_packet0,iface=lo,netns=no-such-namespace")
    assert rtap.devices() == []


def test_pools_that_do_not_fit(netns: NetNS) -> None:
    veth(netns, "v0", "v1")
    lro = rtap.RxOffload.TCP_LRO | rtap.RxOffload.TCP_CKSUM
    with device(netns, "v0") as dev:
        with pytest.raises(ValueError, match="needs TCP_CKSUM too"):
            dev.configure(1, 1, EthConf(rx_offloads=rtap.RxOffload.TCP_LRO))
        dev.configure(1, 1, EthConf(rx_offloads=lro))
        with Mempool(64) as small, pytest.raises(ValueError, match="need a data_room"):
            dev.rx_queue_setup(0, 8, small)
        tight = Mempool(8, 70000, headroom=16)
        with pytest.raises(ValueError, match="a headroom of at least 64"):
            dev.rx_queue_setup(0, 8, tight)


def test_without_the_right_to(netns: NetNS) -> None:
    """The error says which privilege is missing."""
    veth(netns, "v0", "v1")
    code = "import rtap\ntry:\n rtap.probe('net_af_packet0,iface=v0')\n"
    code += "except PermissionError as exc:\n print(exc.strerror)\n"
    done = netns.run(
        ["setpriv", "--bounding-set", "-net_raw", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        **child_place(),
    )
    assert done.stdout.strip() == (
        "opening a raw packet socket takes CAP_NET_RAW, which this process lacks"
    ), done.stderr
