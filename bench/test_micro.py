# SPDX-License-Identifier: BSD-3-Clause
"""Measures single calls: pools, bursts, mbufs, and bursts on a device (pytest-benchmark).

Use these to compare your own changes on one machine (``--benchmark-compare``). To compare with
anything else, use the other files here, which alternate slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import rtap
from bench.closed_loop import Loop
from bench.measure import bench_cpu, pinned
from bench.rig import FRAME, SEQ_OFFSET, frame, namespace
from bench.send64 import numpy_step, plain_step

np = pytest.importorskip("numpy")

BURST = 64


@pytest.fixture(autouse=True, scope="module")
def _pin() -> Iterator[None]:
    with pinned(bench_cpu()):
        yield


@pytest.fixture
def pool() -> Iterator[Any]:
    with rtap.Mempool(1024) as made:
        yield made


@pytest.fixture
def burst(pool: Any) -> Iterator[Any]:
    made = pool.alloc_burst(BURST, data=[frame(i) for i in range(BURST)])
    yield made
    made.free()


@pytest.fixture
def device() -> Iterator[Any]:
    with namespace() as ns, ns.call(rtap.open, "micro0", nb_mbufs=512) as dev:
        yield dev


@pytest.fixture
def loop() -> Iterator[Loop]:
    with ExitStack() as stack:
        yield Loop(stack, stack.enter_context(namespace()), "auto")


def test_alloc_free_one(benchmark: Any, pool: Any) -> None:
    benchmark(lambda: pool.alloc().free())


def test_alloc_free_burst(benchmark: Any, pool: Any) -> None:
    benchmark(lambda: pool.alloc_burst(BURST).free())


def test_alloc_drop_burst(benchmark: Any, pool: Any) -> None:
    """Return slots by dropping the last reference, as most users do."""
    benchmark(lambda: pool.alloc_burst(BURST))


def test_alloc_burst_from_array(benchmark: Any, pool: Any) -> None:
    data = np.zeros((BURST, FRAME), np.uint8)
    benchmark(lambda: pool.alloc_burst(BURST, data=data))


def test_alloc_burst_from_memoryview(benchmark: Any, pool: Any) -> None:
    data = memoryview(bytearray(BURST * FRAME)).cast("B", (BURST, FRAME))
    benchmark(lambda: pool.alloc_burst(BURST, data=data))


def test_alloc_burst_from_list(benchmark: Any, pool: Any) -> None:
    data = [frame(i) for i in range(BURST)]
    benchmark(lambda: pool.alloc_burst(BURST, data=data))


def test_alloc_burst_same_frame(benchmark: Any, pool: Any) -> None:
    data = frame(0)
    benchmark(lambda: pool.alloc_burst(BURST, data=data))


def test_lengths(benchmark: Any, burst: Any) -> None:
    benchmark(lambda: np.asarray(burst.lengths))


def test_ol_flags(benchmark: Any, burst: Any) -> None:
    benchmark(lambda: np.asarray(burst.ol_flags))


def test_gather_addresses(benchmark: Any, burst: Any) -> None:
    benchmark(lambda: np.asarray(burst.gather(0, 12)))


def test_scatter_seq(benchmark: Any, burst: Any) -> None:
    seqs = np.zeros((BURST, 8), np.uint8)
    benchmark(lambda: burst.scatter(SEQ_OFFSET, seqs))


def test_select_mask(benchmark: Any, burst: Any) -> None:
    mask = np.arange(BURST) % 2 == 0
    benchmark(lambda: burst.select(mask))


def test_iterate_len(benchmark: Any, burst: Any) -> None:
    benchmark(lambda: sum(len(mbuf) for mbuf in burst))


def test_iterate_bytes(benchmark: Any, burst: Any) -> None:
    benchmark(lambda: [bytes(mbuf) for mbuf in burst])


def test_mbuf_header_slice(benchmark: Any, burst: Any) -> None:
    mbuf = burst[0]
    benchmark(lambda: mbuf[0:14])


def test_mbuf_data_view(benchmark: Any, burst: Any) -> None:
    mbuf = burst[0]
    benchmark(lambda: mbuf.data)


def test_rx_burst_empty(benchmark: Any, device: Any) -> None:
    """Poll an idle queue."""
    benchmark(lambda: device.rx_burst(0, BURST))


def test_tx_burst_numpy(benchmark: Any, device: Any) -> None:
    """64 frames, stamped with NumPy and sent."""
    benchmark(numpy_step(device))


def test_tx_burst_plain(benchmark: Any, device: Any) -> None:
    """64 frames, stamped with the standard library and sent."""
    benchmark(plain_step(device))


def test_send_one(benchmark: Any, device: Any) -> None:
    data = frame(0)
    benchmark(lambda: device.send(data))


def test_forward_burst(benchmark: Any, loop: Loop) -> None:
    """Receive and send 64 frames, which the kernel redirects back to the receiver."""
    benchmark(loop.step())
