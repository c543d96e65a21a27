# SPDX-License-Identifier: BSD-3-Clause
"""``rtap testpmd`` as a process of its own, driven at its prompt."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from clients import iperf3
from patience import patient
from rigs import MAC_A, MAC_B
from support import child_place, ip

from rtap.control.netns import NetNS

PROMPT = "testpmd> "

#: The two hosts of :func:`between`.
LEFT, RIGHT = "10.9.0.1", "10.9.0.2"
PORTS = ("--vdev=net_rtap0,iface=left0", "--vdev=net_rtap1,iface=right0")
PEERS = (f"--eth-peer=0,{MAC_A}", f"--eth-peer=1,{MAC_B}")
LRO = ("--rx-offloads=0x1c", "--tx-offloads=0x2c")


def argv(*options: str) -> list[str]:
    return [sys.executable, "-m", "rtap", "testpmd", *options]


def run(
    *options: str, ns: NetNS | None = None, script: str = "", timeout: float = 30
) -> subprocess.CompletedProcess[str]:
    """Runs testpmd to its end, with a script on standard input."""
    place: dict[str, Any] = {
        "input": script,
        "capture_output": True,
        "text": True,
        "timeout": patient(timeout),
        **child_place(),
    }
    if ns is not None:
        done: subprocess.CompletedProcess[str] = ns.run(argv(*options), **place)
        return done
    return subprocess.run(argv(*options), check=False, **place)


def report(*options: str, ns: NetNS | None = None) -> dict[str, Any]:
    """The output of ``--json``, from a run that succeeds and prints nothing else."""
    done = run(*options, "--json", ns=ns)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    out: dict[str, Any] = json.loads(done.stdout)
    return out


class Testpmd:
    """A running testpmd; standard output and standard error are read together."""

    __test__ = False

    def __init__(self, ns: NetNS | None, *options: str) -> None:
        place: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            **child_place(),
        }
        start = subprocess.Popen if ns is None else ns.popen
        self.process: subprocess.Popen[bytes] = start(argv(*options), **place)

    def until(self, pattern: str, timeout: float = 20) -> str:
        """The output up to a match of the pattern."""
        assert self.process.stdout is not None
        seen, deadline = b"", time.monotonic() + patient(timeout)
        while not re.search(pattern.encode(), seen):
            left = max(0, deadline - time.monotonic())
            assert select.select([self.process.stdout], [], [], left)[0], seen.decode()
            piece = os.read(self.process.stdout.fileno(), 65536)
            assert piece, f"it has ended: {seen.decode()}"
            seen += piece
        return seen.decode()

    def prompt(self) -> str:
        return self.until(re.escape(PROMPT) + "$").removesuffix(PROMPT)

    def say(self, line: str) -> str:
        """Gives a command and returns its output."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return self.prompt()

    def end(self, signum: int = signal.SIGINT, timeout: float = 20) -> tuple[int, str]:
        """Sends a signal; returns the exit status and the last output."""
        self.process.send_signal(signum)
        out, _ = self.process.communicate(timeout=patient(timeout))
        return self.process.returncode, out.decode()


@contextlib.contextmanager
def attended(ns: NetNS | None, *options: str) -> Iterator[Testpmd]:
    """A testpmd at its prompt."""
    with unattended(ns, *options, "-i") as pmd:
        pmd.prompt()
        yield pmd


@contextlib.contextmanager
def unattended(ns: NetNS | None, *options: str) -> Iterator[Testpmd]:
    """A testpmd that forwards at once, without a prompt."""
    pmd = Testpmd(ns, *options)
    try:
        yield pmd
    finally:
        pmd.process.kill()
        pmd.process.communicate()


def numbers(text: str) -> dict[str, int]:
    """The sums of the accumulated forward statistics in the output, by name."""
    last = text[text.rindex("Accumulated forward statistics") :]
    return {name: int(n) for name, n in re.findall(r"((?:[RT]X|Bad)-[a-z\d-]+): (\d+)", last)}


class Between:
    """A testpmd between two hosts, at its prompt."""

    def __init__(self, pmd: Testpmd, left: NetNS, right: NetNS) -> None:
        self.pmd, self.left, self.right = pmd, left, right

    def iperf3(self, seconds: int = 1) -> float:
        """The bytes that one TCP stream carried from left to right."""
        if shutil.which("iperf3") is None:
            pytest.skip("needs iperf3")
        options = ("-t", str(seconds), "--connect-timeout", "5000")
        end, _ = iperf3(self.left, self.right, RIGHT, *options)
        received: float = end["sum_received"]["bytes"]
        return received


@contextlib.contextmanager
def between(netns: NetNS, netns2: NetNS, *options: str) -> Iterator[Between]:
    """testpmd whose interfaces are moved to two hosts, one address each."""
    with NetNS() as middle, attended(middle, *PORTS, *options) as pmd:
        for ns, ifname, mac, address in (
            (netns, "left0", MAC_A, LEFT),
            (netns2, "right0", MAC_B, RIGHT),
        ):
            ip(middle, "link", "set", ifname, "netns", ns.path)
            ip(ns, "link", "set", ifname, "address", mac)
            ip(ns, "addr", "add", f"{address}/24", "dev", ifname)
            ip(ns, "link", "set", ifname, "up")
        yield Between(pmd, netns, netns2)
