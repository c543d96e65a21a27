# SPDX-License-Identifier: BSD-3-Clause
"""Children that hang when a wait is wrong: net_null devices, and workers whose stages wait."""

from __future__ import annotations

import subprocess
import textwrap

from support import python

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

    def stuck(dev):
        # A worker whose stage is left when the event is set: no stop ends before.
        inside, go = threading.Event(), threading.Event()

        def stage(burst):
            inside.set()
            assert go.wait(10)

        worker = working(dev, dev, stage)
        assert inside.wait(5)
        return worker, go

    def on_alarm(handler):
        # Called from a signal, soon: what comes after this waits by then.
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)

    def interrupted(call):
        # The call waits, and Ctrl-C ends the wait.
        on_alarm(signal.default_int_handler)
        try:
            call()
        except KeyboardInterrupt:
            return
        sys.exit("not interrupted")

    def working(source, target, stage):
        worker = rtap.Worker()
        worker.forward((source, 0), (target, 0), stages=[stage])
        worker.start()
        return worker
"""


def child(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs code after PREPARE; fails when the code hangs, fails or prints something."""
    whole = textwrap.dedent(PREPARE) + textwrap.dedent(code)
    done = python(whole, *args, timeout=20, warnings="ignore")
    assert (done.returncode, done.stderr) == (0, "")
    return done
