# SPDX-License-Identifier: BSD-3-Clause
"""A storm of control operations on two devices while iperf3 runs through them.

The operations go through rtap and, behind its back, through ip(8), in random order. In every other
squall they come one after the other, in an order given by the seeds, so that each result can be
checked. In the rest both sources act at the same time. Another thread reads all statistics and
settings meanwhile. After every squall the test restores what it removed (addresses after a move to
another namespace, carrier, IFF_UP, promiscuous mode), and the same TCP connection must go on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
from rigs import Wire, wire, write_in
from support import (
    Task,
    eventually,
    ip,
    link,
    open_fds,
    quiet_netns,
    running_threads,
    settle,
    threads_end,
)

from rtap import EthDev, EthEvent, NetNS, RxOffload, TxOffload, Worker
from rtap.cli.tcp import Iperf3

OPERATIONS = 520
SQUALLS = 20
GUST = OPERATIONS // SQUALLS  # even: two sources share it equally
#: Seconds until TCP must notice that the wire is back: its timer doubles with each loss.
RESUME_S = 20
#: Seconds for a whole squall, far more than it takes, so that only a deadlock reaches it.
HANG_S = 60

LRO = {
    "rx_offloads": RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM | RxOffload.TCP_LRO,
    "tx_offloads": TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM | TxOffload.TCP_TSO,
}


class End:
    """A device, the namespace of its interface, and the expected settings."""

    def __init__(self, dev: EthDev, home: NetNS, away: NetNS, address: str) -> None:
        self.dev, self.home, self.away, self.address = dev, home, away, address
        self.name = dev.ifname
        self.at = home
        self.renamed = 0

    def set(self, *args: str) -> None:
        ip(self.at, "link", "set", "dev", self.name, *args)

    def rename(self) -> None:
        self.renamed += 1
        name = f"{self.name[0]}{self.renamed}"
        self.set("name", name)
        self.name = name

    def move(self) -> None:
        """Moves the interface home, and restores its address, or away."""
        there = self.away if self.at is self.home else self.home
        self.set("netns", there.path)
        self.at = there
        self.furnish()

    def furnish(self) -> None:
        self.set("up")
        if self.at is self.home:
            ip(self.at, "addr", "replace", f"{self.address}/24", "dev", self.name)

    def mend(self) -> None:
        """Restores the settings that traffic needs."""
        if self.at is not self.home:
            self.move()
        self.furnish()
        self.dev.set_link_up()
        self.dev.promiscuous = True

    def check(self) -> None:
        """The device reports the kernel's state."""
        shown = link(self.at, self.name)
        info = self.dev.info()
        assert (info.ifname, info.if_index, info.mtu) == (
            self.name,
            shown["ifindex"],
            shown["mtu"],
        )
        assert str(self.dev.mac) == shown["address"]
        assert self.dev.link().link_status


class Storm:
    """Random operations on both ends of a wire that a worker forwards over."""

    def __init__(self, w: Wire, away: NetNS, worker: Worker) -> None:
        self.worker = worker
        self.alone = True  # no other operations run, so each one can be checked
        self.ends = [End(w.a, w.left, away, "10.9.0.1"), End(w.b, w.right, away, "10.9.0.2")]
        self.done: list[str] = []
        self.heard: Counter[EthEvent] = Counter()
        for end in self.ends:
            for event in EthEvent:
                end.dev.callback_register(event, self.listen)

    def listen(self, dev: EthDev, event: EthEvent, data: object) -> None:
        """Runs on the events thread, which may call everything on the device."""
        if event != EthEvent.DESTROY:
            dev.link()
            assert dev.info().name == dev.name
            self.heard[event] += 1

    # -- through rtap

    def own_mtu(self, end: End, rng: random.Random) -> None:
        mtu = rng.choice((576, 1280, 1500, 4000, 9000))
        end.dev.mtu = mtu
        assert not self.alone or end.dev.mtu == mtu

    def own_promiscuous(self, end: End, rng: random.Random) -> None:
        end.dev.promiscuous = not end.dev.promiscuous

    def own_allmulticast(self, end: End, rng: random.Random) -> None:
        end.dev.allmulticast = not end.dev.allmulticast

    def own_addresses(self, end: End, rng: random.Random) -> None:
        end.dev.mac_addr_add("02:00:00:00:00:77")
        end.dev.mc_addr_list = ["01:00:5e:00:00:01"]
        end.dev.mac_addr_remove("02:00:00:00:00:77")

    def own_carrier(self, end: End, rng: random.Random) -> None:
        """Takes the carrier down, and mostly up again."""
        end.dev.set_link_down()
        assert not (self.alone and end.dev.link().link_status)
        if rng.random() < 0.8:
            end.dev.set_link_up()

    def own_stats(self, end: End, rng: random.Random) -> None:
        stats, xstats = end.dev.stats(), end.dev.xstats()
        assert min(stats.ipackets, stats.imissed, *xstats.values()) >= 0

    def own_resets(self, end: End, rng: random.Random) -> None:
        end.dev.stats_reset()
        end.dev.xstats_reset()

    def own_restart(self, end: End, rng: random.Random) -> None:
        """The worker drops a queue that stops, so the worker is started again as well."""
        end.dev.stop()
        self.worker.stop()
        end.dev.start()
        self.worker.start()

    # -- by others

    def their_mtu(self, end: End, rng: random.Random) -> None:
        mtu = rng.choice((576, 1280, 1500, 4000, 9000))
        end.set("mtu", str(mtu))
        assert not self.alone or end.dev.mtu == mtu

    def their_promiscuous(self, end: End, rng: random.Random) -> None:
        end.set("promisc", rng.choice(("on", "off")))

    def their_carrier(self, end: End, rng: random.Random) -> None:
        end.set("carrier", "off")
        if rng.random() < 0.8:
            end.set("carrier", "on")

    def their_down(self, end: End, rng: random.Random) -> None:
        end.set("down")
        assert not (self.alone and end.dev.link().link_status)
        if rng.random() < 0.8:
            end.furnish()

    def their_name(self, end: End, rng: random.Random) -> None:
        end.rename()
        assert not self.alone or end.dev.ifname == end.name

    def their_namespace(self, end: End, rng: random.Random) -> None:
        end.move()
        assert not self.alone or end.dev.info().ifname == end.name

    def their_queue_length(self, end: End, rng: random.Random) -> None:
        end.set("txqueuelen", str(rng.choice((500, 1000, 2000))))

    # -- all of them

    def gust(self, kinds: Sequence[str], n: int, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(n):
            kind, end = rng.choice(kinds), rng.choice(self.ends)
            self.done.append(f"{kind} {end.name}")
            getattr(self, kind)(end, rng)

    def squall(self, number: int, n: int) -> None:
        """Does `n` operations, then restores everything."""
        self.alone = number % 2 == 0
        if self.alone:
            self.gust(OWN + THEIR, n, number)
        else:
            gusts = [Task(self.gust, kinds, n // 2, number) for kinds in (OWN, THEIR)]
            for task in gusts:
                task.result(HANG_S)
        for end in self.ends:
            end.mend()
            end.check()
        assert self.worker.running
        assert [route.error for route in self.worker.stats().routes] == ["", ""]

    def watch(self, over: threading.Event) -> int:
        """Reads everything until the storm is over; returns how often."""
        n = 0
        while not over.is_set():
            for end in self.ends:
                assert end.dev.info().driver_name == "net_rtap"
                assert end.dev.stats().imissed >= 0
                assert len(end.dev.xstats()) > 20
                end.dev.link()
                assert end.dev.mac == end.dev.info().mac
                repr(end.dev)
            n += 1
        return n


OWN = [name for name in vars(Storm) if name.startswith("own_")]
TOLD = {EthEvent.INTR_LSC, EthEvent.RENAME, EthEvent.MTU, EthEvent.NETNS, EthEvent.ADMIN_STATE}
THEIR = [name for name in vars(Storm) if name.startswith("their_")]


def within(seconds: float, what: str, fn: Callable[..., object], *args: object) -> None:
    """Calls ``fn(*args)``; if it does not return, prints every thread's stack and fails."""
    task = Task(fn, *args)
    task.join(seconds)
    if task.is_alive():
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        pytest.fail(f"after {seconds} s still busy with {what}")
    task.result()


@contextlib.contextmanager
def iperf3(w: Wire) -> Iterator[Callable[[], int]]:
    """One TCP connection that is always full; gives the number of bytes received."""

    def connected() -> int:
        shown = w.right.run(
            ["ss", "-Htin", "state", "established"], capture_output=True, text=True, check=True
        )
        return max(map(int, re.findall(r"bytes_received:(\d+)", shown.stdout)), default=0)

    def listening() -> bool:
        shown = w.right.run(["ss", "-Htln"], capture_output=True, text=True, check=True)
        return ":5201" in shown.stdout

    with contextlib.ExitStack() as stack:

        def start(ns: NetNS, *argv: str) -> subprocess.Popen[str]:
            process = ns.popen(
                ["iperf3", "-4", "-i", "0", *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        start(w.right, "-s", "-1", "-B", "10.9.0.2")
        eventually(listening, "iperf3 listens")
        client = start(w.left, "-c", "10.9.0.2", "-t", "3600")

        def received() -> int:
            if client.poll() is not None:
                assert client.stdout is not None
                pytest.fail(f"iperf3 has ended: {client.stdout.read()}")
            return connected()

        eventually(lambda: received() > 1 << 20, "iperf3 sends", 10)
        yield received


class Ends:
    """The attributes that :class:`rtap.cli.tcp.Client` needs."""

    def __init__(self, w: Wire) -> None:
        self.name, self.client, self.server, self.address = "rtap", w.left, w.right, "10.9.0.2"


@pytest.mark.slow
def test_storm(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    if not shutil.which("iperf3") or not shutil.which("ss"):
        pytest.skip("needs iperf3 and ss")
    with quiet_netns() as away, wire(a=LRO | {"engine": engine}, b=LRO | {"engine": engine}) as w:
        for ns in (w.left, w.right):
            with contextlib.suppress(FileNotFoundError):  # Linux 6.15
                write_in(ns, "/proc/sys/net/ipv4/tcp_rto_max_ms", "1000")
        worker = Worker()
        worker.forward((w.a, 0), (w.b, 0))
        worker.forward((w.b, 0), (w.a, 0))
        storm = Storm(w, away, worker)
        with worker, iperf3(w) as received:
            for end in storm.ends:
                end.check()
            before, threads = open_fds(), running_threads()
            over = threading.Event()
            watcher = Task(storm.watch, over)
            try:
                for number in range(SQUALLS):
                    within(HANG_S, "a squall", storm.squall, number, GUST)
                    had = received()
                    eventually(
                        lambda had=had: received() > had + (1 << 20),
                        f"traffic resumes after {storm.done[-GUST:]}",
                        RESUME_S,
                    )
            finally:
                over.set()
            assert watcher.result() > SQUALLS
            # Not none_left: descriptors that replaced others are open now.
            eventually(lambda: len(open_fds()) <= len(before), f"no more are open than {before}")
            threads_end(threads)
        assert len(storm.done) == OPERATIONS
        assert storm.heard.keys() >= TOLD
        # Exceptions of callbacks and of the netlink thread are only logged.
        assert [record.getMessage() for record in caplog.records] == []
        assert {line.split()[0] for line in storm.done} == {*OWN, *THEIR}
        with worker:
            assert Iperf3().run(Ends(w), 1, lambda: None) > 0
            w.transfer(1 << 20)
            w.transfer(1 << 20, back=True)
        for end in storm.ends:
            assert settle(end.dev.pool) == 0
