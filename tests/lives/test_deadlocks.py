# SPDX-License-Identifier: BSD-3-Clause
"""A thread that stops a queue never waits for one that waits for it: stages, workers, finalizers.

Code that could hang runs in a child process with a time limit.
"""

from __future__ import annotations

import pytest
from stuck import child


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
    """Its reads are answered, or refused when the device is closed; both threads go on."""
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
    """Two that stop each other end; two that join each other end once one is stopped."""
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
    """The handler runs on a thread for which the worker waits."""
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

        def closes():
            # The device leaves the registry a moment before its queues leave the pool.
            try:
                pool.close()
            except BufferError:
                return False
            return True

        eventually(closes, "its queues have let go of the pool")
        """,
        str(cycle),
    )
