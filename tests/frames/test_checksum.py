# SPDX-License-Identifier: BSD-3-Clause
"""The Internet checksum: against a simple reference, against published values, over chains."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from guard import Guard
from hypothesis import given
from hypothesis import strategies as st

import rtap
from rtap import Burst, Mempool, offload

LENGTHS = range(9002)


def reference(data: bytes | memoryview) -> int:
    """RFC 1071 word by word: the sum, folded and not complemented."""
    data = bytes(data)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1]))
    if len(data) & 1:
        total += data[-1] << 8
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def random_bytes(n: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(n)


def test_the_reference_knows_the_example_of_rfc_1071() -> None:
    assert reference(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2


# ---- published values

PUBLISHED = {
    # RFC 1071, section 3
    "rfc1071": (bytes.fromhex("0001f203f4f5f6f7"), 0xDDF2),
    # values from tailscale's tests of its tun checksum
    "fe x 1282": (b"\xfe" * 1282, 0x7C7C),
    "fe x 65535": (b"\xfe" * 65535, 0x7E81),
    "ff x 65535": (b"\xff" * 65535, 0xFF00),
    # the usual worked example of an IPv4 header checksum, whose field is b861
    "ipv4": (bytes.fromhex("45000073000040004011 0000c0a80001c0a800c7"), 0x479E),
    "nothing": (b"", 0),
    "one byte": (b"\x01", 0x0100),
    "two": (b"\x12\x34", 0x1234),
    "zeros": (bytes(1500), 0),
    "ones": (b"\xff" * 1500, 0xFFFF),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    data, expected = PUBLISHED[name]
    assert offload.partial(data) == expected
    assert offload.checksum(data) == expected ^ 0xFFFF


# ---- lengths and patterns

#: Patterns that carry at every step, at none, and in every place of a word.
PATTERNS = {
    "random": random_bytes(9001 + 64),
    "ones": b"\xff" * (9001 + 64),
    "fe": b"\xfe" * (9001 + 64),
    "80": b"\x80" * (9001 + 64),
    "00ff": b"\x00\xff" * 4600,
    "ff00": b"\xff\x00" * 4600,
    "ffff0001": b"\xff\xff\x00\x01" * 2300,
    "00000000ffffffff": b"\x00\x00\x00\x00\xff\xff\xff\xff" * 1150,
    "ffffffff00000001": b"\xff\xff\xff\xff\x00\x00\x00\x01" * 1150,
}


@pytest.mark.parametrize("name", PATTERNS)
def test_all_lengths(name: str) -> None:
    data = PATTERNS[name]
    view = memoryview(data)
    step = 1 if name == "random" else 7
    for n in LENGTHS[::step]:
        assert offload.partial(view[:n]) == reference(view[:n]), n


def test_all_lengths_by_running_sums() -> None:
    """Every length again, at every alignment, with the reference sum extended by a word a step."""
    data = PATTERNS["random"]
    view = memoryview(data)
    for start in range(9):
        even = 0
        for n in LENGTHS:
            got = offload.partial(view[start : start + n])
            if n & 1:
                assert got == offload.partial(bytes([data[start + n - 1], 0]), even), (start, n)
            elif n:
                even += data[start + n - 2] << 8 | data[start + n - 1]
                assert got % 0xFFFF == even % 0xFFFF, (start, n)


def test_nothing_behind_the_bytes_is_read() -> None:
    guard = Guard(1 << 14)
    for n in [*range(300), 1499, 1500, 4095, 4096, 9001]:
        data = random_bytes(n, n)
        assert offload.partial(guard.put(data)) == reference(data)


@pytest.mark.parametrize("n", [1 << 16, (1 << 20) + 3, (1 << 24) + 5])
def test_long(n: int) -> None:
    data = np.frombuffer(random_bytes(n), np.uint8)
    words = np.frombuffer(data[: n & ~1].tobytes(), ">u2")
    total = int(words.sum(dtype=np.uint64)) + (int(data[-1]) << 8 if n & 1 else 0)
    assert offload.partial(data) % 0xFFFF == total % 0xFFFF


CLONES = {"default": [], "avx2": ["-mavx2"], "x86-64-v4": ["-march=x86-64-v4"]}


@pytest.mark.parametrize("name", CLONES)
def test_every_version_of_the_loop(name: str, tmp_path: Path) -> None:
    """Versions that the dynamic linker does not choose on this processor are called directly."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    asked = ["gcc", "-dM", "-E", "-x", "c", os.devnull]
    macros = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    if CLONES[name] and "#define __x86_64__ 1" not in macros:
        pytest.skip("needs x86-64: the loop has one version on other architectures")
    flags = Path("/proc/cpuinfo").read_text()
    if CLONES[name] and {"avx2": " avx2 ", "x86-64-v4": " avx512vl "}[name] not in flags:
        pytest.skip(f"this processor has no {name}")
    source = tmp_path / "clone.c"
    source.write_text(
        '#include "rtap_checksum.h"\n'
        "uint32_t sum(const uint8_t *p, size_t n) { return rtap_sum16(p, n); }\n"
    )
    library = tmp_path / "clone.so"
    command = ["gcc", "-O3", "-shared", "-fPIC", "-DRTAP_NO_CLONES", *CLONES[name]]
    subprocess.run(
        [*command, f"-I{rtap.get_include()}", str(source), "-o", str(library)], check=True
    )
    function = ctypes.CDLL(str(library)).sum
    function.restype = ctypes.c_uint32
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    for pattern in PATTERNS.values():
        for n in [*range(400), 1500, 4097, 9001]:
            assert function(pattern, n) == reference(pattern[:n]), n


@given(st.binary(max_size=700), st.integers(0, 2**64 - 1))
def test_initial(data: bytes, initial: int) -> None:
    assert offload.partial(data, initial) == reference(initial.to_bytes(8, "big") + data)
    assert offload.checksum(data, initial) == offload.partial(data, initial) ^ 0xFFFF


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_in_two_parts(first: bytes, second: bytes) -> None:
    first = first[: len(first) & ~1]
    assert offload.partial(second, offload.partial(first)) == reference(first + second)


# ---- chains


@pytest.fixture(scope="module")
def pool() -> Mempool:
    """A pool of small slots, so that frames become chains with boundaries at odd places."""
    return Mempool(600, 65)


@given(st.binary(max_size=1000))
def test_chains(pool: Mempool, data: bytes) -> None:
    mbuf = pool.alloc(data)
    assert mbuf.nb_segs == max(1, -(-len(data) // 65))
    assert offload.partial(mbuf) == reference(data)


def test_a_burst(pool: Mempool) -> None:
    data = [random_bytes(n * 13, n) for n in range(40)]
    burst = pool.alloc_burst(40, data)
    for offset in (0, 1, 2, 14, 64, 65, 66, 499, 600):
        sums = offload.checksum_burst(burst, offset)
        assert sums.format == "H"
        assert list(sums) == [reference(frame[offset:]) ^ 0xFFFF for frame in data]
    assert [bytes(mbuf) for mbuf in burst] == data
    assert list(offload.checksum_burst(Burst())) == []


# ---- RFC 1624


def test_the_example_of_rfc_1624() -> None:
    assert offload.update(0xDD2F, b"\x55\x55", b"\x32\x85") == 0x0000


@given(
    st.binary(min_size=2, max_size=200),
    st.integers(0, 100),
    st.binary(min_size=2, max_size=40),
)
def test_update_is_a_new_sum(data: bytes, at: int, new: bytes) -> None:
    data = data[: len(data) & ~1] + b"\x45\x00"  # never all zeros, since no header is
    new = new[: len(new) & ~1]
    at = min(at & ~1, len(data) - 2)
    old = data[at : at + len(new)]
    after = data[:at] + new[: len(old)] + data[at + len(old) :]
    got = offload.update(offload.checksum(data), old, new[: len(old)])
    if reference(after):
        assert got == offload.checksum(after)


# ---- arguments


def test_buffers_of_all_kinds() -> None:
    data = random_bytes(1001)
    expected = reference(data)
    for buffer in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        assert offload.partial(buffer) == expected
    assert offload.checksum(struct.pack("!4H", 1, 2, 3, 4)) == 10 ^ 0xFFFF


def test_what_is_refused() -> None:
    with pytest.raises(TypeError):
        offload.checksum("text")  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        offload.checksum(memoryview(b"abcd")[::2])
    with pytest.raises(OverflowError):
        offload.checksum(b"", -1)
    with pytest.raises(OverflowError):
        offload.checksum(b"", 1 << 64)
    with pytest.raises(ValueError, match="checksum must be"):
        offload.update(0x10000, b"", b"")
    with pytest.raises(ValueError, match="offset must be"):
        offload.checksum_burst(Burst(), -1)
    with pytest.raises(TypeError):
        offload.checksum_burst([b""])  # type: ignore[arg-type]
    mbuf = Mempool(1).alloc(b"gone")
    mbuf.free()
    with pytest.raises(ValueError, match="freed"):
        offload.checksum(mbuf)
