# SPDX-License-Identifier: BSD-3-Clause
"""The stages of the wire fuzzer's routes: every stage of rtap, with odd arguments."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Callable
from typing import Any

from wire_frames import MARK, Frames, Template

import rtap
from rtap import Burst, MbufFlag, Mempool, stages

MAC = "02:00:00:00:0b:0c"


def ask(mbuf: rtap.Mbuf, t: Template) -> None:
    """Copy the template's TX request to the mbuf."""
    mbuf.ol_flags, mbuf.tso_segsz, mbuf.vlan_tci = t.flags, t.tso_segsz, t.vlan_tci
    mbuf.l2_len, mbuf.l3_len, mbuf.l4_len = t.l2_len, t.l3_len, t.l4_len


class Stages:
    """Draws stages, and keeps alive the objects they use."""

    def __init__(self, r: random.Random, drawn: Frames, *, untouched: bool) -> None:
        self.r, self.drawn, self.l2, self.untouched = r, drawn, drawn.l2, untouched
        self.pools: list[Mempool] = []
        #: The frame that a Python stage holds. More than one would keep small pools empty.
        self.held: list[rtap.Mbuf] = []
        self.may_fail = False
        self._natives: list[Any] = []

    def draw(self, targets: int) -> Any:
        """Draw a stage for a route with this number of targets."""
        r, l2 = self.r, self.l2
        drop: Any = stages.DROP
        pick = r.choice([drop, *range(targets)])
        leave: list[Callable[[], Any]] = [
            lambda: stages.Match(
                r.choice([None, "tcp", "udp", 1]), action=pick, otherwise=r.choice([None, 0]), l2=l2
            ),
            lambda: stages.Match(
                "tcp", source_port=(40000, r.randrange(40000, 40064)), action=pick, l2=l2
            ),
            lambda: stages.Match(
                source=r.choice(["10.66.0.0/16", "fd09::/16"]), action=pick, l2=l2
            ),
            lambda: stages.Spread(ports=r.random() < 0.5, l2=l2, seed=r.randrange(9)),
            lambda: stages.ChecksumVerify(drop=r.random() < 0.5, l2=l2),
            stages.Counter,
            lambda: stages.Native(self.native(targets)),
            lambda: self.python(targets, tamper=False),
        ]
        change: list[Callable[[], Any]] = [
            lambda: stages.Gro(
                udp=r.random() < 0.5,
                max_length=r.choice([576, 9000, 65535]),
                fixed_id=r.random() < 0.2,
                l2=l2,
            ),
            lambda: stages.Gso(r.choice([None, self.small_pool()]), l2=l2),
            lambda: stages.ChecksumFill(l2=l2),
            lambda: self.python(targets, tamper=True),
        ]
        if l2:
            change += [
                stages.MacSwap,
                lambda: stages.MacRewrite(MAC),
                stages.FiveTupleSwap,
                lambda: stages.Echo(MAC, others=r.choice([None, 0, targets - 1])),
            ]
        changes = not self.untouched and r.random() < 0.6
        return r.choice(change if changes else leave)()

    def small_pool(self) -> Mempool:
        pool = Mempool(self.r.choice([2, 40, 1000]), self.r.choice([200, 2048, 9100]))
        self.pools.append(pool)
        return pool

    def native(self, targets: int) -> Any:
        """A native stage: a Python function that ctypes wraps."""

        class Native(ctypes.Structure):
            _fields_ = (
                *((name, ctypes.c_uint32) for name in ("abi", "n", "n_targets", "reserved")),
                ("data", ctypes.POINTER(ctypes.c_void_p)),
                ("len", ctypes.POINTER(ctypes.c_uint32)),
                ("ol_flags", ctypes.POINTER(ctypes.c_uint64)),
                ("verdict", ctypes.POINTER(ctypes.c_uint32)),
            )

        def stage(_ctx: int, burst: Any) -> int:
            b = burst.contents
            for i in range(0, b.n, 5):
                b.verdict[i] = b.len[i] % (targets + 1)
                if b.verdict[i] == targets:
                    b.verdict[i] = stages.DROP
            return 0

        made = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Native))(stage)
        self._natives.append(made)
        return made

    def python(self, targets: int, *, tamper: bool) -> Any:
        r = random.Random(self.r.random())
        fails = r.random() < 0.05
        self.may_fail |= fails
        held = self.held

        def stage(burst: Burst) -> list[int] | None:
            if fails and r.random() < 0.01:
                raise LookupError("planned")
            if r.random() < 0.1 and burst[0].nb_segs == 1:
                with contextlib.suppress(MemoryError):
                    held[:] = [burst[0].clone()]
            if tamper and r.random() < 0.3:
                self.tamper(burst, r)
            if r.random() < 0.3:
                return None
            # Not every verdict is invalid, so that some frames move.
            return [r.choice([*range(targets), 0, stages.DROP]) for _ in range(len(burst))]

        return stage

    def tamper(self, burst: Burst, r: random.Random) -> None:
        """Give frames that are not tracked odd requests, lengths and sharing."""
        for mbuf in burst:
            if r.random() > 0.2 or MARK in bytes(mbuf)[:400]:
                continue
            asked = self.drawn.hostile_request() if r.random() < 0.1 else None
            if asked is not None:
                ask(mbuf, asked)
            elif r.random() < 0.5:
                mbuf.ol_flags = mbuf.ol_flags ^ int(r.choice([
                    MbufFlag.RX_LRO, MbufFlag.RX_L4_CKSUM_NONE, MbufFlag.TX_TCP_SEG,
                    MbufFlag.TX_UDP_CKSUM, MbufFlag.TX_VLAN]))  # fmt: skip
            elif len(mbuf) > 20 and mbuf.nb_segs == 1:
                r.choice([mbuf.trim, mbuf.adj])(r.choice([1, 4, 13, len(mbuf) - 1]))
