# SPDX-License-Identifier: BSD-3-Clause
"""What a stop waits for, what ends the wait, and what the end of the process does not wait for.

Code that could hang runs in a child process with a time limit.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
from stuck import child
from support import PacketSocket, Task, eventually, frame, links

import rtap
from rtap import DeviceStateError, Mempool, NetNS, Worker


@pytest.mark.parametrize("call", ["stop", "join"])
def test_ctrl_c_while_a_worker_is_waited_for(call: str) -> None:
    child(
        """
        dev = null(0)
        worker, go = stuck(dev)
        interrupted(getattr(worker, sys.argv[1]))
        assert worker.running
        assert not worker.join(0)
        go.set()
        worker.stop()
        assert not worker.running
        worker.start()
        worker.stop()
        dev.close()
        assert pool.in_use == 0
        """,
        call,
    )


@pytest.mark.parametrize("what", ["device", "queue"])
def test_stop_waits_for_the_burst_in_progress(what: str) -> None:
    order: list[str] = []
    inside, go = threading.Event(), threading.Event()

    def stage(burst: Any) -> None:
        inside.set()
        go.wait(10)
        order.append("left")

    with Mempool(256) as pool, rtap.probe("net_null0") as dev:
        dev.configure(1, 1)
        dev.rx_queue_setup(0, 64, pool)
        dev.tx_queue_setup(0, 64)
        dev.start()
        queue: Any = dev.rx_queue(0)

        def stop() -> None:
            (dev if what == "device" else queue).stop()
            order.append("stopped")

        worker = Worker()
        worker.forward((dev, 0), (dev, 0), stages=[stage])
        worker.start()
        try:
            assert inside.wait(5)
            stopper = Task(stop)
            stopper.join(0.1)
            go.set()
            stopper.result(5)
        finally:
            go.set()
            worker.stop()
    assert order == ["left", "stopped"]


@pytest.mark.parametrize("way", ["stop", "close", "rx_queue_stop", "queue"])
def test_ctrl_c_while_it_waits(way: str) -> None:
    """The interrupted object refuses bursts, and the next call does the rest."""
    child(
        """
        way = sys.argv[1]
        dev = null(0)
        queue = dev.rx_queue(0)
        call = {"stop": dev.stop, "close": dev.close, "queue": queue.stop,
                "rx_queue_stop": lambda: dev.rx_queue_stop(0)}[way]
        worker, go = stuck(dev)
        interrupted(call)
        assert dev.state == ("stopped" if way in ("stop", "close") else "started")
        go.set()
        call()
        worker.join(5)
        if way == "close":
            assert dev.state == "closed"
            dev = null(0)
        elif way == "stop":
            dev.start()
        elif way == "rx_queue_stop":
            dev.rx_queue_start(0)
        else:
            queue.start()
        assert len(dev.rx_burst(0, 4)) == 4
        worker.stop()
        dev.close()
        assert pool.in_use == 0
        """,
        way,
    )


def test_an_interrupted_stop_is_finished_by_whatever_comes_next() -> None:
    child(
        """
        def reset(dev):
            dev.configure(1, 1)
            dev.rx_queue_setup(0, 64, pool)
            dev.tx_queue_setup(0, 64)
            dev.start()

        for n, (queue_only, call) in enumerate((
            (False, lambda dev: dev.start()),
            (False, reset),
            (False, lambda dev: (dev.rx_queue_setup(0, 64, pool), dev.start())),
            (True, lambda dev: dev.rx_queue_start(0)),
            (True, lambda dev: (dev.rx_queue_setup(0, 64, pool), dev.rx_queue_start(0))),
        )):
            dev = null(n)
            worker, go = stuck(dev)
            interrupted(lambda: dev.rx_queue_stop(0) if queue_only else dev.stop())
            go.set()
            call(dev)
            assert len(dev.rx_burst(0, 4)) == 4
            worker.stop()
            dev.close()
        """
    )


def test_a_handler_closes_while_it_stops() -> None:
    """A handler in the waiting thread closes the device, and the stop below it finds it closed."""
    child(
        """
        dev = null(0)
        worker, go = stuck(dev)
        refused = []

        def handler(*_):
            try:
                dev.start()
            except rtap.DeviceStateError as exc:
                refused.append(str(exc))
            go.set()
            dev.close()

        on_alarm(handler)
        dev.stop()
        assert dev.state == "closed"
        assert "in the middle of stopping" in refused[0]
        worker.stop()
        """
    )


@pytest.mark.root
def test_a_handler_in_a_burst_closes_what_another_thread_closes(netns: NetNS) -> None:
    child(
        """
        dev = rtap.open("t0", netns=sys.argv[1])
        in_handler, closing = threading.Event(), threading.Event()

        def handler(*_):
            in_handler.set()
            assert closing.wait(5)
            dev.close()

        def close():
            assert in_handler.wait(5)
            threading.Timer(0.05, closing.set).start()
            dev.close()  # does not wait for a handler

        other = Task(close)
        on_alarm(handler)
        try:
            dev.rx_burst(0, 8, None)
        except rtap.DeviceStateError:
            pass
        other.result(5)
        assert dev.state == "closed"
        """,
        netns.path,
    )
    assert links(netns) == ["lo"]


# ---- the end of the process


@pytest.mark.parametrize(
    "stage",
    ["time.sleep(60)", "threading.Event().wait()", "while True: pass"],
    ids=["sleeps", "waits", "spins"],
)
@pytest.mark.parametrize(
    "ending", ["pass", "import builtins; builtins.kept = (dev, worker)", "del dev, worker"]
)
def test_exit_waits_for_no_stage(stage: str, ending: str) -> None:
    done = child(
        f"""
        inside = threading.Event()

        def stage(burst):
            inside.set()
            {stage}

        dev = null(0)
        worker = working(dev, dev, stage)
        assert inside.wait(5)
        {ending}
        print(time.monotonic())
        """
    )
    assert time.monotonic() - float(done.stdout) < 3


@pytest.mark.root
@pytest.mark.parametrize("lock", ["channel._channels.lock", "held._lock", "dev._lock"])
def test_exit_waits_for_no_lock_of_a_thread(lock: str) -> None:
    """A daemon thread keeps its locks when the interpreter ends."""
    done = child(
        f"""
        from rtap.control import channel

        dev = rtap.open("t0", netns=rtap.NetNS())
        held = next(iter(channel._channels.by_netns.values()))
        inside = threading.Event()

        # A thread that stays keeps its globals alive: not those of here, which have dev.
        names = {{"lock": {lock}, "inside": inside, "sleep": time.sleep}}
        exec("def keep():\\n with lock:\\n  inside.set()\\n  sleep(60)", names)
        threading.Thread(target=names.pop("keep"), daemon=True).start()
        assert inside.wait(5)
        del held
        print(time.monotonic())
        """
    )
    assert time.monotonic() - float(done.stdout) < 3


# ---- waiting for a buffer


@pytest.mark.root
def test_a_burst_waits_for_a_buffer(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, nb_mbufs=32) as dev:
        kept = [dev.pool.alloc() for _ in range(dev.pool.available)]
        with PacketSocket(netns, "t0") as peer:
            peer.send(frame(1))
        start = time.monotonic()
        assert len(dev.rx_burst(0, 8, 0.2)) == 0
        assert 0.2 <= time.monotonic() - start < 2
        assert len(dev.rx_burst(0, 8)) == 0
        with pytest.raises(rtap.PoolEmpty):
            dev.recv()
        before = dev.stats().rx_nombuf
        ticks = os.times().user + os.times().system
        waiter = Task(dev.rx_burst, 0, 8, None)
        waiter.join(0.4)
        assert waiter.is_alive()
        assert os.times().user + os.times().system - ticks < 0.2
        assert dev.stats().rx_nombuf - before <= 2
        kept.clear()
        assert [bytes(m) for m in waiter.result(5)] == [frame(1)]


@pytest.mark.root
def test_a_stop_ends_the_wait_for_a_buffer(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, nb_mbufs=32) as dev:
        kept = [dev.pool.alloc() for _ in range(dev.pool.available)]
        with PacketSocket(netns, "t0") as peer:
            peer.send(frame(1))
        waiter = Task(dev.rx_burst, 0, 8, None)
        eventually(lambda: dev.stats().rx_nombuf > 0, "it waits")
        dev.stop()
        with pytest.raises(DeviceStateError, match="stopped while waiting"):
            waiter.result(5)
        assert len(kept) == 32
