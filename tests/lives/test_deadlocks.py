# SPDX-License-Identifier: BSD-3-Clause
"""Whoever stops a queue waits for nobody who waits for it: stages, finalizers, signals, exit.

What could hang runs in a child process that is given seconds.
"""

from __future__ import annotations

import os
import subprocess
import textwrap
import threading
import time
from typing import Any

import pytest
from rigs import iproute
from support import PacketSocket, Task, eventually, frame, links, python

import rtap
from rtap import DeviceStateError, EthDev, EthEvent, Mempool, NetNS, Worker

PREPARE = """
    import gc, os, signal, sys, threading, time
    import rtap
    from support import Task, eventually

    pool = rtap.Mempool(2048)

    def null(number):
        dev = rtap.probe(f"net_null{number}")
        dev.configure(1, 1)
        dev.rx_queue_setup(0, 64, pool)
        dev.tx_queue_setup(0, 64)
        dev.start()
        return dev

    def working(source, target, stage):
        worker = rtap.Worker()
        worker.forward((source, 0), (target, 0), stages=[stage])
        worker.start()
        return worker
"""


def child(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs code after PREPARE; fails when it hangs, fails or says something."""
    whole = textwrap.dedent(PREPARE) + textwrap.dedent(code)
    done = python(whole, *args, timeout=20, warnings="ignore")
    assert (done.returncode, done.stderr) == (0, "")
    return done


# ---- stages


@pytest.mark.parametrize(
    "call",
    [
        "a.stop()",
        "a.close()",
        "a.rx_queue_stop(0)",
        "b.tx_queue_stop(0)",
        "b.close()",
        "a.rx_queue(0).stop()",
        "b.tx_queue(0).close()",
    ],
)
def test_a_stage_cannot_stop_what_its_worker_has(call: str) -> None:
    child(
        f"""
        a, b = null(0), null(1)
        said, more = [], threading.Event()

        def stage(burst):
            if said:
                more.set()
                return
            try:
                {call}
            except rtap.DeviceStateError as exc:
                said.append(str(exc))

        worker = working(a, b, stage)
        assert more.wait(5)
        assert "a stage cannot wait for one" in said[0], said
        assert (a.state, b.state) == ("started", "started")
        assert worker.running  # nothing has changed
        worker.stop()
        a.close()
        b.close()
        """
    )


def test_a_stage_asks_what_another_thread_stops() -> None:
    """Reads are answered, or refused when it is closed; both threads go on."""
    child(
        """
        reads = (lambda d: d.stats(), lambda d: d.app_mac, lambda d: d.link(), lambda d: d.info(),
                 lambda d: setattr(d, "mtu", 1400))
        ways = (lambda d: d.stop(), lambda d: d.close(), lambda d: d.rx_queue_stop(0))
        for number, (read, way) in enumerate([(r, w) for r in reads for w in ways] * 2):
            dev = null(number)
            busy = threading.Event()

            def stage(burst):
                for _ in range(20):
                    try:
                        read(dev)
                    except rtap.DeviceStateError:
                        pass
                    busy.set()

            worker = working(dev, dev, stage)
            assert busy.wait(5)
            Task(way, dev).result(5)
            worker.stop()
            dev.close()
        """
    )


def test_a_stage_cannot_start_what_is_being_stopped() -> None:
    child(
        """
        a = null(0)
        said, inside, go = [], threading.Event(), threading.Event()

        def stage(burst):
            inside.set()
            assert go.wait(5)
            for call in (a.start, a.close, lambda: a.configure(1, 1),
                         lambda: a.rx_queue_release(0)):
                try:
                    call()
                except rtap.DeviceStateError as exc:
                    said.append(str(exc))

        worker = working(a, a, stage)
        assert inside.wait(5)
        stopper = Task(a.stop)
        eventually(lambda: a.state == "stopped", "it is being stopped")
        starter = Task(a.start)  # another thread has its turn afterwards
        go.set()
        stopper.result(5)
        starter.result(5)
        assert len(said) == 4, said
        assert a.state == "started"
        assert len(a.rx_burst(0, 4)) == 4
        worker.stop()
        a.close()
        """
    )


def test_stages_that_stop_each_others_devices() -> None:
    child(
        """
        a, b = null(0), null(1)
        both = threading.Barrier(2)
        said = []

        def stage_that_stops(other):
            tried = []

            def stage(burst):
                if tried:
                    return
                tried.append(1)
                both.wait(5)
                try:
                    other.stop()
                except rtap.DeviceStateError as exc:
                    said.append(str(exc))
                both.wait(5)
            return stage

        workers = [working(a, a, stage_that_stops(b)), working(b, b, stage_that_stops(a))]
        eventually(lambda: len(said) == 2, "each was refused")
        for worker in workers:
            Task(worker.stop).result(5)
        a.close()
        b.close()
        """
    )


def test_a_stage_cannot_wait_for_its_own_worker() -> None:
    child(
        """
        dev = null(0)
        said, more = [], threading.Event()

        def stage(burst):
            if said:
                more.set()
                return
            for call in (worker.stop, worker.join, lambda: worker.join(0), worker.__exit__,
                         worker.start):
                try:
                    call()
                except rtap.DeviceStateError as exc:
                    said.append(str(exc))

        worker = rtap.Worker(name="own")
        worker.forward((dev, 0), (dev, 0), stages=[stage])
        with worker:
            assert more.wait(5)
            assert worker.running  # nothing has changed
        assert len(said) == 5, said
        for text in said[:4]:
            assert "a stage of the worker own, which cannot wait for itself" in text, text
        assert not worker.running
        dev.close()
        """
    )


@pytest.mark.parametrize("call", ["stop", "join"])
def test_stages_that_wait_for_each_others_worker(call: str) -> None:
    """Two that stop each other end; two that join each other do once one is stopped."""
    child(
        """
        import logging
        logging.disable()
        call = sys.argv[1]
        both = threading.Barrier(2)
        said, workers = [], []

        def stage_that_waits(other):
            def stage(burst):
                both.wait(5)
                try:
                    getattr(workers[other], call)()
                except rtap.DeviceStateError as exc:
                    said.append(str(exc))
                raise EOFError
            return stage

        devices = [null(n) for n in range(2)]
        for n, dev in enumerate(devices):
            workers.append(rtap.Worker(name=f"w{n}"))
            workers[n].forward((dev, 0), (dev, 0), stages=[stage_that_waits(1 - n)])
        for worker in workers:
            worker.start()
        if call == "join":
            time.sleep(0.1)
            assert all(worker.running for worker in workers)
            Task(workers[0].stop).result(5)
        for worker in workers:
            assert Task(worker.join, 5).result(6)
        # The other one may have seen the end of this one first.
        assert "has to end, and no longer waits for the worker" in said[0], said
        for dev in devices:
            dev.close()
        """,
        call,
    )


def test_a_log_handler_cannot_wait_for_the_worker_it_hears_of() -> None:
    """It runs on a thread that the worker waits for."""
    child(
        """
        import logging
        said = []

        class Handler(logging.Handler):
            def emit(self, record):
                try:
                    worker.stop()
                except rtap.DeviceStateError as exc:
                    said.append(str(exc))

        def stage(burst):
            raise OSError("that is all")

        logging.getLogger("rtap").addHandler(Handler())
        dev = null(0)
        worker = rtap.Worker()
        worker.forward((dev, 0), (dev, 0), stages=[stage])
        worker.start()
        assert Task(worker.join, 5).result(6)
        assert any("waits for this thread" in text for text in said), said
        dev.close()
        """
    )


@pytest.mark.parametrize("call", ["stop", "join"])
def test_ctrl_c_while_a_worker_is_waited_for(call: str) -> None:
    child(
        """
        dev = null(0)
        inside, go = threading.Event(), threading.Event()

        def stage(burst):
            inside.set()
            assert go.wait(10)

        worker = working(dev, dev, stage)
        assert inside.wait(5)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            getattr(worker, sys.argv[1])()
        except KeyboardInterrupt:
            pass
        else:
            sys.exit("not interrupted")
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


@pytest.mark.parametrize("cycle", [False, True])
def test_a_device_is_collected_in_a_stage(cycle: bool) -> None:
    """The finalizer does not wait for the stage that it runs in."""
    child(
        """
        held = [null(0)]
        if sys.argv[1] == "True":
            held[0] = [held[0]]
            held[0].append(held[0])
            gc.disable()
        entered, go = threading.Event(), threading.Event()

        def stage(burst):
            entered.set()
            assert go.wait(5)
            held.clear()
            gc.collect()

        dev = held[0] if sys.argv[1] == "False" else held[0][0]
        worker = working(dev, dev, stage)
        del dev
        assert entered.wait(5)
        go.set()
        eventually(lambda: not rtap.devices(), "another thread has closed it")
        eventually(lambda: not worker.running, "the worker has no route left")
        eventually(lambda: pool.in_use == 0, "nothing is lost")
        pool.close()
        """,
        str(cycle),
    )


# ---- what a stop waits for


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
    """What was interrupted refuses bursts, and the next call does the rest."""
    child(
        """
        way = sys.argv[1]
        dev = null(0)
        queue = dev.rx_queue(0)
        call = {"stop": dev.stop, "close": dev.close, "queue": queue.stop,
                "rx_queue_stop": lambda: dev.rx_queue_stop(0)}[way]
        inside, go = threading.Event(), threading.Event()

        def stage(burst):
            inside.set()
            assert go.wait(10)

        worker = working(dev, dev, stage)
        assert inside.wait(5)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            call()
        except KeyboardInterrupt:
            pass
        else:
            sys.exit("not interrupted")
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

        signal.signal(signal.SIGALRM, signal.default_int_handler)
        for n, (queue_only, call) in enumerate((
            (False, lambda dev: dev.start()),
            (False, reset),
            (False, lambda dev: (dev.rx_queue_setup(0, 64, pool), dev.start())),
            (True, lambda dev: dev.rx_queue_start(0)),
            (True, lambda dev: (dev.rx_queue_setup(0, 64, pool), dev.rx_queue_start(0))),
        )):
            dev = null(n)
            inside, go = threading.Event(), threading.Event()

            def stage(burst, inside=inside, go=go):
                inside.set()
                assert go.wait(10)

            worker = working(dev, dev, stage)
            assert inside.wait(5)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            try:
                dev.rx_queue_stop(0) if queue_only else dev.stop()
            except KeyboardInterrupt:
                pass
            else:
                sys.exit("not interrupted")
            go.set()
            call(dev)
            assert len(dev.rx_burst(0, 4)) == 4
            worker.stop()
            dev.close()
        """
    )


def test_a_handler_closes_while_it_stops() -> None:
    """In the thread that waits: it closes, and the stop beneath finds that done."""
    child(
        """
        dev = null(0)
        inside, go = threading.Event(), threading.Event()
        refused = []

        def stage(burst):
            inside.set()
            assert go.wait(10)

        def handler(*_):
            try:
                dev.start()
            except rtap.DeviceStateError as exc:
                refused.append(str(exc))
            go.set()
            dev.close()

        worker = working(dev, dev, stage)
        assert inside.wait(5)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
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

        signal.signal(signal.SIGALRM, handler)
        other = Task(close)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
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
    """A daemon thread stays where it is when the interpreter ends, with what it has locked."""
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


# ---- refusals


@pytest.mark.root
def test_a_refused_set_up_leaves_the_queue(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine) as dev, Mempool(16, data_room=64) as small:
        dev.stop()
        with pytest.raises(ValueError, match="data_room of at least 1523"):
            dev.rx_queue_setup(0, 64, small)
        dev.start()
        with PacketSocket(netns, "t0") as peer:
            peer.send(frame(1))
            assert dev.recv(5) == frame(1)
            dev.stop()
            dev.rx_queue_setup(0, 64, dev.pool)
            dev.tx_queue_setup(0, 64)
            dev.start()
            peer.send(frame(2))
            assert dev.recv(5) == frame(2)
            assert dev.send(frame(3))
            assert frame(3) in peer.drain()


@pytest.mark.root
def test_why_there_can_be_no_more_queues(netns: NetNS) -> None:
    iproute(netns, "tuntap add sq0 mode tap")
    with pytest.raises(ValueError, match="must be 1, got 4: sq0 is a single-queue interface"):
        rtap.open("sq0", queues=4, netns=netns)


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
