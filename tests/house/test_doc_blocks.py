# SPDX-License-Identifier: BSD-3-Clause
"""The code in the README and the docs does what the pages say.

Every ``pycon`` block is a doctest. A ``python`` block with ``<!-- runs -->`` in the line before it
is executed; with ``<!-- runs with NAME -->`` the text of ``SETUPS[NAME]`` comes first. The blocks
of a page run in order, as one program, in a network namespace of its own. All other blocks must
compile.
"""

from __future__ import annotations

import ast
import doctest
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from support import (
    PacketSocket,
    child_environment,
    frame,
    links,
    skip_without_devices,
)

from rtap import NetNS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source tree")

FENCE = re.compile(
    r"^(?:<!-- runs(?: with (?P<setup>[\w ]+))? -->\n(?P<runs>))?"
    r"```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.M | re.S,
)

SETUPS = {
    # A frame waits in the device: the kernel's ARP request for the datagram's destination.
    "a device": """
        import rtap, socket, subprocess
        dev = rtap.open("tap0")
        subprocess.run(["ip", "addr", "add", "10.0.0.1/24", "dev", "tap0"], check=True)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.sendto(b"hello", ("10.0.0.2", 9))
        """,
    "frames": """
        import rtap
        from rtap import offload
        ethernet = bytes.fromhex("02000000000b02000000000a0800")
        header = bytearray.fromhex("4500005400000000401100000a0000010a000002")
        header[10:12] = offload.checksum(header).to_bytes(2, "big")
        frame = ethernet + header + bytes.fromhex("0009000900400000") + bytes(56)
        hdr = offload.VnetHdr(
            flags=offload.VnetHdr.NEEDS_CSUM, gso_type=offload.VnetHdr.GSO_UDP_L4, gso_size=20,
            hdr_len=42, csum_start=34, csum_offset=6)
        data = hdr.pack() + frame
        pool = rtap.Mempool(64)
        burst = rtap.Burst([pool.alloc(frame)])
        """,
    "two queues": """
        import rtap
        dev = rtap.open("tap0", queues=2)
        other_pool = rtap.Mempool(512)
        """,
    "a worker": """
        import rtap
        a, b, c = (rtap.open(name) for name in ("a0", "b0", "c0"))
        worker = rtap.Worker()
        """,
}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    runs: bool
    setup: str

    def shifted(self) -> str:
        """The code, shifted to the page's line numbers."""
        return "\n" * self.line + self.code


def blocks(text: str, page: str) -> list[Block]:
    return [
        Block(
            page,
            text.count("\n", 0, found.start("code")),
            found["language"],
            found["code"],
            found["runs"] is not None,
            found["setup"] or "",
        )
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page.read_text(), page.name)]


def name(block: Block) -> str:
    return f"{block.page}:{block.line}"


def program(some: list[Block]) -> str:
    """A Python program of these blocks in order, whose tracebacks name the page's lines."""
    parts = []
    for block in some:
        if block.setup:
            parts.append(textwrap.dedent(SETUPS[block.setup]))
        parts.append(f"exec(compile({block.shifted()!r}, {block.page!r}, 'exec'), globals())\n")
    return "".join(parts)


def run_inside(code: str, stdin: str = "") -> str:
    with NetNS() as ns:
        done = ns.run(
            [sys.executable, "-c", code],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            env=child_environment(),
        )
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_blocks_are_found() -> None:
    """Checks this module's own parser."""
    text = "a\n\n```python\nx = 1\n```\n\n<!-- runs with a device -->\n```python\ny = 2\n```\n"
    plain, marked = blocks(text, "p")
    assert (plain.line, plain.code, plain.runs) == (3, "x = 1\n", False)
    assert (marked.line, marked.code, marked.runs, marked.setup) == (8, "y = 2\n", True, "a device")
    assert sum(block.runs for block in BLOCKS) > 12
    everything = "\n".join(page.read_text() for page in PAGES)
    unknown = re.findall(r"^<!--(?! runs(?: with [\w ]+)? -->\n```).*", everything, re.M)
    assert unknown == []
    with pytest.raises(AssertionError, match=r"p\", line 9[^Z]*ZeroDivisionError"):
        run_inside(program([marked._replace(code="1 / 0\n", setup="")]))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=name)
def test_code_compiles(block: Block) -> None:
    compile(block.shifted(), block.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", sorted({b.page for b in BLOCKS if b.language == "pycon"}))
def test_sessions_show_what_happens(page: str) -> None:
    pytest.importorskip("numpy")
    text = ""
    for block in (b for b in BLOCKS if b.page == page and b.language == "pycon"):
        text += "\n" * (block.line - text.count("\n")) + block.code
    test = doctest.DocTestParser().get_doctest(text, {}, page, page, 0)
    said: list[str] = []
    failed, tried = doctest.DocTestRunner().run(test, out=said.append)
    assert tried > 0
    assert failed == 0, "".join(said)


@pytest.mark.parametrize("page", sorted({b.page for b in BLOCKS if b.runs}))
def test_blocks_run(page: str) -> None:
    skip_without_devices()
    run_inside(program([b for b in BLOCKS if b.page == page and b.runs]))


def readme(number: int) -> Block:
    return [b for b in BLOCKS if b.page == "README.md" and b.language == "python"][number]


def test_the_first_program_is_an_echo() -> None:
    skip_without_devices()
    with NetNS() as ns:
        echo = ns.popen(
            [sys.executable, "-u", "-c", readme(0).code],
            stdout=subprocess.PIPE,
            env=child_environment(),
        )
        try:
            assert echo.stdout is not None
            assert echo.stdout.readline().startswith(b"tap0 "), "it says that its device is open"
            with PacketSocket(ns, "tap0") as wire:
                wire.send(sent := frame(1))
                assert wire.frames(1, 20) == [sent[6:12] + sent[0:6] + sent[12:]]
        finally:
            echo.send_signal(signal.SIGINT)
            echo.communicate(timeout=20)
        assert links(ns) == ["lo"]


def test_the_second_program_forwards_until_enter() -> None:
    skip_without_devices()
    assert "forwarding" in run_inside(readme(1).code, "\n")
