# SPDX-License-Identifier: BSD-3-Clause
"""An object that is never closed gives one ResourceWarning, which tells where it was made."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from support import Tap, eventually, links, none_left, open_fds, python

import rtap
from rtap import EthDev, Mempool, NetNS, Worker
from rtap._core.origin import origin
from rtap._ring import RxQueue, TxQueue

pytestmark = [pytest.mark.root, pytest.mark.lifetime]

# The second line of each makes its object.


def opened(tap: Tap) -> Any:
    return rtap.open("t0", netns=tap.ns)


def probed(tap: Tap) -> Any:
    return tap.ns.call(rtap.probe, "net_rtap600,iface=t0")


def without_a_kernel(tap: Tap) -> Any:
    return null_device()


def namespace(tap: Tap) -> Any:
    return NetNS()


def own_namespace(tap: Tap) -> Any:
    return NetNS.current()


def namespace_of_a_process(tap: Tap) -> Any:
    return NetNS.from_pid(os.getpid())


def namespace_by_descriptor(tap: Tap) -> Any:
    return NetNS.from_fd(tap.ns.fd)


def rx_queue(tap: Tap) -> Any:
    return RxQueue(tap.fd, Mempool(16), name="tap0")


def split_queue(tap: Tap) -> Any:
    return RxQueue(tap.fd, Mempool(16, 2048), name="tap0", split=Mempool(64))


def tx_queue(tap: Tap) -> Any:
    return TxQueue(tap.fd, name="tap0")


MAKERS = {
    opened: "unclosed device <rtap.EthDev net_rtap",
    probed: "unclosed device <rtap.EthDev net_rtap600 (t0) unconfigured>",
    without_a_kernel: "unclosed device <rtap.EthDev net_null",
    namespace: "unclosed network namespace <rtap.NetNS ",
    own_namespace: "unclosed network namespace <rtap.NetNS ",
    namespace_of_a_process: "unclosed network namespace <rtap.NetNS ",
    namespace_by_descriptor: "unclosed network namespace <rtap.NetNS ",
    rx_queue: "unclosed rx queue 0 of tap0, made at",
    split_queue: "unclosed rx queue 0 of tap0, made at",
    tx_queue: "unclosed tx queue 0 of tap0, made at",
}
every_kind = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def null_device() -> EthDev:
    return rtap.probe("net_null0")


def place_of(make: Callable[..., object]) -> str:
    if make is without_a_kernel:
        make = null_device
    return f"{__file__}:{make.__code__.co_firstlineno + 1}"


def forget(held: list[Any]) -> None:
    held.clear()
    gc.collect()


@every_kind
@pytest.mark.parametrize("cycle", [False, True], ids=["", "in a cycle"])
def test_told_once_and_where_it_was_made(tap: Tap, make: Callable[[Tap], Any], cycle: bool) -> None:
    tap.tx().close()  # this thread has a ring
    before = open_fds()
    held: list[Any] = [make(tap)]
    if cycle:
        held.append(held)
        held = [held]
    with pytest.warns(ResourceWarning) as told:
        forget(held)
    (warning,) = told.list
    assert str(warning.message).startswith(MAKERS[make])
    assert str(warning.message).endswith(f", made at {place_of(make)}")
    assert warning.source is not None
    # The warning refers to the object, which is finalized again without a warning.
    del warning
    told.list.clear()
    gc.collect()
    assert rtap.devices() == []
    assert links(tap.ns) == ["lo", "tap0"]
    none_left(before)


@every_kind
def test_nothing_is_told_of_what_was_closed(tap: Tap, make: Callable[[Tap], Any]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        held = [make(tap)]
        held[0].close()
        forget(held)
    assert told == []


def test_tracemalloc_knows_more(tap: Tap) -> None:
    """The warning has its source, so tracemalloc can report where that was allocated."""
    code = """
        import sys, tracemalloc
        import rtap
        from rtap._ring import RxQueue, TxQueue
        tracemalloc.start(5)
        ns = rtap.NetNS.from_name(sys.argv[1])
        made = [
            rtap.NetNS.current(),
            rtap.open("t0", netns=ns, engine="syscall"),
            rtap.probe("net_null0"),
            RxQueue(int(sys.argv[2]), rtap.Mempool(16), name="x", engine="syscall"),
            TxQueue(int(sys.argv[2]), name="x", engine="syscall"),
        ]
        for _ in range(5):
            made.pop()
        ns.close()
    """
    done = python(code, tap.ns.path, "0")
    assert done.returncode == 0
    told = done.stderr.split("ResourceWarning: unclosed ")[1:]
    assert len(told) == 5
    for text, line in zip(told, range(12, 7, -1), strict=True):
        assert text.partition(", made at ")[2].startswith(f"<string>:{line}\n")
        allocated = text.partition("Object allocated at (most recent call last):\n")[2]
        assert f'  File "<string>", lineno {line}\n' in allocated


def test_queues_of_a_device_are_its_own(tap: Tap) -> None:
    """They give no warning of their own, even if the collector finds them first."""
    held: list[Any] = [opened(tap)]
    dev = held[0]
    queues = [dev.rx_queue(0), dev.tx_queue(0)]
    del dev
    with pytest.warns(ResourceWarning) as told:
        forget(held)
    # Its queues are left; they were closed with it.
    queues.clear()
    gc.collect()
    assert [str(each.message).partition(" <")[0] for each in told.list] == ["unclosed device"]


def test_a_queue_that_a_device_has_released(tap: Tap) -> None:
    with opened(tap) as dev:
        dev.stop()
        dev.rx_queue_release(0)
        dev.tx_queue_release(0)
        gc.collect()


# ---- workers


def routed_worker(a: EthDev, b: EthDev) -> Worker:
    worker = Worker(name="left")
    worker.forward((a, 0), (b, 0))
    return worker


def null_pair(n: int) -> EthDev:
    dev = rtap.probe(f"net_null{n}")
    dev.configure(1, 1)
    dev.rx_queue_setup(0, 64, Mempool(512))
    dev.tx_queue_setup(0, 64)
    dev.start()
    return dev


def test_a_worker_that_runs() -> None:
    place = f"{__file__}:{routed_worker.__code__.co_firstlineno + 1}"
    with null_pair(1) as a, null_pair(2) as b:
        held = [routed_worker(a, b)]
        held[0].start()
        with pytest.warns(ResourceWarning) as told:
            forget(held)
        (warning,) = told.list
        assert str(warning.message).startswith(f"forgotten worker left, made at {place}, which")
        worker = warning.source
        assert isinstance(worker, Worker)
        assert worker.running
        del warning
        told.list.clear()
    eventually(lambda: not worker.running, "its routes ended with their devices")


def test_a_worker_that_does_not_run() -> None:
    with null_pair(1) as a, null_pair(2) as b:
        held = [routed_worker(a, b), routed_worker(a, b)]
        with held[0]:
            pass
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            forget(held)
    assert told == []


# ---- the place in the warning


def test_the_program_is_what_is_outside_of_the_package() -> None:
    """rtap's own commands count as programs like any other."""
    for module, place in {
        "rtap.ethdev.mine": f"{__file__}:",
        "rtap": f"{__file__}:",
        "threading": f"{__file__}:",
        "rtap.cli.mine": "a command:2",
        "rtapper": "a command:2",
        "__main__": "a command:2",
    }.items():
        names: dict[str, Any] = {"__name__": module, "origin": origin}
        exec(compile("\nplace = origin()", "a command", "exec"), names)
        assert names["place"].startswith(f", made at {place}")
    nameless: dict[str, Any] = {"__name__": None, "origin": origin}
    exec(compile("place = origin()", "nameless", "exec"), nameless)
    assert nameless["place"] == ", made at nameless:1"


EXIT = """
    import atexit, builtins, sys
    import rtap
    from rtap import Mempool, NetNS
    from rtap._ring import RxQueue, TxQueue
    from rtap.control import tun

    ns = NetNS.from_name(sys.argv[1])
    fd, _ = ns.call(tun.open_queue, "t1", "tap", vnet_hdr=True, multi_queue=False)
    kept = [
        ns,
        rtap.open("t0", netns=ns),
        rtap.probe("net_null0"),
        RxQueue(fd, Mempool(16), name="t1"),
        TxQueue(fd, name="t1"),
        rtap.Worker(),
    ]
    {}
    del ns, kept
"""
#: The lines of that program that make these objects.
EXIT_PLACES = {
    "network namespace": 8,
    "device <rtap.EthDev net_rtap0": 12,
    "device <rtap.EthDev net_null0": 13,
    "rx queue": 14,
    "tx queue": 15,
}


@pytest.mark.parametrize(
    "keep",
    [
        "sys.kept = kept",
        "builtins.kept = kept",
        "rtap.control.netns.kept = kept",
        "rtap.ethdev.device.kept = kept",
        "rtap._ring.kept = kept",
        "loop = [kept]; loop.append(loop); sys.loop = loop",
        "atexit.register(kept.clear)",
    ],
)
def test_the_end_of_the_interpreter(tap: Tap, keep: str) -> None:
    """Wherever objects are kept, the end of the interpreter prints only that warning."""
    done = python(EXIT.format(keep), tap.ns.path)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    told = [line for line in lines if ": ResourceWarning: unclosed " in line]
    counts = []
    for what, line in EXIT_PLACES.items():
        of_it = [each for each in told if f"unclosed {what}" in each]
        assert all(each.endswith(f", made at <string>:{line}") for each in of_it)
        counts.append(len(of_it))
    assert sum(counts) == len(told)
    # The last modules to go are warnings and sys, and then nothing can print a warning.
    assert counts == [1] * 5 if "atexit" in keep else set(counts) <= {0, 1}
    hint = "ResourceWarning: Enable tracemalloc to get the object allocation traceback"
    assert [line for line in lines if line not in told and line != hint] == []
    eventually(lambda: links(tap.ns) == ["lo", "tap0"], "the interfaces are gone")
