# SPDX-License-Identifier: BSD-3-Clause
"""An exception from a signal handler may come after any call in Python.

Here a trace function raises it after each call in turn.
"""

from __future__ import annotations

import dis
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from support import eventually, none_left, open_fds, skip_without_devices

from rtap._core import descriptor, threads
from rtap._core.threads import call_in_thread, start_thread
from rtap.control import attach, channel, tun
from rtap.control import netns as netns_module
from rtap.control.attach import adopt, netns_of
from rtap.control.netns import NetNS

#: Modules that open descriptors and pass them on.
TRACED = {
    module.__file__
    for module in (attach, channel, descriptor, netns_module, threading, threads, tun)
}


class Interrupt(Exception):
    """Not a KeyboardInterrupt: handlers may raise any exception."""


def interrupted(fn: Callable[[], object], step: int) -> bool:
    """Calls `fn` with an Interrupt at that step; returns false if `fn` has fewer steps.

    The interpreter runs signal handlers after calls, where a function begins and where a loop goes
    back, but not within the steps of a with statement, for instance.
    """
    steps = itertools.count()
    previous: dict[FrameType, str] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in TRACED or frame.f_code.co_name == "__del__":
            return None  # an exception in a finalizer, such as weakref's, is lost
        frame.f_trace_opcodes = True
        if event == "opcode":
            before = previous.get(frame, "")
            previous[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before.startswith(("CALL", "RESUME", "JUMP_BACKWARD")) and next(steps) == step:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        fn()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
        previous.clear()
    return False


def interrupted_at_each_step(fn: Callable[[], object]) -> Iterator[int]:
    step = 0
    while interrupted(fn, step):
        yield step
        step += 1
    assert step > 3


def adopted(ns: NetNS, fd: int) -> None:
    file, _ = adopt(ns, fd, "tap")
    file.close()


@pytest.mark.root
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("what", ["adopt", "netns_of", "from_fd", "current", "new"])
def test_no_descriptor_is_lost(netns: NetNS, what: str) -> None:
    skip_without_devices()
    fd, _ = netns.call(tun.open_queue, "t0")
    ways: dict[str, Callable[[], object]] = {
        "adopt": lambda: adopted(netns, fd),
        "netns_of": lambda: netns_of(fd).close(),
        "from_fd": lambda: NetNS.from_fd(netns.fd).close(),
        "current": lambda: NetNS.current().close(),
        "new": lambda: NetNS().close(),
    }
    try:
        ways[what]()
        before = open_fds()
        for _ in interrupted_at_each_step(ways[what]):
            gc.collect()
            none_left(before)
    finally:
        os.close(fd)


def test_a_thread_that_starts() -> None:
    """The exception arrives unchanged, and the thread either runs or does not."""
    ended = threading.Event()

    def start() -> None:
        start_thread(ended.set, name="rtap-test")

    for _ in interrupted_at_each_step(start):
        pass
    assert ended.wait(10)


def interrupt_main(handled: threading.Event) -> None:
    """Makes the main thread run its handler of SIGUSR1.

    A signal just before a wait does not end the wait, so another one follows.
    """
    while not handled.wait(0.01):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


@pytest.fixture
def handled() -> Iterator[threading.Event]:
    """An event that is set when a handler of SIGUSR1 has run and raised Interrupt."""
    event = threading.Event()

    def handler(*_: object) -> None:
        if not event.is_set():
            event.set()
            raise Interrupt

    before = signal.signal(signal.SIGUSR1, handler)
    yield event
    signal.signal(signal.SIGUSR1, before)


def test_a_wait_for_a_thread(handled: threading.Event) -> None:
    went_on = threading.Event()

    def body() -> None:
        interrupt_main(handled)
        went_on.set()

    with pytest.raises(Interrupt):
        call_in_thread(body)
    assert went_on.wait(10)


@pytest.mark.root
def test_a_program_whose_start_is_interrupted_ends(
    netns: NetNS, handled: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_devices()
    started: list[subprocess.Popen[Any]] = []
    popen = subprocess.Popen

    def late(*args: Any, **how: Any) -> subprocess.Popen[Any]:
        interrupt_main(handled)
        started.append(popen(*args, **how))
        return started[0]

    before = open_fds()
    monkeypatch.setattr(subprocess, "Popen", late)
    with pytest.raises(Interrupt):
        netns.run(["sleep", "600"], capture_output=True)
    eventually(lambda: bool(started) and started[0].returncode is not None, "it was ended")
    assert started[0].returncode == -signal.SIGKILL
    none_left(before)
