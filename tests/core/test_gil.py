# SPDX-License-Identifier: BSD-3-Clause
"""How a burst treats the GIL: "hold", "release", "auto".

With a switch interval of minutes, the GIL changes hands only where a thread releases it. So a burst
released it exactly if another thread ran meanwhile.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from support import Tap, frame

from rtap import Mempool

pytestmark = pytest.mark.root

a_lock_to_keep = pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(),
    reason="is about keeping the interpreter lock, and this build has none",
)

MODES = ("auto", "release", "hold")


@pytest.fixture
def never_switch() -> Iterator[None]:
    """No thread is asked to release the GIL."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(600)
    yield
    sys.setswitchinterval(before)


class Other:
    """A thread that takes the GIL for ``hold`` seconds, then releases it for a moment."""

    def __init__(self, hold: float = 0) -> None:
        self.hold = hold
        self.turns = 0
        self._stop = False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop:
            self.turns += 1
            until = time.perf_counter() + self.hold
            while self.hold and time.perf_counter() < until:
                pass
            time.sleep(0)

    def __enter__(self) -> Other:
        self._thread.start()
        while self.turns < 3:
            time.sleep(0.001)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self._thread.join()


Fire = Callable[[], None]


@pytest.fixture(params=["rx", "tx", "rx idle"])
def bursts(request: pytest.FixtureRequest, tap: Tap, engine: str) -> Callable[[str], Fire]:
    """Prepares bursts of 64 frames; returns a function that only does these bursts."""
    pool = Mempool(4096)
    packets = tap.packets()

    def make(gil: str) -> Fire:
        rx = tap.rx(pool, engine=engine, gil=gil)
        tx = tap.tx(engine=engine, gil=gil)
        if request.param == "tx":
            prepared = [pool.alloc_burst(64, frame(1)) for _ in range(7)]

            def send() -> None:
                for burst in prepared:
                    tx.tx_burst(burst)

            return send
        if request.param == "rx":
            for i in range(7 * 64):
                packets.send(frame(i))

        def receive() -> None:
            for _ in range(7):
                rx.rx_burst(64)

        return receive

    return make


@a_lock_to_keep
def test_hold_never_gives_the_lock_away(bursts: Callable[[str], Fire], never_switch: None) -> None:
    with Other() as other:
        for _ in range(50):
            fire = bursts("hold")
            before = other.turns
            fire()
            assert other.turns == before


def test_release_gives_the_lock_away(bursts: Callable[[str], Fire], never_switch: None) -> None:
    """The other thread must be quick to take the GIL, so it gets many chances."""
    caught = 0
    deadline = time.perf_counter() + 20
    with Other() as other:
        while caught < 3 and time.perf_counter() < deadline:
            fire = bursts("release")
            before = other.turns
            fire()
            caught += other.turns > before
    assert caught == 3


def test_long_bursts_give_the_lock_away_in_every_mode(
    tap: Tap, engine: str, never_switch: None
) -> None:
    pool = Mempool(40_000, 1600)
    for gil in MODES:
        tx = tap.tx(engine=engine, gil=gil)
        prepared = [pool.alloc_burst(1000, frame(1, 1500)) for _ in range(40)]
        with Other() as other:
            before = other.turns
            for burst in prepared:
                assert tx.tx_burst(burst) == 1000
            assert other.turns > before, gil


@a_lock_to_keep
def test_auto_lets_go_until_that_proves_slow(tap: Tap, engine: str, never_switch: None) -> None:
    """A burst releases the GIL, notices that it came back slowly, keeps it, and retries later."""
    pool = Mempool(4096)
    rx = tap.rx(pool, engine=engine, gil="auto")
    burst = rx.rx_burst
    kept_rounds = 0
    with Other(hold=0.004) as other:
        # On a busy machine, the other thread's 4 ms may be over before the burst wants the GIL
        # back. It then gets it quickly, and the round shows nothing.
        for _ in range(12):
            # In one of these bursts, the other thread gets the GIL and keeps it for 4 ms.
            before = other.turns
            deadline = time.perf_counter() + 10
            while other.turns == before and time.perf_counter() < deadline:
                burst(64)
            assert other.turns > before, "auto never let go of the lock"
            # Now bursts keep the GIL: hundreds in a row, and no other thread runs.
            kept = other.turns
            started = time.perf_counter()
            for _ in range(300):
                burst(64)
            took = time.perf_counter() - started
            if other.turns != kept or took > 0.2:
                continue
            kept_rounds += 1
            # Until "auto" checks again whether the other thread still wants it.
            deadline = time.perf_counter() + 10
            while other.turns == kept and time.perf_counter() < deadline:
                burst(64)
            assert other.turns > kept, "auto never looked again"
            if kept_rounds == 3:
                break
    assert kept_rounds == 3, "auto gave the lock away again at once"


def test_auto_lets_go_again_and_again_while_that_is_quick(
    tap: Tap, engine: str, never_switch: None
) -> None:
    """A thread that never holds the GIL for long does not make "auto" keep it."""
    pool = Mempool(4096)
    rx = tap.rx(pool, engine=engine, gil="auto")
    with Other() as other:
        started = time.perf_counter()
        for _ in range(40):
            before = other.turns
            while other.turns == before and time.perf_counter() - started < 10:
                rx.rx_burst(64)
        took = time.perf_counter() - started
    assert took < 40 * 0.25 / 2


@a_lock_to_keep
@pytest.mark.parametrize("way", ["rx", "tx"])
def test_bursts_beside_a_busy_thread(tap: Tap, engine: str, way: str) -> None:
    """There each release can cost a switch interval; "auto" must avoid nearly all of them."""
    pool = Mempool(4096)
    stop = threading.Event()
    before = sys.getswitchinterval()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    def rate(gil: str) -> int:
        rx = tap.rx(pool, engine=engine, gil=gil)
        tx = tap.tx(engine=engine, gil=gil)
        done = 0
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            if way == "rx":
                rx.rx_burst(64)
            else:
                tx.tx_burst(pool.alloc_burst(8, b"f" * 60))
            done += 1
        return done

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        sys.setswitchinterval(0.02)
        rates = {gil: rate(gil) for gil in ("auto", "hold")}
    finally:
        sys.setswitchinterval(before)
        stop.set()
        thread.join()
    assert rates["auto"] > rates["hold"] / 4, rates
    assert rates["hold"] > 500, rates


@pytest.mark.parametrize("gil", MODES)
def test_every_mode_moves_the_same_frames(tap: Tap, engine: str, gil: str) -> None:
    pool = Mempool(2048)
    packets = tap.packets(rcvbuf=64 << 20)
    rx, tx = tap.rx(pool, engine=engine, gil=gil), tap.tx(engine=engine, gil=gil)
    with Other(hold=0.001):
        for n in (1, 64, 65, 500):
            frames = [frame(i) for i in range(n)]
            assert tx.tx_burst(pool.alloc_burst(n, frames)) == n
            assert packets.drain() == frames
            for f in frames:
                packets.send(f)
            assert [bytes(m) for m in rx.rx_burst(n)] == frames
    assert pool.in_use == 0
