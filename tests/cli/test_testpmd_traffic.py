# SPDX-License-Identifier: BSD-3-Clause
"""``rtap testpmd`` between network namespaces, with real clients: iperf3 and the kernel."""

from __future__ import annotations

import contextlib
import signal

import pytest
from rigs import wrong_checksums
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from support import PacketSocket, eventually, frame, ip, links, netdev, seq_of
from testpmds import LRO, PORTS, Testpmd, attended, between, numbers, report, unattended

from rtap.control.netns import NetNS

pytestmark = pytest.mark.root

IPV4 = 0x0800


@pytest.mark.parametrize("options", [(), LRO], ids=["frames", "super-frames"])
def test_iperf3_through_io(netns: NetNS, netns2: NetNS, options: tuple[str, ...]) -> None:
    with between(netns, netns2, *options) as hosts:
        hosts.pmd.say("start")
        n_bytes = hosts.iperf3()
        assert n_bytes > 1_000_000
        total = numbers(hosts.pmd.say("stop"))
        # Nothing is lost in between, and TCP takes at least a frame for each 64 KiB.
        assert total["RX-packets"] == total["TX-packets"] > n_bytes / 65536
        assert total["TX-dropped"] == 0
        for ns, ifname in ((netns, "left0"), (netns2, "right0")):
            counted = netdev(ns, ifname)
            assert counted["rx_packets"] > 0
            assert counted["rx_dropped"] == 0


def test_statistics_are_the_kernels(netns: NetNS) -> None:
    """Every frame of a host is counted once: forwarded, or dropped because nothing read it."""
    with attended(netns, "--vdev=net_rtap0,iface=a0", "--vdev=net_rtap1,iface=b0") as pmd:
        with PacketSocket(netns, "a0") as out, PacketSocket(netns, "b0") as back:
            # Without forwarding, the interface's queue fills up and the rest is dropped.
            pmd.say("set fwd io")
            before = netdev(netns, "a0")
            pmd.say("start")
            for seq in range(300):
                out.send(frame(seq))
            assert [seq_of(data) for data in back.frames(300)] == list(range(300))
            text = pmd.say("stop")
            moved = netdev(netns, "a0")["tx_packets"] - before["tx_packets"]
        assert moved == 300
        total = numbers(text)
        assert (total["RX-packets"], total["TX-packets"]) == (300, 300)
        assert "RX-packets: 300 " in pmd.say("show port stats 0")
        assert "TX-packets: 300 " in pmd.say("show port stats 1")
        xstats = pmd.say("show port xstats 0")
        assert "rx_q0_size_64_packets: 300\n" in xstats


def test_frames_that_nobody_reads_are_dropped_and_counted(netns: NetNS) -> None:
    options = ("--vdev=net_rtap0,iface=a0,txqueuelen=100", "--forward-mode=txonly")
    with attended(netns, *options) as pmd, PacketSocket(netns, "a0") as out:
        pmd.say("start")  # which receives nothing
        for seq in range(250):
            with contextlib.suppress(OSError):
                out.send(frame(seq))
        missed = netdev(netns, "a0")["tx_dropped"]
        assert missed > 100
        total = numbers(pmd.say("stop"))
        assert total["RX-dropped"] == missed
        assert total["RX-packets"] == 0
        assert total["RX-total"] == missed


@pytest.mark.parametrize("lengths", [[64], [1400], [64, 100, 36]])
def test_txonly_frames_are_sound(netns: NetNS, lengths: list[int]) -> None:
    segments = ",".join(map(str, lengths))
    options = ("--forward-mode=txonly", f"--txpkts={segments}", "--eth-peer=0,02:00:00:00:00:77")
    with attended(netns, "--vdev=net_rtap0,iface=a0", *options) as pmd:
        info = pmd.say("show port info 0")
        with PacketSocket(netns, "a0", IPV4) as arriving:
            pmd.say("start")
            (data,) = arriving.frames(1)
            pmd.say("stop")
    assert len(data) == sum(lengths)
    packet = Ether(data)
    assert packet.dst == "02:00:00:00:00:77"
    assert f"MAC address: {packet.src}\n" in info
    assert (packet[IP].src, packet[IP].dst) == ("198.18.0.1", "198.18.0.2")
    assert (packet[UDP].sport, packet[UDP].dport) == (9, 9)
    assert not [text for text in wrong_checksums(data) if text.startswith("IP:")]
    assert packet[UDP].chksum == 0
    assert len(packet[UDP].payload) == sum(lengths) - 42


@pytest.mark.parametrize(
    ("options", "flows", "at"),
    [(("--forward-mode=flowgen", "--flowgen-flows=5"), 5, 30),
     (("--forward-mode=txonly", "--txonly-multi-flow"), 256, 26)],
)  # fmt: skip
def test_flows(netns: NetNS, options: tuple[str, ...], flows: int, at: int) -> None:
    with (
        attended(netns, "--vdev=net_rtap0,iface=a0", *options) as pmd,
        PacketSocket(netns, "a0", IPV4, rcvbuf=1 << 22) as arriving,
    ):
        pmd.say("start")
        frames = arriving.frames(1000)
        pmd.say("stop")
    assert len(frames) == 1000
    assert len({data[at : at + 4] for data in frames}) == flows
    assert not [w for data in frames[:10] for w in wrong_checksums(data) if w.startswith("IP:")]


def test_flowgen_takes_what_comes(netns: NetNS) -> None:
    with (
        attended(netns, "--vdev=net_rtap0,iface=a0", "--forward-mode=flowgen") as pmd,
        PacketSocket(netns, "a0") as out,
    ):
        pmd.say("start")
        for seq in range(100):
            out.send(frame(seq))

        def received() -> bool:
            return "RX-packets: 100 " in pmd.say("show port stats 0")

        eventually(received, "all frames are received")
        assert numbers(pmd.say("stop"))["RX-packets"] == 100


@pytest.mark.parametrize("engine", ["uring", "syscall"])
def test_rxonly_takes_everything(netns: NetNS, engine: str) -> None:
    options = ("--forward-mode=rxonly", "--rxq=2", "--txq=2", f"--engine={engine}")
    with attended(netns, "--vdev=net_rtap0,iface=a0", *options) as pmd:
        assert f"Engine: {engine}" in pmd.say("show port info 0")
        with PacketSocket(netns, "a0") as out:
            pmd.say("start")
            for seq in range(200):
                out.send(frame(seq))
            eventually(lambda: netdev(netns, "a0")["tx_packets"] == 200, "all are read")
            total = numbers(pmd.say("stop"))
    assert (total["RX-packets"], total["TX-packets"]) == (200, 0)


def test_noisy_forwards_late_but_all(netns: NetNS) -> None:
    noise = ("--forward-mode=noisy", "--noisy-tx-sw-buffer-size=64", "--noisy-lkup-memory=1")
    noise += ("--noisy-lkup-num-reads=4", "--noisy-tx-sw-buffer-flushtime=100")
    with (
        attended(netns, "--vdev=net_rtap0,iface=a0", "--vdev=net_rtap1,iface=b0", *noise) as pmd,
        PacketSocket(netns, "a0") as out,
        PacketSocket(netns, "b0") as back,
    ):
        pmd.say("start")
        for seq in range(200):
            out.send(frame(seq))
        # Later frames push out 136 of them; the others leave after the time-out.
        assert [seq_of(data) for data in back.frames(200)] == list(range(200))
        total = numbers(pmd.say("stop"))
    assert (total["RX-packets"], total["TX-packets"]) == (200, 200)


def test_bursts_to_begin_with(netns: NetNS) -> None:
    with attended(netns, "--vdev=net_rtap0,iface=a0", "--burst=20") as pmd:
        pmd.say("start tx_first 3")
        assert numbers(pmd.say("stop"))["TX-packets"] == 60
        assert netdev(netns, "a0")["rx_packets"] == 60


# ---- ends


def test_nothing_is_left(netns: NetNS) -> None:
    before = links(netns)
    with unattended(netns, *PORTS, "--stats-period=0.1") as pmd:
        pmd.until(r"port 1: rx ")
        assert {"left0", "right0"} <= set(links(netns))
        status, out = pmd.end(signal.SIGINT)
    assert status == 0
    assert "Accumulated forward statistics" in out
    assert links(netns) == before


def test_a_deleted_interface_is_said_and_the_others_go_on(netns: NetNS) -> None:
    ports = ("--vdev=net_rtap0,iface=a0", "--vdev=net_rtap1,iface=b0", "--vdev=net_rtap2,iface=c0")
    with attended(netns, *ports, "--port-topology=loop") as pmd:
        pmd.say("start")
        ip(netns, "link", "del", "b0")

        def said() -> bool:
            return "ended: " in pmd.say("")

        eventually(said, "the end of a route is told")
        with PacketSocket(netns, "c0") as wire:
            wire.send(frame(7))
            assert [seq_of(data) for data in wire.frames(1)] == [7]
        assert "Accumulated forward statistics" in pmd.say("stop")


def test_the_loss_of_the_only_interface_is_an_error(netns: NetNS) -> None:
    with unattended(netns, "--vdev=net_rtap0,iface=a0", "--stats-period=0.1") as pmd:
        pmd.until(r"port 0: rx ")
        ip(netns, "link", "del", "a0")
        out, _ = pmd.process.communicate(timeout=20)
    assert pmd.process.returncode == 1
    text = out.decode()
    assert "Accumulated forward statistics" in text
    assert "rtap testpmd: forwarding from rx queue 0 of " in text


def test_ports_stop_and_start(netns: NetNS) -> None:
    with attended(netns, "--vdev=net_rtap0,iface=a0", "--vdev=net_rtap1,iface=b0") as pmd:
        with PacketSocket(netns, "a0") as out, PacketSocket(netns, "b0") as back:
            for seq in range(3):
                pmd.say("start")
                out.send(frame(seq))
                assert [seq_of(data) for data in back.frames(1)] == [seq]
                pmd.say("stop")
                pmd.say("port stop all")
                assert "Link status: down" in pmd.say("show port info 0")
                pmd.say("port start all")
        assert "Link status: up" in pmd.say("show port info 1")


def test_json_of_an_interface(netns: NetNS) -> None:
    out = report("--vdev=net_rtap0,iface=a0", "--duration=0.2", "--forward-mode=txonly", ns=netns)
    (port,) = out["ports"]
    assert port["ifname"] == "a0"
    assert port["tx_packets"] == port["stats"]["opackets"] > 100


def test_a_name_in_use_is_refused(netns: NetNS) -> None:
    with attended(netns, "--vdev=net_rtap0,iface=a0"):
        other = Testpmd(netns, "--vdev=net_rtap0,iface=a0", "--duration=1")
        out, _ = other.process.communicate(timeout=20)
    assert other.process.returncode == 1
    assert b"a0" in out
    assert out.count(b"\n") == 1
