# SPDX-License-Identifier: BSD-3-Clause
"""The package as a user sees it: cimported by a user's module, and checked by a type checker."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support import child_environment

import rtap
from rtap import Burst, Mempool

PACKAGE = Path(rtap.__file__).resolve().parent

USER_MODULE = """
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from rtap.native cimport (
    Burst, Mbuf, Mempool, mbuf_data, mbuf_free, mbuf_free_bulk, mbuf_read, mbuf_ref, mbuf_reset,
    mbuf_t, mbuf_tailroom, mbuf_write, pool_available, pool_get,
)


cdef uint64_t checksum(mbuf_t **v, Py_ssize_t n) noexcept nogil:
    cdef uint64_t total = 0
    cdef uint8_t byte
    cdef uint32_t offset
    cdef Py_ssize_t i
    for i in range(n):
        for offset in range(v[i].pkt_len):
            mbuf_read(v[i], offset, &byte, 1)
            total += byte
    return total


def sum_of_bytes(Burst burst not None):
    cdef uint64_t total
    with nogil:
        total = checksum(burst.v, burst.n)
    return total


def swap_addresses(Burst burst not None):
    cdef uint8_t a[6]
    cdef uint8_t b[6]
    cdef Py_ssize_t i
    for i in range(burst.n):
        mbuf_read(burst.v[i], 0, a, 6)
        mbuf_read(burst.v[i], 6, b, 6)
        mbuf_write(burst.v[i], 0, b, 6)
        mbuf_write(burst.v[i], 6, a, 6)


def facts(Mbuf mbuf not None):
    cdef mbuf_t *m = mbuf.alive()
    return m.pkt_len, m.data_len, m.nb_segs, m.refcnt, mbuf_data(m)[0], mbuf_tailroom(m)


def take_and_give_back(Mempool pool not None, uint32_t n):
    cdef mbuf_t **slots = <mbuf_t **>PyMem_Malloc(n * sizeof(mbuf_t *))
    cdef uint32_t got, left, i
    try:
        with nogil:
            got = pool_get(pool.p, slots, n)
            left = pool_available(pool.p)
            for i in range(got):
                mbuf_reset(slots[i])
            mbuf_free_bulk(slots, got)
    finally:
        PyMem_Free(slots)
    return got, left


def hold(Mbuf mbuf not None):
    mbuf_ref(mbuf.alive())


def let_go(Mbuf mbuf not None):
    mbuf_free(mbuf.alive())
"""

SETUP = """
import shlex
import subprocess

import rtap
from Cython.Build import cythonize
from setuptools import Extension, setup

flags = subprocess.run(["pkg-config", "--cflags", "liburing"], capture_output=True, text=True)
setup(
    name="user",
    ext_modules=cythonize(
        [
            Extension(
                name,
                [f"{name}.pyx"],
                include_dirs=[rtap.get_include()],
                extra_compile_args=["-O1", *shlex.split(flags.stdout)],
            )
            for name in ("user", "everything")
        ],
        # Else importing it would switch the GIL on.
        compiler_directives={"language_level": 3, "freethreading_compatible": True},
    ),
    script_args=["-q", "build_ext", "--inplace"],
)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project, built against this package."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "user.pyx").write_text(USER_MODULE)
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.pxd"))
    declared = sorted(".".join(path.parts) for path in paths)
    assert len(declared) > 30
    everything = "".join(f"cimport rtap.{name}\n" for name in declared)
    (folder / "everything.pyx").write_text(f"{everything}\nnames = {declared!r}\n")
    (folder / "build.py").write_text(SETUP)
    done = subprocess.run(
        [sys.executable, "build.py"],
        cwd=folder,
        # Cython searches sys.path for rtap's .pxd files, and an editable install may not be on it.
        env=child_environment() | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    return folder


def load(project: Path, name: str) -> ModuleType:
    (path,) = project.glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def user(project: Path) -> ModuleType:
    return load(project, "user")


def test_every_declaration_can_be_cimported(project: Path) -> None:
    assert "_core.pool" in load(project, "everything").names


def test_a_burst_read_without_the_gil(user: ModuleType) -> None:
    pool = Mempool(64, 64)
    data = [bytes([n]) * n for n in range(1, 60)] + [b"\xff" * 300]
    burst = pool.alloc_burst(10, data[-10:])
    assert user.sum_of_bytes(burst) == sum(map(sum, data[-10:]))
    assert user.sum_of_bytes(Burst()) == 0


def test_a_burst_written(user: ModuleType) -> None:
    pool = Mempool(8, 64)
    burst = pool.alloc_burst(4, b"aaaaaabbbbbbrest")
    user.swap_addresses(burst)
    assert [bytes(mbuf) for mbuf in burst] == [b"bbbbbbaaaaaarest"] * 4


def test_an_mbufs_fields(user: ModuleType) -> None:
    pool = Mempool(8, 64)
    mbuf = pool.alloc(b"x" * 100)
    assert user.facts(mbuf) == (100, 64, 2, 1, ord("x"), 0)
    user.hold(mbuf)
    assert mbuf.refcnt == 2
    user.let_go(mbuf)
    assert mbuf.refcnt == 1
    mbuf.free()
    with pytest.raises(Exception, match="free"):
        user.facts(mbuf)


def test_slots_taken_natively(user: ModuleType) -> None:
    pool = Mempool(8, 64)
    assert user.take_and_give_back(pool, 5) == (5, 3)
    assert user.take_and_give_back(pool, 50) == (8, 0)
    assert (pool.available, pool.in_use) == (8, 0)


def test_wrong_types_are_refused(user: ModuleType) -> None:
    things: list[object] = [None, [], "burst"]
    for call in (user.sum_of_bytes, user.facts, user.swap_addresses):
        for thing in things:
            with pytest.raises(TypeError):
                call(thing)


# ---- types


PROGRAM = """
from collections.abc import Iterator
from typing_extensions import assert_type

import rtap
from rtap import Burst, EthDev, MacAddr, Mbuf, Mempool, NetNS, RxOffload, Stats, Worker

def program(ns: NetNS) -> None:
    with rtap.open("t0", netns=ns, queues=2, rx_offloads=RxOffload.TCP_CKSUM, mac=b"xxxxxx") as dev:
        assert_type(dev, EthDev)
        burst = dev.rx_burst(0, timeout=None)
        assert_type(burst, Burst)
        assert_type(dev.tx_burst(0, burst), int)
        assert_type(dev.recv(timeout=1), bytes)
        assert_type(dev.send(bytearray(60)), bool)
        assert_type(dev.send(memoryview(b"")), bool)
        assert_type(dev.stats(), Stats)
        assert_type(dev.stats().q_ipackets, list[int])
        assert_type(dev.mac, MacAddr)
        dev.mac = "02:00:00:00:00:02"
        dev.mac = b"123456"
        dev.mtu = 1400
        assert_type(dev.info().rx_offloads, RxOffload)
        assert_type(dev.pool, Mempool)
        for mbuf in burst:
            assert_type(mbuf, Mbuf)
            assert_type(mbuf[0], int)
            assert_type(mbuf[0:6], bytes)
            mbuf[0:6] = b"123456"
            assert_type(mbuf.data, memoryview)
            mbuf.ol_flags |= rtap.MbufFlag.TX_IPV4
        assert_type(burst[0], Mbuf)
        assert_type(burst[1:], Burst)
        with Worker(cpu=0, wait="sleep") as worker:
            worker.forward((dev, 0), (dev, 1), on_full="retry")
            assert_type(worker.stats().drops, int)
    assert_type(rtap.probe("net_rtap0"), EthDev)
    assert_type(rtap.__version__, str)
    assert_type(rtap.get_include(), str)
    assert_type(ns.run(["true"]).returncode, int)
"""

MISTAKES = {
    "dev.rx_burst('0')": "arg-type",
    "dev.tx_burst(0, b'frame')": "arg-type",
    "dev.send('text')": "arg-type",
    "dev.pool = dev.pool": "misc",
    "rtap.open(queues=1.5)": "arg-type",
    "rtap.open(rx_offloads='LRO')": "arg-type",
    "rtap.open(nmae='t0')": "call-arg",
    "rtap.Mempool('8')": "arg-type",
    "rtap.colour": "attr-defined",
    "dev.info().mtu = 5": "misc",
    "rtap.Worker().forward(dev, dev)": "arg-type",
}


def test_types(tmp_path: Path) -> None:
    """A typical user's program type-checks, and a checker finds its mistakes."""
    pytest.importorskip("mypy")
    wrong = "\n".join(f"    {line}  # type: ignore[{code}]" for line, code in MISTAKES.items())
    file = tmp_path / "program.py"
    file.write_text(f"{PROGRAM}\n\ndef mistakes(dev: rtap.EthDev) -> None:\n{wrong}\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--cache-dir",
            str(tmp_path / "cache"),
            str(file),
        ],
        cwd=tmp_path,
        env=child_environment() | {"MYPYPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
