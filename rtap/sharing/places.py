# SPDX-License-Identifier: BSD-3-Clause
"""Where the sockets of shared devices are, and who may connect to them.

The directory is ``$RTAP_RUNTIME_DIR``, else ``$XDG_RUNTIME_DIR/rtap``, else ``/run/rtap``; the
socket of a device is named after the device. A process that dies leaves its socket file behind:
whoever finds that nobody listens to it removes it.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "Allowed",
    "Listening",
    "Peer",
    "connect",
    "directories",
    "listen",
    "peer_of",
    "sockets",
    "unlisten",
]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_SUFFIX = ".sock"
_UCRED = struct.Struct("3i")
_TIMEVAL = struct.Struct("ll")
_SO_PEERGROUPS = 59  # asm-generic/socket.h
_GROUPS_ROOM = 1024  # all that Python allows, 256 groups


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a connection: its ids as they are in this process's namespaces
    when it connected; `pid` is 0 for a process that is not seen from here."""

    pid: int
    uid: int
    gid: int
    #: Supplementary groups.
    groups: frozenset[int] = frozenset()


def peer_of(sock: socket.socket) -> Peer:
    """As the kernel says (SO_PEERCRED, SO_PEERGROUPS)."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    groups = array.array("I")
    with contextlib.suppress(OSError):  # more than there is room for, or Linux before 4.13
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_ROOM))
    pid, uid, gid = _UCRED.unpack(found)
    return Peer(pid, uid, gid, frozenset(groups))


@dataclass(frozen=True)
class Allowed:
    """Who may attach, beside root and the user of this process: users and groups by number."""

    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()

    def lets_in(self, peer: Peer) -> bool:
        return peer.uid in (0, os.geteuid(), *self.uids) or not self.gids.isdisjoint(
            {peer.gid, *peer.groups}
        )

    @property
    def others(self) -> bool:
        return bool(self.uids or self.gids)


def directories() -> list[str]:
    """Where sockets may be; a process makes its own in the first one."""
    chosen = os.environ.get("RTAP_RUNTIME_DIR")
    if chosen:
        return [chosen]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return ([os.path.join(runtime, "rtap")] if runtime else []) + ["/run/rtap"]


def checked_name(name: str) -> str:
    """`name`, if it can be one of a socket; else ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, got {type(name).__name__}")
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} cannot be the name of something shared: letters, digits, _ . - and at most "
            "64 of them"
        )
    return name


def _make_directory(path: str, others: bool) -> None:
    """Make the directory, or check the one that is there."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as exc:
        raise OSError(
            exc.errno,
            f"{path} cannot be made ({exc.strerror}): set RTAP_RUNTIME_DIR or XDG_RUNTIME_DIR to a "
            "directory of yours",
        ) from None
    status = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(
            errno.EPERM, f"{path} has to be a directory of this user that nobody else writes to"
        )
    if others and not status.st_mode & 0o001:
        os.chmod(path, 0o711)  # those who are let in can pass, and see no names


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[int]:
    """Sockets in there are made and removed by one process at a time."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _address(directory: int, name: str) -> str:
    # A name through the directory's descriptor fits into a socket address, whatever the path is.
    return f"/proc/self/fd/{directory}/{name}{_SUFFIX}"


#: Seconds to wait for room among those that wait to be let in.
CONNECT_S = 5.0


def _connected(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Not settimeout(): Python's timeout does not wait for room, connect() fails at once.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(CONNECT_S), 0))
        sock.connect(address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    except BaseException:
        sock.close()
        raise
    return sock


def _answers(address: str) -> bool:
    """Whether somebody listens there."""
    try:
        _connected(address).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:  # full, or not for us
        return True
    return True


class Listening(NamedTuple):
    """A listening socket, its path, and which file that is."""

    sock: socket.socket
    path: str
    file: tuple[int, int]


def _file_at(address: str) -> tuple[int, int]:
    found = os.lstat(address)
    return found.st_dev, found.st_ino


def listen(name: str, allowed: Allowed) -> Listening:
    """A socket that listens under `name`.

    FileExistsError when another process has that name.
    """
    directory = directories()[0]
    path = os.path.join(directory, checked_name(name) + _SUFFIX)
    _make_directory(directory, allowed.others)
    with _locked(directory) as fd:
        address = _address(fd, name)
        if _answers(address):
            raise FileExistsError(
                errno.EEXIST,
                f"another process shares {name!r} ({path}), give this one another name",
            )
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
        sock = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            os.fchmod(sock.fileno(), 0o600)  # bind gives the file the mode of the socket
            sock.bind(address)
            if allowed.others:
                os.chmod(address, 0o666)  # whoever connects is asked for, see Allowed
            sock.listen(64)
            return Listening(sock, path, _file_at(address))
        except BaseException:
            sock.close()
            raise


def unlisten(listening: Listening) -> None:
    """Remove the socket's file, if it is still its, and close it."""
    sock, path, file = listening
    with contextlib.suppress(OSError), _locked(os.path.dirname(path)) as fd:
        # Whether it is the same file, not whether somebody listens there: a child that has just
        # been forked still has the socket. While it is open, no other file has its number.
        address = _address(fd, os.path.basename(path).removesuffix(_SUFFIX))
        if _file_at(address) == file:
            os.unlink(address)
    sock.close()


def connect(name: str) -> socket.socket:
    """A connection to the process that shares something under `name`, which may be the path of its
    socket.

    FileNotFoundError when there is none; PermissionError when this user may not.
    """
    places = directories()
    if isinstance(name, str) and os.sep in name:
        places = [os.path.dirname(name)]
        name = os.path.basename(name).removesuffix(_SUFFIX)
    checked_name(name)
    refused: OSError | None = None
    for directory in places:
        path = os.path.join(directory, name + _SUFFIX)
        try:
            fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            return _connected(_address(fd, name))
        except PermissionError as exc:
            refused = PermissionError(exc.errno, f"{path}: this user may not use it")
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:
            forget_stale(path)
        finally:
            os.close(fd)
    if refused is not None:
        raise refused
    raise FileNotFoundError(
        errno.ENOENT,
        f"no process shares {name!r} in {' or '.join(places)}: call rtap.share() there",
    )


def forget_stale(path: str) -> None:
    """Remove a socket's file that its process left behind, if this user may."""
    with contextlib.suppress(OSError), _locked(os.path.dirname(path)) as fd:
        address = _address(fd, os.path.basename(path).removesuffix(_SUFFIX))
        if not _answers(address):
            os.unlink(address)


def sockets() -> Iterator[str]:
    """The paths of the sockets in the directories that this user may list."""
    for directory in directories():
        with contextlib.suppress(OSError):
            for entry in sorted(os.listdir(directory)):
                if entry.endswith(_SUFFIX):
                    yield os.path.join(directory, entry)
