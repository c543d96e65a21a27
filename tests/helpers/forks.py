# SPDX-License-Identifier: BSD-3-Clause
"""Forked children that report what went wrong in them, with a time limit."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from patience import patient
from support import Tap, frame

from rtap import Mempool
from rtap._ring import RxQueue, TxQueue


def fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 and later warn about a fork while other threads run; these are intended.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _tell(report: int, what: Any) -> None:
    """Writes an exception, or what Python could not raise, to the parent."""
    exc = what if isinstance(what, BaseException) else what.exc_value
    lines = traceback.format_exception(exc) if exc else [f"{what.exc_type}\n"]
    if exc is not what:
        lines.insert(0, f"{what.err_msg or 'Exception ignored in'}: {what.object!r}\n")
    os.write(report, "".join(lines).encode()[-4000:])


class Child:
    """A forked child that runs a function, at once or when told to."""

    def __init__(self, fn: Callable[[], object], wait: bool = False, timeout: float = 20) -> None:
        self._timeout = patient(timeout)
        self._report, report = os.pipe()
        go, self._go = os.pipe()
        self.pid = fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._go)
                if wait:
                    os.read(go, 1)
                faulthandler.register(signal.SIGUSR1, file=report)
                sys.unraisablehook = functools.partial(_tell, report)
                fn()
                status = 0
            except BaseException as exc:  # noqa: BLE001 - the parent reports it
                _tell(report, exc)
            finally:
                os._exit(status)
        os.close(report)
        os.close(go)

    def finish(self) -> None:
        """Lets the child run, and fails with its traceback unless it succeeds in time."""
        # Closing the pipe would not do: later children inherit this end.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"x")
        os.close(self._go)
        deadline = time.monotonic() + self._timeout
        pid = 0
        while pid == 0 and time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            time.sleep(0.001)
        if pid == 0:
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.2)
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
        with os.fdopen(self._report, "rb") as pipe:
            report = pipe.read().decode()
        if pid == 0:
            pytest.fail(f"the child hung for {self._timeout} s:\n{report}")
        if status or report:
            pytest.fail(f"the child ended with {os.waitstatus_to_exitcode(status)}:\n{report}")


def in_child(fn: Callable[[], object], timeout: float = 20) -> None:
    Child(fn, timeout=timeout).finish()


def alone(fn: Callable[[], object], timeout: float = 20) -> None:
    """Runs a function where nothing but what it does allocates memory.

    A child has no other thread and no garbage collection, whose callbacks allocate. So when a test
    lets the next allocation fail, no bystander takes the failure.
    """

    def child() -> None:
        gc.disable()
        fn()

    in_child(child, timeout)


def warm_up(rx: RxQueue, tx: TxQueue, pool: Mempool, tap: Tap) -> None:
    """Sends enough bursts that the ring registers the descriptor and the arena."""
    packets = tap.packets()
    for i in range(40):
        assert tx.tx_burst(pool.alloc_burst(8, frame(i))) == 8
        assert packets.frames(8) == [frame(i)] * 8
        packets.send(frame(i))
        assert [bytes(m) for m in rx.rx_burst(8, 5)] == [frame(i)]
