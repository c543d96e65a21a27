# SPDX-License-Identifier: BSD-3-Clause
"""Network namespaces held by a descriptor, and running code inside one.

``setns(2)`` and ``unshare(2)`` move a thread, not the process. So every operation here
runs in a short-lived thread of its own: the caller's namespace never changes, no process is
forked, and nothing has to be restored afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from rtap._core.descriptor import Descriptor
from rtap._core.origin import origin
from rtap._core.threads import call_in_thread
from rtap.errors import raise_errno

if TYPE_CHECKING:
    # Few programs start others, and importing it takes long.
    import subprocess

__all__ = ["NetNS", "NetNSLike", "call_in", "enter", "open_netns"]

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_OWN_NETNS = "/proc/thread-self/ns/net"
_NAMED_NETNS = "/run/netns"  # where ip-netns(8) mounts them

_T = TypeVar("_T")

_libc = ctypes.CDLL(None, use_errno=True)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) < 0:
        raise_errno(ctypes.get_errno(), "setns into a network namespace")


def _is_own(fd: int) -> bool:
    there = os.fstat(fd)
    try:
        here = os.stat(_OWN_NETNS)
    except OSError:
        return False  # no /proc, after chroot: nobody can tell
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def enter(netns: NetNS) -> None:
    """Move the calling thread, and the threads that it starts later, into a namespace.

    For programs that do it before they have a second thread; others use :func:`call_in`.
    """
    _setns(netns.fd)


def call_in(netns: int, fn: Callable[..., _T], *args: Any, own_thread: bool = False) -> _T:
    """Run ``fn(*args)`` in the network namespace of descriptor `netns` and return its result.

    Runs in the calling thread if that is already there, otherwise (or with `own_thread`) in a
    thread of its own. Exceptions of `fn` pass through, and so do those of a signal handler
    during the wait. In the latter case nobody gets the result of `fn`, which has to be an object
    that cleans up after itself.

    Raises OSError (PermissionError without CAP_SYS_ADMIN) when the namespace cannot be entered,
    and RuntimeError for green threads (:mod:`rtap._core.threads`).
    """
    inside = _is_own(netns)
    if inside and not own_thread:
        return fn(*args)

    def body() -> _T:
        if not inside:
            _setns(netns)
        return fn(*args)

    return call_in_thread(body)


class NetNS:
    """A new anonymous network namespace with ``lo`` up, kept alive by a descriptor.

    It has no name and no mount, so it disappears with the last process that holds it, however
    that ends::

        with NetNS() as ns:
            dev = rtap.open("tap0", netns=ns)
            ns.run(["ip", "addr", "add", "10.0.0.1/24", "dev", "tap0"], check=True)

    Needs CAP_SYS_ADMIN (where user namespaces are allowed, ``unshare -Ur`` gives it to anybody).
    Existing namespaces are adopted with :meth:`from_name`, :meth:`from_pid` or :meth:`from_fd`.
    """

    __slots__ = ("__weakref__", "_held", "_origin")

    # The descriptor; empty once closed. When several threads close it at once, one takes it out.
    _held: list[Descriptor]
    # Where the program made it, as the end of a sentence.
    _origin: str

    def __init__(self) -> None:
        self._origin = origin()
        self._held = []

        def make() -> None:
            if _libc.unshare(_CLONE_NEWNET) < 0:
                raise_errno(ctypes.get_errno(), "unshare a network namespace")
            from rtap.control.netlink import loopback_up

            loopback_up()
            # Here, where no signal handler raises: the caller may be gone.
            self._held.append(Descriptor(_OWN_NETNS))

        call_in_thread(make)

    @classmethod
    def from_fd(cls, fd: int) -> NetNS:
        """Adopt the namespace that `fd` refers to; `fd` is duplicated, the caller keeps it."""
        self = cls.__new__(cls)
        self._origin = origin()
        self._held = [Descriptor.of(os.dup, fd)]  # close-on-exec, see PEP 446
        return self

    @classmethod
    def from_name(cls, name: str) -> NetNS:
        """Adopt a namespace of ``ip netns`` by name, or any by path (anything with a slash)."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"a network namespace name or path is a non-empty str, got {name!r}")
        path = name if "/" in name else f"{_NAMED_NETNS}/{name}"
        self = cls.__new__(cls)
        self._origin = origin()
        self._held = [Descriptor(path)]
        return self

    @classmethod
    def from_pid(cls, pid: int) -> NetNS:
        """Adopt the namespace that process `pid` is in."""
        return cls.from_name(f"/proc/{int(pid)}/ns/net")

    @classmethod
    def current(cls) -> NetNS:
        """The namespace of the calling thread."""
        return cls.from_name(_OWN_NETNS)

    @property
    def fd(self) -> int:
        """The descriptor, for ``setns(2)`` and for ``netns=`` arguments. ValueError once closed."""
        held = self._held[:]
        if not held:
            raise ValueError("the network namespace is closed")
        return held[0].fileno()

    def fileno(self) -> int:
        """Same as :attr:`fd`."""
        return self.fd

    @property
    def path(self) -> str:
        """A path to the namespace that other processes can open while this one holds it.

        ``ip link set dev X netns PATH`` and ``nsenter --net=PATH`` take it.
        """
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @property
    def inode(self) -> int:
        """The number that ``readlink /proc/self/ns/net`` shows; equal for equal namespaces."""
        return os.fstat(self.fd).st_ino

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called. Devices opened in the namespace still work."""
        return not self._held

    def call(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> _T:
        """Run ``fn(*args, **kwargs)`` in a thread inside the namespace; return or raise its
        outcome.

        Sockets that `fn` opens stay in the namespace, no matter who uses them later.
        """
        fd = self.fd
        return call_in(fd, lambda: fn(*args, **kwargs), own_thread=True)

    def popen(self, argv: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen(argv, **kwargs)`` with the child inside the namespace.

        A child belongs to the namespace of the thread that starts it, so no helper program and
        no ``preexec_fn`` is involved, and ``.pid`` is that of `argv` itself.
        """
        import subprocess

        return self.call(subprocess.Popen, argv, **kwargs)

    def _started(self, argv: Sequence[str], kwargs: dict[str, Any]) -> subprocess.Popen[Any]:
        """As :meth:`popen`; if a signal handler's exception leaves a child behind, the child is
        ended."""
        import subprocess

        children: list[subprocess.Popen[Any]] = []
        abandoned: list[bool] = []

        def end() -> None:
            while children:
                with contextlib.suppress(IndexError), children.pop() as child:
                    child.kill()

        def start() -> None:
            children.append(subprocess.Popen(argv, **kwargs))
            if abandoned:
                end()

        try:
            self.call(start)
            return children[0]
        except BaseException:
            abandoned.append(True)  # before the check for a child; start() does the reverse
            end()
            raise

    def run(
        self,
        argv: Sequence[str],
        *,
        input: Any = None,  # noqa: A002 - subprocess.run's name
        capture_output: bool = False,
        timeout: float | None = None,
        check: bool = False,
        **kwargs: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """``subprocess.run(...)`` with the child inside the namespace; same arguments, same result.

        The waiting is done by the caller's thread, so that Ctrl-C and `timeout` end the child.
        """
        import subprocess

        if input is not None:
            kwargs["stdin"] = subprocess.PIPE
        if capture_output:
            kwargs["stdout"] = kwargs["stderr"] = subprocess.PIPE
        with self._started(argv, kwargs) as process:
            try:
                out, err = process.communicate(input, timeout=timeout)
            except BaseException:
                process.kill()
                raise
        done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
        if check:
            done.check_returncode()
        return done

    def close(self) -> None:
        """Release the namespace. It vanishes once no process, socket or device is left in it.

        Idempotent.
        """
        with contextlib.suppress(IndexError):
            self._held.pop().close()

    def __enter__(self) -> NetNS:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_held", None):
            warnings.warn(
                f"unclosed network namespace {self!r}{self._origin}",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
            self.close()

    def __repr__(self) -> str:
        return "<rtap.NetNS closed>" if self.closed else f"<rtap.NetNS {self.inode}>"


#: The values of ``netns=`` arguments: None for the calling thread's namespace, a :class:`NetNS`, a
#: descriptor, or a name or path as in :meth:`NetNS.from_name`.
NetNSLike: TypeAlias = "NetNS | int | str | None"


def open_netns(netns: NetNSLike) -> NetNS:
    """A new :class:`NetNS` for the namespace that `netns` stands for; the caller closes it."""
    if netns is None:
        return NetNS.current()
    if isinstance(netns, NetNS):
        return NetNS.from_fd(netns.fd)
    if isinstance(netns, str):
        return NetNS.from_name(netns)
    if isinstance(netns, int) and not isinstance(netns, bool):
        return NetNS.from_fd(netns)
    raise TypeError(
        f"netns must be None, a NetNS, a descriptor, a name or a path, got {type(netns).__name__}"
    )
