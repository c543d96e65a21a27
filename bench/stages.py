# SPDX-License-Identifier: BSD-3-Clause
"""Measures the cost of stages: a worker over net_null, where only bursts and stages take time.

Each subject is a worker with one route and one stage, and the worker counts the frames. Beside the
built-in stages there is the address swap of ``MacSwap`` as a user's own stage: in C, numba, Cython
and Python.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.closed_loop import thread_cpu_ns
from bench.measure import Sample, Subject, alternate, bench_cpu, write_report
from bench.worker_idle import udp

C_SWAP = """
#include <string.h>
#include <rtap_stage.h>
int swap(void *ctx, struct rtap_burst *burst)
{
	uint8_t kept[6];
	for (uint32_t i = 0; i < burst->n; i++) {
		uint8_t *p = burst->data[i];
		if (burst->len[i] < 12)
			continue;
		memcpy(kept, p, 6);
		memcpy(p, p + 6, 6);
		memcpy(p + 6, kept, 6);
	}
	return 0;
}
"""

CYTHON_SWAP = """
# cython: language_level=3, freethreading_compatible=True
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy
from rtap.stage cimport rtap_burst

cdef api int swap(void *ctx, rtap_burst *burst) noexcept nogil:
    cdef uint8_t kept[6]
    cdef uint8_t *p
    cdef uint32_t i
    for i in range(burst.n):
        if burst.len[i] < 12:
            continue
        p = burst.data[i]
        memcpy(kept, p, 6)
        memcpy(p, p + 6, 6)
        memcpy(p + 6, kept, 6)
    return 0
"""


def compile_c(directory: str, source: str, name: str, *flags: str) -> str:
    """Compile C code into a shared library and return its path."""
    import rtap

    path = Path(directory) / f"{name}.c"
    path.write_text(source)
    target = str(Path(directory) / f"{name}.so")
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    include = [f"-I{rtap.get_include()}", *flags]
    subprocess.run([*compiler, "-O3", "-shared", "-fPIC", *include, "-o", target, path], check=True)
    return target


def cython_swap(directory: str) -> Any:
    """The capsule of the Cython function."""
    import rtap

    source = Path(directory) / "cython_swap.pyx"
    source.write_text(CYTHON_SWAP)
    where = str(Path(rtap.__file__).parents[1])
    command = [sys.executable, "-m", "cython", "-3", "-I", where, str(source)]
    subprocess.run(command, check=True)
    text = source.with_suffix(".c").read_text()
    python = f"-I{sysconfig.get_path('include')}"
    target = compile_c(directory, text, "cython_swap", python)
    spec = importlib.util.spec_from_file_location("cython_swap", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.__pyx_capi__["swap"]


def numba_swap() -> Any:
    """The function compiled by numba; None without numba."""
    try:
        numba: Any = importlib.import_module("numba")
        extending: Any = importlib.import_module("numba.extending")
        cgutils: Any = importlib.import_module("numba.core.cgutils")
    except ImportError:
        return None
    import numpy as np

    carray = numba.carray

    @extending.intrinsic  # type: ignore[untyped-decorator]
    def pointer(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], cgutils.voidptr_t)

        return numba.types.voidptr(address), generate

    @numba.cfunc("int32(voidptr, voidptr)")  # type: ignore[untyped-decorator]
    def swap(ctx: Any, burst: Any) -> int:
        n = carray(burst, 4, np.uint32)[1]
        arrays = carray(burst, 6, np.uint64)
        data = carray(pointer(arrays[2]), n, np.uint64)
        length = carray(pointer(arrays[3]), n, np.uint32)
        for i in range(n):
            if length[i] < 12:
                continue
            p = carray(pointer(data[i]), 12, np.uint8)
            for k in range(6):
                kept = p[k]
                p[k] = p[6 + k]
                p[6 + k] = kept
        return 0

    return swap


def os_threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def python_swap(burst: Any) -> None:
    for mbuf in burst:
        mbuf[0:12] = mbuf[6:12] + mbuf[0:6]


@contextmanager
def subject(number: int, chain: list[Any], cpu: int) -> Iterator[Subject]:
    """A worker over a net_null device of its own."""
    import rtap

    with rtap.probe(f"net_null{number},size=64") as device:
        device.configure(1, 1)
        pool = rtap.Mempool(512)
        # net_null hands out buffers with whatever they contain.
        pool.alloc_burst(pool.available, data=udp(1, 1)).free()
        device.rx_queue_setup(0, 64, pool)
        device.tx_queue_setup(0, 64)
        device.start()
        worker = rtap.Worker(cpu=cpu, wait="poll")
        worker.forward((device, 0), (device, 0), stages=chain)

        def run(seconds: float) -> Sample:
            threads = os_threads()
            with worker:
                time.sleep(0.005)
                mine = os_threads() - threads
                begun, before = time.perf_counter(), worker.stats().rx_packets
                cpu_before = thread_cpu_ns(mine)
                time.sleep(seconds)
                after, ended = worker.stats().rx_packets, time.perf_counter()
                spent = thread_cpu_ns(mine) - cpu_before
            return Sample(after - before, ended - begun, spent)

        yield run


def all_chains(directory: str) -> dict[str, list[Any]]:
    """The stages to measure, by name; libraries they need are compiled into `directory`."""
    from rtap import stages

    mac = "02:00:00:00:00:01"
    chains: dict[str, list[Any]] = {
        "macswap": [stages.MacSwap()],
        "none": [],
        "mac rewrite": [stages.MacRewrite(mac, mac)],
        "5tuple swap": [stages.FiveTupleSwap()],
        "checksum fill": [stages.ChecksumFill()],
        "match": [stages.Match("udp", destination_port=53)],
        "spread": [stages.Spread()],
        "counter": [stages.Counter()],
        "native C": [stages.Native(ctypes.CDLL(compile_c(directory, C_SWAP, "c_swap")).swap)],
        "native Cython": [stages.Native(cython_swap(directory))],
        "Python": [python_swap],
    }
    numba = numba_swap()
    if numba is not None:
        chains["native numba"] = [stages.Native(numba)]
    return chains


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 when the figures are valid, 1 when a control voids them."""
    parser = argparse.ArgumentParser(prog="bench.stages", description=__doc__.partition(":")[0])
    parser.add_argument("--slices", type=int, default=31, help="rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per slice (default 0.1)")
    parser.add_argument("--json", metavar="FILE", help="write JSON there ('-': print it)")
    args = parser.parse_args(argv)
    cpu = bench_cpu()
    with ExitStack() as stack:
        chains = all_chains(stack.enter_context(tempfile.TemporaryDirectory()))
        subjects = {
            name: stack.enter_context(subject(number, chain, cpu))
            for number, (name, chain) in enumerate(chains.items())
        }
        rounds = alternate(
            subjects,
            slices=args.slices,
            seconds=args.seconds,
            progress=lambda line: print(line, file=sys.stderr),
        )
    costs = {name: rounds.cpu_ns_per_frame(name) for name in chains}
    base = costs["macswap"]
    assert base is not None
    lines = ["stages over net_null, 64-byte frames", rounds.table("macswap"), ""]
    more = {name: cost.median - base.median for name, cost in costs.items() if cost is not None}
    lines += [f"{name}: {ns:+.1f} ns a frame beside macswap" for name, ns in more.items()]
    result: dict[str, Any] = {
        "benchmark": "stages",
        "stages": rounds.to_json("macswap"),
        "ns_beside_macswap": more,
    }
    write_report(args.json, result, "\n".join(lines))
    return 1 if rounds.void else 0


if __name__ == "__main__":
    raise SystemExit(main())
