# SPDX-License-Identifier: BSD-3-Clause
"""Captures with tcpdump, and which frames a filter takes according to tcpdump and tshark."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from patience import patient

from rtap import NetNS

_MAGIC, _LITTLE = 0xA1B2C3D4, struct.Struct("<IIII")
#: Each frame takes as much room of tcpdump's buffer as the longest (-s) would, so that about 1900
#: wait there (-B, in KiB) while tcpdump does not get to run.
_ROOM = ("-s", "69632", "-B", "131072")
#: A frame is judged by its own bytes, not by earlier frames.
_PREFERENCES = ("ip.defragment:FALSE", "ipv6.defragment:FALSE", "tcp.desegment_tcp_streams:FALSE")


def records(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The frames of a pcap file: each whole record, and the frame in it.

    While the file is being written, its last complete frame is the end.
    """
    data = path.read_bytes()
    if len(data) < 24:
        return
    assert struct.unpack_from("<I", data)[0] == _MAGIC
    at = 24
    while at + 16 <= len(data):
        _, _, kept, length = _LITTLE.unpack_from(data, at)
        assert kept == length, "a frame was cut"
        end = at + 16 + kept
        if end > len(data):
            return
        yield data[at:end], data[at + 16 : end]
        at = end


def frames_of(path: Path) -> list[bytes]:
    return [frame for _, frame in records(path)]


class Capture:
    """tcpdump on an interface, of frames that go "out" of the kernel's stack or come "in"."""

    def __init__(self, ns: NetNS, ifname: str, way: str, path: Path) -> None:
        self.path = path
        how = ["-n", "-U", "--immediate-mode", *_ROOM, "-Z", "root", "-Q", way]
        self._process = ns.popen(
            ["tcpdump", *how, "-i", ifname, "-w", str(path)], stderr=subprocess.PIPE, text=True
        )
        said = ""
        while "listening on" not in said:
            assert self._process.stderr is not None
            line = self._process.stderr.readline()
            assert line, f"tcpdump has ended: {said}"
            said += line

    def frames(self) -> list[bytes]:
        """All frames captured until now."""
        return frames_of(self.path)

    def close(self) -> None:
        self._process.terminate()
        _, said = self._process.communicate(timeout=patient(20))
        assert "\n0 packets dropped by kernel" in said, said


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def tcpdump_says(path: Path, expression: str) -> set[int]:
    """Positions in a capture of the frames that a pcap-filter(7) expression takes."""
    taken = path.with_suffix(".taken")
    _run("tcpdump", "-n", "-Z", "root", "-r", str(path), "-w", str(taken), expression)
    # Records are compared with their times, so no two frames are the same.
    left = [record for record, _ in records(taken)][::-1]
    found = set()
    for n, (record, _) in enumerate(records(path)):
        if left and record == left[-1]:
            found.add(n)
            left.pop()
    assert not left
    return found


def tshark_says(path: Path, expression: str) -> set[int]:
    """The same for a wireshark-filter(4) expression."""
    options = [word for preference in _PREFERENCES for word in ("-o", preference)]
    out = _run(
        *("tshark", "-n", "-r", str(path), *options),
        *("-Y", expression, "-T", "fields", "-e", "frame.number"),
    )
    return {int(line) - 1 for line in out.split()}
