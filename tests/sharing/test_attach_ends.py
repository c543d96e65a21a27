# SPDX-License-Identifier: BSD-3-Clause
"""The first process ends, in every way: those that attached notice, and let it go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from patience import patient
from sharing import MakeProcess, Process, sockets_left, to_and_fro
from support import PacketSocket, eventually, frame, ip, links

import rtap
from rtap import DeviceGone, NetNS

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("runtime_dir")]


@dataclass
class Pair:
    """A process that has a device, and one that attached to its pair 1."""

    ns: NetNS
    first: Process
    name: str
    second: Process

    def gone(self) -> None:
        eventually(lambda: links(self.ns) == ["lo"], "the interface is gone")


def first_process(process: MakeProcess, ns: NetNS, **options: object) -> tuple[Process, str]:
    first = process()
    first(
        "dev = rtap.open('tap0', netns=path, queues=2, **options)\nshare = rtap.share(dev, [1])",
        path=ns.path,
        options=options,
    )
    return first, first("dev.name")


@pytest.fixture
def both(netns: NetNS, process: MakeProcess) -> Pair:
    first, name = first_process(process, netns)
    return Pair(netns, first, name, process().attach(name, [1]))


ENDS: dict[str, Callable[[Process], object]] = {
    "share.close": lambda first: first("share.close()"),
    "dev.close": lambda first: first("dev.close()"),
    "exit": Process.leave,
    "kill": Process.kill,
}
ends = pytest.mark.parametrize("end", list(ENDS.values()), ids=list(ENDS))
End = Callable[[Process], object]


@ends
def test_waiting_bursts_end(both: Pair, end: End) -> None:
    both.second.begin("dev.rx_burst(1, 64, None)")
    time.sleep(0.05)
    end(both.first)
    with pytest.raises(DeviceGone):
        both.second.result()
    for use in (
        "dev.rx_burst(1)",
        "dev.rx_burst(1, 8, None)",
        "dev.tx_burst(1, dev.pool.alloc_burst(1, data))",
        "dev.send(data, queue=1)",
        "dev.recv(None, queue=1)",
        "dev.mtu",
        "dev.stats()",
        "setattr(dev, 'mtu', 1400)",
        "dev.rx_burst(0)",
    ):
        with pytest.raises(DeviceGone):
            both.second(use, data=frame(1))
    assert both.second("dev.state") == "started"
    both.second("dev.close()")
    assert both.second("dev.state") == "closed"


@ends
def test_interface_goes_though_the_other_process_lives(both: Pair, end: End) -> None:
    end(both.first)
    if end is not ENDS["share.close"]:
        both.gone()
    # Its descriptors are closed.
    eventually(
        lambda: (
            not both.second(
                "import glob\n"
                "def name(path):\n"
                "    return os.readlink(path) if os.path.lexists(path) else ''\n"
                "[fd for fd in glob.glob('/proc/self/fd/*') if name(fd) == '/dev/net/tun']"
            )
        ),
        "it has no descriptors of the interface",
    )
    assert sockets_left() == ([] if end is not Process.kill else [f"{both.name}"])


@ends
@pytest.mark.parametrize("wait", ["sleep", "adaptive", "poll"])
@pytest.mark.parametrize("idle", [0.0, 0.1])
def test_workers_end(both: Pair, end: End, wait: str, idle: float) -> None:
    both.second(
        "heard = []\n"
        "handle = rtap.callback_register(rtap.EthEvent.ROUTE_END,"
        " lambda dev, event, data: heard.append([dev.name, data.error]))\n"
        "worker = rtap.Worker(wait=wait)\n"
        "worker.forward((dev, 1), (dev, 1))\n"
        "worker.start()",
        wait=wait,
    )
    with PacketSocket(both.ns, "tap0") as packets:
        both.first("dev.rx_queue_stop(0)")
        packets.send(frame(1))
        assert packets.frames(1) == [frame(1)]
        time.sleep(idle)  # it sleeps by then
        end(both.first)
    assert both.second("worker.join(wait)", wait=patient(10))
    (error,) = both.second("[r.error for r in worker.stats().routes]")
    assert error
    eventually(lambda: bool(both.second("heard")), "ROUTE_END")
    both.second("worker.stop()")
    if end is not ENDS["share.close"]:
        both.gone()


@ends
def test_interrupts_end(both: Pair, end: End) -> None:
    both.second(
        "import select\n"
        "fd = dev.rx_queue_intr_fd(1)\n"
        "dev.rx_queue_intr_enable(1)\n"
        "def readable(wait):\n"
        "    return bool(select.select([fd], [], [], wait)[0])"
    )
    assert not both.second("readable(0)")
    both.second.begin("readable(wait)", wait=patient(10))
    end(both.first)
    assert both.second.result() is True
    with pytest.raises(DeviceGone):
        both.second("dev.rx_burst(1)")


@ends
def test_events_and_leases_end(both: Pair, process: MakeProcess, end: End) -> None:
    lazy = process().attach(both.name)
    lazy(
        "heard = []\n"
        "handle = dev.callback_register(rtap.EthEvent.INTR_RMV,"
        " lambda dev, event, data: heard.append(event.name))"
    )
    end(both.first)
    eventually(lambda: lazy("heard") == ["INTR_RMV"], "INTR_RMV")
    with pytest.raises(DeviceGone, match=r"which has device net_rtap.*, is gone"):
        lazy("dev.rx_burst(1)")
    lazy("dev.close()")
    assert lazy("rtap.devices()") == []


@pytest.mark.parametrize("end", list(ENDS.values())[1:], ids=list(ENDS)[1:])
def test_another_process_shares_under_the_same_name(
    both: Pair, process: MakeProcess, end: End
) -> None:
    end(both.first)
    both.gone()
    third, name = first_process(process, both.ns)
    assert name == both.name
    assert sockets_left() == [name]
    fourth = process().attach(name, [1])
    third("dev.rx_queue_stop(0)")
    with PacketSocket(both.ns, "tap0") as packets:
        to_and_fro(packets, fourth, 1)
    with pytest.raises(DeviceGone):
        both.second("dev.rx_burst(1)")
    both.second("dev.close()")
    both.second.attach(name)
    with pytest.raises(rtap.DeviceStateError, match=f"in use by process {fourth.pid}"):
        both.second("dev.rx_burst(1)")


def test_persistent_interface(netns: NetNS, process: MakeProcess) -> None:
    first, name = first_process(process, netns, persist=True)
    second = process().attach(name, [1])
    second.begin("dev.rx_burst(1, 8, None)")
    first.kill()
    with pytest.raises(DeviceGone):
        second.result()
    assert "tap0" in links(netns)
    third, name = first_process(process, netns, persist=True)
    second("dev.close()")
    second.attach(name, [1])
    third("dev.rx_queue_stop(0)")
    with PacketSocket(netns, "tap0") as packets:
        to_and_fro(packets, second, 1)
    third("dev.close()")
    ip(netns, "link", "delete", "tap0")


def test_first_process_makes_the_interface_anew(netns: NetNS, process: MakeProcess) -> None:
    """Pairs that are lent are on the new interface too; the others stay silent."""
    with rtap.open("tap0", netns=netns, queues=3) as dev, rtap.share(dev, [1, 2]) as share:
        other = process().attach(dev.name, [1])
        other(
            "heard = []\n"
            "handles = [\n"
            "    dev.callback_register(event, lambda dev, event, data: heard.append(event.name))\n"
            "    for event in (rtap.EthEvent.INTR_RMV, rtap.EthEvent.RECOVERY_SUCCESS)\n"
            "]"
        )
        ip(netns, "link", "delete", "tap0")
        with pytest.raises(DeviceGone):
            other("dev.rx_burst(1, 8, wait)", wait=patient(10))
        eventually(lambda: other("heard") == ["INTR_RMV"], "INTR_RMV")
        dev.stop()
        dev.start()
        assert sorted(links(netns)) == ["lo", "tap0"]
        eventually(lambda: other("heard") == ["INTR_RMV", "RECOVERY_SUCCESS"], "recovery")
        assert sorted(share.leases) == [1]
        dev.rx_queue_stop(0)
        with PacketSocket(netns, "tap0") as packets:
            settled = f"dev.send({frame(3)!r}, queue=1)"
            eventually(lambda: bool(other(settled)), "it may send")
            assert packets.frames(1) == [frame(3)]
            for seq in range(10):
                to_and_fro(packets, other, 1, seq)


def test_first_process_hangs(both: Pair, process: MakeProcess) -> None:
    """Bursts need nothing of it. A request waits, and a close does not."""
    import signal

    both.first("dev.rx_queue_stop(0)")
    with PacketSocket(both.ns, "tap0") as packets:
        both.first.signal(signal.SIGSTOP)
        to_and_fro(packets, both.second, 1)
        both.second.begin("dev.mtu")
        time.sleep(0.05)
        both.first.signal(signal.SIGCONT)
        assert both.second.result() == 1500
        both.first.signal(signal.SIGSTOP)
        both.second("dev.close()")
        both.first.signal(signal.SIGCONT)
    eventually(lambda: both.first("share.leases") == {}, "the pair is free")
