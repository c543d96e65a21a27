# SPDX-License-Identifier: BSD-3-Clause
"""What processes that attached ask of the device, and what they hear of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import patient
from sharing import MakeProcess, Process, to_and_fro
from support import LOCAL, PacketSocket, eventually, frame, ip, link, rename

import rtap
from rtap import DeviceStateError, EthDev, MacAddr, NetNS

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("runtime_dir")]

OTHER = "02:00:00:00:00:77"
GROUP = "01:00:5e:00:00:05"
#: An address that no filter of these tests knows.
STRANGER = bytes.fromhex("020000000099")


@pytest.fixture
def dev(netns: NetNS) -> Iterator[EthDev]:
    with rtap.open("tap0", netns=netns, queues=3) as device:
        yield device


@pytest.fixture(autouse=True)
def share(runtime_dir: Path, dev: EthDev) -> Iterator[rtap.Share]:
    """Before devices of a test attach."""
    with rtap.share(dev, [1, 2]) as shared:
        yield shared


@pytest.fixture
def packets(netns: NetNS, dev: EthDev) -> Iterator[PacketSocket]:
    with PacketSocket(netns, "tap0") as socket:
        yield socket


@pytest.fixture
def one(dev: EthDev, process: MakeProcess) -> Process:
    return process().attach(dev.name, [1])


@pytest.fixture
def two(dev: EthDev, process: MakeProcess) -> Process:
    return process().attach(dev.name, [2])


def settled(other: Process, code: str) -> None:
    eventually(lambda: bool(other(code)), code)


# ---- settings


def test_mtu(netns: NetNS, dev: EthDev, share: rtap.Share, one: Process, two: Process) -> None:
    assert one("dev.mtu") == 1500
    one("dev.mtu = 9000")
    assert (dev.mtu, two("dev.mtu"), link(netns, "tap0")["mtu"]) == (9000, 9000, 9000)
    # Every process has room for such frames now.
    long = frame(1, 9000)
    settled(two, "dev.rx_queue(2).room >= 9014")
    assert one("dev.rx_queue(1).room") >= 9014
    assert dev.rx_queue(0).room >= 9014
    with PacketSocket(netns, "tap0") as packets:
        dev.rx_queue_stop(0)
        two("dev.close()")
        eventually(lambda: sorted(share.leases) == [1], "the pair is free")
        packets.send(long)
        assert one("[bytes(m) for m in dev.rx_burst(1, 8, wait)]", wait=patient(5)) == [long]
    for mtu in (67, 70000, -1):
        with pytest.raises((ValueError, OSError)):
            one("dev.mtu = mtu", mtu=mtu)
    with pytest.raises(TypeError):
        one("dev.mtu = 'large'")
    assert one("dev.mtu") == 9000


def test_mtu_of_another_program(
    netns: NetNS, dev: EthDev, one: Process, process: MakeProcess
) -> None:
    small = process()
    small("pool = rtap.Mempool(512, 2048)")
    small("dev = rtap.attach(name, [2], pool=pool)", name=dev.name)
    ip(netns, "link", "set", "tap0", "mtu", "4000")
    settled(one, "dev.rx_queue(1).room >= 4014")
    assert small("dev.mtu") == 4000
    assert small("dev.rx_queue(2).room") < 4014
    with pytest.raises(ValueError, match="needs larger receive buffers than tap0 has"):
        small("dev.mtu = 5000")
    assert dev.mtu == 4000


def test_mac(netns: NetNS, dev: EthDev, one: Process, two: Process) -> None:
    assert one("str(dev.mac)") == str(dev.mac) == link(netns, "tap0")["address"]
    one("dev.mac = mac", mac=OTHER)
    assert str(dev.mac) == two("str(dev.mac)") == link(netns, "tap0")["address"] == OTHER
    for wrong in ("ff:ff:ff:ff:ff:ff", "01:00:00:00:00:00", "nonsense"):
        with pytest.raises((ValueError, OSError)):
            one("dev.mac = mac", mac=wrong)
    assert str(dev.mac) == OTHER


def test_app_mac(dev: EthDev, one: Process, two: Process) -> None:
    assert one("str(dev.app_mac)") == str(dev.app_mac)
    one("dev.app_mac = mac", mac=OTHER)
    assert dev.app_mac == MacAddr(OTHER)
    assert one("str(dev.app_mac)") == two("str(dev.app_mac)") == OTHER
    dev.app_mac = MacAddr("02:00:00:00:00:78")
    assert one("str(dev.app_mac)") == two("str(dev.app_mac)") == "02:00:00:00:00:78"


def received(other: Process, queue: int, packets: PacketSocket, *sent: bytes) -> list[bytes]:
    """What of these the only process with an attached pair receives."""
    for data in sent:
        packets.send(data)
    code = "[bytes(m) for m in dev.rx_burst(queue, 64)]"
    got: list[bytes] = other(code, queue=queue)
    return got


@pytest.fixture
def alone(dev: EthDev, packets: PacketSocket) -> PacketSocket:
    """The first process's own pair takes no frames."""
    dev.rx_queue_stop(0)
    return packets


def test_filter(dev: EthDev, one: Process, alone: PacketSocket) -> None:
    """What a process asks for holds in its own queue when the request has returned."""
    own = bytes(dev.app_mac)
    to_own, to_other = frame(1, dst=own), frame(2, dst=bytes(MacAddr(OTHER)))
    to_group, to_stranger = frame(3, dst=bytes(MacAddr(GROUP))), frame(4, dst=STRANGER)
    every = (to_own, to_other, to_group, to_stranger)
    assert received(one, 1, alone, *every) == list(every)
    one("dev.promiscuous = False")
    assert dev.promiscuous is False
    assert received(one, 1, alone, *every) == [to_own]
    one("dev.mac_addr_add(mac)", mac=OTHER)
    assert MacAddr(OTHER) in dev.mac_addrs
    assert received(one, 1, alone, *every) == [to_own, to_other]
    one("dev.mc_addr_list = [mac]", mac=GROUP)
    assert dev.mc_addr_list == (MacAddr(GROUP),)
    assert received(one, 1, alone, *every) == [to_own, to_other, to_group]
    one("dev.mac_addr_remove(mac)", mac=OTHER)
    one("dev.mc_addr_list = []")
    assert received(one, 1, alone, *every) == [to_own]
    one("dev.allmulticast = True")
    assert dev.allmulticast
    assert received(one, 1, alone, *every) == [to_own, to_group]
    one("dev.promiscuous = True")
    assert received(one, 1, alone, *every) == list(every)


def test_filter_of_others(
    dev: EthDev, share: rtap.Share, one: Process, two: Process, alone: PacketSocket
) -> None:
    """What one process sets reaches the queues of the other ones, and the first process sees it."""
    own = bytes(dev.app_mac)
    to_own, to_stranger = frame(1, dst=own), frame(4, dst=STRANGER)
    one("dev.promiscuous = False")
    settled(two, "not dev.promiscuous")
    one("dev.close()")
    eventually(lambda: sorted(share.leases) == [2], "the pair is free")
    assert received(two, 2, alone, to_own, to_stranger) == [to_own]
    dev.promiscuous = True
    settled(two, "dev.promiscuous")
    assert received(two, 2, alone, to_own, to_stranger) == [to_own, to_stranger]
    dev.promiscuous = False
    dev.mac_addr_add(MacAddr(STRANGER))
    settled(two, "len(dev.mac_addrs) == 2")
    assert received(two, 2, alone, to_own, to_stranger) == [to_own, to_stranger]


def test_news_reach_a_program_that_asks_without_pause(
    dev: EthDev, share: rtap.Share, one: Process
) -> None:
    """Each question holds the device's lock until it is answered."""
    one.begin(
        "import time\n"
        "until = time.monotonic() + wait\n"
        "while len(dev.mac_addrs) < 2 and time.monotonic() < until: dev.link()",
        wait=patient(10),
    )
    dev.mac_addr_add(MacAddr(STRANGER))
    one.result()
    assert one("len(dev.mac_addrs)") == 2


def test_filter_holds_for_those_who_come_later(
    dev: EthDev, alone: PacketSocket, process: MakeProcess
) -> None:
    dev.promiscuous = False
    dev.mac_addr_add(OTHER)
    dev.mc_addr_list = [GROUP]
    late = process().attach(dev.name)
    assert late("dev.promiscuous, len(dev.mac_addrs), len(dev.mc_addr_list)") == [False, 2, 1]
    late("dev.rx_burst(1)")  # leases it
    got = received(late, 1, alone, frame(1, dst=bytes(MacAddr(OTHER))), frame(2, dst=STRANGER))
    assert got == [frame(1, dst=bytes(MacAddr(OTHER)))]


def test_link(netns: NetNS, dev: EthDev, one: Process, two: Process, packets: PacketSocket) -> None:
    assert one("dev.link().link_status")
    assert two("dev.link().link_status")
    one("dev.set_link_down()")
    assert not dev.link().link_status
    assert not one("dev.send(data, queue=1)", data=frame(1))
    settled(two, "not dev._ops.terms.plugged")  # news, which may come after an answer
    assert not two("dev.link().link_status")
    assert not two("dev.send(data, queue=2)", data=frame(1))
    assert not dev.send(frame(1))
    burst = dev.pool.alloc_burst(1, frame(1))
    taken = dev.tx_burst(0, burst)
    assert one("dev.tx_burst(1, dev.pool.alloc_burst(1, data))", data=frame(1)) == taken
    two("dev.set_link_up()")
    assert dev.link().link_status
    settled(one, "dev.send(data, queue=1)".replace("data", repr(frame(2))))
    settled(two, "dev.send(data, queue=2)".replace("data", repr(frame(3))))
    assert packets.frames(2) == [frame(2), frame(3)]


def test_name_and_info(netns: NetNS, dev: EthDev, one: Process) -> None:
    info, mine = one("vars(dev.info())"), vars(dev.info())
    assert info.keys() == mine.keys()
    for name in ("driver_name", "mode", "max_rx_queues", "nb_rx_queues", "ifname"):
        if name in mine:
            assert info[name] == mine[name], name
    rename(netns, "tap0", "uplink")
    settled(one, "dev.ifname == 'uplink'")
    assert one("dev.rx_queue(1).name") == "uplink"
    one("dev.mtu = 1400")
    assert dev.mtu == 1400


def test_set_up_is_the_first_process_s(dev: EthDev, one: Process) -> None:
    sentence = rf"{{}}: device {dev.name} is attached, process \d+ has it and sets it up"
    for name, call in (
        ("rx_queue_setup", "dev.rx_queue_setup(1, 64, dev.pool)"),
        ("tx_queue_setup", "dev.tx_queue_setup(1, 64)"),
        ("rx_queue_setup", "dev.rx_queue_setup(0, 64, dev.pool)"),
        ("rx_queue_release", "dev.stop(); dev.rx_queue_release(1)"),
        ("tx_queue_release", "dev.tx_queue_release(1)"),
        ("configure", "dev.configure()"),
        ("configure", "dev.configure(1, 1, rtap.EthConf())"),
    ):
        with pytest.raises(DeviceStateError, match=sentence.format(name)):
            one(call)
    one("dev.start()")
    one("dev.rx_burst(1)")


def test_stop_and_start_are_of_this_process(
    dev: EthDev, one: Process, two: Process, packets: PacketSocket
) -> None:
    for n in range(3):
        one("dev.stop()")
        with pytest.raises(DeviceStateError):
            one("dev.rx_burst(1)")
        with pytest.raises(DeviceStateError):
            one("dev.send(data, queue=1)", data=frame(1))
        assert dev.state == two("dev.state") == "started"
        assert two("dev.send(data, queue=2)", data=frame(n))
        assert packets.frames(1) == [frame(n)]
        one("dev.start()")
        assert one("dev.send(data, queue=1)", data=frame(n + 10))
        assert packets.frames(1) == [frame(n + 10)]
    one("dev.rx_queue_stop(1); dev.tx_queue_stop(1)")
    with pytest.raises(DeviceStateError):
        one("dev.rx_burst(1)")
    one("dev.rx_queue_start(1); dev.tx_queue_start(1)")
    one("dev.rx_burst(1)")


def test_first_process_stops_and_starts(dev: EthDev, one: Process, packets: PacketSocket) -> None:
    dev.stop()
    assert dev.state == "stopped"
    dev.start()
    dev.rx_queue_stop(0)
    eventually(lambda: one("dev.link().link_status") is True, "the link is up")
    settled(one, f"dev.send({frame(5)!r}, queue=1)")
    assert packets.frames(1) == [frame(5)]
    to_and_fro(packets, one, 1, 7)


# ---- events


EVENTS = """
import threading
heard = []
kinds = [rtap.EthEvent.INTR_LSC, rtap.EthEvent.INTR_RMV, rtap.EthEvent.MTU, rtap.EthEvent.MAC,
         rtap.EthEvent.RENAME, rtap.EthEvent.ADMIN_STATE]
handles = [
    dev.callback_register(kind, lambda dev, event, data: heard.append([event.name, str(data)]))
    for kind in kinds
]
"""


def test_events(netns: NetNS, dev: EthDev, one: Process, two: Process) -> None:
    for other in (one, two):
        other(EVENTS)

    def hear(name: str, data: str | None = None) -> None:
        def heard() -> bool:
            return all(
                any(event == name and data in (None, what) for event, what in other("heard"))
                for other in (one, two)
            )

        eventually(heard, f"{name} {data}")

    ip(netns, "link", "set", "tap0", "mtu", "1300")
    hear("MTU", "1300")
    one("dev.mtu = 1350")
    hear("MTU", "1350")
    ip(netns, "link", "set", "tap0", "address", OTHER)
    hear("MAC", OTHER)
    dev.set_link_down()
    hear("INTR_LSC")
    rename(netns, "tap0", "tap7")
    hear("RENAME", "tap7")
    ip(netns, "link", "set", "tap7", "down")
    hear("ADMIN_STATE", "False")
    ip(netns, "link", "delete", "tap7")
    hear("INTR_RMV")
    for other in (one, two):
        assert sum(event == "INTR_RMV" for event, _ in other("heard")) == 1
        queue = other("dev.queues[0]")
        with pytest.raises(rtap.DeviceGone):
            other("dev.rx_burst(queue, 8, wait)", queue=queue, wait=patient(10))
        with pytest.raises(OSError, match=r"tap7|No such device"):
            other("dev.mtu")


def test_deleted_interface_ends_waits(netns: NetNS, dev: EthDev, one: Process) -> None:
    one.begin("dev.rx_burst(1, 8, None)")
    ip(netns, "link", "delete", "tap0")
    with pytest.raises(rtap.DeviceGone):
        one.result()
    assert dev.state == "started"


def test_all_statistics_of_many_queues(netns: NetNS, process: MakeProcess) -> None:
    """More counters than a message can have."""
    with (
        rtap.open("tap1", netns=netns, queues=100, nb_mbufs=2048) as dev,
        rtap.share(dev, [0, 99]),
    ):
        a = process().attach(dev.name, [99])
        assert a("dev.send(data, queue=99)", data=frame(1))
        assert a("dev.xstats()") == dev.xstats()
        assert a("dev.stats().q_opackets") == [0] * 99 + [1]
        a("dev.xstats_reset()")
        assert not any(a("dev.xstats()").values())
        assert a("list(dev.xstats())") == list(dev.xstats())


def test_nothing_is_logged(dev: EthDev, one: Process, caplog: pytest.LogCaptureFixture) -> None:
    """Requests that fail are the other process's."""
    with caplog.at_level(logging.DEBUG, logger="rtap"):
        for call in ("dev.mtu = -1", "dev.mac = 'x'", "dev.mac_addr_remove('02:00:00:00:00:55')"):
            with pytest.raises((ValueError, OSError)):
                one(call)
    assert not caplog.records
    assert LOCAL
