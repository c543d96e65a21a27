# SPDX-License-Identifier: BSD-3-Clause
"""Mixed traffic of real programs, steered by Match.

Each target must get the frames that tcpdump and tshark select from a capture of all traffic.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from captures import tcpdump_says, tshark_says
from clients import iperf3, listening
from odd_frames import ODD
from steering import (
    CLIENT,
    MAIN,
    NAMES,
    OTHER6,
    PREFIX6,
    RULES,
    SERVER,
    SERVER6,
    TAGGED,
    TAGGED_SERVER,
    UNHEARD,
    WEB,
    Steered,
    dealt_out,
    in_words,
    tagged,
)
from support import PacketSocket, Task, eventually, ping, skip_without_devices

from rtap import NetNS

PROGRAMS = ("tcpdump", "tshark", "iperf3", "ping")
pytestmark = [
    pytest.mark.root,
    *(pytest.mark.skipif(shutil.which(name) is None, reason=f"needs {name}") for name in PROGRAMS),
]

PAGE = b"a page of twenty thousand bytes ".ljust(20000, b".")


@contextlib.contextmanager
def steered(engine: str, directory: Path) -> Iterator[Steered]:
    skip_without_devices()
    with ExitStack() as stack:
        yield Steered(stack, engine, directory)


def differences(wanted: list[list[bytes]], got: list[list[bytes]]) -> list[str]:
    """Frames that a target has but should not, and frames that it lacks."""
    found = []
    for n, (right, actual) in enumerate(zip(wanted, got, strict=True)):
        found += [f"{n} lacks {in_words(f)}" for f in Counter(right) - Counter(actual)]
        found += [f"{n} has {in_words(f)}" for f in Counter(actual) - Counter(right)]
    return found


# ---- programs


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET if "." in address else socket.AF_INET6


def udp(ns: NetNS, source: str, port: int = 0) -> socket.socket:
    s = ns.call(socket.socket, family(source), socket.SOCK_DGRAM)
    s.settimeout(10)
    s.bind((source, port))
    return s


def answer(server: socket.socket) -> None:
    """Sends everything back until it receives something empty."""
    while True:
        data, peer = server.recvfrom(1 << 16)
        if not data:
            return
        server.sendto(data.upper(), peer)


def refused(ns: NetNS, address: str, port: int) -> None:
    """A connection that fails without any data."""
    with ns.call(socket.socket, family(address), socket.SOCK_STREAM) as s:
        s.settimeout(0.05)
        with pytest.raises(TimeoutError):
            s.connect((address, port))


@contextlib.contextmanager
def answering(ns: NetNS, port: int) -> Iterator[None]:
    with udp(ns, "::", port) as server:
        task = Task(answer, server)
        yield
        with udp(ns, "::1") as last:
            last.sendto(b"", ("::1", port))
        task.result()


def ask(ns: NetNS, address: str, question: bytes, source: str = "", port: int = 0) -> None:
    with udp(ns, source or ("0.0.0.0" if "." in address else "::"), port) as s:
        s.sendto(question, (address, 53))
        assert s.recv(1 << 16) == question.upper()


@contextlib.contextmanager
def serving(ns: NetNS, port: int, directory: Path) -> Iterator[None]:
    (directory / "page").write_bytes(PAGE)
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "::"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with ns.popen(command, cwd=directory, **quiet) as process:
        try:
            eventually(lambda: listening(ns, port), "the server listens", 20)
            yield
        finally:
            process.kill()


def fetch(ns: NetNS, address: str, port: int) -> bytes:
    def body() -> bytes:
        connection = http.client.HTTPConnection(address, port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/page")
            return connection.getresponse().read()

    page: bytes = ns.call(body)
    return page


def everything(rig: Steered, directory: Path) -> None:
    """Runs clients of all kinds; those meant to be served are served."""
    client = rig.client
    rig.give_addresses()
    ping(client, SERVER)
    ping(client, SERVER6)
    ping(client, SERVER, "-s4000")
    ping(client, OTHER6, "-s3000")
    ping(client, f"{PREFIX6}::2")
    with answering(rig.hosts[NAMES], 53):
        for n in range(20):
            ask(client, SERVER, b"who is %d" % n)
            ask(client, SERVER6, b"who is %d" % n)
    # Fragments have no ports, so MAIN gets them.
    with answering(rig.hosts[MAIN], 53):
        ask(client, SERVER, b"a long question" * 300)
        ask(client, SERVER6, b"a long question" * 300)
    # The last rule that matches decides.
    with answering(rig.hosts[WEB], 53):
        ask(client, SERVER, b"from a port of its own", CLIENT, 20500)
    for port in (80, 88):
        with serving(rig.hosts[WEB], port, directory):
            assert fetch(client, SERVER, port) == PAGE
            assert fetch(client, SERVER6, port) == PAGE
    with serving(rig.hosts[MAIN], 8080, directory):
        assert fetch(client, SERVER, 8080) == PAGE
    for address in (SERVER, SERVER6):
        iperf3(client, rig.hosts[MAIN], address, "-n", "1M", "-P", "2")
        iperf3(client, rig.hosts[MAIN], address, "-u", "-l", "1000", "-b", "10M", "-n", "100K")
        refused(client, address, 23)
    with udp(client, UNHEARD) as s:
        for _ in range(10):
            s.sendto(b"can you hear me", (SERVER, 53))
    with tagged(client, "a0"):
        with udp(client, TAGGED) as s:
            for port in range(45, 60):
                s.sendto(b"an unanswered question", (TAGGED_SERVER, port))
        for port in (22, 23, 80):
            refused(client, TAGGED_SERVER, port)
        client.run(["ping", "-c", "3", "-i", "0.01", "-W", "0.01", TAGGED_SERVER])


def test_real_programs(engine: str, tmp_path: Path) -> None:
    capture = tmp_path / "all.pcap"
    with steered(engine, tmp_path) as rig:
        everything(rig, tmp_path)
        before, after = rig.captured(capture)
    for taken in (
        [tcpdump_says(capture, rule.with_tags) for rule in RULES],
        [tshark_says(capture, rule.tshark) for rule in RULES],
    ):
        unused = [rule.match for rule, frames in zip(RULES, taken, strict=True) if not frames]
        assert unused == [
            rule.match for rule in RULES if rule.match.get("protocol") in ("sctp", 47)
        ]
        assert differences(dealt_out(taken, before), after) == []


def test_odd_frames(engine: str, tmp_path: Path) -> None:
    capture = tmp_path / "all.pcap"
    with steered(engine, tmp_path) as rig:
        with PacketSocket(rig.client, "a0") as out:
            for frame in ODD:
                out.send(frame)
        before, after = rig.captured(capture)
    assert before == ODD
    taken = [tshark_says(capture, rule.tshark) for rule in RULES]
    assert all(taken)
    assert differences(dealt_out(taken, before), after) == []
