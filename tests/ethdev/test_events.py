# SPDX-License-Identifier: BSD-3-Clause
"""What a device tells: link changes, renames, moves, deletion, whoever causes them."""

from __future__ import annotations

import contextlib
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
from rigs import iproute
from support import (
    PacketSocket,
    Task,
    eventually,
    frame,
    ip,
    link,
    links,
    netdev,
    none_left,
    open_fds,
    python,
    skip_without_devices,
    threads_end,
)

import rtap
from rtap import DeviceGone, EthDev, EthEvent, EventHandle, Link, Mempool, NetNS, RxOffload, Worker

UP, DOWN = Link(link_status=True), Link(link_status=False)
OTHER_MAC = "02:00:00:00:00:77"


class Recorder:
    """Registers for events of a device and keeps what it is told."""

    def __init__(self, dev: EthDev, *events: EthEvent) -> None:
        self.dev = dev
        self.told: queue.SimpleQueue[tuple[EthEvent, Any]] = queue.SimpleQueue()
        self.handles = [dev.callback_register(event, self) for event in events or EthEvent]

    def __call__(self, dev: EthDev, event: EthEvent, data: Any) -> None:
        assert dev is self.dev
        assert threading.current_thread().name == "rtap-events"
        self.told.put((event, data))

    def next(self, timeout: float = 10) -> tuple[EthEvent, Any]:
        return self.told.get(timeout=timeout)

    def expect(self, *wanted: tuple[EthEvent, Any]) -> None:
        """These are the next ones, in that order."""
        assert [self.next() for _ in wanted] == list(wanted)

    def nothing_more(self) -> None:
        """All that has happened is told; a change that is seen comes after it."""
        mtu = self.dev.mtu - 1
        ip(self.ns, "link", "set", self.dev.ifname, "mtu", str(mtu))
        self.expect((EthEvent.MTU, mtu))

    @property
    def ns(self) -> NetNS:
        return self.dev._ops._control.netns  # type: ignore[attr-defined]


@pytest.fixture
def dev(netns: NetNS, engine: str) -> Iterator[EthDev]:
    with rtap.open("t0", netns=netns, engine=engine) as device:
        yield device


@pytest.fixture
def told(dev: EthDev) -> Recorder:
    return Recorder(dev)


# ---- what is told


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


def test_a_flap_is_told_even_when_nobody_saw_it(dev: EthDev, told: Recorder) -> None:
    with dev._lock:  # nobody looks meanwhile
        dev._ops._control.set_carrier(False)  # type: ignore[attr-defined]
        dev._ops._control.set_carrier(True)  # type: ignore[attr-defined]
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
    for here, there in ((netns, netns2), (netns2, netns)) * 3:
        iproute(here, f"link set t0 netns {there.path}")
        assert told.next() == (EthEvent.NETNS, None)
        told.expect((EthEvent.ADMIN_STATE, False), (EthEvent.INTR_LSC, DOWN))
        # It is heard of in its new place, and where it was nobody listens any more.
        iproute(there, "link set t0 mtu 1400")
        told.expect((EthEvent.MTU, 1400))
        iproute(there, "link set t0 mtu 1500 up")
        assert {told.next()[0] for _ in range(3)} == {
            EthEvent.MTU,
            EthEvent.ADMIN_STATE,
            EthEvent.INTR_LSC,
        }
        assert dev.link() == UP
    # Looking at the link is a thread of its own for a moment, in another namespace.
    eventually(lambda: threading.active_count() == 3 + plain_threads(), "no thread is left over")


def plain_threads() -> int:
    return sum(not t.name.startswith("rtap-") for t in threading.enumerate()) - 1


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


# ---- deletion


def test_deleted_and_made_anew(netns: NetNS, engine: str) -> None:
    options: dict[str, Any] = {"mtu": 1400, "mac": OTHER_MAC, "queues": 3}
    with rtap.open(
        "t0", netns=netns, engine=engine, rx_offloads=RxOffload.CHECKSUM, **options
    ) as dev:
        told = Recorder(dev)
        fd = dev.rx_queue_intr_fd(0)
        dev.rx_queue_intr_enable(0)
        for again in range(5):
            iproute(netns, "link del t0")
            told.expect((EthEvent.INTR_RMV, None))
            for _ in range(2):
                with pytest.raises(DeviceGone):
                    dev.rx_burst(again % 3)
                with pytest.raises(DeviceGone):
                    dev.send(frame())
            dev.stop()
            dev.start()
            told.expect(
                (EthEvent.RECOVERY_SUCCESS, None),
                (EthEvent.ADMIN_STATE, True),
                (EthEvent.INTR_LSC, UP),
            )
            assert dev.rx_queue_intr_fd(0) == fd
            shown = link(netns, "t0")
            assert (shown["mtu"], shown["address"]) == (1400, OTHER_MAC)
            assert shown["linkinfo"]["info_data"]["numqueues"] == 3
            ip(netns, "link", "set", "t0", "multicast", "off")
            with PacketSocket(netns, "t0") as kernel:
                assert dev.send(frame(again))
                assert kernel.frames(1) == [frame(again)]
                kernel.send(frame(7))
                got = [bytes(m) for q in range(3) for m in dev.rx_burst(q, timeout=0.2)]
                assert frame(7) in got
        assert dev.stats().opackets == 5
    assert links(netns) == ["lo"]


def test_deleted_and_configured(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev, Mempool(64) as pool:
        iproute(netns, "link del t0")
        dev.stop()
        dev.configure(1, 1)
        assert link(netns, "t0")["linkinfo"]["info_data"]["numqueues"] == 1
        dev.rx_queue_setup(0, 16, pool)
        dev.tx_queue_setup(0, 16)
        dev.start()
        assert dev.send(frame())
        dev.close()


def test_deleted_and_made_anew_by_somebody_else(netns: NetNS) -> None:
    """It is taken over if it is of the same kind, and left alone otherwise."""
    with rtap.open("t0", netns=netns) as dev:
        for kind in ("", " multi_queue"):
            iproute(netns, "link del t0")
            iproute(netns, "tuntap add mode tap t0" + kind)
            dev.stop()
            if not kind:
                with pytest.raises(OSError, match="t0"):
                    dev.start()
            else:
                dev.start()
                assert dev.send(frame())
                assert dev.info().if_index == link(netns, "t0")["ifindex"]
            iproute(netns, "link show t0")


def test_persistence_is_made_anew_too(netns: NetNS) -> None:
    with rtap.open("t0", netns=netns, persist=True) as dev:
        iproute(netns, "link del t0")
        dev.stop()
        dev.start()
        assert dev.info().persist
    assert links(netns) == ["lo", "t0"]


def test_a_worker_and_a_waiter_hear_of_the_deletion(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev:
        told = Recorder(dev, EthEvent.INTR_RMV)
        worker = Worker()
        worker.forward((dev, 0), (dev, 0))
        with worker:
            waiter = Task(dev.rx_burst, 1, 64, None)
            iproute(netns, "link del t0")
            told.expect((EthEvent.INTR_RMV, None))
            with pytest.raises(DeviceGone):
                waiter.result()
            assert worker.join(10)


# ---- sending and drops while the link is down


def test_sends_while_the_link_is_down_are_refused_and_counted(
    netns: NetNS, dev: EthDev, told: Recorder
) -> None:
    burst = dev.pool.alloc_burst(5, frame())
    for down, up in (
        (dev.set_link_down, dev.set_link_up),
        (lambda: iproute(netns, "link set t0 carrier off"), lambda: carrier_on(netns)),
    ):
        before, errors = netdev(netns, "t0")["rx_packets"], dev.stats().oerrors
        down()
        told.expect((EthEvent.INTR_LSC, DOWN))
        assert dev.tx_burst(0, burst[:]) == 5
        assert dev.stats().oerrors == errors + 5
        assert netdev(netns, "t0")["rx_packets"] == before
        up()
        told.expect((EthEvent.INTR_LSC, UP))
        assert dev.tx_burst(0, burst[:]) == 5
        assert netdev(netns, "t0")["rx_packets"] == before + 5
    assert dev.stats().oerrors == 10
    assert dev.stats().opackets == 10
    assert dev.tx_queue(0).counters()["down"] == 10  # type: ignore[attr-defined]


def carrier_on(ns: NetNS) -> None:
    iproute(ns, "link set t0 carrier on")


def test_what_the_kernel_drops_while_the_link_is_down_is_not_missed(
    netns: NetNS, dev: EthDev, told: Recorder
) -> None:
    def push(n: int) -> None:
        for k in range(n):
            with_drops.send(frame(k))

    def hear(link: Link) -> None:
        while told.next() != (EthEvent.INTR_LSC, link):
            pass

    with PacketSocket(netns, "t0") as with_drops:
        assert dev.xstats()["link_down_drops"] == 0
        dev.set_link_down()
        push(7)
        assert dev.xstats()["link_down_drops"] == 7
        hear(DOWN)
        dev.set_link_up()
        push(3)
        assert (len(dev.rx_burst(0)), dev.xstats()["link_down_drops"]) == (3, 7)
        hear(UP)
        iproute(netns, "link set t0 carrier off")
        hear(DOWN)
        # DOWN is told first. The kernel sets operstate and closes the queues under one lock.
        eventually(lambda: link(netns, "t0")["operstate"] == "DOWN", "the queues are closed")
        push(5)
        dev.stop()
        push(5)
        dev.start()
        assert dev.xstats()["link_down_drops"] == 17
        assert dev.stats().imissed == 0
        iproute(netns, "link set t0 txqueuelen 2")
        for k in range(6):
            with contextlib.suppress(OSError):  # ENOBUFS is the drop itself
                with_drops.send(frame(k))
        assert dev.stats().imissed == 4
        dev.stats_reset()
        assert (dev.stats().imissed, dev.xstats()["link_down_drops"]) == (0, 17)
        dev.xstats_reset()
        assert dev.xstats()["link_down_drops"] == 0


# ---- an MTU that others raise


def test_buffers_grow_with_an_mtu_that_others_raise(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev:
        told = Recorder(dev, EthEvent.MTU)
        pool = dev.pool
        old = dev.pool.alloc(b"still there")
        iproute(netns, "link set t0 mtu 9000")
        told.expect((EthEvent.MTU, 9000))
        assert dev.pool is not pool
        assert dev.pool.data_room >= 9000 + 22 + 1
        with PacketSocket(netns, "t0") as kernel:
            kernel.send(frame(1, 9014))
            got = [m for q in range(2) for m in dev.rx_burst(q, timeout=0.2)]
            assert [(bytes(m), m.nb_segs) for m in got] == [(frame(1, 9014), 1)]
        assert dev.stats().ierrors == 0
        assert bytes(old) == b"still there"
        del old
        pool.close()  # nothing receives into it any more
        dev.mtu = 20000
        told.expect((EthEvent.MTU, 20000))
        assert dev.pool.data_room >= 20000


def test_buffers_grow_under_a_worker(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine) as dev:
        told = Recorder(dev, EthEvent.MTU)
        worker = Worker()
        worker.forward((dev, 0), (dev, 0))
        with worker, PacketSocket(netns, "t0") as kernel:
            for mtu in (3000, 9000, 30000):
                iproute(netns, f"link set t0 mtu {mtu}")
                told.expect((EthEvent.MTU, mtu))
                kernel.send(frame(mtu, mtu + 14))
                assert kernel.frames(1) == [frame(mtu, mtu + 14)]


def test_chains_grow_with_an_mtu_that_others_raise(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, rx_offloads=RxOffload.SCATTER) as dev:
        told = Recorder(dev, EthEvent.MTU)
        iproute(netns, "link set t0 mtu 9000")
        told.expect((EthEvent.MTU, 9000))
        with PacketSocket(netns, "t0") as kernel:
            kernel.send(frame(1, 9014))
            (mbuf,) = dev.rx_burst(0, timeout=5)
            assert (bytes(mbuf), mbuf.nb_segs) == (frame(1, 9014), 5)


def test_a_pool_of_the_callers_own_is_warned_about(
    netns: NetNS, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    with rtap.open("t0", netns=netns, engine=engine, data_room=2048) as dev:
        told = Recorder(dev, EthEvent.MTU)
        iproute(netns, "link set t0 mtu 9000")
        told.expect((EthEvent.MTU, 9000))
        assert "MTU of t0 is now 9000" in caplog.text
        with PacketSocket(netns, "t0") as kernel:
            kernel.send(frame(1, 9014))
            kernel.send(frame(2))
            # Never a frame that was cut.
            assert [bytes(m) for m in dev.rx_burst(0, timeout=5)] == [frame(2)]
        assert dev.stats().ierrors == 1


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


def test_wrong_arguments(dev: EthDev) -> None:
    with pytest.raises(ValueError, match="99"):
        dev.callback_register(99, print)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fn\\(dev, event, data\\)"):
        dev.callback_register(EthEvent.MTU, 5)  # type: ignore[arg-type]


def test_callbacks_keep_no_device_alive(netns: NetNS) -> None:
    dev = rtap.open("t0", netns=netns)
    handle: EventHandle = dev.callback_register(EthEvent.MTU, lambda *_: None)
    Recorder(dev)  # which refers to it
    dev.mtu = 1400
    dev.close()
    gone = weakref.ref(dev)
    del dev
    eventually(lambda: gc.collect() >= 0 and gone() is None, "it is collected")
    handle.unregister()


def test_threads_and_descriptors_end_with_the_last_device(netns: NetNS, netns2: NetNS) -> None:
    before, threads = open_fds(), threading.active_count()
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
    """More changes than the socket holds while nobody listens: what is so now is seen."""
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
    """What the sockets of the namespace that listen for links have lost."""
    lines = ns.call(lambda: Path("/proc/thread-self/net/netlink").read_text().splitlines())
    head, *sockets = (line.split() for line in lines)
    rows = [dict(zip(head, fields, strict=True)) for fields in sockets]
    return sum(int(row["Drops"]) for row in rows if row["Groups"] == "00000001")


def flood(ns: NetNS, n: int) -> None:
    """`n` changes of lo, each of which is announced: its alias, set by raw requests."""

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
