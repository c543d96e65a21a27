# SPDX-License-Identifier: BSD-3-Clause
"""How a command ends when it fails: with one sentence, or by a signal."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["CommandError", "Interrupted", "Stop", "sentence"]


class CommandError(Exception):
    """A command failed; the message is the sentence its user reads."""


class Interrupted(Exception):
    """A signal asked the command to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def sentence(exc: BaseException) -> str:
    """The message of `exc` on one line, without the errno that OSError puts in front."""
    text = str(exc)
    if isinstance(exc, OSError) and exc.strerror:
        text = exc.strerror if exc.filename is None else f"{exc.filename}: {exc.strerror}"
    return " ".join(text.split()) or type(exc).__name__


class Stop:
    """Whether a signal asked the command to end.

    A signal only leaves a note; :meth:`check` raises it at places where nothing is half done.
    The same signal a second time has its default effect, at once.
    """

    def __init__(self) -> None:
        self._signum = 0

    def check(self) -> None:
        """Raise Interrupted when a signal has come."""
        if self._signum:
            raise Interrupted(self._signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = self._signum or signum
        signal.signal(signum, signal.SIG_DFL)

    @contextlib.contextmanager
    def installed(self) -> Iterator[Stop]:
        """Notes SIGINT, SIGTERM and SIGHUP meanwhile. Off the main thread it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {}
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Respect nohup(1). But SIGINT is ignored in every background job of a script.
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, self._note)
        try:
            yield self
        finally:
            for signum, handler in before.items():
                # None: installed by something other than Python, which cannot put it back.
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)
