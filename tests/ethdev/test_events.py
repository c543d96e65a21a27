# SPDX-License-Identifier: BSD-3-Clause
"""Events of a device: link changes, renames and moves, whatever their cause; and callbacks."""

from __future__ import annotations

import gc
import queue
import socket
import struct
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from recorder import DOWN, OTHER_MAC, UP, Recorder
from rigs import iproute
from support import (
    PacketSocket,
    eventually,
    frame,
    none_left,
    open_fds,
    python,
    running_threads,
    skip_without_devices,
    threads_end,
)

import rtap
from rtap import DeviceGone, EthDev, EthEvent, EventHandle, NetNS


@pytest.fixture
def dev(netns: NetNS, engine: str) -> Iterator[EthDev]:
    with rtap.open("t0", netns=netns, engine=engine) as device:
        yield device


@pytest.fixture
def told(dev: EthDev) -> Recorder:
    return Recorder(dev)


# ---- events


def test_link_changes_by_us(dev: EthDev, told: Recorder) -> None:
    dev.set_link_down()
    told.expect((EthEvent.INTR_LSC, DOWN))
    dev.set_link_down()
    dev.set_link_up()
    told.expect((EthEvent.INTR_LSC, UP))
    dev.stop()
    told.expect((EthEvent.INTR_LSC, DOWN))
    dev.start()
    told.expect((EthEvent.INTR_LSC, UP))
    told.nothing_more()


def test_link_changes_by_others(netns: NetNS, dev: EthDev, told: Recorder) -> None:
    iproute(netns, "link set t0 carrier off")
    told.expect((EthEvent.INTR_LSC, DOWN))
    assert dev.link() == DOWN
    iproute(netns, "link set t0 carrier on")
    told.expect((EthEvent.INTR_LSC, UP))
    assert dev.link() == UP
    iproute(netns, "link set t0 down")
    told.expect((EthEvent.ADMIN_STATE, False), (EthEvent.INTR_LSC, DOWN))
    iproute(netns, "link set t0 up")
    told.expect((EthEvent.ADMIN_STATE, True), (EthEvent.INTR_LSC, UP))
    told.nothing_more()


def test_a_flap_is_told_even_when_nobody_saw_it(netns: NetNS, dev: EthDev, told: Recorder) -> None:
    with dev._lock:  # keeps the netlink thread from looking
        iproute(netns, "link set t0 carrier off")
        iproute(netns, "link set t0 carrier on")
    told.expect((EthEvent.INTR_LSC, UP))
    told.nothing_more()


def test_mtu_mac_and_name(netns: NetNS, dev: EthDev, told: Recorder) -> None:
    iproute(netns, "link set t0 mtu 1400")
    told.expect((EthEvent.MTU, 1400))
    assert dev.mtu == dev.info().mtu == 1400
    iproute(netns, f"link set t0 address {OTHER_MAC}")
    told.expect((EthEvent.MAC, OTHER_MAC))
    assert dev.mac == dev.info().mac == OTHER_MAC
    iproute(netns, "link set t0 name other0")
    told.expect((EthEvent.RENAME, "other0"))
    assert dev.ifname == dev.info().ifname == "other0"
    dev.mtu = 1300
    told.expect((EthEvent.MTU, 1300))
    dev.mac = "02:00:00:00:00:05"
    told.expect((EthEvent.MAC, "02:00:00:00:00:05"))
    told.nothing_more()


def test_messages_name_the_interface_as_it_is_called_now(netns: NetNS, dev: EthDev) -> None:
    told = Recorder(dev, EthEvent.RENAME)
    iproute(netns, "link set t0 name other0")
    told.expect((EthEvent.RENAME, "other0"))
    iproute(netns, "link del other0")
    with pytest.raises(DeviceGone) as caught:
        dev.rx_burst(0, timeout=5)
    assert caught.value.ifname == "other0"


def test_the_filter_follows_an_address_set_by_others(
    netns: NetNS, dev: EthDev, told: Recorder
) -> None:
    dev.promiscuous = False
    iproute(netns, f"link set t0 address {OTHER_MAC}")
    told.expect((EthEvent.MAC, OTHER_MAC))
    ours = rtap.MacAddr(OTHER_MAC).peer()
    with PacketSocket(netns, "t0") as kernel:
        kernel.send(frame(1, dst=bytes(ours)))
        assert [bytes(m) for m in dev.rx_burst(0, timeout=5)] == [frame(1, dst=bytes(ours))]


def test_moves(netns: NetNS, netns2: NetNS, dev: EthDev, told: Recorder) -> None:
    threads = running_threads()
    for here, there in ((netns, netns2), (netns2, netns)) * 3:
        iproute(here, f"link set t0 netns {there.path}")
        assert told.next() == (EthEvent.NETNS, None)
        told.expect((EthEvent.ADMIN_STATE, False), (EthEvent.INTR_LSC, DOWN))
        # Events come from its new namespace, and no socket listens in the old one.
        iproute(there, "link set t0 mtu 1400")
        told.expect((EthEvent.MTU, 1400))
        iproute(there, "link set t0 mtu 1500 up")
        assert {told.next()[0] for _ in range(3)} == {
            EthEvent.MTU,
            EthEvent.ADMIN_STATE,
            EthEvent.INTR_LSC,
        }
        assert dev.link() == UP
    # A look at the link in another namespace takes a thread of its own for a moment.
    threads_end(threads)


def test_queue_state(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev:
        told = Recorder(dev)
        dev.rx_queue_stop(1)
        dev.tx_queue_stop(0)
        dev.tx_queue_start(0)
        dev.rx_queue_start(1)
        told.expect(
            *(
                (EthEvent.QUEUE_STATE, what)
                for what in (("rx", 1, False), ("tx", 0, False), ("tx", 0, True), ("rx", 1, True))
            )
        )
        told.nothing_more()


def test_new_and_destroy(netns: NetNS) -> None:
    told: queue.SimpleQueue[tuple[EthDev, EthEvent]] = queue.SimpleQueue()
    handles = [
        rtap.callback_register(event, lambda dev, event, _: told.put((dev, event)))
        for event in (EthEvent.NEW, EthEvent.INTR_LSC, EthEvent.DESTROY)
    ]
    try:
        with rtap.open("t0", netns=netns) as dev:
            dev.set_link_down()
        with rtap.probe("net_null0") as null:
            pass
        assert [told.get(timeout=10) for _ in range(6)] == [
            (dev, EthEvent.NEW),
            (dev, EthEvent.INTR_LSC),
            (dev, EthEvent.INTR_LSC),
            (dev, EthEvent.DESTROY),
            (null, EthEvent.NEW),
            (null, EthEvent.DESTROY),
        ]
    finally:
        for handle in handles:
            handle.unregister()


# ---- registration


def test_unregister_inside_a_callback(netns: NetNS, dev: EthDev) -> None:
    calls: list[Any] = []
    others = Recorder(dev, EthEvent.MTU)

    def once(dev: EthDev, event: EthEvent, data: Any) -> None:
        calls.append(data)
        handle.unregister()
        handle.unregister()

    handle = dev.callback_register(EthEvent.MTU, once)
    for mtu in (1400, 1401, 1402):
        dev.mtu = mtu
    others.expect(*((EthEvent.MTU, mtu) for mtu in (1400, 1401, 1402)))
    others.nothing_more()
    assert calls == [1400]


def test_a_callback_may_do_anything(netns: NetNS, dev: EthDev) -> None:
    done: queue.SimpleQueue[str] = queue.SimpleQueue()

    def on_down(dev: EthDev, event: EthEvent, data: Any) -> None:
        dev.callback_register(EthEvent.DESTROY, lambda *_: done.put("destroyed"))
        with rtap.open("t1", netns=netns) as other:
            other.mtu = 1234
        dev.set_link_up()
        dev.close()
        done.put("closed")

    dev.callback_register(EthEvent.INTR_LSC, on_down)
    dev.set_link_down()
    assert done.get(timeout=10) == "closed"
    assert done.get(timeout=10) == "destroyed"
    assert dev.state == "closed"
    with pytest.raises(rtap.DeviceStateError):
        dev.callback_register(EthEvent.MTU, on_down)


def test_a_callback_that_raises_is_logged(
    netns: NetNS, dev: EthDev, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(dev: EthDev, event: EthEvent, data: Any) -> None:
        raise ZeroDivisionError("in a callback")

    dev.callback_register(EthEvent.MTU, bad)
    told = Recorder(dev, EthEvent.MTU)
    dev.mtu = 1400
    told.expect((EthEvent.MTU, 1400))
    assert "callback for MTU of net_rtap0" in caplog.text
    assert "ZeroDivisionError: in a callback" in caplog.text


def test_a_callback_that_exits_ends_no_events(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[EthDev] = []

    def leave(*_: object) -> None:
        raise SystemExit(1)

    with rtap.probe("net_null0") as dev:
        dev.callback_register(EthEvent.MTU, leave)
        dev.callback_register(EthEvent.MTU, lambda dev, event, data: heard.append(dev))
        dev.mtu = 1400
        eventually(lambda: len(heard) == 1, "others hear of it")
        dev.mtu = 1300
        eventually(lambda: len(heard) == 2, "and of later ones")
    assert "callback for MTU" in caplog.text


def test_wrong_arguments(dev: EthDev) -> None:
    with pytest.raises(ValueError, match="99"):
        dev.callback_register(99, print)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fn\\(dev, event, data\\)"):
        dev.callback_register(EthEvent.MTU, 5)  # type: ignore[arg-type]


def test_callbacks_keep_no_device_alive(netns: NetNS) -> None:
    dev = rtap.open("t0", netns=netns)
    handle: EventHandle = dev.callback_register(EthEvent.MTU, lambda *_: None)
    Recorder(dev)  # refers to the device
    dev.mtu = 1400
    dev.close()
    gone = weakref.ref(dev)
    del dev
    eventually(lambda: gc.collect() >= 0 and gone() is None, "it is collected")
    handle.unregister()


def test_threads_and_descriptors_end_with_the_last_device(netns: NetNS, netns2: NetNS) -> None:
    before, threads = open_fds(), running_threads()
    for _ in range(20):
        with rtap.open("a0", netns=netns) as a, rtap.open("b0", netns=netns2) as b:
            Recorder(a)
            Recorder(b)
            names = {t.name for t in threading.enumerate()}
            assert {"rtap-netlink", "rtap-events"} <= names
        none_left(before)
        threads_end(threads)


def test_after_fork() -> None:
    skip_without_devices()
    done = python(
        """
        import os, rtap
        with rtap.NetNS() as ns, rtap.open("t0", netns=ns) as dev:
            handle = dev.callback_register(rtap.EthEvent.MTU, print)
            pid = os.fork()
            if pid == 0:
                handle.unregister()
                heard = []
                with rtap.open("t1", netns=ns) as mine:
                    import queue
                    told = queue.SimpleQueue()
                    mine.callback_register(rtap.EthEvent.MTU, lambda *a: told.put(a[2]))
                    ns.run(["ip", "link", "set", "t1", "mtu", "1400"], check=True)
                    assert told.get(timeout=10) == 1400
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            told = __import__("queue").SimpleQueue()
            dev.callback_register(rtap.EthEvent.MTU, lambda *a: told.put(a[2]))
            ns.run(["ip", "link", "set", "t0", "mtu", "1300"], check=True)
            assert told.get(timeout=10) == 1300
        print("fine")
        """,
        warnings="ignore",
    )
    assert done.stdout.endswith("fine\n"), done.stderr


# ---- lost notifications


def test_overrun(netns: NetNS, dev: EthDev, told: Recorder) -> None:
    """The socket loses changes while no thread listens; the present state is still reported."""
    with dev._lock:  # the netlink thread has to wait
        iproute(netns, "link set t0 mtu 1400")
        flood(netns, 3000)
        iproute(netns, "link set t0 mtu 1450")
        iproute(netns, "link set t0 name t9")
        assert lost_notifications(netns) > 0
    told.expect((EthEvent.RENAME, "t9"), (EthEvent.MTU, 1450))
    told.nothing_more()
    iproute(netns, "link set t9 mtu 1460")
    told.expect((EthEvent.MTU, 1460))


def lost_notifications(ns: NetNS) -> int:
    """The messages lost by the namespace's sockets that listen for links."""
    lines = ns.call(lambda: Path("/proc/thread-self/net/netlink").read_text().splitlines())
    head, *sockets = (line.split() for line in lines)
    rows = [dict(zip(head, fields, strict=True)) for fields in sockets]
    return sum(int(row["Drops"]) for row in rows if row["Groups"] == "00000001")


def flood(ns: NetNS, n: int) -> None:
    """Changes lo's alias `n` times with raw requests; the kernel announces each change."""

    def run() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            sock.bind((0, 0))
            for k in range(n):
                alias = b"%06d" % k
                attribute = struct.pack("=HH", 4 + len(alias), 20) + alias.ljust(8, b"\0")
                body = struct.pack("=BxHiII", 0, 0, 1, 0, 0) + attribute
                sock.send(struct.pack("=IHHII", 16 + len(body), 16, 5, k, 0) + body)
                sock.recv(4096)

    ns.call(run)
