# SPDX-License-Identifier: BSD-3-Clause
"""A device removes eBPF programs that an earlier owner left on a persistent interface."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from flows import flow
from support import BROADCAST, PacketSocket, netdev

import rtap
from rtap import NetNS
from rtap.control import tun

pytestmark = pytest.mark.root

SYS_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
PROG_LOAD, SOCKET_FILTER = 5, 1
MOVE_R0, EXIT = 0xB7, 0x95
FRAMES = 40

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def program(value: int) -> int:
    """The descriptor of a program that returns `value` for every frame."""
    code = struct.pack("=BBhiBBhi", MOVE_R0, 0, 0, value, EXIT, 0, 0, 0)
    text = ctypes.create_string_buffer(code, len(code))
    gpl = ctypes.create_string_buffer(b"GPL")
    asked = struct.pack(
        "=IIQQ", SOCKET_FILTER, len(code) // 8, ctypes.addressof(text), ctypes.addressof(gpl)
    )
    attributes = ctypes.create_string_buffer(asked.ljust(128, b"\0"), 128)
    fd = libc.syscall(SYS_BPF[platform.machine()], PROG_LOAD, attributes, 128)
    if fd < 0:
        raise OSError(ctypes.get_errno(), f"bpf: {os.strerror(ctypes.get_errno())}")
    return int(fd)


def read_all(fd: int) -> int:
    n = 0
    while True:
        try:
            n += os.read(fd, 2048) != b""
        except BlockingIOError:
            return n


@pytest.fixture
def fill(netns: NetNS) -> Callable[[], None]:
    """Sends frames of many flows to p0."""

    def send() -> None:
        with PacketSocket(netns, "p0", 0x0800) as packets:
            for port in range(FRAMES):
                packets.send(flow(port, dst=BROADCAST))

    return send


@pytest.fixture
def owner(netns: NetNS) -> Iterator[tuple[ExitStack, list[int]]]:
    """Two queues of a persistent interface, and a function that closes them."""
    with ExitStack() as stack:
        fds = []
        for _ in range(2):
            file, _ = netns.call(lambda: tun.open_file("p0", "tap", multi_queue=True))
            stack.callback(file.close)
            fds.append(file.fileno())
        tun.set_persist(fds[0], True, "p0")
        netns.run(["ip", "link", "set", "p0", "up"], check=True)
        yield stack, fds


def leave(fd: int, request: int, value: int) -> None:
    """Attaches a program to the interface, which holds the only reference."""
    loaded = program(value)
    try:
        fcntl.ioctl(fd, request, struct.pack("i", loaded))
    finally:
        os.close(loaded)


def test_a_filter(
    netns: NetNS, engine: str, owner: tuple[ExitStack, list[int]], fill: Callable[[], None]
) -> None:
    close, fds = owner
    fill()
    assert sum(map(read_all, fds)) == FRAMES
    leave(fds[0], tun.TUNSETFILTEREBPF, 0)
    dropped = netdev(netns, "p0")["tx_dropped"]
    fill()
    assert sum(map(read_all, fds)) == 0
    assert netdev(netns, "p0")["tx_dropped"] - dropped == FRAMES
    close.close()
    with rtap.open("p0", netns=netns, engine=engine, queues=2) as dev:
        fill()
        assert sum(len(dev.rx_burst(q, 64)) for q in range(2)) == FRAMES
        assert dev.stats().imissed == 0


@pytest.mark.parametrize("queue", [0, 1])
def test_a_choice_of_queues(
    netns: NetNS,
    engine: str,
    owner: tuple[ExitStack, list[int]],
    fill: Callable[[], None],
    queue: int,
) -> None:
    close, fds = owner
    leave(fds[0], tun.TUNSETSTEERINGEBPF, queue)
    fill()
    assert [read_all(fd) for fd in fds] == [FRAMES * (q == queue) for q in range(2)]
    close.close()
    with rtap.open("p0", netns=netns, engine=engine, queues=2) as dev:
        fill()
        got = [len(dev.rx_burst(q, 64)) for q in range(2)]
        assert sum(got) == FRAMES
        assert min(got) > 0


def test_both(
    netns: NetNS, engine: str, owner: tuple[ExitStack, list[int]], fill: Callable[[], None]
) -> None:
    """The device has one queue, for which the steering program makes no difference."""
    close, fds = owner
    leave(fds[0], tun.TUNSETSTEERINGEBPF, 1)
    leave(fds[0], tun.TUNSETFILTEREBPF, 0)
    fill()
    assert sum(map(read_all, fds)) == 0
    close.close()
    for _ in range(2):
        with rtap.open("p0", netns=netns, engine=engine) as dev:
            fill()
            assert len(dev.rx_burst(0, 64)) == FRAMES
