# SPDX-License-Identifier: BSD-3-Clause
"""The examples run, and the stages in all languages treat the same frames the same way."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from clients import iperf3
from patience import patient
from support import child_environment, ip
from veths import veth

from rtap import NetNS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")


def output(name: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected() -> str:
    """Of thirteen frames, the ten IPv4 ones with ports 1000 to 1009 and addresses swapped."""
    head = "02000000000b" + "02000000000a" + "0800" + "45" + "00" * 19
    lines = [f"{port % 2} {head}{port:04x}\n" for port in range(1000, 1010)]
    return "".join(lines) + "frames: 13\n"


@pytest.mark.parametrize("language", ["python", "ctypes", "cffi", "numba", "cython"])
def test_stages_are_alike(language: str) -> None:
    needs = {"cffi": "cffi", "numba": "numba", "cython": "Cython"}
    if language in needs:
        pytest.importorskip(needs[language])
    said = output(f"stage_{language}.py")
    assert said.endswith(expected()), said


@pytest.mark.root
def test_vpn(netns: NetNS, netns2: NetNS) -> None:
    """Two hosts with a path between them: ping, and TCP each way, through the example."""
    veth(netns, "v0", "v1", netns2)
    hosts = [(netns, "v0", 1), (netns2, "v1", 2)]
    for ns, name, n in hosts:
        ip(ns, "addr", "add", f"10.0.0.{n}/24", "dev", name)
    with contextlib.ExitStack() as stack:
        ends = []
        for ns, _, n in hosts:
            where = [f"10.0.0.{n}:5000", f"10.0.0.{3 - n}:5000", f"10.9.0.{n}/24"]
            end = stack.enter_context(
                ns.popen(
                    [sys.executable, str(EXAMPLES / "vpn.py"), *where],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=child_environment(),
                )
            )
            stack.callback(end.kill)
            ends.append(end)
        for n, end in enumerate(ends, 1):
            assert end.stdout is not None
            assert f"vpn0: 10.9.0.{n}/24" in end.stdout.readline()
        done = netns.run(
            ["ping", "-c3", "-i0.2", "-W5", "10.9.0.2"], capture_output=True, text=True
        )
        assert "3 received" in done.stdout, done.stdout
        for a, b, address in ((netns, netns2, "10.9.0.2"), (netns2, netns, "10.9.0.1")):
            _, received = iperf3(a, b, address, "-n", "20M")
            assert received["sum_received"]["bytes"] > 10 << 20
        for end in ends:
            end.terminate()
            said, _ = end.communicate(timeout=patient(20))
            assert end.returncode == 0
            assert len(said.splitlines()) == 2
