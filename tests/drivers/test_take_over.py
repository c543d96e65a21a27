# SPDX-License-Identifier: BSD-3-Clause
"""Ownership of an interface: concurrent openers, re-creation, and what others left on it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import importlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from rigs import iproute
from support import (
    PacketSocket,
    child_environment,
    eventually,
    frame,
    link,
    links,
    none_left,
    open_fds,
)

import rtap
from rtap import EthDev, NetNS, RxOffload
from rtap.control import attach, tun
from rtap.control.netlink import Control
from rtap.drivers import observed

pytestmark = pytest.mark.root

opening_module = importlib.import_module("rtap.drivers.open_tap")

MAC = "02:00:00:00:00:77"


def refused(ns: NetNS, name: str) -> bool:
    """Whether opening the interface fails because it is in use."""
    try:
        rtap.open(name, netns=ns).close()
    except OSError as exc:
        return exc.errno == errno.EBUSY
    return False


# ---- concurrent openers


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes openers not wait for an interface in use."""
    monkeypatch.setattr(attach, "DYING_S", 0.02)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", ["multi_queue", ""])
def test_another_opener_between_the_look_and_the_attach(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    iproute(netns, f"tuntap add mode tap p0 {kind}")
    take_over = attach._take_over
    others: list[bool] = []

    def slow(*args: Any) -> Any:
        if not others:
            others.append(refused(netns, "p0"))
        return take_over(*args)

    monkeypatch.setattr(attach, "_take_over", slow)
    with rtap.open("p0", netns=netns) as dev:
        assert others == [True]
        assert refused(netns, "p0")
        assert dev.send(frame())
    assert not refused(netns, "p0")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("persist", [False, True])
def test_another_opener_while_headers_are_negotiated(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, persist: bool
) -> None:
    """At that moment the interface is persistent and has no queue."""
    others: list[bool] = []
    with rtap.open("t0", netns=netns, persist=persist) as dev:
        open_file = tun.open_file

        def slow(*args: Any, **how: Any) -> Any:
            others.append(refused(netns, "t0"))
            return open_file(*args, **how)

        dev.stop()
        with monkeypatch.context() as patch:
            patch.setattr(tun, "open_file", slow)
            dev.configure(1, 1, rtap.EthConf(rx_offloads=RxOffload.CHECKSUM))
        assert others == [True]
        assert dev.info().vnet_hdr


def test_threads_open_one_interface(netns: NetNS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "DYING_S", 0.1)
    iproute(netns, "tuntap add mode tap p0 multi_queue")
    for _ in range(8):
        barrier = threading.Barrier(4)
        won: list[EthDev] = []
        lost: list[int | None] = []

        def work(barrier: threading.Barrier, won: list[EthDev], lost: list[int | None]) -> None:
            barrier.wait()
            try:
                won.append(rtap.open("p0", netns=netns))
            except OSError as exc:
                lost.append(exc.errno)

        threads = [threading.Thread(target=work, args=(barrier, won, lost)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for dev in won:
            assert link(netns, "p0")["linkinfo"]["info_data"]["numqueues"] == 1
            dev.close()
        assert (len(won), lost) == (1, [errno.EBUSY] * 3)


def test_a_claim_ends_with_its_process(netns: NetNS) -> None:
    iproute(netns, "tuntap add mode tap p0 multi_queue")
    index = link(netns, "p0")["ifindex"]
    code = f"""
import time
from rtap import NetNS
from rtap.control.attach import claimed
with NetNS.from_name({netns.path!r}) as ns, claimed(ns.fd, {index}):
    print("claimed", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=child_environment()
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "claimed\n"
            assert refused(netns, "p0")
        finally:
            process.send_signal(signal.SIGKILL)
        process.wait()
    assert not refused(netns, "p0")


# ---- re-creation


def adopted(ns: NetNS, **options: Any) -> EthDev:
    fd, _ = ns.call(tun.open_queue, "s0", multi_queue=False)
    try:
        return rtap.open(fd=fd, **options)
    finally:
        os.close(fd)


def taken_over(ns: NetNS, **options: Any) -> EthDev:
    iproute(ns, "tuntap add mode tap s0 user 4321 group 4322")
    return rtap.open("s0", netns=ns, **options)


def persistent(ns: NetNS, **options: Any) -> EthDev:
    return rtap.open("s0", netns=ns, queues=2, persist=True, owner=4321, sndbuf=1 << 20, **options)


def state(ns: NetNS, dev: EthDev) -> tuple[object, ...]:
    info, shown = dev.info(), link(ns, "s0")
    data = shown["linkinfo"]["info_data"]
    about = [data.get(k) for k in ("type", "multi_queue", "numqueues", "vnet_hdr", "persist")]
    who = [data.get(k) for k in ("user", "group")]
    return info.mtu, info.mac, info.persist, info.rx_offloads, shown["txqlen"], about, who


@pytest.mark.parametrize("make", [adopted, taken_over, persistent])
@pytest.mark.parametrize("fails", ["", "set_mtu", "set_mac", "set_txqueuelen", "get"])
def test_made_anew_as_it_was(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, make: Callable[..., EthDev], fails: str
) -> None:
    """It has the same kind and settings, even if the first attempt failed halfway."""
    with make(netns, mtu=1400, mac=MAC, rx_offloads=RxOffload.CHECKSUM) as dev:
        iproute(netns, "link set s0 txqueuelen 77")
        eventually(lambda: dev._ops._observer.seen.txqueuelen == 77, "it has been seen")  # type: ignore[attr-defined]
        dev.stop()
        before = state(netns, dev)
        iproute(netns, "link del s0")
        if fails:

            def fail(*args: object) -> None:
                raise OSError(errno.ENOMEM, "injected")

            with monkeypatch.context() as patch:
                patch.setattr(Control, fails, fail)
                with pytest.raises(OSError, match="injected"):
                    dev.start()
            assert dev.state == "stopped"
        dev.start()
        assert state(netns, dev) == before
        with PacketSocket(netns, "s0") as kernel:
            assert dev.send(frame(1))
            assert kernel.recv(2000) == frame(1)
    if "s0" in links(netns):
        iproute(netns, "link del s0")


def test_made_anew_by_somebody_else(netns: NetNS) -> None:
    """If it has the same kind, it is used and stays persistent; otherwise it is left alone."""
    with rtap.open("s0", netns=netns) as dev:
        iproute(netns, "link del s0")
        dev.stop()
        iproute(netns, "tuntap add mode tap s0")
        with pytest.raises(FileExistsError, match="of another kind"):
            dev.start()
        iproute(netns, "link del s0")
        iproute(netns, "tuntap add mode tap s0 multi_queue user 4321")
        dev.start()
        assert dev.info().persist
        assert dev.send(frame())
    data = link(netns, "s0")["linkinfo"]["info_data"]
    assert (data["persist"], data["user"]) == (True, 4321)


def test_a_stopped_queue_of_one_made_anew(netns: NetNS, engine: str) -> None:
    """It is attached like all queues, and starts and stops as before."""
    with rtap.open("s0", netns=netns, engine=engine, queues=2) as dev:
        for _ in range(2):
            dev.rx_queue_stop(1)
            iproute(netns, "link del s0")
            dev.stop()
            dev.start()
            assert link(netns, "s0")["linkinfo"]["info_data"]["numqueues"] == 2
        dev.rx_queue_stop(1)
        assert link(netns, "s0")["linkinfo"]["info_data"]["numqueues"] == 1
        with PacketSocket(netns, "s0") as kernel:
            kernel.send(frame(1))
            assert dev.recv(5) == frame(1)


# ---- shared with others


@pytest.mark.parametrize("then", ["stop", "close"])
def test_others_go_on_when_one_of_them_stops(netns: NetNS, engine: str, then: str) -> None:
    """When one of two devices on an interface stops, the other keeps its frames and carrier."""
    lent = [netns.call(tun.open_queue, "t0")[0] for _ in range(2)]
    one, two = (rtap.open(fd=fd, engine=engine) for fd in lent)
    for fd in lent:
        os.close(fd)
    with one, two, PacketSocket(netns, "t0") as kernel:
        for _ in range(2):
            getattr(one, then)()
            assert two.link().link_status
            assert two.send(frame(1))
            assert kernel.recv(2000) == frame(1)
            for n in range(32):  # whatever flows there are
                kernel.send(frame(n, src=bytes([2, 0, 0, 0, 1, n])))
                assert two.recv(5) == frame(n, src=bytes([2, 0, 0, 0, 1, n]))
            if then == "close":
                break
            one.start()
            assert one.send(frame(2))
            assert kernel.recv(2000) == frame(2)
        two.stop()
        assert two.link().link_status is (then == "stop")
    assert links(netns) == ["lo"]


def test_a_name_that_is_not_utf8(netns: NetNS) -> None:
    """Others rename the interface: the event comes, and the device still passes all states."""
    names: list[str] = []
    with rtap.open("t0", netns=netns) as dev:
        handle = dev.callback_register(
            rtap.EthEvent.RENAME, lambda _dev, _event, to: names.append(to)
        )
        iproute(netns, "link set t0 down")
        with netns.call(socket.socket) as control:
            fcntl.ioctl(control, 0x8923, struct.pack("16s16s8x", b"t0", b"\xff\xfe"))  # SIOCSIFNAME
        eventually(lambda: bool(names), "the event")
        name = os.fsdecode(b"\xff\xfe")
        assert (names, dev.ifname, dev.info().ifname) == ([name], name, name)
        repr(dev)
        dev.stop()
        dev.mtu = 1400
        for conf in (rtap.EthConf(rx_offloads=RxOffload.CHECKSUM), rtap.EthConf()):
            dev.configure(2, 2, conf)
            pool = rtap.Mempool(64)
            for q in range(2):
                dev.rx_queue_setup(q, 8, pool)
                dev.tx_queue_setup(q, 8)
            dev.start()
            assert dev.send(frame())
            assert len(dev.rx_burst(0)) == 0
            dev.stop()
        dev._ops._control.delete()  # type: ignore[attr-defined]
        dev.start()  # creates it again with that name
        assert dev.ifname == name
        handle.unregister()
    assert links(netns) == ["lo"]


# ---- what an earlier owner left


def test_filters_of_an_earlier_owner_are_taken_off(netns: NetNS, engine: str) -> None:
    fd, _ = netns.call(tun.open_queue, "p0")
    tun.set_persist(fd, True)
    # One address that no one uses; the program "return 0" passes no packet.
    wanted = struct.pack("HH6s", 0, 1, b"\x02\x00\x00\x00\x00\x55")
    fcntl.ioctl(fd, tun.TUNSETTXFILTER, wanted)
    program = bytearray(struct.pack("HBBI", 6, 0, 0, 0))
    code = (ctypes.c_char * len(program)).from_buffer(program)
    number = tun._ioc(tun._WRITE, 213, struct.calcsize("HP"))  # TUNATTACHFILTER
    fcntl.ioctl(fd, number, struct.pack("HP", 1, ctypes.addressof(code)))
    os.close(fd)
    with rtap.open("p0", netns=netns, engine=engine) as dev, PacketSocket(netns, "p0") as kernel:
        dev.rx_queue_stop(0)
        dev.rx_queue_start(0)  # attaching again applies the filter that is left
        kernel.send(frame(3))
        assert dev.recv(5) == frame(3)
        assert dev.stats().imissed == 0


# ---- Ctrl-C


@pytest.mark.parametrize("name", ["open_control", "join", "set_sndbuf", "set_offload"])
def test_interrupted_when_it_has_been_done(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A step's result is lost: nothing stays behind, and no other descriptor is closed."""
    rtap.open("t0", netns=netns).close()
    before = open_fds()
    function = getattr(tun, name)

    def interrupted(*args: Any, **how: Any) -> Any:
        function(*args, **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tun, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            rtap.open("t0", netns=netns, sndbuf=1 << 20)
    assert links(netns) == ["lo"]
    assert rtap.devices() == []
    none_left(before)


@pytest.mark.parametrize("where", [(observed, "watch"), (opening_module, "NetRtap")])
def test_interrupted_when_the_device_is_watched(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]
) -> None:
    """The thread that watches for changes does not keep a device that was never returned."""
    owner, name = where
    function = getattr(owner, name)

    def interrupted(*args: Any, **how: Any) -> Any:
        function(*args, **how)
        raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                rtap.open("t0", netns=netns)
        gc.collect()
    eventually(lambda: links(netns) == ["lo"], "the interface is gone")
    assert rtap.devices() == []
