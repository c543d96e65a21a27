# SPDX-License-Identifier: BSD-3-Clause
"""Queue pairs of this process's devices, used by others: bursts, workers, interrupts, leases."""

from __future__ import annotations

import errno
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from flows import flow, flow_of
from patience import patient
from rigs import wire
from sharing import MakeProcess, Process, no_leases, sockets_left, to_and_fro
from support import PacketSocket, eventually, frame, netdev, python
from veths import pair

import rtap
from rtap import DeviceStateError, EthDev, NetNS, RxOffload, TxOffload

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("runtime_dir")]

RECEIVE = "[bytes(m) for m in dev.rx_burst(queue, 64, wait)]"


@pytest.fixture
def dev(netns: NetNS) -> Iterator[EthDev]:
    with rtap.open("tap0", netns=netns, queues=4) as device:
        yield device


@pytest.fixture
def packets(netns: NetNS, dev: EthDev) -> Iterator[PacketSocket]:
    with PacketSocket(netns, dev.ifname, rcvbuf=1 << 22) as socket:
        yield socket


def receive(other: Process, queue: int, wait: float = 5) -> list[bytes]:
    got: list[bytes] = other(RECEIVE, queue=queue, wait=patient(wait))
    return got


# ---- bursts


def test_a_shared_pool(netns: NetNS, process: MakeProcess) -> None:
    """The other process receives into it, and a ring hands frames over as they are."""
    pool = rtap.Mempool(1024, shared=True)
    with (
        netns.call(rtap.probe, "net_rtap0,iface=tap0") as dev,
        rtap.ShmRing("pipe", 64, pool=pool) as ring,
    ):
        dev.configure(2, 2)
        for queue in (0, 1):
            dev.rx_queue_setup(queue, 64, pool)
            dev.tx_queue_setup(queue, 64)
        dev.start()
        with rtap.share(dev), PacketSocket(netns, "tap0") as packets:
            a = process().attach(dev.name, [0, 1])
            a("ring = rtap.ShmRing('pipe'); mine = rtap.Mempool(512)")
            assert a("dev.pool.shared, dev.pool.size") == [True, 1024]
            packets.send(frame(5))
            a(
                "burst = rtap.Burst()\n"
                "while not burst: burst = dev.rx_burst(0, 8, 0.01) or dev.rx_burst(1, 8, 0.01)\n"
                "ring.enqueue(burst)"
            )
            assert [bytes(m) for m in ring.dequeue(8, patient(10))] == [frame(5)]
            assert a("ring.counters()['copied_packets']") == 0
    pool.close()


def test_bursts(dev: EthDev, packets: PacketSocket, process: MakeProcess) -> None:
    with rtap.share(dev) as share:
        a = process().attach(dev.name, [2])
        lease = share.leases[2]
        assert (lease.queue, lease.pid, lease.uid) == (2, a.pid, 0)
        assert a("type(dev).__mro__[1].__name__, dev.state, dev.ifname, dev.queues") == [
            *("EthDev", "started", "tap0", [2])
        ]
        for n in range(5):
            packets.send(frame(n))
        got: list[bytes] = []
        while len(got) < 5:
            got += receive(a, 2)
        assert got == [frame(n) for n in range(5)]
        sent = a(
            "dev.tx_burst(2, dev.pool.alloc_burst(len(frames), frames))",
            frames=[frame(n) for n in range(10, 14)],
        )
        assert sent == 4
        assert packets.frames(4) == [frame(n) for n in range(10, 14)]
        a.begin("dev.recv(timeout=wait, queue=2)", wait=patient(10))
        packets.send(frame(20))
        assert a.result() == frame(20)
        assert a("dev.send(data, queue=2)", data=frame(21))
        assert packets.frames(1) == [frame(21)]
        assert a(
            "dev.rx_queue(2).counters()['packets'], dev.tx_queue(2).counters()['packets']"
        ) == [*(6, 5)]


def test_both_processes_get_their_flows(
    netns: NetNS, dev: EthDev, process: MakeProcess, engine: str
) -> None:
    with rtap.share(dev, [1, 3]), PacketSocket(netns, dev.ifname, 0x0800) as packets:
        a = process().attach(dev.name, [1, 3], engine=engine)
        assert a("dev.info().engine") == engine
        # Queues that nobody has let down (2) are the primary's.
        for n in range(200):
            packets.send(flow(n))
        got = [flow_of(bytes(m)) for q in (0, 2) for m in dev.rx_burst(q, 256)]
        here = len(got)
        for q in (1, 3):
            got += [flow_of(data) for data in a("[bytes(m) for m in dev.rx_burst(q, 256)]", q=q)]
        assert 0 < here < 200
        assert sorted(got) == list(range(200))
        assert dev.stats().ipackets == 200
        assert a("dev.stats().ipackets") == 200
        assert a("sum(dev.rx_queue(q).counters()['packets'] for q in (1, 3))") == 200 - here


def test_pairs_are_silent_while_nobody_has_them(
    dev: EthDev, packets: PacketSocket, process: MakeProcess
) -> None:
    with rtap.share(dev, [1, 2, 3]) as share:
        for n in range(64):
            packets.send(frame(n))
        assert len(dev.rx_burst(0, 256)) == 64
        a = process().attach(dev.name, [1])
        assert receive(a, 1, 0) == []
        a("dev.close()")
        no_leases(share)
        for n in range(64):
            packets.send(frame(n))
        assert len(dev.rx_burst(0, 256)) == 64


def test_shared_pairs_are_not_the_owners(dev: EthDev, process: MakeProcess) -> None:
    burst = dev.pool.alloc_burst(1, frame(1))
    sentence = "queue 1 of device net_rtap.* is for other processes, which attach to it"
    with rtap.share(dev, [1]):
        process().attach(dev.name, [1])
        for use in (
            lambda: dev.rx_burst(1),
            lambda: dev.tx_burst(1, burst),
            lambda: dev.send(frame(1), queue=1),
            lambda: dev.recv(0, queue=1),
            lambda: dev.rx_queue_start(1),
            lambda: dev.tx_queue_start(1),
            lambda: dev.rx_queue_setup(1, 64, dev.pool),
            lambda: dev.tx_queue_setup(1, 64),
            lambda: dev.rx_queue_release(1),
        ):
            with pytest.raises(DeviceStateError, match=sentence):
                use()
        dev.stop()
        with pytest.raises(DeviceStateError, match="shared with other processes, close its"):
            dev.configure()
        dev.start()
    dev.rx_burst(1)
    assert dev.tx_burst(1, burst) == 1


def test_share_gives_the_pairs_back(
    dev: EthDev, packets: PacketSocket, process: MakeProcess
) -> None:
    for _ in range(3):
        with rtap.share(dev) as share:
            a = process().attach(dev.name, [0, 1, 2, 3])
            assert sorted(share.leases) == [0, 1, 2, 3]
            packets.send(frame(1))
            with pytest.raises(DeviceStateError, match="is for other processes"):
                dev.rx_burst(0)
            a("dev.close()")
            no_leases(share)
    packets.send(frame(2))
    got = [bytes(m) for q in range(4) for m in dev.rx_burst(q)]
    assert got == [frame(2)]


def test_offloads_pass(process: MakeProcess) -> None:
    """TCP between two namespaces; a worker of another process forwards super-frames."""
    rx = RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM | RxOffload.TCP_LRO
    tx = TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM | TxOffload.TCP_TSO
    whole = {"rx_offloads": rx, "tx_offloads": tx}
    with wire(a=whole, b=whole) as w, rtap.share(w.a), rtap.share(w.b):
        other = forwards(process(), w.a, w.b)
        w.transfer(2 << 20)
        w.transfer(2 << 20, back=True)
        assert other("worker.stop() or [r.error for r in worker.stats().routes]") == ["", ""]
        assert other("a.xstats()['rx_q0_lro_packets']") > 0
        assert other("a.info().rx_offloads == b.info().rx_offloads")
        nothing_lost(w.a, w.b)


def test_split_and_merged_frames_pass(process: MakeProcess) -> None:
    """The same with frames that other processes split as they arrive and merge as they leave."""
    rx = RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM
    tx = TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM | TxOffload.TCP_TSO
    cut = {"rx_offloads": rx, "tx_offloads": tx, "rx_gso": True, "tx_gro": True}
    with wire(a=cut, b=cut) as w, rtap.share(w.a), rtap.share(w.b):
        other = forwards(process(), w.a, w.b)
        assert other("[a.info().rx_gso, a.info().tx_gro]") == [True, True]
        w.transfer(2 << 20)
        w.transfer(2 << 20, back=True)
        assert other("worker.stop() or [r.error for r in worker.stats().routes]") == ["", ""]
        xstats = w.b.xstats()
        assert xstats["tx_q0_tso_packets"] > 0 or other("b.xstats()['tx_q0_tso_packets']") > 0


def forwards(other: Process, a: EthDev, b: EthDev) -> Process:
    other(
        "a, b = rtap.attach(name_a, [0]), rtap.attach(name_b, [0])\n"
        "worker = rtap.Worker()\n"
        "worker.forward((a, 0), (b, 0))\n"
        "worker.forward((b, 0), (a, 0))\n"
        "worker.start()",
        name_a=a.name,
        name_b=b.name,
    )
    return other


def nothing_lost(a: EthDev, b: EthDev) -> None:
    def passed_on() -> bool:
        of_a, of_b = a.stats(), b.stats()
        return (of_a.ipackets, of_a.ibytes, of_b.ipackets, of_b.ibytes) == (
            *(of_b.opackets, of_b.obytes, of_a.opackets, of_a.obytes),
        )

    eventually(passed_on, "all that was received is sent")
    for dev in (a, b):
        stats = dev.stats()
        assert (stats.ierrors, stats.oerrors, stats.imissed) == (0, 0, 0)


def test_worker_with_stages(netns: NetNS, process: MakeProcess) -> None:
    with ExitStack() as stack:
        devs = [stack.enter_context(rtap.open(name, netns=netns)) for name in ("a0", "b0")]
        ends = [stack.enter_context(PacketSocket(netns, name)) for name in ("a0", "b0")]
        shares = [stack.enter_context(rtap.share(dev)) for dev in devs]
        other = process()
        other(
            "from rtap import stages\n"
            "a, b = rtap.attach(name_a, [0]), rtap.attach(name_b, [0])\n"
            "worker = rtap.Worker()\n"
            "counter = stages.Counter()\n"
            "seen = []\n"
            "def look(burst):\n"
            "    seen.append(len(burst))\n"
            "worker.forward((a, 0), (b, 0), stages=[counter, look, stages.MacSwap()])\n"
            "worker.start()",
            name_a=devs[0].name,
            name_b=devs[1].name,
        )
        for n in range(20):
            ends[0].send(frame(n))
        swapped = [data[6:12] + data[:6] + data[12:] for data in map(frame, range(20))]
        assert ends[1].frames(20) == swapped
        eventually(lambda: devs[1].stats().opackets == 20, "the primary has the counters")
        assert devs[0].stats().ipackets == 20
        assert (
            other("[counter.packets, sum(seen), worker.stats().routes[0].rx_packets]") == [20] * 3
        )
        assert [share.leases[0].pid for share in shares] == [other.pid] * 2
        other("worker.stop()")
        other.leave()
        for share in shares:
            no_leases(share)


def test_worker_leases_its_queues(dev: EthDev, process: MakeProcess) -> None:
    with rtap.share(dev) as share:
        a = process().attach(dev.name)
        assert share.leases == {}
        a("worker = rtap.Worker(); worker.forward((dev, 1), (dev, 3)); worker.start()")
        assert sorted(share.leases) == [1, 3]
        a("worker.stop()")


def test_interrupts(dev: EthDev, packets: PacketSocket, process: MakeProcess) -> None:
    with rtap.share(dev):
        a = process().attach(dev.name)
        a(
            "import select\n"
            "fd = dev.rx_queue_intr_fd(2)\n"
            "dev.rx_queue_intr_enable(2)\n"
            "def readable(wait):\n"
            "    return bool(select.select([fd], [], [], wait)[0])"
        )
        assert not a("readable(0)")
        packets.send(frame(1))
        assert a("readable(wait)", wait=patient(10))
        assert receive(a, 2, 0) == [frame(1)]
        assert not a("readable(0)")
        a("dev.stop()")
        packets.send(frame(2))
        assert not a("readable(0)")
        a("dev.start()")
        assert not a("readable(0)") or receive(a, 2, 0) == [frame(2)]
        a("dev.rx_queue_intr_disable(2)")
        packets.send(frame(3))
        assert not a("readable(0.05)")


# ---- leases


def test_pairs_are_leased_when_they_are_used(
    dev: EthDev, packets: PacketSocket, process: MakeProcess
) -> None:
    uses = (
        "dev.rx_burst(0)",
        "dev.send(data, queue=1)",
        "dev.tx_burst(2, rtap.Mempool(16).alloc_burst(1, data))",
        "dev.rx_queue_intr_fd(3)",
    )
    with rtap.share(dev) as share:
        a = process().attach(dev.name)
        for queue, use in enumerate(uses):
            assert queue not in share.leases
            a(use, data=frame(queue))
            assert share.leases[queue].pid == a.pid
        assert a("dev.queues") == [0, 1, 2, 3]
        for queue in (4, -1, 128):
            with pytest.raises(ValueError, match="queue"):
                a("dev.rx_burst(queue)", queue=queue)
        for queue in ("1", 1.5, None, []):
            with pytest.raises(TypeError, match="queue must be an int"):
                a("dev.rx_burst(queue)", queue=queue)
    assert len(packets.frames(2)) == 2


def test_a_number_of_free_pairs(dev: EthDev, process: MakeProcess) -> None:
    with rtap.share(dev, [0, 1, 3]) as share:
        a = process().attach(dev.name, [1])
        b = process().attach(dev.name, 2)
        assert b("dev.queues") == [0, 3]
        assert {q: lease.pid for q, lease in share.leases.items()} == {0: b.pid, 1: a.pid, 3: b.pid}
        sentence = (
            rf"{dev.name} has 0 free queues, 1 are wanted; in use are 0 by process {b.pid}, "
            rf"1 by process {a.pid}, 3 by process {b.pid}"
        )
        with pytest.raises(DeviceStateError, match=sentence):
            process().attach(dev.name, 1)
        b("dev.close()")
        no_more = process().attach(dev.name, 1)
        assert no_more("dev.queues") == [0]
        # All or none.
        with pytest.raises(DeviceStateError, match="1 free queues, 2 are wanted"):
            process().attach(dev.name, 2)
        eventually(lambda: sorted(share.leases) == [0, 1], "nothing stays of what failed")


def test_taken_pairs_name_their_holder(dev: EthDev, process: MakeProcess) -> None:
    with rtap.share(dev, [1, 2]) as share:
        a = process().attach(dev.name, [1])
        sentence = f"queue 1 of {dev.name} is in use by process {a.pid}"
        with pytest.raises(DeviceStateError, match=sentence):
            process().attach(dev.name, [2, 1])
        lazy = process().attach(dev.name)
        for use in ("dev.rx_burst(1)", "dev.tx_queue(1)", "dev.send(b'x' * 60, queue=1)"):
            with pytest.raises(DeviceStateError, match=sentence):
                lazy(use)
        with pytest.raises(ValueError, match=f"queue 0 of {dev.name} is not shared, 1, 2 are"):
            lazy("dev.rx_burst(0)")
        with pytest.raises(ValueError, match="is not shared, 1, 2 are"):
            process().attach(dev.name, [0])
        eventually(lambda: sorted(share.leases) == [1], "nothing stays of what failed")
        lazy("dev.rx_burst(2)")
        a("dev.close()")
        lazy("dev.rx_burst(1)")
        assert {lease.pid for lease in share.leases.values()} == {lazy.pid}


@pytest.mark.parametrize(
    ("queues", "error", "text"),
    [
        (0, ValueError, "queues must be 1 to 128, got 0"),
        (True, ValueError, "queues must be 1 to 128"),
        (129, ValueError, "queues must be 1 to 128"),
        ([], ValueError, "queues names no queue pair"),
        (["0"], TypeError, "queues has numbers of queue pairs, got str"),
        ([True], TypeError, "queues has numbers of queue pairs, got bool"),
        ([-1], ValueError, "is not shared"),
        ([4], ValueError, "is not shared"),
        ([1 << 70], ValueError, "queues is out of range"),
        (list(range(2000)), ValueError, "queues is out of range"),
        ([0.5], TypeError, "got float"),
    ],
)
def test_wrong_queues(
    dev: EthDev, process: MakeProcess, queues: Any, error: type[Exception], text: str
) -> None:
    with rtap.share(dev) as share:
        with pytest.raises(error, match=text):
            process().attach(dev.name, queues)
        no_leases(share)
        process().attach(dev.name, [0])


def test_the_same_pair_twice_is_one(dev: EthDev, process: MakeProcess) -> None:
    with rtap.share(dev) as share:
        a = process().attach(dev.name, [2, 2])
        assert a("dev.queues") == [2]
        assert sorted(share.leases) == [2]


def test_unknown_names(netns: NetNS, process: MakeProcess) -> None:
    a = process()
    with pytest.raises(FileNotFoundError, match=r"no process shares 'net_rtap7' in .*rtap.share"):
        a.attach("net_rtap7")
    with pytest.raises(FileNotFoundError, match="no process shares"):
        a.attach("/nonexistent/net_rtap7.sock")
    for name in ("", "a b", "x" * 65, "ä", ".", "..", "/", "../", "\0", "a\n"):
        with pytest.raises(ValueError, match="cannot be the name"):
            a.attach(name)
    for name in (None, 7, b"net_rtap0"):
        with pytest.raises(TypeError):
            a("rtap.attach(name)", name=name)


def test_wrong_key(dev: EthDev, process: MakeProcess) -> None:
    with rtap.share(dev, key="open sesame") as share:
        for key in ("", "open", "open sesame ", "ö", "\ud800"):
            with pytest.raises(PermissionError, match="shared with processes that have its key"):
                process().attach(dev.name, [0], key=key)
        a = process().attach(dev.name, [0], key="open sesame")
        assert share.leases[0].pid == a.pid


def test_names_and_paths(dev: EthDev, netns: NetNS, process: MakeProcess) -> None:
    with (
        rtap.share(dev, [0], name="uplink") as share,
        rtap.open("tap1", netns=netns) as second,
    ):
        assert share.path.endswith("/uplink.sock")
        a = process().attach(share.path, [0])
        assert a("dev.ifname") == "tap0"
        with pytest.raises(FileNotFoundError):
            process().attach(dev.name, [0])
        with pytest.raises(DeviceStateError, match="is shared already"):
            rtap.share(dev, [1])
        with pytest.raises(FileExistsError, match="another process shares 'uplink'"):
            rtap.share(second, name="uplink")
        for name in ("", "a/b", "..", "x" * 65):
            with pytest.raises(ValueError, match="cannot be the name"):
                rtap.share(second, name=name)
        for queues in ([1], [0, 0], [-1], [True], ["0"]):
            with pytest.raises((ValueError, TypeError, DeviceStateError)):
                rtap.share(second, queues)
        second.rx_burst(0)
        with rtap.share(second, name="downlink"):
            process().attach("downlink", [0])


def test_two_devices_of_one_process(netns: NetNS, process: MakeProcess) -> None:
    with ExitStack() as stack:
        devs = [stack.enter_context(rtap.open(name, netns=netns)) for name in ("a0", "b0")]
        ends = [stack.enter_context(PacketSocket(netns, name)) for name in ("a0", "b0")]
        for dev in devs:
            stack.enter_context(rtap.share(dev))
        other = process()
        for n, dev in enumerate(devs):
            other.attach(dev.name, [0])
            other(f"dev{n} = dev")
        for n, end in enumerate(ends):
            other(f"dev = dev{n}")
            to_and_fro(end, other, seq=10 * n)
        assert other("[d.name for d in rtap.devices()]") == [dev.name for dev in devs]
        other("dev0.close()")
        to_and_fro(ends[1], other, seq=30)


def test_one_device_twice_in_a_process(
    dev: EthDev, packets: PacketSocket, process: MakeProcess
) -> None:
    with rtap.share(dev) as share:
        a = process().attach(dev.name, [0])
        a("first = dev")
        a.attach(dev.name, [1])
        assert a("first.name != dev.name, first.ifname == dev.ifname") == [True, True]
        a("first.send(data)", data=frame(1))
        a("dev.send(data, queue=1)", data=frame(2))
        assert packets.frames(2) == [frame(1), frame(2)]
        with pytest.raises(DeviceStateError, match=f"in use by process {a.pid}"):
            a("first.rx_burst(1)")
        a("first.close()")
        eventually(lambda: sorted(share.leases) == [1], "the first one's pair is free")
        a("dev.rx_burst(0)")
        assert share.leases[0].pid == a.pid


def test_own_process_attaches(dev: EthDev, packets: PacketSocket) -> None:
    """A process may attach to its own device, as to that of another."""
    with rtap.share(dev, [1]) as share, rtap.attach(dev.name, [1]) as mine:
        assert mine.send(frame(1), queue=1)
        assert packets.frames(1) == [frame(1)]
        assert mine.stats() == dev.stats()
        assert share.leases[1].pid
        mine.mtu = 1400
        assert (dev.mtu, mine.mtu) == (1400, 1400)


def test_packet_sockets(netns: NetNS, process: MakeProcess) -> None:
    with pair(netns) as (a, b), rtap.share(a), PacketSocket(netns, "v1") as packets:
        other = process().attach(a.name, [0])
        assert other("dev.info().driver_name") == "net_af_packet"
        data = frame(1)
        assert b.send(data)
        assert receive(other, 0) == [data]
        other("dev.send(data)", data=frame(2))
        assert [bytes(m) for m in b.rx_burst(0, 8, patient(5))] == [frame(2)]
        assert a.stats().ipackets == 1
        other.kill()
        eventually(lambda: a.stats().opackets == 1, "counts stay")
        third = process()
        eventually(lambda: attached(third, a.name, [0]), "the pair is free again")
        assert b.send(frame(3))
        assert receive(third, 0) == [frame(3)]
        del packets


def attached(other: Process, name: str, queues: Any) -> bool:
    try:
        other.attach(name, queues)
    except DeviceStateError:
        return False
    return True


def test_tun(netns: NetNS, process: MakeProcess) -> None:
    with rtap.open("tun0", netns=netns, mode="tun", queues=2) as dev, rtap.share(dev):
        a = process().attach(dev.name, [1])
        assert a("dev.info().mode") == "tun"
        packet = bytes.fromhex("4500001c000000004011000a0a0900010a090002") + bytes(8)
        before = netdev(netns, "tun0")["rx_packets"]
        assert a("dev.send(data, queue=1)", data=packet)
        eventually(lambda: netdev(netns, "tun0")["rx_packets"] == before + 1, "it has arrived")


def test_devices_without_an_interface_are_refused() -> None:
    with rtap.probe("net_null0") as dev:
        dev.configure(1, 1)
        dev.rx_queue_setup(0, 64, rtap.Mempool(256))
        dev.tx_queue_setup(0, 64)
        dev.start()
        with pytest.raises(OSError, match="cannot lend its queues") as caught:
            rtap.share(dev)
        assert caught.value.errno == errno.EOPNOTSUPP
        dev.rx_burst(0)
        assert sockets_left() == []


def test_attached_device_cannot_be_shared(dev: EthDev, process: MakeProcess) -> None:
    with rtap.share(dev):
        a = process().attach(dev.name, [0])
        with pytest.raises(OSError, match="is attached: the process that has it shares it"):
            a("rtap.share(dev, name='again')")
        a("dev.rx_burst(0)")


def test_not_before_it_is_set_up(netns: NetNS) -> None:
    with netns.call(rtap.probe, "net_rtap0,iface=tap0") as dev:
        with pytest.raises(DeviceStateError):
            rtap.share(dev)
        dev.configure(1, 1)
        with pytest.raises(DeviceStateError):
            rtap.share(dev)
    with pytest.raises(DeviceStateError):
        rtap.share(dev)
    assert sockets_left() == []


def test_own_pool_and_engine(
    dev: EthDev, packets: PacketSocket, process: MakeProcess, engine: str
) -> None:
    with rtap.share(dev):
        a = process()
        a("pool = rtap.Mempool(64)")
        code = "dev = rtap.attach(name, [0], pool=pool, nb_desc=16, engine=engine, gil='release')"
        a(code, name=dev.name, engine=engine)
        assert a("dev.pool is pool, dev.info().engine") == [True, engine]
        to_and_fro(packets, a)
        a("dev.close()")
        assert a("pool.in_use") == 0


def test_a_program_of_its_own(dev: EthDev, packets: PacketSocket) -> None:
    """Not forked from anything; it exits without closing its device."""
    with rtap.share(dev) as share:
        done = python(
            """
            import sys, rtap
            dev = rtap.attach(sys.argv[1], [0])
            dev.send(bytes.fromhex(sys.argv[2]))
            print(dev)
            """,
            *(dev.name, frame(5).hex()),
        )
        assert done.returncode == 0
        # Without a GIL, Python takes its modules down before an object that threads have shared.
        if not sysconfig.get_config_var("Py_GIL_DISABLED"):
            assert "ResourceWarning: unclosed device <rtap.EthDev net_rtap" in done.stderr
        assert done.stdout.startswith("<rtap.")
        assert packets.frames(1) == [frame(5)]
        no_leases(share)
