# SPDX-License-Identifier: BSD-3-Clause
"""The build for AddressSanitizer and UBSan finds the faults that it is made for.

A write outside its slot stays inside the arena, which is one mapping. The sanitizer sees it only
because the pool poisons memory that no frame owns. A library compiled here writes to a given place.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from support import child_place

#: A frame of 60 bytes, its address, and a C function that writes one byte.
SCENE = """
import ctypes, sys
import rtap
pool = rtap.Mempool(4, data_room=100, headroom=64)
frame = pool.alloc(bytes(60))
start = ctypes.addressof(ctypes.c_char.from_buffer(frame.data))
write = ctypes.CFUNCTYPE(None, ctypes.c_size_t)(("plant", ctypes.CDLL(sys.argv[1])))
"""

PLANT = """
void plant(unsigned long at) { *(volatile char *)at = 1; }
"""


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with one function, which writes a byte; compiled like the build."""
    place = tmp_path_factory.mktemp("plant")
    (place / "plant.c").write_text(PLANT)
    library = place / "plant.so"
    command = ["gcc", "-shared", "-fPIC", "-fsanitize=address", "-o", str(library)]
    subprocess.run([*command, str(place / "plant.c")], check=True, timeout=60)
    return library


def outcome(plant: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCENE + code, str(plant)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **child_place(),
    )


@pytest.mark.parametrize("offset", [0, 59])
def test_a_write_into_the_frame_passes(plant: Path, offset: int) -> None:
    done = outcome(plant, f"write(start + {offset})")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("offset", [60, -1, 100, -65, 192])
def test_a_write_beside_the_frame_is_seen(plant: Path, offset: int) -> None:
    done = outcome(plant, f"write(start + {offset})")
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr


def test_a_write_into_a_slot_that_was_freed_is_seen(plant: Path) -> None:
    done = outcome(plant, "frame = None; write(start)")
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr


def test_the_build_has_both() -> None:
    """Both are in the process; a missing sanitizer would report nothing."""
    process = ctypes.CDLL(None)
    assert process.__asan_region_is_poisoned is not None
    with open("/proc/self/maps") as maps:
        assert "libubsan" in maps.read()
