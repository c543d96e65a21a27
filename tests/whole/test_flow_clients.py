# SPDX-License-Identifier: BSD-3-Clause
"""iperf3 through workers that spread flows over queues; the kernel checks the order."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from clients import iperf3, netstat, six
from rigs import Wire, wire

import rtap
from rtap import Burst, EthDev, stages

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("iperf3") is None, reason="needs iperf3"),
]

QUEUES = 4
#: All streams together have no more bytes in flight than a queue has room for.
TCP = ("-P", "8", "-w", "512K", "--cport", "41000", "-n", "128M")
#: Full speed, so that a burst has several frames of a stream. The run is short, because after 3 s
#: the kernel forgets a flow's queue, and a flow without answers may move to another.
UDP = ("-P", "4", "-u", "-l", "1400", "-b", "0", "--cport", "41000", "-t", "2")
OUT_OF_ORDER = ("TcpExtTCPOFOQueue", "TcpExtTCPSACKReorder", "TcpExtTCPRenoReorder")


def dealt_out(burst: Burst) -> list[int]:
    """A stage by which later frames of a burst leave sooner."""
    return [QUEUES - 1 - n * QUEUES // len(burst) for n in range(len(burst))]


@contextmanager
def spread(
    engine: str, stage: Callable[[Burst], Sequence[int] | None] | None = None
) -> Iterator[Wire]:
    """A wire of devices with several queues, with a worker for each direction."""
    options: dict[str, Any] = {"engine": engine, "queues": QUEUES, "txqueuelen": 20000}
    with wire(a=options, b=options) as w:

        def one_way(source: EthDev, target: EthDev) -> rtap.Worker:
            worker = rtap.Worker()
            for q in range(QUEUES):
                worker.forward(
                    (source, q),
                    [(target, n) for n in range(QUEUES)],
                    stages=[stage or stages.Spread()],
                    on_full="retry",
                )
            return worker

        with one_way(w.a, w.b), one_way(w.b, w.a):
            yield w


def used(dev: EthDev) -> int:
    """The queues that sent more than a handshake."""
    return sum(n > 100 for n in dev.stats().q_opackets)


def out_of_order(w: Wire) -> dict[str, int]:
    return {
        name: n for name in OUT_OF_ORDER if (n := netstat(w.left)[name] + netstat(w.right)[name])
    }


@pytest.mark.parametrize("address", ["10.9.0.2", "fd09::2"], ids=["ipv4", "ipv6"])
def test_tcp_streams_keep_their_order(engine: str, address: str) -> None:
    with spread(engine) as w:
        six(w)
        _, end = iperf3(w.left, w.right, address, *TCP)
        assert end["sum_received"]["bytes"] > 100e6
        assert used(w.b) > 1
        assert used(w.a) > 1
        assert w.a.stats().imissed == w.b.stats().imissed == 0
        assert out_of_order(w) == {}


def test_udp_streams_keep_their_order(engine: str) -> None:
    with spread(engine) as w:
        _, end = iperf3(w.left, w.right, "10.9.0.2", *UDP)
        assert used(w.b) > 1
        assert end["sum"]["packets"] > 10_000
        assert [stream["udp"]["out_of_order"] for stream in end["streams"]] == [0] * 4


# ---- what the kernel would have noticed


def test_tcp_frames_dealt_out_by_position() -> None:
    with spread("syscall", dealt_out) as w:
        iperf3(w.left, w.right, "10.9.0.2", *TCP)
        assert out_of_order(w)["TcpExtTCPOFOQueue"] > 100


def test_udp_frames_dealt_out_by_position() -> None:
    with spread("syscall", dealt_out) as w:
        _, end = iperf3(w.left, w.right, "10.9.0.2", *UDP)
        assert sum(stream["udp"]["out_of_order"] for stream in end["streams"]) > 0
