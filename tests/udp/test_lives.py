# SPDX-License-Identifier: BSD-3-Clause
"""UDP devices that are opened again and again, forgotten, forked, and closed in the middle."""

from __future__ import annotations

import contextlib
import gc

import pytest
from datagrams import HERE, PORT, counts, plain, send_all, take, with_loopback
from forks import in_child
from support import Task, eventually, none_left, open_fds, running_threads, threads_end

import rtap
from rtap import DeviceStateError, EthDev, NetNS, Worker

pytestmark = [pytest.mark.root, pytest.mark.lifetime]


@pytest.fixture
def ns(netns: NetNS) -> NetNS:
    return with_loopback(netns)


def test_again_and_again(ns: NetNS) -> None:
    with rtap.open_udp((HERE, PORT), netns=ns), plain(ns):
        pass
    before, threads = open_fds(), running_threads()
    for queues in (1, 3) * 10:
        with rtap.open_udp((HERE, PORT), netns=ns, queues=queues, unknown="learn") as dev:
            with plain(ns) as peer:
                peer.sendto(b"x", (HERE, PORT))
                eventually(
                    lambda dev=dev, queues=queues: any(len(dev.rx_burst(q)) for q in range(queues)),
                    "it comes",
                )
            dev.rx_queue_intr_enable(queues - 1)
            dev.stop()
            dev.start()
    none_left(before)
    threads_end(threads)


@pytest.mark.parametrize("arguments", [{"data_room": 1}, {"nb_mbufs": 0}, {"gil": "x"}])
def test_a_failure_leaves_nothing(ns: NetNS, arguments: dict[str, object]) -> None:
    before = open_fds()
    with pytest.raises(ValueError, match=r"\S"):
        rtap.open_udp((HERE, PORT), netns=ns, **arguments)  # type: ignore[arg-type]
    none_left(before)
    with rtap.open_udp((HERE, PORT), netns=ns):
        pass


def forget(held: list[EthDev]) -> None:
    held.clear()
    gc.collect()


def test_forgotten(ns: NetNS) -> None:
    before = open_fds()
    held: list[EthDev] = [rtap.open_udp((HERE, PORT), netns=ns)]
    with pytest.warns(ResourceWarning, match="unclosed device <rtap.EthDev net_udp"):
        forget(held)
    none_left(before)
    held.append(rtap.open_udp((HERE, PORT), netns=ns))
    held.append(held)  # type: ignore[arg-type]
    with pytest.warns(ResourceWarning, match="unclosed device <rtap.EthDev net_udp"):
        forget(held)
    none_left(before)


def test_forked(ns: NetNS) -> None:
    """The child cannot use it, and does not keep the address."""
    dev = rtap.open_udp((HERE, PORT), netns=ns)

    def child() -> None:
        with pytest.raises(DeviceStateError, match="fork"):
            dev.rx_burst(0)
        with pytest.raises(DeviceStateError, match="fork"):
            dev.stats()

    in_child(child)
    with plain(ns) as peer:
        peer.sendto(b"x", (HERE, PORT))
        assert len(take(dev, 1)) == 1
    dev.close()
    with rtap.open_udp((HERE, PORT), netns=ns):
        pass


def test_closed_under_a_worker(ns: NetNS) -> None:
    with (
        rtap.open_udp((HERE, PORT), (HERE, PORT + 1), netns=ns) as a,
        rtap.open_udp((HERE, PORT + 1), (HERE, PORT), netns=ns) as b,
    ):
        worker = Worker()
        worker.forward((a, 0), (a, 0))
        with worker:
            send_all(b, b.pool.alloc_burst(100, bytes(500)))
            assert len(take(b, 100)) == 100
            assert counts(a)["rx_q0_gro_segments"] > 0
            a.close()
    assert a.pool.in_use == b.pool.in_use == 0


def test_peers_change_under_a_worker(ns: NetNS) -> None:
    """Threads add, move and remove peers while a worker looks up each sender, and answers."""
    with rtap.open_udp((HERE, PORT), netns=ns, peers=64, unknown="learn") as dev, plain(ns) as peer:
        worker = Worker()
        worker.forward((dev, 0), (dev, 0))

        def change(k: int) -> None:
            for i in range(300):
                number = dev.peers.add((f"10.0.{k}.{i % 7 + 1}", 9))
                with contextlib.suppress(KeyError):
                    dev.peers[number] = (f"10.0.{k}.{i % 5 + 10}", 9)
                    del dev.peers[number]
                assert len(dev.peers.items()) <= 64

        with worker:
            changers = [Task(change, k) for k in range(4)]
            for i in range(200):
                peer.sendto(b"%d" % i, (HERE, PORT))
                assert peer.recv(9) == b"%d" % i
            for task in changers:
                task.result()
        assert dev.peers.find(peer.getsockname()) is not None
