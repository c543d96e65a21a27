# SPDX-License-Identifier: BSD-3-Clause
"""Other processes that share a pool and its rings with a test.

A nursery is a Python process that has rtap loaded and no pool. It forks a mate for each request,
and hands it the descriptors that came with the request, so that mates start and die by the hundred.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rtap import Burst, Mbuf, Mempool, PoolEmpty
from rtap._queues.shm_ring import ShmRing

Say = Callable[[Any], None]
Role = Callable[..., object]

ROLES: dict[str, Role] = {}
MESSAGE = 1 << 16
END = b"end"
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def role(fn: Role) -> Role:
    ROLES[fn.__name__] = fn
    return fn


# ---- pools and rings


def made(n: int = 256, room: int = 256, size: int = 64) -> tuple[Mempool, ShmRing]:
    pool = Mempool(n, room, shared=True)
    return pool, ShmRing.create(pool, size)


def attached(pool: Mempool, *rings: ShmRing, events: bool = True) -> tuple[Any, ...]:
    """The pool and its rings as another process has them."""
    assert pool.fd is not None
    other = Mempool.attach(pool.fd)
    ends = [
        ShmRing(ring.fd, pool=other, event_fd=ring.event_fd if events else None) for ring in rings
    ]
    return (other, *ends)


def place(mbuf: Any) -> int:
    """Where a frame's bytes are, in the address space of this process."""
    import numpy as np

    return int(np.frombuffer(mbuf.data, np.uint8).ctypes.data)


@contextlib.contextmanager
def sealed(data: bytes, size: int, seals: int = SEALS) -> Iterator[int]:
    """A memfd that begins with the data."""
    fd = os.memfd_create("rtap-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.pwrite(fd, data, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


# ---- frames that show whether they are whole


def whole(number: int, length: int) -> bytes:
    """A frame whose bytes all follow from its first eight."""
    word = struct.pack("!Q", number)
    return (word * (length // 8 + 1))[: max(length, 8)]


def number_of(data: bytes) -> int:
    """The number of such a frame, which must be whole."""
    number: int = struct.unpack_from("!Q", data)[0]
    assert data == whole(number, len(data)), f"a frame of {len(data)} bytes is not whole"
    return number


def send_all(ring: ShmRing, burst: Burst, patience: float = 60) -> None:
    """Puts all frames into the ring, as room appears."""
    until = time.monotonic() + patience
    while len(burst):
        if ring.enqueue(burst) == 0:
            assert time.monotonic() < until, f"the ring stays full: {ring}"
            time.sleep(0.0005)


def frames(pool: Mempool, first: int, n: int, length: int, patience: float = 60) -> Burst:
    """As many numbered frames, once the pool has room for them."""
    until = time.monotonic() + patience
    while True:
        try:
            return Burst([pool.alloc(whole(first + i, length)) for i in range(n)])
        except PoolEmpty:
            assert time.monotonic() < until, f"the pool stays empty: {pool}"
            time.sleep(0.0005)


# ---- what mates do


@role
def take(pool: Mempool, rings: list[ShmRing], say: Say, n: int) -> None:
    """Takes buffers, and keeps them until it is killed."""
    kept = pool.alloc_burst(n)
    say(len(kept))
    signal.pause()


@role
def fill(pool: Mempool, rings: list[ShmRing], say: Say, n: int) -> None:
    """Takes buffers, frees them and ends."""
    burst = pool.alloc_burst(n)
    del burst
    say(pool.available)


@role
def take_and_fork(pool: Mempool, rings: list[ShmRing], say: Say, n: int) -> None:
    """The same with a child that outlives it."""
    kept = pool.alloc_burst(n)
    child = os.fork()
    if child == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    say([len(kept), child])
    signal.pause()


@role
def count_up(
    pool: Mempool, rings: list[ShmRing], say: Say, first: int, n: int, length: int = 60
) -> None:
    """Sends numbered frames."""
    for number in range(first, first + n, 32):
        send_all(rings[0], frames(pool, number, min(32, first + n - number), length))
    say(rings[0].counters())


@role
def collect(pool: Mempool, rings: list[ShmRing], say: Say) -> None:
    """Receives frames until one says that it is the last, passes that on to the next receiver, and
    tells the numbers."""
    numbers: list[int] = []
    while True:
        data = [bytes(mbuf) for mbuf in rings[0].dequeue(32, 30)]
        assert data, "no frame came for 30 seconds"
        numbers += [number_of(each) for each in data if each != END]
        if END in data:
            send_all(rings[0], pool.alloc_burst(1, END))
            say(numbers)
            return


@role
def relay(pool: Mempool, rings: list[ShmRing], say: Say, seed: int) -> None:
    """Moves frames from one ring to another in all ways there are, until it is killed."""
    choose = random.Random(seed)
    kept: list[Mbuf] = []
    say("up")
    while True:
        burst = rings[0].dequeue(choose.choice([1, 4, 32]), 0.02)
        for mbuf in burst:
            number_of(bytes(mbuf))
        mbuf = None
        if len(burst) and choose.random() < 0.2:
            kept.append(burst[0])  # it is copied then
        del kept[8:]
        with contextlib.suppress(PoolEmpty):
            spare = pool.alloc_burst(choose.randrange(8))
            del spare
        for _ in range(100):
            if not len(burst):
                break
            rings[1].enqueue(burst)


@role
def echo(pool: Mempool, rings: list[ShmRing], say: Say, n: int) -> None:
    """Sends back what comes, with one more byte set, and the address that it had here."""
    say("up")
    for _ in range(n):
        burst = rings[0].dequeue(1, 30)
        burst[0][0:1] = b"\xee"
        send_all(rings[1], burst)
    say(rings[1].counters())


@role
def forward(pool: Mempool, rings: list[ShmRing], say: Say, wait: str) -> None:
    """A worker between two rings, until it is killed."""
    from rtap import Worker

    worker = Worker(wait=wait)
    worker.forward(rings[0], rings[1], on_full="retry")
    worker.start()
    say("up")
    signal.pause()


@role
def wait_for_one(pool: Mempool, rings: list[ShmRing], say: Say) -> None:
    """Waits for a frame, and tells how long it then took until it was here."""
    say("up")
    burst = rings[0].dequeue(1, 30)
    now = time.monotonic_ns()
    say(now - struct.unpack("!Q", bytes(burst[0])[:8])[0])


@role
def drain_events(pool: Mempool, rings: list[ShmRing], say: Say) -> None:
    """Takes every wake-up away from those that it is for."""
    event = rings[0].event_fd
    assert event is not None
    say("up")
    while True:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(event)


@role
def spoil(
    pool: Mempool, rings: list[ShmRing], say: Say, seed: int, seconds: float, ends: list[int]
) -> None:
    """Writes random bytes and plausible words into what processes share: the first bytes of each
    memory, as many as ``ends`` says."""
    choose = random.Random(seed)
    maps = [mmap.mmap(thing.fd, 0) for thing in (pool, *rings)]  # type: ignore[arg-type]
    say("up")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(200):
            which = choose.randrange(len(maps))
            start = 64 if which == 0 else 128
            at = choose.randrange(start, ends[which]) & ~7
            how = choose.randrange(6)
            if how == 0:
                maps[which][at] = choose.randrange(256)
            elif how == 1:
                maps[which][at : at + 8] = bytes(8)
            elif how == 2:
                maps[which][at : at + 8] = choose.randbytes(8)
            elif how == 3:  # what lies elsewhere
                other = choose.randrange(start, ends[which]) & ~7
                maps[which][at : at + 8] = maps[which][other : other + 8]
            elif how == 4:
                value = struct.unpack_from("=Q", maps[which], at)[0]
                value = value + choose.choice([-1, 1, 1 << 32, -1 << 32, 1 << 8]) & (1 << 64) - 1
                maps[which][at : at + 8] = struct.pack("=Q", value)
            else:
                maps[which][at] ^= 1 << choose.randrange(8)
    say("done")


@role
def scribble(
    pool: Mempool, rings: list[ShmRing], say: Say, seed: int, seconds: float, first: int
) -> None:
    """Changes bytes of frames, their headers mostly; the arena begins at ``first``."""
    choose = random.Random(seed)
    stride = -(-(pool.headroom + pool.data_room) // 64) * 64
    memory = mmap.mmap(pool.fd, 0)  # type: ignore[arg-type]
    say("up")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(500):
            start = first + choose.randrange(pool.size) * stride + pool.headroom
            at = choose.choice([12, 14, 16, 17, 18, 20, 23, 34, 38, 46, choose.randrange(90)])
            memory[start + at] = choose.choice([0, 6, 17, 0x45, 0x4F, 0xFF, choose.randrange(256)])
    say("done")


# ---- the nursery


def _grow(request: dict[str, Any], fds: list[int]) -> None:
    """The life of a mate."""
    out = fds.pop()

    def say(what: Any) -> None:
        os.write(out, json.dumps(what).encode() + b"\n")

    try:
        pool = Mempool.attach(fds[0])
        rings = []
        for i in range(1, len(fds), 2):
            event = fds[i + 1] if request["events"] else None
            rings.append(ShmRing(fds[i], pool=pool, event_fd=event))
        for fd in fds:
            os.close(fd)
        ROLES[request["role"]](pool, rings, say, **request["arguments"])
    except BaseException:  # noqa: BLE001 - the test reports it
        say({"failed": traceback.format_exc()})
        os._exit(1)
    os._exit(0)


def nursery(fd: int) -> None:
    """Serves requests until the other end is closed."""
    with socket.socket(fileno=fd) as line:
        mates: set[int] = set()
        while True:
            data, fds, _, _ = socket.recv_fds(line, MESSAGE, 64)
            if not data:
                break
            request = json.loads(data)
            if request["role"] == "wait":
                pid = request["arguments"]["pid"]
                mates.discard(pid)
                line.send(json.dumps(os.waitpid(pid, 0)[1]).encode())
                continue
            pid = os.fork()
            if pid == 0:
                line.close()
                _grow(request, fds)
            mates.add(pid)
            for each in fds:
                os.close(each)
            line.send(json.dumps(pid).encode())
        for pid in mates:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Mate:
    """A process that plays a role."""

    def __init__(self, mates: Mates, pid: int, out: int) -> None:
        self.pid = pid
        self._mates = mates
        self._pipe = os.fdopen(out, "rb")
        self._status: int | None = None

    def said(self) -> Any:
        """The next thing that it says; what went wrong in it fails the test."""
        line = self._pipe.readline()
        assert line, f"the mate ended silently, with status {self.wait()}"
        what = json.loads(line)
        assert not (isinstance(what, dict) and "failed" in what), what["failed"]
        return what

    def kill(self) -> None:
        """kill -9, and what it left to say."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        if self._status is None:
            self._status = self._mates.ask({"role": "wait", "arguments": {"pid": self.pid}}, [])
        return self._status

    def failure(self) -> str:
        """What went wrong in a mate that has ended, or nothing."""
        for line in self._pipe.read().splitlines():
            what = json.loads(line)
            if isinstance(what, dict) and "failed" in what:
                return str(what["failed"])
        return ""

    def close(self) -> None:
        self.kill()
        self._pipe.close()


class Mates:
    """A nursery, and the mates of one test at a time."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._line, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            code = (
                f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import ring_mates"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"{code}; ring_mates.nursery({other.fileno()})"],
                pass_fds=[other.fileno()],
                **options,
            )
        self._all: list[Mate] = []

    def ask(self, request: dict[str, Any], fds: list[int]) -> Any:
        socket.send_fds(self._line, [json.dumps(request).encode()], fds)
        data = self._line.recv(MESSAGE)
        assert data, "the nursery is gone"
        return json.loads(data)

    def start(
        self, name: str, pool: Mempool, *rings: ShmRing, events: bool = True, **arguments: Any
    ) -> Mate:
        """A new mate, with the pool and the rings."""
        back, out = os.pipe()
        fds: list[Any] = [pool.fd]
        for ring in rings:
            fds += [ring.fd, ring.event_fd]
        try:
            request = {"role": name, "events": events, "arguments": arguments}
            pid = self.ask(request, [*fds, out])
        finally:
            os.close(out)
        mate = Mate(self, pid, back)
        self._all.append(mate)
        return mate

    def clear(self) -> None:
        """No mate of this test is left."""
        while self._all:
            self._all.pop().close()

    def close(self) -> None:
        self.clear()
        self._line.close()
        self._process.wait(30)


@contextlib.contextmanager
def nursed(options: dict[str, Any]) -> Iterator[Mates]:
    mates = Mates(options)
    try:
        yield mates
    finally:
        mates.close()
