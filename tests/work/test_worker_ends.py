# SPDX-License-Identifier: BSD-3-Clause
"""Workers when devices or processes end, after Ctrl-C and after fork."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any

import pytest
from rigs import iproute
from support import (
    PacketSocket,
    child_environment,
    eventually,
    frame,
    links,
    none_left,
    open_fds,
    python,
    running_threads,
    seq_of,
    settle,
    threads_end,
)
from workers import Line, both_ways, can_send, cpu_ticks, thread_id

import rtap
from rtap import Burst, Mempool, NetNS, Worker

# ---- devices that go


def test_a_device_stopped_under_it(line: Line, engine: str) -> None:
    with both_ways(line.a, line.b) as worker:
        line.passes()
        start = time.monotonic()
        line.a.stop()
        assert time.monotonic() - start < 1
        # Both routes used the device, so the worker has none left.
        eventually(lambda: not worker.running, "the worker has ended by itself")
        assert worker.join(1)
        assert [route.error for route in worker.stats().routes] == ["", ""]
        line.a.start()
        worker.start()
        line.passes(2)


@pytest.mark.parametrize("victim", ["source", "target"])
@pytest.mark.parametrize("way", ["stop", "close", "delete", "stop queue"])
def test_the_other_routes_go_on(netns: NetNS, engine: str, victim: str, way: str) -> None:
    with ExitStack() as stack:
        line = Line(stack, netns, engine=engine)
        c = stack.enter_context(rtap.open("c0", netns=netns, engine=engine))
        d = stack.enter_context(rtap.open("d0", netns=netns, engine=engine))
        at_c = stack.enter_context(PacketSocket(netns, "c0"))
        at_d = stack.enter_context(PacketSocket(netns, "d0"))
        worker = Worker()
        worker.forward((c, 0), (d, 0))
        worker.forward((line.a, 0), (line.b, 0))
        dev = c if victim == "source" else d
        with worker:
            at_c.send(frame(1))
            assert at_d.frames(1) == [frame(1)]
            line.passes(1)
            start = time.monotonic()
            if way == "delete":
                iproute(netns, f"link del {dev.ifname}")
                if victim == "target":
                    at_c.send(frame(2))
            elif way == "stop queue":
                queue: Any = dev.rx_queue(0) if victim == "source" else dev.tx_queue(0)
                queue.stop()
            else:
                getattr(dev, way)()
            assert time.monotonic() - start < 2
            for seq in range(20):
                line.passes(seq)
            assert worker.running
            if way == "delete":
                eventually(lambda: bool(worker.stats().routes[0].error), "the route has ended")
                assert "bad state" in worker.stats().routes[0].error
            stats = worker.stats()
            assert stats.routes[1].error == ""
            assert (stats.routes[1].rx_packets, stats.routes[1].drops) == (21, 0)
            if way == "delete":
                dev.close()
                assert dev.name not in [other.name for other in rtap.devices()]
            survivor = d if victim == "source" else c
            if victim == "source":
                eventually(lambda: can_send(survivor), "the target is given back")
        assert settle(line.a.pool) == settle(c.pool) == 0


def test_an_interface_taken_down_and_up_again(line: Line) -> None:
    """No route ends because of it."""
    with both_ways(line.a, line.b) as worker:
        line.passes()
        iproute(line.ns, "link set b0 down")
        line.at_a.send(frame(5))
        eventually(lambda: line.b.stats().oerrors == 1, "the kernel refuses it")
        iproute(line.ns, "link set b0 up")
        with PacketSocket(line.ns, "b0") as again:  # the first socket reports the downtime
            line.at_a.send(frame(6))
            assert again.frames(1) == [frame(6)]
        assert worker.running
        assert [route.error for route in worker.stats().routes] == ["", ""]


def test_frames_that_find_no_mbuf(netns: NetNS, engine: str) -> None:
    """The worker waits for buffers without spinning, and goes on when some are free."""
    with ExitStack() as stack:
        line = Line(stack, netns, engine=engine, nb_mbufs=8)
        held = line.a.pool.alloc_burst(8)
        worker = Worker(name="starved")
        worker.forward((line.a, 0), (line.b, 0))
        with worker:
            for seq in range(20):
                line.at_a.send(frame(seq))
            eventually(lambda: line.a.stats().rx_nombuf > 0, "it is noticed")
            tid = thread_id(worker)
            before = cpu_ticks(tid)
            time.sleep(0.3)
            assert (cpu_ticks(tid) - before) / os.sysconf("SC_CLK_TCK") < 0.2
            held.free()
            assert [seq_of(f) for f in line.at_b.frames(20)] == list(range(20))


def test_moved_to_another_namespace(line: Line, netns2: NetNS) -> None:
    with both_ways(line.a, line.b) as worker:
        line.passes()
        iproute(line.ns, f"link set b0 netns {netns2.path}")
        iproute(netns2, "link set b0 up")
        with PacketSocket(netns2, "b0") as there:
            line.at_a.send(frame(7))
            assert there.frames(1) == [frame(7)]
        assert worker.running


# ---- processes


def test_ctrl_c_with_a_running_worker(netns: NetNS) -> None:
    code = """
import sys, time, rtap
with rtap.open("a0", netns=sys.argv[1]) as a, rtap.open("b0", netns=sys.argv[1]) as b:
    worker = rtap.Worker()
    worker.forward((a, 0), (b, 0))
    with worker:
        print("running", flush=True)
        getattr(worker, sys.argv[2])() if sys.argv[2] == "join" else time.sleep(60)
"""
    for how in ("join", "sleep"):
        with subprocess.Popen(
            [sys.executable, "-c", code, netns.path, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(),
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "running\n"
                assert links(netns) == ["lo", "a0", "b0"]
                time.sleep(0.05)
                process.send_signal(signal.SIGINT)
                start = time.monotonic()
                _, err = process.communicate(timeout=10)
                assert time.monotonic() - start < 5
            finally:
                process.kill()
        assert process.returncode == -signal.SIGINT, how
        assert err.rstrip().endswith("KeyboardInterrupt")
        assert links(netns) == ["lo"]


@pytest.mark.parametrize(
    "ending",
    ["pass", "del worker, a, b", "a.close()", "raise SystemExit(0)", "import gc; gc.collect()"],
)
def test_interpreter_exit_with_a_running_worker(netns: NetNS, ending: str) -> None:
    done = python(
        f"""
        import sys, warnings, rtap
        warnings.simplefilter("ignore", ResourceWarning)
        a = rtap.open("a0", netns=sys.argv[1])
        b = rtap.open("b0", netns=sys.argv[1])
        worker = rtap.Worker(wait="poll")
        worker.forward((a, 0), (b, 0))
        worker.start()
        print("running", flush=True)
        {ending}
        """,
        netns.path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "running\n", "")
    eventually(lambda: links(netns) == ["lo"], "the interfaces go with the process")


def test_fork_with_a_running_worker(netns: NetNS) -> None:
    done = python(
        """
        import os, sys, warnings, rtap
        warnings.simplefilter("ignore", DeprecationWarning)
        a = rtap.open("a0", netns=sys.argv[1])
        b = rtap.open("b0", netns=sys.argv[1])
        worker = rtap.Worker()
        worker.forward((a, 0), (b, 0))
        worker.start()
        pid = os.fork()
        if pid == 0:
            assert not worker.running
            worker.stop()
            try:
                worker.start()
            except rtap.DeviceStateError as exc:
                assert "fork" in str(exc), exc
            else:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert worker.running
        worker.stop()
        a.close()
        b.close()
        print("fine")
        """,
        netns.path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


# ---- leaks


def test_five_hundred_starts_leak_nothing(line: Line) -> None:
    worker = both_ways(line.a, line.b)
    for _ in range(5):
        with worker:
            line.passes()
    gc.collect()
    before, threads = open_fds(), running_threads()
    for n in range(500):
        with worker:
            if n % 50 == 0:
                line.passes(n)
    none_left(before)
    threads_end(threads)
    assert settle(line.a.pool) == settle(line.b.pool) == 0
    with worker:
        line.passes()


def test_a_hundred_workers(line: Line) -> None:
    before = open_fds()
    for n in range(100):
        with both_ways(line.a, line.b, wait=("poll", "sleep", "adaptive")[n % 3]):
            line.passes(n)
    gc.collect()
    none_left(before, but=1)
    assert settle(line.a.pool) == 0


def test_a_forgotten_worker_runs_on_with_a_warning(line: Line) -> None:
    """Closing a device is enough to end it."""
    with pytest.warns(ResourceWarning, match="forgotten worker dropped, .* rx queue 0 of a0 to tx"):
        both_ways(line.a, line.b, name="dropped").start()
    line.passes()
    line.a.close()
    eventually(
        lambda: not any(t.name == "dropped" for t in threading.enumerate()), "the thread ended"
    )
    assert line.b.send(frame())


@pytest.mark.parametrize("end", ["stop", "close", "error", "referred to by its stage"])
def test_no_warning_of_a_worker_that_has_ended(line: Line, end: str) -> None:
    worker = Worker(name="ended")
    held: list[Worker] = []

    def stage(burst: Burst) -> None:
        assert end != "error"
        assert held

    worker.forward((line.a, 0), (line.b, 0), stages=[stage])
    held.append(worker)
    worker.start()
    line.at_a.send(frame(1))
    if end == "stop":
        worker.stop()
    elif end == "close":
        line.a.close()
    del worker
    if end != "referred to by its stage":
        eventually(lambda: not held[0].running, "it has ended")
        held.clear()
    gc.collect()  # no warning: these are errors here
    if held:
        assert line.at_b.frames(1) == [frame(1)]
        held.pop().stop()


def test_control_while_it_runs(netns: NetNS) -> None:
    """Statistics and settings work on devices whose queues a worker owns."""
    with ExitStack() as stack:
        line = Line(stack, netns)
        with Mempool(16), both_ways(line.a, line.b) as worker:
            for n in range(20):
                line.passes(n)
                line.a.mtu = 1400 + n
                line.a.stats_reset()
                line.b.set_link_down()
                line.b.set_link_up()
                assert line.a.link().link_status
                assert line.a.info().state == "started"
                assert worker.stats().rx_packets == n + 1
