# SPDX-License-Identifier: BSD-3-Clause
"""Shares and attached devices that are forgotten, forked, interrupted, or left to the exit."""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import in_child
from patience import patient
from sharing import MakeProcess, no_leases, sockets_left, to_and_fro
from support import (
    PacketSocket,
    Tap,
    Task,
    eventually,
    frame,
    links,
    none_left,
    open_fds,
    python,
    running_threads,
    threads_end,
)

import rtap
from rtap import EthDev, Mempool, NetNS
from rtap._core import memfd
from rtap._ring import STATE_SIZE, RxQueue, TxQueue

pytestmark = [pytest.mark.root, pytest.mark.lifetime]


@pytest.fixture
def dev(netns: NetNS, runtime_dir: Path) -> Iterator[EthDev]:
    with rtap.open("tap0", netns=netns, queues=2) as device:
        yield device


# ---- fork


def test_child_of_the_first_process(dev: EthDev, netns: NetNS, process: MakeProcess) -> None:
    """It cannot use the share, and its exit does not end the parent's connections."""
    with rtap.share(dev) as share:
        other = process().attach(dev.name, [0])

        def child() -> None:
            for use in (lambda: dev.rx_burst(0), dev.stats, lambda: rtap.share(dev)):
                with pytest.raises(RuntimeError, match="fork"):
                    use()
            share.close()
            dev.close()

        in_child(child)
        assert sorted(share.leases) == [0]
        with PacketSocket(netns, "tap0") as packets:
            to_and_fro(packets, other, 0)
        assert sockets_left() == [dev.name]
        assert process().attach(dev.name, [1])("dev.mtu") == 1500


def test_child_of_the_second_process(dev: EthDev, netns: NetNS) -> None:
    with rtap.share(dev) as share, rtap.attach(dev.name, [0]) as mine:

        def child() -> None:
            for use in (
                lambda: mine.rx_burst(0),
                lambda: mine.rx_burst(1),
                lambda: mine.send(frame(1)),
                mine.stats,
                lambda: mine.mtu,
                lambda: setattr(mine, "mtu", 1400),
            ):
                with pytest.raises(RuntimeError, match="fork"):
                    use()
            mine.close()
            left = open_fds().values()
            assert not any("tun" in name or "rtap-queue" in name for name in left), left

        in_child(child)
        assert sorted(share.leases) == [0]
        with PacketSocket(netns, "tap0") as packets:
            assert mine.send(frame(1))
            assert packets.frames(1) == [frame(1)]
        assert mine.stats().opackets == dev.stats().opackets == 1
        assert mine.mtu == 1500


def test_child_does_not_keep_the_interface(dev: EthDev, netns: NetNS) -> None:
    """While it lives, the parent closes everything."""
    share = rtap.share(dev)
    mine = rtap.attach(dev.name, [0])
    r, w = os.pipe()
    there, here = os.pipe()

    def child() -> None:
        mine.close()
        dev.close()
        os.close(w)
        os.write(here, b"x")
        os.read(r, 1)

    thread = threading.Thread(target=in_child, args=(child,))
    thread.start()
    try:
        assert os.read(there, 1)
        mine.close()
        share.close()
        dev.close()
        eventually(lambda: links(netns) == ["lo"], "the interface is gone")
        assert sockets_left() == []
    finally:
        os.close(w)
        thread.join()
        for fd in (r, there, here):
            os.close(fd)


def test_many_threads_attach_and_close(netns: NetNS, runtime_dir: Path) -> None:
    """Each its own pair of one device; another thread reads the leases and the figures."""
    with rtap.open("tap1", netns=netns, queues=4) as dev, rtap.share(dev) as share:
        done = threading.Event()

        def borrow(queue: int) -> None:
            for i in range(10):
                with rtap.attach(dev.name, [queue]) as mine:
                    assert mine.queues == (queue,)
                    assert mine.send(frame(i), queue=queue)
                    assert mine.mtu == 1500
                eventually(lambda: queue not in share.leases, "the pair is free")

        def look() -> None:
            while not done.is_set():
                assert share.leases.keys() <= {0, 1, 2, 3}
                dev.stats()
                time.sleep(0.001)

        watcher = Task(look)
        for task in [Task(borrow, queue) for queue in range(4)]:
            task.result(patient(60))
        done.set()
        watcher.result()
        assert dev.stats().opackets == 40


def test_a_forked_child_does_not_keep_the_name(dev: EthDev) -> None:
    """Not even in its first moment, when it still has the socket."""
    share = rtap.share(dev)
    listening = os.dup(share._server._sock.fileno())  # as such a child has it
    share.close()
    os.close(listening)
    assert sockets_left() == []


def test_counts_of_a_child_are_its_own(dev: EthDev) -> None:
    """The page with the counters is not written by a forked child."""
    with rtap.share(dev), rtap.attach(dev.name, [0]) as mine:
        assert mine.send(frame(1))

        def child() -> None:
            mine.tx_queue  # noqa: B018
            mine.close()

        in_child(child)
        assert dev.stats().opackets == 1
        assert mine.send(frame(1))
        assert dev.stats().opackets == 2


# ---- forgotten


def forget(held: list[Any]) -> None:
    held.clear()
    gc.collect()


def test_forgotten_attached_device(dev: EthDev) -> None:
    with rtap.share(dev) as share:
        rtap.attach(dev.name, [1]).close()
        no_leases(share)
        threads, before = running_threads(), open_fds()
        gone: list[weakref.ref[EthDev]] = []
        for _ in range(3):
            held = [rtap.attach(dev.name, [1])]
            held[0].send(frame(1), queue=1)
            gone.append(weakref.ref(held[0]))
            with pytest.warns(ResourceWarning, match="unclosed device <rtap"):
                forget(held)
            eventually(lambda: gone[-1]() is None, "it is collected")
            no_leases(share)
            threads_end(threads)
            none_left(before)


def test_forgotten_share_goes_on(dev: EthDev, process: MakeProcess) -> None:
    """As a device that is open: it ends with that."""
    threads = running_threads()
    rtap.share(dev)
    gc.collect()
    other = process().attach(dev.name, [1])
    assert other("dev.send(data, queue=1)", data=frame(1))
    dev.close()
    with pytest.raises(rtap.DeviceGone):
        other("dev.rx_burst(1, 8, wait)", wait=patient(5))
    threads_end(threads)
    assert sockets_left() == []


def test_forgotten_device_ends_its_share(
    netns: NetNS, runtime_dir: Path, process: MakeProcess
) -> None:
    threads, before = running_threads(), open_fds()
    held = [rtap.open("tap0", netns=netns)]
    share = rtap.share(held[0])
    other = process().attach(held[0].name, [0])
    with pytest.warns(ResourceWarning, match="unclosed device <rtap"):
        forget(held)
    eventually(lambda: sockets_left() == [], "the share has ended")
    with pytest.raises(rtap.DeviceGone):
        other("dev.rx_burst(0, 8, wait)", wait=patient(5))
    eventually(lambda: links(netns) == ["lo"], "the interface is gone")
    share.close()
    share.close()
    assert share.leases == {}
    other.kill()
    threads_end(threads)
    none_left(before, but=1)


def test_many_lives(dev: EthDev) -> None:
    with rtap.share(dev):
        rtap.attach(dev.name, [0, 1]).close()
    threads, before = running_threads(), open_fds()
    for _ in range(20):
        with rtap.share(dev) as share:
            with rtap.attach(dev.name, [0, 1]) as mine:
                mine.send(frame(1), queue=1)
            no_leases(share)
    threads_end(threads)
    none_left(before)
    dev.rx_burst(0)
    dev.tx_burst(1, dev.pool.alloc_burst(1, frame(1)))


# ---- exit and signals


@pytest.mark.parametrize("how", ["", "sys.exit(0)", "raise KeyboardInterrupt", "os._exit(0)"])
def test_exit_with_both(netns: NetNS, runtime_dir: Path, how: str) -> None:
    done = python(
        f"""
        import os, sys, threading
        import rtap
        dev = rtap.open("tap0", netns=sys.argv[1], queues=2)
        share = rtap.share(dev, [1])
        mine = rtap.attach(dev.name, [1])
        threading.Thread(target=lambda: mine.rx_burst(1, 8, None), daemon=True).start()
        print("ready", flush=True)
        {how}
        """,
        f"/proc/{os.getpid()}/fd/{netns.fd}",
        warnings="ignore",
    )
    assert done.stdout == "ready\n"
    assert "Fatal" not in done.stderr
    assert "Segmentation" not in done.stderr
    assert done.returncode in (0, 1, 130, -2), done.stderr
    eventually(lambda: links(netns) == ["lo"], "the interface is gone")


@pytest.mark.parametrize(
    "call", ["rtap.attach(name).rx_burst(0)", "dev.rx_burst(1)", "dev.mtu", "rtap.attach(name)"]
)
def test_ctrl_c_in_a_request(dev: EthDev, process: MakeProcess, call: str) -> None:
    """While the first process does not answer."""
    with rtap.share(dev):
        other = process().attach(dev.name)
        with dev._lock:  # requests wait
            other(
                "import signal, threading\n"
                "def interrupted(call):\n"
                "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
                "    try:\n"
                "        eval(call, globals())\n"
                "    except KeyboardInterrupt:\n"
                "        return 'interrupted'\n"
            )
            other("signal.signal(signal.SIGINT, signal.default_int_handler)")
            other("globals().update(name=name)", name=dev.name)
            assert other("interrupted(call)", call=call) == "interrupted"
        # It can be used afterwards.
        assert other("dev.mtu") == 1500
        other("dev.rx_burst(0)")


# ---- multiprocessing


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_arguments_of_processes(netns: NetNS, runtime_dir: Path, method: str) -> None:
    code = f"""
    import multiprocessing, sys
    import rtap
    from spawned_work import work

    if __name__ == "__main__":
        context = multiprocessing.get_context({method!r})
        with rtap.open("tap1", netns=sys.argv[1], queues=2) as dev:
            results = context.Queue()
            children = [
                context.Process(target=work, args=(dev, number, results)) for number in range(2)
            ]
            for child in children:
                child.start()
            print(sorted(results.get(timeout=60) for _ in children))
            for child in children:
                child.join()
            print([child.exitcode for child in children], dev.stats().opackets)
            import pickle, copy
            from multiprocessing.reduction import ForkingPickler  # of Queue.put, in a thread
            for use in (ForkingPickler.dumps, pickle.dumps, copy.copy, copy.deepcopy):
                try:
                    use(dev)
                except TypeError as exc:
                    print("refused", str(exc)[-90:])
            results.close()
            results.cancel_join_thread()
    """
    done = python(code, f"/proc/{os.getpid()}/fd/{netns.fd}", timeout=90)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["[(0, True), (1, True)]", "[0, 0] 2"], done.stdout + done.stderr
    assert sum("refused" in line for line in lines) == 4, done.stdout


def test_fork_context_is_refused(dev: EthDev) -> None:
    context = multiprocessing.get_context("fork")
    r, w = context.Pipe()

    def work() -> None:
        try:
            dev.rx_burst(0)
        except RuntimeError as exc:
            w.send(str(exc))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=work)
        child.start()
    assert r.poll(patient(20))
    assert "fork" in r.recv()
    child.join()
    r.close()
    w.close()
    dev.rx_burst(0)


# ---- queues on memory that others see


def test_state_in_a_memfd(tap: Tap) -> None:
    pool = Mempool(64)
    before = open_fds()
    states = [memfd.make("rx", STATE_SIZE), memfd.make("tx", STATE_SIZE)]
    lenders = [tap.rx(pool, start=False), tap.tx(start=False)]
    for lender, state in zip(lenders, states, strict=True):
        lender.lend(state, STATE_SIZE)
    rx = RxQueue(tap.fd, pool, name="tap0", state_fd=states[0])
    tx = TxQueue(tap.fd, name="tap0", state_fd=states[1])
    for state in states:
        os.close(state)  # the mappings stay
    rx.start()
    tx.start()
    packets = tap.packets()
    for n in range(5):
        assert tx.send(frame(n), pool)
        packets.send(frame(n))
        assert len(rx.rx_burst(8, patient(5))) == 1
    assert packets.frames(5) == [frame(n) for n in range(5)]
    assert [lender.counters()["packets"] for lender in lenders] == [5, 5]
    rx.close()
    tx.close()
    assert [lender.counters()["packets"] for lender in lenders] == [5, 5]
    for lender in lenders:
        lender.take_back()
        lender.take_back()
        assert lender.counters()["packets"] == 5
        assert lender.xcounters()["size_64_packets"] == 5
    del rx, tx
    gc.collect()
    packets.close()
    none_left(before, but=1)


def test_bad_memory_is_refused(tap: Tap, tmp_path: Path) -> None:
    pool = Mempool(64)
    lender = tap.rx(pool, start=False)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 1 << 16)
    small = memfd.make("small", 64)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 1 << 16)
    null = os.open("/dev/null", os.O_RDWR)
    try:
        for fd in (unsealed, small, file, null, tap.fd, 1 << 20, -5):
            with pytest.raises((OSError, ValueError)):
                lender.lend(fd, STATE_SIZE)
            if fd >= 0:
                with pytest.raises((OSError, ValueError), match="state_fd"):
                    RxQueue(tap.fd, pool, name="tap0", state_fd=fd)
                with pytest.raises((OSError, ValueError), match="state_fd"):
                    TxQueue(tap.fd, name="tap0", state_fd=fd)
        assert lender.counters()["packets"] == 0
        lender.start()
        lender.rx_burst()
    finally:
        for fd in (unsealed, small, file, null):
            os.close(fd)


def test_borrower_writes_any_numbers(tap: Tap) -> None:
    """The lender reads them as numbers, and as nothing else."""
    lender = tap.rx(Mempool(64), start=False)
    state = memfd.make("rx", STATE_SIZE)
    lender.lend(state, STATE_SIZE)
    with mmap.mmap(state, STATE_SIZE) as page:
        for byte in (b"\xff", b"\x00", b"\x80", b"\x01"):
            page[:] = byte * STATE_SIZE
            assert all(type(n) is int for n in lender.counters().values())
            assert all(type(n) is int for n in lender.xcounters().values())
    os.close(state)
    lender.take_back()
    lender.start()
    lender.rx_burst()
    lender.stop()


def test_cut_off(tap: Tap, engine: str) -> None:
    pool = Mempool(64)
    rx, tx = tap.rx(pool, engine=engine), tap.tx(engine=engine)
    rx.rx_burst()
    result: list[BaseException] = []

    def wait() -> None:
        try:
            rx.rx_burst(8, None)
        except BaseException as exc:  # noqa: BLE001 - looked at below
            result.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    rx.cut_off()
    tx.cut_off()
    thread.join(patient(10))
    assert isinstance(result[0], rtap.DeviceGone)
    for use in (rx.rx_burst, lambda: tx.send(frame(1), pool)):
        with pytest.raises(rtap.DeviceGone):
            use()
    rx.cut_off()
    rx.close()
    tx.close()
    assert pool.in_use == 0
