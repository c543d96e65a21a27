# SPDX-License-Identifier: BSD-3-Clause
"""Super-frames that the kernel refuses: split in software, held, or counted and dropped."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import preload
import pytest
from rigs import Shape, bridged, label
from support import (
    pattern,
    settle,
)

from rtap import Burst, DeviceGone, Mempool, TxOffload
from rtap._ring import TxQueue

TX = TxOffload.UDP_CKSUM | TxOffload.TCP_CKSUM | TxOffload.TCP_TSO | TxOffload.UDP_TSO


# ---- a kernel that splits fewer kinds than this one


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """refuse.c, compiled."""
    return preload.build("refuse", tmp_path_factory.mktemp("shim"))


PRELUDE = """
import ctypes, json, logging, sys
from rigs import Shape, bridged
from support import pattern
import rtap
from rtap import Burst, TxOffload

shim = ctypes.CDLL(sys.argv[1])
engine = sys.argv[2]
TCP4, TCP6, UDP = 1 << 1, 1 << 4, 1 << 5
TX = TxOffload.UDP_CKSUM | TxOffload.TCP_CKSUM | TxOffload.TCP_TSO | TxOffload.UDP_TSO

def refuse(kinds, longer_than=0):
    shim.refuse_kinds(kinds, ctypes.c_ulong(longer_than))

class Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []
        logging.getLogger("rtap").addHandler(self)

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))

said = Said()

def send(bridge, shape, payload, segsz, queue=0, **pool):
    frame = shape.unfinished(payload)
    mbuf = shape.request(bridge.a.pool.alloc(frame), segsz)
    assert bridge.a.tx_burst(queue, Burst([mbuf])) == 1
    wanted = shape.segments(payload, segsz)
    assert bridge.arriving(len(wanted)) == wanted, (shape, segsz)

def xstat(bridge, name):
    return sum(n for key, n in bridge.a.xstats().items() if key.endswith(name))

def options(**more):
    return {"tx_offloads": TX, "engine": engine, "nb_mbufs": 256, "data_room": 66000, **more}
"""


def run(shim: Path, engine: str, code: str) -> Any:
    """Runs `code` in a process with the shim; returns the JSON it prints last."""
    return preload.run(shim, engine, PRELUDE, code)


KINDS = {
    "tcp4": ("TCP4", 'Shape(4, tcp_flags="CEPA")', TxOffload.TCP_TSO, "TCP over IPv4", 1),
    "tcp6": ("TCP6", "Shape(6, vlans=1)", TxOffload.TCP_TSO, "TCP over IPv6", 2),
    "udp4": ("UDP", 'Shape(4, "udp")', TxOffload.UDP_TSO, "UDP", 4),
    "udp6": ("UDP", 'Shape(6, "udp", l3_options=True)', TxOffload.UDP_TSO, "UDP", 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_the_kernel_refuses_is_split_here(shim: Path, engine: str, kind: str) -> None:
    """No frame is lost, and the kernel is tried only twice: with the frame and with the probe."""
    name, shape, offload, words, _ = KINDS[kind]
    found = run(
        shim,
        engine,
        f"""
        shape = {shape}
        others = [s for s in (Shape(4), Shape(6), Shape(4, "udp"))
                  if (s.version, s.proto) != (shape.version, shape.proto)
                  and (s.proto, shape.proto) != ("udp", "udp")]
        with bridged(a=options(queues=2), b={{"engine": "syscall"}}) as bridge:
            refuse({name})
            before = bridge.a.info().tx_offloads_refused
            for segsz in (1000, 700, 1400):
                send(bridge, shape, pattern(segsz, 5000), segsz)
            asked = shim.refused_so_far()
            send(bridge, shape, pattern(9, 5000), 1000, queue=1)
            for other in others:
                send(bridge, other, pattern(1, 5000), 1000)
            assert bridge.nothing_arrives()
            info = bridge.a.info()
            print(json.dumps({{
                "before": int(before), "refused": int(info.tx_offloads_refused),
                "on": int(info.tx_offloads), "asked": asked, "later": shim.refused_so_far(),
                "oerrors": bridge.a.stats().oerrors,
                "software": xstat(bridge, "software_gso_packets"),
                "tso": xstat(bridge, "tso_packets"), "others": len(others), "said": said.lines,
                "used": bridge.a.pool.in_use,
            }}))
        """,
    )
    assert found["before"] == 0
    assert found["refused"] == offload
    assert found["on"] == TX
    assert (found["asked"], found["later"]) == (2, 2)
    assert (found["oerrors"], found["used"]) == (0, 0)
    assert (found["software"], found["tso"]) == (4, found["others"])
    assert found["said"] == [
        [
            "WARNING",
            f"a0: the kernel refuses every super-frame of {words}, they are split in software from "
            "now on",
        ]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_one_frame_that_the_kernel_refuses_is_split_here(
    shim: Path, engine: str, kind: str
) -> None:
    """The kernel takes the shorter probe, so nothing is switched off and nothing is logged."""
    name, shape, _, _, _ = KINDS[kind]
    found = run(
        shim,
        engine,
        f"""
        shape = {shape}
        with bridged(a=options(), b={{"engine": "syscall"}}) as bridge:
            refuse({name}, 300)
            for segsz in (1000, 700, 1400):
                send(bridge, shape, pattern(segsz, 5000), segsz)
            asked = shim.refused_so_far()
            refuse(0)
            send(bridge, shape, pattern(1, 5000), 1000)
            assert bridge.nothing_arrives()  # the probe reaches nobody
            print(json.dumps({{
                "refused": int(bridge.a.info().tx_offloads_refused), "asked": asked,
                "oerrors": bridge.a.stats().oerrors, "tso": xstat(bridge, "tso_packets"),
                "software": xstat(bridge, "software_gso_packets"), "said": said.lines,
            }}))
        """,
    )
    assert found == {
        "refused": 0, "asked": 3, "oerrors": 0, "tso": 1, "software": 3, "said": [],
    }  # fmt: skip


def test_a_signal_handler_that_raises_while_it_is_said(shim: Path, engine: str) -> None:
    """The exception arrives, the frame is sent, and the refusal is remembered."""
    found = run(
        shim,
        engine,
        """
        import signal

        class Interrupted(Exception):
            pass

        def interrupt(*_):
            raise Interrupted

        class Interrupts(logging.Handler):
            def emit(self, record):
                signal.raise_signal(signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, interrupt)
        shape = Shape()
        with bridged(a=options(), b={"engine": "syscall"}) as bridge:
            dev, wanted = bridge.a, shape.segments(pattern(1, 5000), 1000)
            logging.getLogger("rtap").addHandler(Interrupts())
            refuse(TCP4)
            burst = Burst([shape.request(dev.pool.alloc(shape.unfinished(pattern(1, 5000))), 1000)])
            try:
                dev.tx_burst(0, burst)
            except Interrupted:
                found = [len(burst), int(dev.info().tx_offloads_refused)]
            assert bridge.arriving(len(wanted)) == wanted
            send(bridge, shape, pattern(2, 5000), 1000)
            print(json.dumps([found, dev.stats().oerrors, dev.pool.in_use]))
        """,
    )
    assert found == [[0, TxOffload.TCP_TSO], 0, 0]


def test_configuring_anew_asks_the_kernel_anew(shim: Path, engine: str) -> None:
    found = run(
        shim,
        engine,
        """
        with bridged(a=options(), b={"engine": "syscall"}) as bridge:
            dev, pool = bridge.a, bridge.a.pool
            refuse(TCP4)
            send(bridge, Shape(), pattern(1, 5000), 1000)
            seen = [int(dev.info().tx_offloads_refused)]
            refuse(0)
            dev.stop()
            dev.start()
            seen.append(int(dev.info().tx_offloads_refused))
            dev.stop()
            dev.configure(1, 1, rtap.EthConf(tx_offloads=TX, engine=engine))
            seen.append(int(dev.info().tx_offloads_refused))
            dev.rx_queue_setup(0, 64, pool)
            dev.tx_queue_setup(0, 64)
            dev.start()
            send(bridge, Shape(), pattern(1, 5000), 1000)
            print(json.dumps([seen, xstat(bridge, "tso_packets"), len(said.lines)]))
        """,
    )
    assert found == [[TxOffload.TCP_TSO, TxOffload.TCP_TSO, 0], 1, 1]


def test_what_was_merged_here_is_split_again(shim: Path, engine: str) -> None:
    """With tx_gro, the frames arrive unchanged, and no more are merged."""
    found = run(
        shim,
        engine,
        """
        shape = Shape()
        with bridged(a=options(tx_gro=True), b={"engine": "syscall"}) as bridge:
            frames = shape.segments(pattern(1, 10_000), 1000)
            seen = []
            for kinds in (0, TCP4, TCP4):
                refuse(kinds)
                burst = bridge.a.pool.alloc_burst(len(frames), frames)
                assert bridge.a.tx_burst(0, burst) == len(frames)
                assert bridge.arriving(len(frames)) == frames
                seen.append((xstat(bridge, "gro_merged_packets"),
                             xstat(bridge, "software_gso_packets"), shim.refused_so_far()))
            print(json.dumps([seen, bridge.a.stats().oerrors, bridge.a.pool.in_use]))
        """,
    )
    assert found == [[[10, 0, 0], [10, 1, 2], [10, 1, 0]], 0, 0]


def test_nothing_overtakes_the_pieces_of_what_was_merged_here(shim: Path) -> None:
    """256 frames are processed together; the kernel has room for another one after them."""
    found = run(
        shim,
        "syscall",
        """
        shape, other = Shape(), Shape(6, "udp")
        with bridged(a=options(tx_gro=True, nb_mbufs=512), b=options()) as bridge:
            frames = [*shape.segments(pattern(1, 25_600), 100), other.finished(b"behind")]
            refuse(TCP4)
            shim.full_at_write(20)  # the frame, a probe, and then pieces of it
            burst = bridge.a.pool.alloc_burst(len(frames), frames)
            sent = bridge.a.tx_burst(0, burst)
            waiting = bridge.a._txq[0].waiting
            later = bridge.a.tx_burst(0, burst)
            assert bridge.arriving(len(frames)) == frames
            print(json.dumps([len(frames), sent, waiting, later]))
        """,
    )
    assert found == [257, 256, 256 - 17, 1]


def test_a_frame_is_prepared_once(shim: Path) -> None:
    """Also where it could not go with those before it: what a program that still has it writes
    into its flags meanwhile is not looked at."""
    found = run(
        shim,
        "uring",
        """
        from contextlib import ExitStack
        from support import PacketSocket, eventually, quiet_netns
        with ExitStack() as stack:
            ns = stack.enter_context(quiet_netns())
            a, b, c = (stack.enter_context(rtap.open(name, netns=ns, **options()))
                       for name in ("a0", "b0", "c0"))
            at_a = stack.enter_context(PacketSocket(ns, "a0", 0x0800))
            at_c = stack.enter_context(PacketSocket(ns, "c0", 0x0800))
            big, small = Shape(), Shape(proto="udp")
            payload = pattern(1, 1000)
            for data in (big.unfinished(payload), small.finished(b"kept"), big.unfinished(payload)):
                at_a.send(data)
            kept, told = [], []

            def stage(burst):
                if len(burst) != 3:
                    return [rtap.stages.DROP] * len(burst)
                for n in (0, 2):
                    big.request(burst[n], 100)
                kept.append(burst[1])
                return [0, 1, 1]

            class Refused(logging.Handler):
                def emit(self, record):
                    told.append(record.getMessage()[:2])
                    kept[0].ol_flags = rtap.MbufFlag.TX_UDP_CKSUM  # and no lengths: impossible

            logging.getLogger("rtap").addHandler(Refused())
            c._txq[0].software_gso = 7  # its second frame has to be split first
            refuse(TCP4)
            worker = rtap.Worker()
            worker.forward((a, 0), [(b, 0), (c, 0)], stages=[stage])
            with worker:
                eventually(lambda: worker.stats().tx_packets == 3, "all are sent")
            arrived = at_c.frames(11)
            assert arrived == [small.finished(b"kept"), *big.segments(payload, 100)]
            print(json.dumps([told, worker.stats().drops, c.stats().oerrors]))
            kept.clear()
        """,
    )
    assert found == [["b0"], 0, 0]


def test_a_worker_falls_back_too(shim: Path, engine: str) -> None:
    """A worker without the GIL splits a real connection's super-frames; its data is whole."""
    found = run(
        shim,
        engine,
        """
        from rigs import wire
        from rtap import RxOffload
        both = {"tx_offloads": TX, "rx_offloads": RxOffload.TCP_CKSUM | RxOffload.TCP_LRO,
                "engine": engine, "nb_mbufs": 1024}
        refuse(TCP4)
        with wire(a=both, b=both) as w:
            worker = rtap.Worker()
            worker.forward((w.a, 0), (w.b, 0), on_full="retry")
            worker.forward((w.b, 0), (w.a, 0), on_full="retry")
            with worker:
                w.transfer(4 << 20)
            print(json.dumps({
                "lro": w.a.xstats()["rx_q0_lro_packets"],
                "software": w.b.xstats()["tx_q0_software_gso_packets"],
                "tso": w.b.xstats()["tx_q0_tso_packets"],
                "oerrors": w.b.stats().oerrors,
                "refused": int(w.b.info().tx_offloads_refused),
                "said": [line for _, line in said.lines if line.startswith("b0")],
            }))
        """,
    )
    assert found["lro"] == found["software"] > 20
    assert found["tso"] == found["oerrors"] == 0
    assert found["refused"] == TxOffload.TCP_TSO
    assert len(found["said"]) == 1


# ---- frames that any kernel refuses


@pytest.mark.parametrize("version", [4, 6])
def test_too_many_datagrams_are_refused_and_counted(engine: str, version: int) -> None:
    """The kernel answers EINVAL above 128 (UDP_MAX_SEGMENTS), and so does software."""
    shape = Shape(version, "udp")
    with bridged(a={"tx_offloads": TX, "engine": engine}, b={"engine": "syscall"}) as bridge:
        for n, fits in ((128, True), (129, False), (128, True)):
            payload = pattern(n, 10 * n)
            mbuf = shape.request(bridge.a.pool.alloc(shape.unfinished(payload)), 10)
            last = bridge.a.pool.alloc(shape.finished(b"last"))
            assert bridge.a.tx_burst(0, Burst([mbuf, last])) == 2
            wanted = shape.segments(payload, 10) if fits else []
            assert bridge.arriving(len(wanted) + 1) == [*wanted, shape.finished(b"last")]
        stats, xstats = bridge.a.stats(), bridge.a.xstats()
        assert (stats.opackets, stats.oerrors) == (5, 1)
        assert xstats["tx_q0_kernel_refused_packets"] == 1
        assert xstats["tx_q0_software_gso_packets"] == 0
        assert bridge.a.info().tx_offloads_refused == 0
        assert bridge.nothing_arrives()


# ---- a target that is full half-way


class Pair:
    """A send queue into a socket that holds a few datagrams, and a reader."""

    def __init__(self, stack: ExitStack, engine: str) -> None:
        ours, self.theirs = map(
            stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        )
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
        self.theirs.setblocking(False)
        self.pool = stack.enter_context(Mempool(256, 4096))
        self.tx = TxQueue(ours.fileno(), name="pair", vnet_hdr=False, ordered=True, engine=engine)
        stack.callback(self.tx.close)
        self.tx.start()

    def burst(self, shape: Shape, payload: bytes, segsz: int) -> Burst:
        return Burst([shape.request(self.pool.alloc(shape.unfinished(payload)), segsz)])

    def all(self) -> list[bytes]:
        """The frames that have arrived, and those still held."""
        got = self.drain()
        while more := (self.tx.tx_burst(Burst()), self.drain())[1]:
            got += more
        return got

    def drain(self) -> list[bytes]:
        got = []
        while True:
            try:
                got.append(self.theirs.recv(1 << 16))
            except BlockingIOError:
                return got


@pytest.fixture
def pair(engine: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, engine)


PAYLOAD = pattern(5, 3000)


@pytest.mark.parametrize("shape", [Shape(), Shape(6, "udp")], ids=label)
def test_what_does_not_fit_leaves_first_with_the_next_burst(pair: Pair, shape: Shape) -> None:
    wanted = shape.segments(PAYLOAD, 50)
    assert pair.tx.tx_burst(pair.burst(shape, PAYLOAD, 50)) == 1
    got = pair.drain()
    assert 0 < len(got) < len(wanted)
    # The queue takes nothing else until all of it has left.
    more = Burst([pair.pool.alloc(shape.finished(b"more"))])
    taken = 0
    while taken == 0:
        before = len(got)
        taken = pair.tx.tx_burst(more)
        got += pair.drain()
        assert len(got) > before
        assert len(more) == 1 - taken
    assert got == [*wanted, shape.finished(b"more")]
    counters = pair.tx.counters()
    assert (counters["packets"], counters["errors"]) == (len(wanted) + 1, 0)
    assert pair.tx.xcounters()["software_gso_packets"] == 1
    del more
    assert settle(pair.pool) == 0


def test_an_empty_burst_sends_what_is_left(pair: Pair) -> None:
    shape = Shape()
    assert pair.tx.tx_burst(pair.burst(shape, PAYLOAD, 50)) == 1
    assert pair.tx.waiting > 0
    assert pair.all() == shape.segments(PAYLOAD, 50)
    assert pair.tx.waiting == 0
    assert pair.pool.in_use == 0


def lose_by_stopping(pair: Pair) -> str:
    pair.tx.stop()
    pair.tx.start()
    return "unsent_packets"


def lose_by_unplugging(pair: Pair) -> str:
    pair.tx.set_plugged(False)
    assert pair.tx.tx_burst(Burst()) == 0
    pair.tx.set_plugged(True)
    return "link_down_packets"


@pytest.mark.parametrize("size", [50, 2])  # with 2, not all are made at once
@pytest.mark.parametrize("lose", [lose_by_stopping, lose_by_unplugging])
def test_what_is_left_when_the_link_goes(
    pair: Pair, lose: Callable[[Pair], str], size: int
) -> None:
    """Every piece is sent, or counted with the reason why not."""
    shape = Shape()
    pieces = len(shape.segments(PAYLOAD, size))
    assert pair.tx.tx_burst(pair.burst(shape, PAYLOAD, size)) == 1
    waiting = pair.tx.waiting
    assert waiting == pieces - len(pair.drain()) > 0
    reason = lose(pair)
    assert (pair.tx.waiting, pair.pool.in_use) == (0, 0)
    assert pair.tx.xcounters()[reason] == pair.tx.counters()["errors"] == waiting
    assert pair.tx.counters()["packets"] == pieces - waiting
    assert pair.tx.tx_burst(Burst([pair.pool.alloc(shape.finished(b"anew"))])) == 1
    assert pair.drain() == [shape.finished(b"anew")]


def test_closing_gives_back_what_is_left(engine: str) -> None:
    with ExitStack() as stack:
        pair = Pair(stack, engine)
        assert pair.tx.tx_burst(pair.burst(Shape(), PAYLOAD, 50)) == 1
        waiting = pair.tx.waiting
        assert waiting > 0
        pair.tx.close()
        assert pair.pool.in_use == 0
        assert pair.tx.counters()["unsent"] == waiting


@pytest.mark.parametrize("shape", [Shape(), Shape(6, "udp")], ids=label)
def test_no_buffer_is_needed(pair: Pair, shape: Shape) -> None:
    """A super-frame that holds the last buffer is sent nevertheless."""
    burst = pair.burst(shape, PAYLOAD, 50)
    rest = pair.pool.alloc_burst(pair.pool.available)
    assert pair.pool.available == 0
    assert pair.tx.tx_burst(burst) == 1
    assert pair.all() == shape.segments(PAYLOAD, 50)
    assert pair.tx.counters()["errors"] == 0
    rest.free()


@pytest.mark.parametrize("size", [10, 2, 1])
def test_more_frames_than_the_pool_has(pair: Pair, size: int) -> None:
    """The frames leave in portions, whatever their number."""
    shape = Shape()
    wanted = shape.segments(PAYLOAD, size)
    assert len(wanted) > pair.pool.size
    assert pair.tx.tx_burst(pair.burst(shape, PAYLOAD, size)) == 1
    assert pair.all() == wanted
    assert (pair.tx.counters()["packets"], pair.tx.counters()["errors"]) == (len(wanted), 0)
    assert pair.pool.in_use == 0


def test_a_device_that_goes_meanwhile(engine: str) -> None:
    """The rest of the super-frame is freed with the queue once the loss is noticed."""
    shape = Shape()
    with bridged(a={"engine": engine}) as bridge:
        queue: Any = bridge.a.tx_queue(0)
        burst = Burst([shape.request(bridge.a.pool.alloc(shape.unfinished(PAYLOAD[:1400])), 50)])
        bridge.ns.run(["ip", "link", "del", "a0"], check=True)
        with pytest.raises(DeviceGone) as gone:
            queue.tx_burst(burst)
        assert gone.value.sent == 1
        assert queue.waiting == 28
        bridge.a.stop()
        assert (queue.waiting, queue.counters()["unsent"]) == (0, 28)
        assert bridge.a.pool.in_use == 0
