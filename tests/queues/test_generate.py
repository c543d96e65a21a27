# SPDX-License-Identifier: BSD-3-Clause
"""Queues that make frames from a template, or hold frames back. Needs no device and no root."""

from __future__ import annotations

import sys

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from support import Task, eventually, settle

from rtap import Burst, DeviceStateError, Mempool
from rtap._queues.generate import GenerateRxQueue
from rtap._queues.noisy import NoisyRxQueue
from rtap.cli.testpmd.frames import FLOWGEN, TXONLY, header
from rtap.cli.testpmd.modes import Ends

ENDS = Ends(source="02:00:00:00:00:01", destination="02:00:00:00:00:02")


def generator(
    pool: Mempool, lengths: list[int], flows: int = 1, vary: str = "destination"
) -> GenerateRxQueue:
    flow = TXONLY if vary == "source" else FLOWGEN
    queue = GenerateRxQueue(pool, header(ENDS, flow, sum(lengths)), lengths, flows=flows, vary=vary)
    queue.start()
    return queue


# ---- the generator


@pytest.mark.parametrize("lengths", [[64], [1500], [42], [60, 1, 200]])
def test_frames_are_the_header_and_zeros(lengths: list[int]) -> None:
    pool = Mempool(64, max(64, *lengths))
    queue = generator(pool, lengths)
    burst = queue.rx_burst(8)
    assert len(burst) == 8
    assert queue.frame_len == sum(lengths)
    for mbuf in burst:
        assert mbuf.nb_segs == len(lengths)
        data = bytes(mbuf)
        assert len(data) == len(mbuf) == sum(lengths)
        assert data[42:] == bytes(len(data) - 42)
        packet = Ether(data)
        assert (packet.src, packet.dst) == (ENDS.source, ENDS.destination)
        assert (packet[IP].src, packet[IP].dst) == ("10.254.0.0", "10.253.0.0")
        assert (packet[IP].len, packet[UDP].len) == (len(data) - 14, len(data) - 34)
        assert (packet[UDP].sport, packet[UDP].dport, packet[UDP].chksum) == (1000, 1001, 0)
    assert pool.in_use == 8 * len(lengths)
    del mbuf, burst
    assert pool.in_use == 0
    assert queue.counters()["packets"] == 8
    assert queue.counters()["bytes"] == 8 * sum(lengths)
    queue.close()


@pytest.mark.parametrize("vary", ["source", "destination"])
def test_flows_go_through_consecutive_addresses(vary: str) -> None:
    queue = generator(Mempool(2048, 64), [64], flows=700, vary=vary)
    base = 0xC6120001 if vary == "source" else 0x0AFD0000
    for i, mbuf in enumerate(queue.rx_burst(1500)):
        data = bytes(mbuf)
        at = 26 if vary == "source" else 30
        assert int.from_bytes(data[at : at + 4], "big") == base + i % 700
        packet = IP(data[14:34])
        stated = packet.chksum
        del packet.chksum
        assert IP(bytes(packet)).chksum == stated
    assert i == 1499
    queue.close()


def test_a_pool_that_is_used_up_gives_whole_frames_only() -> None:
    pool = Mempool(10, 64)
    queue = generator(pool, [60, 60, 60])
    burst = queue.rx_burst(8)
    assert [mbuf.nb_segs for mbuf in burst] == [3] * len(burst)
    assert len(burst) <= 3
    burst.free()
    assert pool.in_use == 0
    queue.close()


@pytest.mark.parametrize(
    ("lengths", "options", "complaint"),
    [
        ([41], {}, "segment 0"),
        ([3000], {}, "segment 0"),
        ([64, 0], {}, "segment 1"),
        ([], {}, "number of segments"),
        ([64] * 65, {}, "number of segments"),
        ([64], {"flows": 0}, "flows"),
        ([64], {"vary": "port"}, "'port'"),
    ],
)
def test_templates_that_do_not_fit_are_refused(
    lengths: list[int], options: dict[str, object], complaint: str
) -> None:
    pool = Mempool(64, 2048)
    with pytest.raises(ValueError, match=complaint):
        GenerateRxQueue(pool, bytes(42), lengths, **options)
    with pytest.raises(ValueError, match="header"):
        GenerateRxQueue(pool, bytes(129), [200])
    with pytest.raises(ValueError, match="IPv4"):
        GenerateRxQueue(pool, bytes(42), [64], flows=2)
    pool.close()


def test_a_closed_generator_is_closed() -> None:
    pool = Mempool(64, 64)
    queue = generator(pool, [64])
    with pytest.raises(BufferError):
        pool.close()
    queue.close()
    queue.close()
    with pytest.raises(DeviceStateError, match="closed"):
        queue.rx_burst(1)
    pool.close()


# ---- the queue that holds back


def numbers(burst: Burst) -> list[int]:
    """The sequence numbers of a generator's frames."""
    out = [int.from_bytes(mbuf[30:34], "big") - 0x0AFD0000 for mbuf in burst]
    burst.free()
    return out


def endless(pool: Mempool) -> GenerateRxQueue:
    return generator(pool, [64], flows=1 << 20)


def test_a_buffer_keeps_as_many_as_it_holds_and_their_order() -> None:
    pool = Mempool(256, 64)
    inner = endless(pool)
    queue = NoisyRxQueue(inner, buffer_size=100)
    queue.start()
    got: list[int] = []
    while len(got) < 1000:
        got += numbers(queue.rx_burst(16))
        taken = inner.counters()["packets"]
        assert queue.buffered == min(taken, 100)
        assert len(got) == taken - queue.buffered
    assert got == list(range(len(got)))
    assert queue.counters()["packets"] == len(got)
    assert pool.in_use == 100
    assert queue.close() == 100
    assert pool.in_use == 0
    assert queue.close() == 0
    assert numbers(inner.rx_burst(1)) == [taken]  # given back
    inner.close()


def test_bursts_longer_than_the_buffer_pass_through_it() -> None:
    inner = endless(Mempool(256, 64))
    queue = NoisyRxQueue(inner, buffer_size=3)
    queue.start()
    got: list[int] = []
    for _ in range(50):
        got += numbers(queue.rx_burst(64))
    assert got == list(range(inner.counters()["packets"] - 3))
    assert len(got) >= 147
    assert queue.buffered == 3
    queue.close()
    inner.close()


def test_a_buffer_that_rests_is_emptied() -> None:
    pool = Mempool(50, 64)
    inner = endless(pool)
    queue = NoisyRxQueue(inner, buffer_size=1000, flush_ms=20)
    queue.start()
    while pool.available:  # until nothing more can come
        assert len(queue.rx_burst(64)) == 0
    kept = []
    got: list[int] = []

    def emptied() -> bool:
        burst = queue.rx_burst(16)
        kept.append(burst)
        got.extend(int.from_bytes(mbuf[30:34], "big") - 0x0AFD0000 for mbuf in burst)
        return len(got) == 50

    eventually(emptied, "the buffer is emptied")
    assert got == list(range(50))
    assert queue.buffered == 0
    queue.close()
    inner.close()


def test_without_a_flush_time_nothing_leaves_a_buffer_that_rests() -> None:
    pool = Mempool(50, 64)
    inner = endless(pool)
    queue = NoisyRxQueue(inner, buffer_size=1000)
    queue.start()
    for _ in range(100):
        assert len(queue.rx_burst(64)) == 0
    assert queue.buffered == 50
    queue.close()
    inner.close()


@pytest.mark.parametrize("what", ["reads", "writes", "reads_writes"])
def test_memory_is_touched_for_every_frame_without_a_buffer(what: str) -> None:
    """A frame with many memory accesses must take many times as long."""
    inner = endless(Mempool(64, 64))
    queue = NoisyRxQueue(inner, memory_mb=3, **{what: 100})
    queue.start()
    assert numbers(queue.rx_burst(10)) == list(range(10))
    assert numbers(queue.rx_burst(10)) == list(range(10, 20))
    queue.close()
    inner.close()


def test_it_ends_when_the_queue_behind_it_is_stopped() -> None:
    inner = endless(Mempool(64, 64))
    queue = NoisyRxQueue(inner, buffer_size=8)
    queue.start()
    queue.rx_burst(20)
    with pytest.raises(DeviceStateError, match="in use"):
        inner.rx_burst(1)
    stopping = Task(inner.stop)  # waits until it is given back

    def ended() -> bool:
        try:
            queue.rx_burst(1)
        except DeviceStateError:
            return True
        return False

    eventually(ended, "the outer queue stops")
    stopping.result()
    assert queue.close() == 8
    inner.close()


def test_it_takes_a_queue_that_is_there_for_it() -> None:
    inner = endless(Mempool(64, 64))
    first, second = NoisyRxQueue(inner), NoisyRxQueue(inner)
    first.start()
    with pytest.raises(DeviceStateError, match="in use"):
        second.start()
    first.close()
    second.start()
    second.close()
    inner.stop()
    third = NoisyRxQueue(inner)
    with pytest.raises(DeviceStateError, match="not started"):
        third.start()
    third.close()
    inner.close()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"buffer_size": -1}, "buffer_size"),
        ({"flush_ms": -1}, "flush_ms"),
        ({"memory_mb": 1 << 20}, "memory_mb"),
        ({"reads": -1}, "reads"),
        ({"reads_writes": 1}, "memory_mb"),
    ],
)
def test_bad_noise_is_refused(options: dict[str, int], complaint: str) -> None:
    inner = endless(Mempool(64, 64))
    with pytest.raises(ValueError, match=complaint):
        NoisyRxQueue(inner, **options)
    inner.close()


if sys.maxsize < 1 << 32:  # elsewhere there may be room for it

    def test_noise_in_more_memory_than_there_can_be() -> None:
        inner = endless(Mempool(64, 64))
        with pytest.raises(MemoryError, match="no memory for 32768 MiB"):
            NoisyRxQueue(inner, memory_mb=1 << 15)
        inner.close()


def test_a_forgotten_one_frees_what_it_holds() -> None:
    pool = Mempool(64, 64)
    inner = endless(pool)
    queue = NoisyRxQueue(inner, buffer_size=8)
    queue.start()
    queue.rx_burst(20)
    assert pool.in_use == 8
    del queue
    assert settle(pool) == 0
    inner.close()
