# SPDX-License-Identifier: BSD-3-Clause
"""One run of the wire fuzzer: devices, traffic, what happens meanwhile, and the balance."""

from __future__ import annotations

import contextlib
import gc
import itertools
import select
import socket
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any, cast

from wire_balance import check_received, check_route, check_sent, merge
from wire_ends import Sink, Volley, counters, packet_socket
from wire_frames import MAC_A, Frames, Template, look, untagged
from wire_plan import Plan
from wire_stages import Stages, ask

import rtap
from rtap import Burst, MbufFlag, Mempool, NetNS, RouteStats, stages
from rtap._ring import RxQueue, TxQueue
from rtap.offload import VnetHdr

#: Seconds without progress after which a run fails, and seconds for which it sends.
STILL, SENDS = 10, 20
#: Approximate frames of one run, and the most volleys it fires to reach them.
FRAMES, VOLLEYS, VOLLEY = 16000, 300, 192
HEADER = VnetHdr.SIZE


class End:
    """One device and what the run knows about it."""

    def __init__(self, run: Run, name: str, options: dict[str, Any]) -> None:
        plan = run.plan
        self.dev = rtap.open(
            name,
            netns=run.ns,
            mode=plan.mode,
            mtu=plan.mtu,
            queues=plan.queues,
            engine=plan.engine,
            **options,
        )
        self.options = options
        if plan.filtered:
            self.dev.promiscuous = False
            self.dev.allmulticast = plan.filtered > 1
            self.dev.mac_addr_add(MAC_A)
        self.queues = [
            (cast(RxQueue, self.dev._rxq[q]), cast(TxQueue, self.dev._txq[q]))
            for q in range(plan.queues)
        ]
        self.sink = Sink(run.ns, name)
        self.wire = packet_socket(run.ns, name, 0, plan.vnet)
        self.name = name
        self.volleys: list[Volley] = []
        self.closed = False
        self.took = 0  # frames that tx_burst took
        self.received = 0  # frames that rx_burst returned
        self.seen: Counter[int] = Counter()  # frames that came out at the kernel's side, by hash
        self.frames: dict[int, bytes] = {}
        self.probes: list[int] = []
        self.routes: list[tuple[int, RouteStats]] = []  # routes from it: queue, figures

    def close(self) -> None:
        self.wire.close()
        self.sink.close()
        self.dev.close()


class Run:
    """One seed's run."""

    def __init__(self, plan: Plan, ns: NetNS) -> None:
        self.plan, self.ns, self.r = plan, ns, plan.r
        self.l2 = plan.mode == "tap"
        self.stack = ExitStack()
        self.fired: Counter[Volley] = Counter()
        self.known: set[int] = set()  # hashes of frames that were judged
        self.kept: list[Any] = []
        self.workers: list[tuple[rtap.Worker, list[tuple[End, int, list[tuple[End, int]]]]]] = []
        self.ends: list[End] = []
        self.open("in0", plan.a)
        for n in range(plan.targets):
            self.open(f"out{n}", plan.b)
        self.sources = self.ends[: 1 + plan.back]
        self.drawn = Frames(self.r, self.l2, plan.mtu)
        self.stages = Stages(self.r, self.drawn, untouched=plan.untouched)
        self.tx_pool = Mempool(2048, self.r.choice([256, 2048, 70_000]))
        for end in self.sources:
            index = ns.call(socket.if_nametoindex, end.name)
            for _ in range(6):
                templates: list[Template] = []
                while len(templates) < VOLLEY:
                    templates += self.drawn.from_kernel(plan.hostile, plan.vnet)
                end.volleys.append(Volley(templates, index, plan.vnet, self.l2))
        if plan.narrow:
            self.narrow()

    def open(self, name: str, options: dict[str, Any]) -> None:
        end = End(self, name, options)
        self.stack.callback(end.close)
        self.ends.append(end)

    def narrow(self) -> None:
        """Keep frames that the targets send in their send buffers: they leave slowly."""
        self.stack.enter_context(rtap.open("slow", netns=self.ns, mode=self.plan.mode, mtu=65000))
        commands = ["qdisc add dev slow root tbf rate 800mbit burst 70000 limit 1000000000"]
        for end in self.ends[1:]:
            commands += [
                f"qdisc add dev {end.name} ingress",
                f"filter add dev {end.name} parent ffff: protocol all u32 match u32 0 0 "
                "action mirred egress redirect dev slow",
            ]
        for command in commands:
            self.ns.run(["tc", *command.split()], check=True)

    # -- traffic

    def fire(self, end: End) -> None:
        volley = self.r.choice(end.volleys)
        volley.fire(end.wire)
        self.fired[volley] += 1

    def waiting(self, end: End) -> bool:
        """Whether frames wait in the kernel for a queue of the device that is still served."""
        if end.closed:
            return False
        ended = set()
        for worker, routes in self.workers:
            for (source, q, outs), figures in zip(routes, worker.stats().routes, strict=True):
                if source is end and (figures.error or any(out.closed for out, _ in outs)):
                    ended.add(q)
        poll = select.poll()
        for q, (rxq, _) in enumerate(end.queues):
            if q not in ended:
                poll.register(rxq.fd, select.POLLIN)
        return any(what & select.POLLIN for _, what in poll.poll(0))

    def look_at(self, end: End) -> None:
        """Judge the frames that the interface received."""
        seen = end.seen
        for raw in end.sink.frames():
            key = hash(raw)
            if key not in seen:
                self.look_first(end, raw, key)
            seen[key] += 1

    def look_first(self, end: End, raw: bytes, key: int) -> None:
        header, frame = VnetHdr.unpack(raw), raw[HEADER:]
        if frame[:6] == b"\x01\x80\xc2\0\0\1" or (not self.l2 and self.loopback(frame)):
            end.probes.append(key)
        if self.plan.untouched:
            end.frames[key] = frame
        self.judge(frame, not header.flags & VnetHdr.NEEDS_CSUM, header.gso_size, end)

    @staticmethod
    def loopback(frame: bytes) -> bool:
        """Whether the frame is one of rtap's probes, see docs/offload.md."""
        return frame[12:20] == b"\x7f\0\0\1" * 2 or frame[8:40] == (bytes(15) + b"\1") * 2

    def judge(self, frame: bytes, finished: bool, segsz: int, end: End) -> None:
        key = hash((frame, finished, segsz))
        if key in self.known:
            return
        self.known.add(key)
        wrong = look(frame, self.l2, finished, segsz)
        if wrong:
            raise AssertionError(f"{end.name}: {wrong}: {frame[:200].hex()} of {len(frame)} bytes")

    def go(self) -> None:
        plan = self.plan
        if plan.worker:
            self.employ()
        moment = self.r.randrange(5, 30)
        ends = time.monotonic() + SENDS
        for n in range(VOLLEYS):
            for end in self.sources:
                if not end.closed:
                    self.fire(end)
            if not plan.worker:
                self.turn()
            if plan.paced:
                self.settle()
            for end in self.ends:
                self.look_at(end)
            if n == moment:
                self.happen(plan.event)
            if n % 4 == 3 and n > moment and (self.moved() > FRAMES or time.monotonic() > ends):
                break
        self.settle()
        for worker, _ in self.workers:
            self.dismiss(worker)

    def moved(self) -> int:
        """Frames that rtap has received, and been given to send, so far."""
        rx = sum(q.counters()["packets"] for end in self.ends for q, _ in end.queues)
        return rx + sum(end.took for end in self.ends if self.plan.asked)

    def settle(self) -> None:
        """Wait until no frames wait in the kernel for a queue that is served."""
        before, since = -1, time.monotonic()
        while any(map(self.waiting, self.sources)):
            if self.plan.worker and not any(w.running for w, _ in self.workers):
                return
            if not self.plan.worker:
                self.turn()
            if (now := self.moved()) != before:
                before, since = now, time.monotonic()
            if time.monotonic() - since > STILL:
                raise AssertionError(f"frames wait, and nothing reads them: {self.figures()}")
            for end in self.ends:
                self.look_at(end)
            time.sleep(0.0003)

    def figures(self) -> str:
        return "\n".join(str(w.stats()) for w, _ in self.workers)

    # -- a worker

    def employ(self) -> None:
        plan = self.plan
        worker = rtap.Worker(wait=plan.wait, burst=plan.burst)
        routes = []
        for end in self.sources:
            outs = self.ends[1:] if end is self.ends[0] else self.ends[:1]
            for q in range(plan.queues):
                there = [(out, q) for out in outs]
                chain = []
                for _ in range(self.r.choice([0, 1, 2, 4])):
                    chain.append(self.stages.draw(len(there)))
                worker.forward(
                    (end.dev, q),
                    [(out.dev, n) for out, n in there],
                    stages=chain,
                    on_full=plan.on_full,
                )
                routes.append((end, q, there))
        self.workers.append((worker, routes))
        worker.start()

    def dismiss(self, worker: rtap.Worker) -> None:
        """End a worker and keep its figures."""
        worker.stop()
        for found, routes in self.workers:
            if found is worker:
                for (end, q, _), figures in zip(routes, worker.stats().routes, strict=True):
                    end.routes.append((q, figures))

    # -- bursts

    def turn(self) -> None:
        """One round of bursts from Python."""
        r = self.r
        for end in self.sources:
            for q in range(self.plan.queues if end.dev.state == "started" else 0):
                nothing = 0
                while nothing < 2:
                    try:
                        burst = end.dev.rx_burst(q, r.choice([1, 8, 64, 300]))
                    except rtap.DeviceStateError:  # the queue is stopped
                        break
                    end.received += len(burst)
                    nothing = 0 if len(burst) else nothing + 1
                    self.handle(burst, end)
                    del burst
        if self.plan.asked:
            self.send_ours()
        if r.random() < 0.5:
            self.kept.clear()

    def handle(self, burst: Burst, end: End) -> None:
        r = self.r
        for mbuf in burst:
            none = mbuf.ol_flags & MbufFlag.RX_L4_CKSUM_MASK == MbufFlag.RX_L4_CKSUM_NONE
            self.judge(bytes(mbuf), not none, mbuf.tso_segsz, end)
        if not self.plan.untouched:
            if r.random() < 0.3:
                stage = self.stages.draw(1)
                if isinstance(stage, stages.Stage):
                    stage(burst)
                del stage
            if r.random() < 0.1 and len(burst):
                with contextlib.suppress(MemoryError):
                    self.kept.append(burst[0].clone())
                self.stages.tamper(burst, r)
        if r.random() < 0.8 or self.plan.untouched:
            self.send(burst, r.choice(self.ends[1:]))
        burst.free()

    def send(self, burst: Burst, end: End) -> int:
        if end.closed or end.dev.state != "started":
            return 0
        n = len(burst)
        took = end.dev.tx_burst(self.r.randrange(self.plan.queues), burst)
        end.took += took
        if took + len(burst) != n:
            raise AssertionError(f"{end.name}: of {n} frames {took} went and {len(burst)} are left")
        return took

    def send_ours(self) -> None:
        r, plan = self.r, self.plan
        templates = list(
            itertools.chain.from_iterable(self.drawn.from_rtap(plan.hostile) for _ in range(8))
        )
        if r.random() < 0.2:
            templates.append(Template(b"\x45" * r.choice([1, 13, 14, 19])))
        mbufs = []
        for t in templates:
            try:
                mbuf = self.tx_pool.alloc(t.data)
            except (ValueError, MemoryError):  # longer than a slot
                continue
            ask(mbuf, t)
            mbufs.append(mbuf)
            if r.random() < 0.2:
                with contextlib.suppress(MemoryError):
                    mbufs.append(mbuf.clone())
            if r.random() < 0.1:
                self.kept.append(mbuf)
            del mbuf
        burst = Burst(mbufs)
        del mbufs
        end = r.choice(self.ends)
        for _ in range(3):
            self.send(burst, end)
        burst.free()

    # -- events

    def happen(self, event: str) -> None:
        if not event:
            return
        r = self.r
        end = r.choice(self.ends)
        if event == "carrier":
            end.dev.set_link_down()
            self.fire_some()
            end.dev.set_link_up()
        elif event == "admin":
            self.ns.run(["ip", "link", "set", end.name, "down"], check=True)
            self.fire_some()
            self.ns.run(["ip", "link", "set", end.name, "up"], check=True)
        elif event == "restart":
            end.dev.stop()
            self.fire_some()
            end.dev.start()
            self.restart()
        elif event == "queue":
            q = r.randrange(self.plan.queues)
            end.dev.rx_queue_stop(q)
            self.fire_some()
            end.dev.rx_queue_start(q)
            end.dev.tx_queue_stop(q)
            end.dev.tx_queue_start(q)
            self.restart()
        elif event == "close":
            end.dev.close()
            end.closed = True
        elif event == "worker":
            self.restart()

    def fire_some(self) -> None:
        for _ in range(5):
            for end in self.sources:
                self.fire(end)
            if not self.plan.worker:
                self.turn()

    def restart(self) -> None:
        for worker, _ in self.workers:
            self.dismiss(worker)
            worker.start()

    # -- the balance

    def check(self) -> int:
        """Check that every frame is accounted for; return how many moved."""
        moved = self.moved()
        for end in self.ends:
            self.look_at(end)
            if not end.closed:
                end.dev.stop()
        for end in self.ends:
            if end.closed:
                continue
            kernel = counters(self.ns, end.name)
            self.check_device(end, kernel)
        for end in self.ends:
            for _, figures in end.routes:
                check_route(figures)
                if figures.error and not (self.stages.may_fail or self.plan.event == "close"):
                    raise AssertionError(f"a route has ended: {figures.error}")
        if self.plan.untouched and not self.plan.vnet:
            self.check_bytes()
        self.check_slots()
        return moved

    def check_device(self, end: End, kernel: dict[str, int]) -> None:
        rx = merge(rxq.counters() | rxq.xcounters() for rxq, _ in end.queues)
        tx = merge(txq.counters() | txq.xcounters() for _, txq in end.queues)
        stats, xstats = end.dev.stats(), end.dev.xstats()
        what = f"{end.name}: {rx} {tx} {stats} {kernel}"
        got = sum(f.rx_packets for _, f in end.routes) + end.received
        check_received(rx, kernel, got, self.l2, what)
        if stats.imissed + xstats["link_down_drops"] != kernel["tx_dropped"]:
            raise AssertionError(f"missed frames: {xstats['link_down_drops']} and {what}")
        if (stats.ipackets, stats.opackets) != (rx["packets"], tx["packets"]):
            raise AssertionError(f"figures of the device and of its queues differ: {what}")
        probes = sum(end.seen[key] for key in end.probes) if tx["software_gso_packets"] else 0
        lost = end.sink.lost or self.plan.narrow
        check_sent(tx, kernel, probes, bool(lost), self.l2, what)
        targets = [
            t
            for source in self.ends
            for _, figures in source.routes
            for t in figures.targets
            if t.device == end.dev.name
        ]
        packets, drops = sum(t.packets for t in targets), sum(t.drops for t in targets)
        plain = not tx["software_gso_packets"] and not tx["gro_merged_packets"]
        if self.plan.worker:
            if sum(t.bytes for t in targets) != tx["bytes"]:
                raise AssertionError(f"bytes: {targets} {what}")
            quiet = not self.plan.event and end.options["sndbuf"] is None
            if plain and (
                packets != tx["packets"]
                or tx["errors"] > drops
                or (quiet and tx["errors"] != drops and not self.stages.may_fail)
            ):
                raise AssertionError(f"frames of targets: {targets} {what}")
        elif plain and end.took != tx["packets"] + tx["errors"]:
            raise AssertionError(f"{end.took} frames were taken: {what}")
        if self.plan.hostile == 0 and not self.plan.asked:
            for name in ("bad_request_packets", "kernel_refused_packets"):
                if tx[name] and self.plan.untouched:
                    raise AssertionError(f"good frames were refused: {what}")
            if rx["bad_header_packets"] or rx["truncated_packets"]:
                raise AssertionError(f"good frames were not received: {what}")

    def check_bytes(self) -> None:
        """Check that no frame comes out that did not go in, or more often than it went in."""
        if self.plan.back or self.ends[1].options["tx_gro"] or self.ends[0].options["rx_gso"]:
            return
        went: Counter[bytes] = Counter()
        for volley, times in self.fired.items():
            for frame in volley.frames:
                went[untagged(frame) if self.l2 else frame] += times
        came: Counter[bytes] = Counter()
        for end in self.ends[1:]:
            for key, frame in end.frames.items():
                came[frame] += end.seen[key]
        for frame, n in came.items():
            if n > went[frame]:
                raise AssertionError(f"came {n} times, went {went[frame]} times: {frame.hex()}")

    def check_slots(self) -> None:
        self.kept.clear()
        self.stages.held.clear()
        self.workers.clear()
        pools = [self.tx_pool, *self.stages.pools]
        for end in self.ends:
            pools += [rxq.pool for rxq, _ in end.queues if not end.closed]
            if not end.closed:
                pools.append(end.dev.pool)
        gc.collect()
        for pool in pools:
            if pool.in_use:
                raise AssertionError(f"{pool.in_use} slots are lost of {pool}")

    def close(self) -> None:
        self.kept.clear()
        for worker, _ in self.workers:
            worker.stop()
        self.stack.close()
        self.tx_pool.close()
