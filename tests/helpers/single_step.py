# SPDX-License-Identifier: BSD-3-Clause
"""A child that is stopped after each of its instructions, to see and to use what it shares."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections.abc import Callable

import pytest

TRACEME, CONT, SINGLESTEP = 0, 7, 9  # of ptrace(2)
#: More than any act takes.
STEPS_MAX = 3_000_000
NOT_TRACED = 98

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Stepped:
    """A forked child that prepares something, and then acts one instruction at a time.

    ``prepare`` runs in the child at once and returns the act. That returns the child's exit status.
    """

    def __init__(self, prepare: Callable[[], Callable[[], int]]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                if _libc.ptrace(TRACEME, 0, None, None) != 0:
                    os._exit(NOT_TRACED)
                act = prepare()
                gc.disable()
                os.kill(os.getpid(), signal.SIGSTOP)
                status = act()
                os.kill(os.getpid(), signal.SIGSTOP)
            finally:
                os._exit(status)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == NOT_TRACED:
            pytest.skip("this machine cannot trace a process")
        if not os.WIFSTOPPED(status):
            pytest.fail(f"the child could not prepare: {os.waitstatus_to_exitcode(status)}")

    def step(self) -> bool:
        """One instruction; false when the act is over."""
        if _libc.ptrace(SINGLESTEP, self.pid, None, None) != 0:
            self.kill()
            pytest.skip("this machine cannot stop a process after each instruction")
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSTOPPED(status), f"the child ended: {status:#x}"
        return os.WSTOPSIG(status) == signal.SIGTRAP

    def steps(self, look: Callable[[], bytes]) -> int:
        """Steps until what ``look`` sees has changed; the number of steps, or 0 when the act is
        over."""
        before = look()
        for n in range(1, STEPS_MAX):
            if not self.step():
                return 0
            if look() != before:
                return n
        raise AssertionError("the act does not end")

    def go_on(self) -> None:
        """To the end of the act."""
        _libc.ptrace(CONT, self.pid, None, None)
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSTOPPED(status), f"the child ended: {status:#x}"

    def finish(self) -> int:
        """The child's exit status, once its act is over."""
        _libc.ptrace(CONT, self.pid, None, None)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
