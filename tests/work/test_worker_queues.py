# SPDX-License-Identifier: BSD-3-Clause
"""A worker over many queues: all are served; idle ones leave the pass and come back."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from typing import Any

import pytest
from flows import flow, flow_of
from rigs import iproute, redirect
from support import PacketSocket, eventually, frame, seq_of, settle, skip_without_engine

import rtap
from rtap import DeviceStateError, NetNS, RouteStats, RxOffload, Worker

WAITS = ("poll", "sleep", "adaptive")
MANY = 128


def queue_to_queue(a: rtap.EthDev, b: rtap.EthDev, **options: Any) -> Worker:
    worker = Worker(**options)
    for q in range(a.info().nb_rx_queues):
        worker.forward((a, q), (b, q % b.info().nb_tx_queues))
    return worker


def all_idle(worker: Worker) -> bool:
    return all(route.idle for route in worker.stats().routes)


def served(worker: Worker) -> list[int]:
    return [route.rx_packets for route in worker.stats().routes]


def test_128_queues_carry_traffic(netns: NetNS, engine: str) -> None:
    """The kernel spreads flows over all queues, and every frame is accounted for."""
    flows, rounds = 2000, 3
    with ExitStack() as stack:
        options: dict[str, Any] = {"netns": netns, "engine": engine, "queues": MANY}
        a = stack.enter_context(rtap.open("a0", **options))
        b = stack.enter_context(rtap.open("b0", **options))
        at_a = stack.enter_context(PacketSocket(netns, "a0", 0x0800, rcvbuf=1 << 24))
        at_b = stack.enter_context(PacketSocket(netns, "b0", 0x0800, rcvbuf=1 << 24))
        with queue_to_queue(a, b) as worker:
            for round_ in range(1, rounds + 1):
                for n in range(flows):
                    at_a.send(flow(n))
                eventually(
                    lambda wanted=flows * round_: (  # type: ignore[misc]
                        sum(served(worker)) + a.stats().imissed == wanted
                    ),
                    "every frame was read, or dropped for want of a reader",
                )
            assert all(served(worker)), "some queue was given nothing"
            eventually(lambda: all_idle(worker), "they have all left the pass")
            stats = worker.stats()
            assert stats.tx_packets + stats.drops == stats.rx_packets
            assert stats.drops == 0
            sizes = {len(flow(n)) for n in range(flows)}
            assert len(sizes) == 1
            for route in stats.routes:
                assert route.rx_bytes == route.tx_bytes == route.rx_packets * max(sizes)
                assert route.cycles > 0
        counted = a.stats()
        assert counted.q_ipackets == served(worker)
        assert counted.q_ipackets == b.stats().q_opackets
        got = sorted(flow_of(data) for data in at_b.drain())
        assert len(got) == stats.tx_packets
        if counted.imissed == 0:
            assert got == sorted(list(range(flows)) * rounds)
        assert settle(a.pool) == 0


@pytest.mark.parametrize("wait", WAITS)
def test_an_idle_queue_is_served(netns: NetNS, engine: str, wait: str) -> None:
    """An idle queue that has left the pass is served when a frame comes.

    One queue is never empty meanwhile: its frames go round.
    """
    with ExitStack() as stack:
        loop_in = stack.enter_context(rtap.open("a0", netns=netns, engine=engine))
        loop_out = stack.enter_context(rtap.open("b0", netns=netns, engine=engine))
        many = stack.enter_context(rtap.open("c0", netns=netns, engine=engine, queues=32))
        out = stack.enter_context(rtap.open("d0", netns=netns, engine=engine, queues=32))
        at_loop = stack.enter_context(PacketSocket(netns, "a0"))
        at_c = stack.enter_context(PacketSocket(netns, "c0", 0x0800, rcvbuf=1 << 22))
        at_d = stack.enter_context(PacketSocket(netns, "d0", 0x0800, rcvbuf=1 << 22))
        redirect(netns, "b0", "a0")
        worker = queue_to_queue(many, out, wait=wait)
        worker.forward((loop_in, 0), (loop_out, 0), on_full="retry")
        with worker:
            for seq in range(64):
                at_loop.send(frame(seq))
            for n in range(200):
                if n % 8 == 0:
                    eventually(
                        lambda: all(route.idle for route in worker.stats().routes[:-1]),
                        "the others have left the pass",
                    )
                at_c.send(flow(n))
                assert [flow_of(data) for data in at_d.frames(1)] == [n]
            busy = worker.stats().routes[-1]
            assert not busy.idle
            assert busy.rx_packets > 1000
            assert sum(1 for n in served(worker)[:-1] if n) > 16


@pytest.mark.parametrize("wait", WAITS)
def test_no_wake_up_is_lost(netns: NetNS, engine: str, wait: str) -> None:
    """Frames come just when a queue leaves the pass, or when the worker goes to sleep."""
    chance = random.Random(5)
    with ExitStack() as stack:
        a = stack.enter_context(rtap.open("a0", netns=netns, engine=engine, queues=8))
        b = stack.enter_context(rtap.open("b0", netns=netns, engine=engine, queues=8))
        at_a = stack.enter_context(PacketSocket(netns, "a0", 0x0800))
        at_b = stack.enter_context(PacketSocket(netns, "b0", 0x0800))
        with queue_to_queue(a, b, wait=wait) as worker:
            for n in range(1500):
                until = time.perf_counter_ns() + chance.randrange(300_000)
                while time.perf_counter_ns() < until:
                    pass
                at_a.send(flow(n % 64))
                assert [flow_of(data) for data in at_b.frames(1)] == [n % 64]
            assert sum(served(worker)) == 1500


@pytest.mark.parametrize("tx_queues", [16, 1])
def test_read_together_in_order(netns: NetNS, engine: str, tx_queues: int) -> None:
    """When the worker starts, all queues are full of frames of all lengths.

    Flows keep their order for any burst size, with a TX queue each or one for all.
    """
    flows, each = 40, 30
    with ExitStack() as stack:
        options: dict[str, Any] = {"netns": netns, "engine": engine}
        a = stack.enter_context(rtap.open("a0", queues=16, **options))
        b = stack.enter_context(rtap.open("b0", queues=tx_queues, **options))
        at_a = stack.enter_context(PacketSocket(netns, "a0", 0x0800, rcvbuf=1 << 24))
        at_b = stack.enter_context(PacketSocket(netns, "b0", 0x0800, rcvbuf=1 << 24))
        for burst in (1, 64, 512):
            for k in range(each):
                for n in range(flows):
                    at_a.send(flow(n) + bytes([k]) * (1 + (k * 37 + n) % 900))
            with queue_to_queue(a, b, burst=burst) as worker:
                got = at_b.frames(flows * each)
                assert sum(served(worker)) == flows * each
            for n in range(flows):
                mine = [data[60:] for data in got if flow_of(data) == n]
                assert mine == [bytes([k]) * (1 + (k * 37 + n) % 900) for k in range(each)]
        assert settle(a.pool) == 0


def test_read_together_into_chains(netns: NetNS) -> None:
    """With SCATTER a frame takes several slots, so fewer queues fit into one kernel entry."""
    skip_without_engine("uring")
    with ExitStack() as stack:
        a = stack.enter_context(
            rtap.open(
                "a0",
                netns=netns,
                engine="uring",
                queues=16,
                mtu=9000,
                data_room=256,
                nb_mbufs=16384,
                rx_offloads=RxOffload.SCATTER,
            )
        )
        b = stack.enter_context(rtap.open("b0", netns=netns, engine="uring", mtu=9000))
        at_a = stack.enter_context(PacketSocket(netns, "a0", 0x0800, rcvbuf=1 << 24))
        at_b = stack.enter_context(PacketSocket(netns, "b0", 0x0800, rcvbuf=1 << 24))
        sent = [flow(n) + bytes([n % 251]) * (n * 17 % 8000) for n in range(600)]
        for data in sent:
            at_a.send(data)
        worker = Worker()
        for q in range(16):
            worker.forward((a, q), (b, 0))
        with worker:
            got = at_b.frames(len(sent))
        assert sorted(got) == sorted(sent)
        assert settle(a.pool) == 0


def test_many_queues_without_buffers(netns: NetNS, engine: str) -> None:
    """No frame is lost, and the worker goes on when buffers come back."""
    with ExitStack() as stack:
        a = stack.enter_context(rtap.open("a0", netns=netns, engine=engine, queues=8, nb_mbufs=8))
        b = stack.enter_context(rtap.open("b0", netns=netns, engine=engine))
        at_a = stack.enter_context(PacketSocket(netns, "a0", 0x0800, rcvbuf=1 << 22))
        at_b = stack.enter_context(PacketSocket(netns, "b0", 0x0800, rcvbuf=1 << 22))
        held = a.pool.alloc_burst(8)
        worker = Worker()
        for q in range(8):
            worker.forward((a, q), (b, 0))
        with worker:
            for n in range(100):
                at_a.send(flow(n))
            eventually(lambda: a.stats().rx_nombuf > 0, "it is noticed")
            held.free()
            assert sorted(flow_of(data) for data in at_b.frames(100)) == list(range(100))


# ---- queues and devices that go


def owned(dev: rtap.EthDev, queue: int) -> bool:
    try:
        dev.rx_burst(queue)
    except DeviceStateError as exc:
        return "in use" in str(exc)
    return False


@pytest.mark.parametrize("wait", WAITS)
def test_fewer_buffers_than_queues(netns: NetNS, engine: str, wait: str) -> None:
    """Empty queues do not keep the only buffers from the queues after them."""
    flows = 200
    with ExitStack() as stack:
        options: dict[str, Any] = {"netns": netns, "engine": engine, "queues": 4}
        a = stack.enter_context(rtap.open("a0", nb_mbufs=1, **options))
        b = stack.enter_context(rtap.open("b0", **options))
        at_a = stack.enter_context(PacketSocket(netns, "a0", 0x0800, rcvbuf=1 << 24))
        with queue_to_queue(a, b, wait=wait) as worker:
            for n in range(flows):
                at_a.send(flow(n))
            eventually(lambda: sum(served(worker)) == flows, "every frame was read")
            assert all(served(worker)), "some queue was given nothing"
        assert a.stats().imissed == 0
        assert settle(a.pool) == 0


def test_queues_that_vanish_while_idle(netns: NetNS, engine: str) -> None:
    with ExitStack() as stack:
        a = stack.enter_context(rtap.open("a0", netns=netns, engine=engine, queues=16))
        b = stack.enter_context(rtap.open("b0", netns=netns, engine=engine, queues=16))
        at_a = stack.enter_context(PacketSocket(netns, "a0", 0x0800))
        at_b = stack.enter_context(PacketSocket(netns, "b0", 0x0800))
        with queue_to_queue(a, b) as worker:
            eventually(lambda: all_idle(worker), "they have all left the pass")
            for q in range(1, 16):
                assert owned(a, q)
                if q % 2:
                    a.rx_queue_stop(q)
                    a.rx_queue_release(q)
                    a.rx_queue_setup(q, 64, a.pool)
                else:
                    b.tx_queue_stop(q)
                    eventually(lambda q=q: not owned(a, q), "it is let go")  # type: ignore[misc]
                    a.rx_queue_stop(q)
                for n in range(20):
                    at_a.send(flow(n))
                assert sorted(flow_of(data) for data in at_b.frames(20)) == list(range(20))
            assert worker.running
            stats = worker.stats()
            assert [route.error for route in stats.routes] == [""] * 16
            a.rx_queue_stop(0)
            assert worker.join(5)
        # No descriptors of closed queues are left in the epoll set, so it works again.
        a.stop()
        b.stop()
        a.start()
        b.start()
        with queue_to_queue(a, b) as worker:
            for n in range(200):
                at_a.send(flow(n))
            assert sorted(flow_of(data) for data in at_b.frames(200)) == list(range(200))


def test_a_device_of_128_idle_queues_is_stopped(netns: NetNS, engine: str) -> None:
    with ExitStack() as stack:
        a = stack.enter_context(rtap.open("a0", netns=netns, engine=engine, queues=MANY))
        b = stack.enter_context(rtap.open("b0", netns=netns, engine=engine, queues=MANY))
        with queue_to_queue(a, b) as worker:
            eventually(lambda: all_idle(worker), "they have all left the pass")
            a.stop()
            assert worker.join(5)
            assert [route.error for route in worker.stats().routes] == [""] * MANY
        a.start()
        with worker:
            eventually(lambda: all_idle(worker), "they have all left the pass")


def errors(routes: list[RouteStats]) -> list[bool]:
    return [bool(route.error) for route in routes]


@pytest.mark.parametrize("wait", WAITS)
def test_a_device_that_disappears_names_its_routes(netns: NetNS, engine: str, wait: str) -> None:
    with ExitStack() as stack:
        a = stack.enter_context(rtap.open("a0", netns=netns, engine=engine, queues=4))
        b = stack.enter_context(rtap.open("b0", netns=netns, engine=engine, queues=4))
        c = stack.enter_context(rtap.open("c0", netns=netns, engine=engine, queues=4))
        at_a = stack.enter_context(PacketSocket(netns, "a0", 0x0800))
        at_b = stack.enter_context(PacketSocket(netns, "b0", 0x0800))
        worker = queue_to_queue(a, b, wait=wait)
        for q in range(4):
            worker.forward((c, q), (b, q))
        with worker:
            iproute(netns, "link del c0")
            eventually(
                lambda: errors(worker.stats().routes) == [False] * 4 + [True] * 4,
                "its routes have ended",
            )
            for q, route in enumerate(worker.stats().routes[4:]):
                assert route.error == f"rx queue {q} of c0: File descriptor in bad state"
                assert not route.idle
            for n in range(100):
                at_a.send(flow(n))
            assert sorted(flow_of(data) for data in at_b.frames(100)) == list(range(100))
            # The target: a frame that cannot be sent shows it.
            iproute(netns, "link del b0")
            for n in range(100):
                at_a.send(flow(n))
            assert worker.join(5)
            for q, route in enumerate(worker.stats().routes[:4]):
                assert route.error == f"tx queue {q} of b0: File descriptor in bad state"
                assert route.rx_packets == route.tx_packets + route.drops


def test_a_full_target_holds_up_no_other_route(netns: NetNS, engine: str) -> None:
    """A route that retries waits only for its own target."""
    with ExitStack() as stack:
        a = stack.enter_context(rtap.open("a0", netns=netns, engine=engine))
        full = stack.enter_context(rtap.open("b0", netns=netns, engine=engine, sndbuf=20_000))
        stack.enter_context(rtap.open("c0", netns=netns))
        d = stack.enter_context(rtap.open("d0", netns=netns, engine=engine, queues=2))
        e = stack.enter_context(rtap.open("e0", netns=netns, engine=engine))
        at_a = stack.enter_context(PacketSocket(netns, "a0"))
        at_d = stack.enter_context(PacketSocket(netns, "d0"))
        at_e = stack.enter_context(PacketSocket(netns, "e0"))
        redirect(netns, "b0", "c0", "1mbit")
        worker = Worker()
        worker.forward((a, 0), (full, 0), on_full="retry")
        worker.forward((d, 0), (e, 0))
        worker.forward((d, 1), (e, 0))
        with worker:
            for seq in range(200):
                at_a.send(frame(seq, 1000))
            eventually(lambda: worker.stats().routes[0].retries > 0, "the target is full")
            for seq in range(100):
                at_d.send(frame(seq))
                assert [seq_of(data) for data in at_e.frames(1)] == [seq]
            assert worker.stats().routes[0].tx_packets < 200
