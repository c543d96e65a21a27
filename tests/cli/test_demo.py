# SPDX-License-Identifier: BSD-3-Clause
"""``rtap demo`` on real traffic: what it reports, and that it leaves nothing behind.

No speed is asserted: the machine is shared, and the benchmarks measure speed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console
from support import skip_without_devices

from rtap.cli.display import WARM_UP, Display, Lines, RichTable, choose
from rtap.cli.errors import CommandError
from rtap.cli.tcp import Builtin, find_client
from rtap.control.netns import NetNS, call_in

pytestmark = pytest.mark.root

SO_NETNS_COOKIE = 71  # asm-generic/socket.h
Namespaces = dict[str, int]


@pytest.fixture(autouse=True)
def _devices() -> None:
    skip_without_devices()


class Demo:
    """A running ``rtap demo`` whose processes are identified by their environment."""

    def __init__(self, *argv: str) -> None:
        self._mark = f"RTAP_TEST_DEMO={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rtap", "demo", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {name: value},
        )

    def pids(self) -> set[int]:
        """Its process and those that it started, if they still run."""
        found = set()
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as f:
                    if self._mark.encode() in f.read().split(b"\0"):
                        found.add(int(entry))
        return found

    def until_running(self) -> Namespaces:
        """Wait for the first live figure; return the demo's own network namespaces."""
        assert self.process.stdout is not None
        seen = ""
        deadline = time.monotonic() + 20
        while "..." not in seen:
            left = deadline - time.monotonic()
            assert select.select([self.process.stdout], [], [], max(0, left))[0], seen
            line = self.process.stdout.readline()
            assert line, f"the demo has ended: {seen}"
            seen += line
        while True:  # a slice may end at this moment
            with contextlib.suppress(OSError):
                found = dict(identify(f"/proc/{pid}/ns/net") for pid in self.children())
                if len(found) == 2:  # the client's and the server's
                    return found
            assert time.monotonic() < deadline

    def children(self) -> set[int]:
        return self.pids() - {self.process.pid}

    def finish(self, timeout: float = 40) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def gone(self, namespaces: Namespaces) -> bool:
        """Whether all its processes, and all holders of `namespaces`, end within two seconds."""
        deadline = time.monotonic() + 2
        while self.pids() or holders(namespaces):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def identify(link: str) -> tuple[str, int]:
    """The text of a link to a network namespace, and the namespace's cookie, which is unique.

    The number in the link is reused once its namespace is gone, perhaps by a concurrent test.
    """
    with open(link) as file:
        return os.readlink(f"/proc/self/fd/{file.fileno()}"), call_in(file.fileno(), cookie)


def cookie() -> int:
    with socket.socket(socket.AF_UNIX) as any_socket:
        number = any_socket.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        return int.from_bytes(number, sys.byteorder)


def holders(namespaces: Namespaces) -> set[str]:
    """Processes that are in one of those network namespaces, or have a descriptor of one."""
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        links = [f"/proc/{entry}/ns/net"]
        with contextlib.suppress(OSError):
            links += [f"/proc/{entry}/fd/{fd}" for fd in os.listdir(f"/proc/{entry}/fd")]
        for link in links:
            with contextlib.suppress(OSError):
                if os.readlink(link) in namespaces and identify(link) in namespaces.items():
                    found.add(link)
    return found


@contextlib.contextmanager
def demo(*argv: str) -> Iterator[Demo]:
    running = Demo(*argv)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.wait()
        for stream in (running.process.stdout, running.process.stderr):
            if stream is not None:
                stream.close()


def report(*argv: str) -> dict[str, Any]:
    with demo("--seconds", "1", "--pairs", "3", "--json", *argv) as running:
        status, out, err = running.finish()
        assert (status, err) == (0, "")
        assert running.gone({})
    result: dict[str, Any] = json.loads(out)
    assert out.count("\n") == 1
    return result


def is_sound(result: dict[str, Any]) -> None:
    """Checks that hold for any report of three pairs."""
    assert result["throughput_gbps"] > 0
    assert result["veth_gbps"] > 0
    assert result["ratio"] > 0
    assert result["rx_packets"] > 0
    assert result["tx_packets"] == result["rx_packets"]
    assert result["errors"] == 0
    assert result["engine"] in ("uring", "syscall")
    assert result["engine_reason"]
    assert len(result["pairs"]) == 3
    for key in ("rtap_gbps", "veth_gbps", "ratio"):
        values = sorted(pair[key] for pair in result["pairs"])
        whole = {"rtap_gbps": "throughput_gbps"}.get(key, key)
        assert result[whole] == values[1]  # the median
    for pair in result["pairs"]:
        assert pair["ratio"] == pytest.approx(pair["rtap_gbps"] / pair["veth_gbps"], rel=0.01)
    assert result["kernel"] == os.uname().release


def test_json_report() -> None:
    result = report()
    is_sound(result)
    assert result["offload"] is True
    assert result["client"] == find_client("auto").name
    assert (result["seconds"], result["mtu"]) == (1, 1500)
    # Large frames came through whole: far fewer frames than the MTU alone would give.
    n_bytes = sum(pair["rtap_gbps"] for pair in result["pairs"]) * 1e9 / 8
    packets = sum(pair["rtap_packets_per_second"] for pair in result["pairs"])
    assert packets < n_bytes / 1500


def test_builtin_client_without_offloads_on_the_syscall_engine() -> None:
    result = report("--client", "builtin", "--no-offload", "--engine", "syscall", "--mtu", "1400")
    is_sound(result)
    assert result["client"] == "builtin"
    assert result["engine"] == "syscall"
    assert result["offload"] is False
    assert result["mtu"] == 1400


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(signum: signal.Signals) -> None:
    with demo("--seconds", "30") as running:
        namespaces = running.until_running()
        assert len(namespaces) == 2
        running.process.send_signal(signum)
        status, out, err = running.finish(timeout=10)
        assert status == 128 + signum
        assert err == f"rtap demo: stopped by {signum.name}\n"
        assert "median" not in out
        assert running.gone(namespaces)


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    with demo("--seconds", "30") as running:
        namespaces = running.until_running()
        assert running.process.stdout is not None
        assert running.process.stderr is not None
        running.process.stdout.close()
        assert running.process.wait(10) == 128 + signal.SIGPIPE
        assert running.process.stderr.read() == ""
        running.process.stderr.close()
        assert running.gone(namespaces)


def test_a_killed_demo_leaves_nothing() -> None:
    with demo("--seconds", "30", "--client", "builtin") as running:
        namespaces = running.until_running()
        running.process.kill()
        running.process.wait(5)
        assert running.gone(namespaces)


def test_a_failed_slice_is_an_error_and_no_figure() -> None:
    with demo("--seconds", "30") as running:
        namespaces = running.until_running()
        while running.process.poll() is None:
            for pid in running.children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        status, out, err = running.finish(timeout=20)
        assert status == 1
        assert re.fullmatch(r"rtap demo: the \w+ (client|server) (failed|did not start): .+\n", err)
        assert "median" not in out
        assert running.gone(namespaces)


class Lonely:
    """A namespace whose server cannot be reached from the other one."""

    name = "nothing"
    address = "127.0.0.1"

    def __init__(self, client: NetNS, server: NetNS) -> None:
        self.client, self.server = client, server


def test_a_client_that_cannot_connect_is_an_error() -> None:
    with NetNS() as client, NetNS() as server, pytest.raises(CommandError, match="refused"):
        Builtin().run(Lonely(client, server), 1, lambda: None)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# ---- output


SLICES = (
    (WARM_UP, "rtap", 9.0, 20_000),
    (WARM_UP, "veth", 10.0, 30_000),
    (0, "rtap", 12.34, 34_567),
    (0, "veth", 16.0, 40_000),
    (1, "rtap", 11.0, 33_333),
)


def show(display: Display) -> None:
    """Runs a measurement that is interrupted after one and a half pairs."""
    with display:
        display.begin("the title", 3)
        for pair, path, gbps, pps in SLICES:
            display.live(pair, path, gbps / 2, pps / 2)
            display.done(pair, path, gbps, pps)


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    display = choose(json=False)
    assert type(display) is Lines
    show(display)
    display.summary(["the end"])
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("the title", "the end")
    assert lines[1].split() == ["warm-up", "rtap", "4.50", "Gb/s", "10,000", "packets/s", "..."]
    assert lines[6].split() == ["1/3", "rtap", "12.34", "Gb/s", "34,567", "packets/s"]
    assert len(lines) == 2 + 2 * len(SLICES)


def test_lines_of_long_slices_are_few() -> None:
    assert Lines().interval(1) <= 0.5
    assert Lines().interval(600) == 60


def test_json_shows_nothing_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    display = choose(json=True)
    show(display)
    display.summary(["the end"])
    assert capsys.readouterr() == ("", "")


def test_table_on_a_terminal() -> None:
    out = io.StringIO()
    show(RichTable(Console(file=out, force_terminal=True, width=100, color_system=None)))
    text = out.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back
    last = text[text.rindex("rtap Gb/s") :]
    rows = [line.split() for line in last.splitlines()]
    assert ["1/3", "12.34", "34,567", "16.00", "40,000", "0.77"] in rows
    assert ["2/3", "11.00", "33,333"] in rows
    assert ["3/3"] in rows


def test_ctrl_c_on_a_terminal() -> None:
    """The terminal sends SIGINT to its foreground processes; the children are not among them."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-m", "rtap", "demo", "--seconds", "30"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    seen = b""
    asked = False
    try:
        deadline = time.monotonic() + 20
        while select.select([ours], [], [], max(0, deadline - time.monotonic()))[0]:
            try:
                data = os.read(ours, 65536)
            except OSError:  # EIO: the other end is closed
                break
            seen += data
            # The table is no longer empty: the warm-up has figures.
            if not asked and re.search(rb"warm-up.{0,60}\d+\.\d\d", seen):
                os.write(ours, b"\x03")
                asked = True
        assert process.wait(5) == 130, seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert seen.endswith(b"rtap demo: stopped by SIGINT\r\n")
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h") == 1
