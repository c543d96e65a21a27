# SPDX-License-Identifier: BSD-3-Clause
"""The end of the interpreter, or of the process, with everything open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from support import child_place, eventually, frame, links, python

import rtap
from rtap import NetNS

pytestmark = [pytest.mark.root, pytest.mark.lifetime]


PREPARE = """
    import gc, sys, threading, time
    import rtap
    from rtap import Burst, Mempool
    from support import PacketSocket, frame

    ns, engine = sys.argv[1], sys.argv[2]
    dev = rtap.open("tap0", netns=ns, engine=engine, gil="release")
    other = rtap.open("tap1", netns=ns, engine=engine)
    pool = dev.pool
    for i in range(40):
        assert dev.tx_burst(0, pool.alloc_burst(8, frame(i))) == 8
        dev.rx_burst(0)
"""

EXITS = {
    "devices": "",
    "bursts and views": """
        burst = pool.alloc_burst(8, frame(1))
        view, array, part = burst[0].data, burst.array(60), burst[1].append(3)
        iterator = iter(burst)
        next(iterator)
    """,
    "numpy": """
        import numpy as np
        burst = pool.alloc_burst(8, frame(1))
        array = np.asarray(burst.array(60))
        lengths = np.asarray(burst.lengths)
    """,
    "in a cycle": """
        class Holder: pass
        holder = Holder()
        holder.me = holder
        holder.everything = (dev, pool, pool.alloc_burst(4), other, pool.alloc(b"x").data)
        del dev, pool, other
    """,
    "in builtins": """
        import builtins
        builtins.kept = (dev, pool.alloc_burst(4), pool.alloc(b"x").data)
    """,
    "a waiting thread": """
        started = threading.Event()
        def wait():
            started.set()
            dev.rx_burst(0, 8, None)
        threading.Thread(target=wait, daemon=True).start()
        started.wait()
        time.sleep(0.05)
    """,
    "a bursting thread": """
        def burst():
            while True:
                dev.tx_burst(0, pool.alloc_burst(200, frame(1)))
        threading.Thread(target=burst, daemon=True).start()
        time.sleep(0.05)
    """,
    "a worker": """
        worker = rtap.Worker(wait="adaptive")
        worker.forward((dev, 0), (other, 0))
        worker.start()
        time.sleep(0.05)
    """,
    "a polling worker": """
        worker = rtap.Worker(wait="poll")
        worker.forward((dev, 0), (other, 0))
        worker.start()
        time.sleep(0.05)
    """,
    "a forgotten worker": """
        worker = rtap.Worker()
        worker.forward((dev, 0), (other, 0))
        worker.start()
        del worker, dev, other
    """,
    "a failed worker": """
        worker = rtap.Worker()
        worker.forward((dev, 0), (other, 0))
        worker.start()
        dev.close()
    """,
    "sys.exit in a thread's time": """
        threading.Thread(target=lambda: dev.rx_burst(0, 8, 0.3)).start()
        sys.exit(0)
    """,
    "a closed pool": """
        mine = Mempool(64, memfd=True)
        dev.tx_burst(0, mine.alloc_burst(8, frame(1)))
        mine.close()
    """,
    "an unraised error": """
        try:
            dev.rx_burst(99)
        except ValueError as exc:
            error = exc
    """,
}


@pytest.mark.parametrize("what", EXITS.values(), ids=EXITS.keys())
def test_exit_with_everything_open(netns: NetNS, engine: str, what: str) -> None:
    code = textwrap.dedent(PREPARE) + textwrap.dedent(what)
    done = python(code, netns.path, engine, warnings="default")
    stderr = [line for line in done.stderr.splitlines() if "ResourceWarning" not in line]
    stderr = [line for line in stderr if not line.startswith("  ")]
    assert (done.returncode, stderr) == (0, [])
    eventually(lambda: links(netns) == ["lo"], "the interfaces are gone")


def test_exit_says_what_was_left_open(netns: NetNS) -> None:
    done = python(textwrap.dedent(PREPARE), netns.path, "syscall", warnings="always")
    assert done.returncode == 0
    assert done.stderr.count("ResourceWarning: unclosed device") == 2


def test_uncaught_error_is_the_only_output(netns: NetNS, engine: str) -> None:
    done = python(
        textwrap.dedent(PREPARE) + "raise SystemExit('the end')",
        netns.path,
        engine,
        warnings="ignore",
    )
    assert (done.returncode, done.stderr) == (1, "the end\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_process_leaves_a_name_that_can_be_used(
    netns: NetNS, engine: str, number: signal.Signals
) -> None:
    """The name works even while the kernel still removes the dead process's ring."""
    code = textwrap.dedent(PREPARE) + "print('ready', flush=True)\ndev.rx_burst(0, 8, None)\n"
    child = subprocess.Popen(
        [sys.executable, "-c", code, netns.path, engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **child_place(),
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        child.wait(20)
        with (
            rtap.open("tap0", netns=netns, engine=engine) as dev,
            rtap.open("tap1", netns=netns, engine=engine) as other,
        ):
            assert dev.send(frame(1))
            assert other.send(frame(2))
    assert child.returncode == -number


def test_environment_is_the_one_under_test() -> None:
    """The children above must import the build that this process tests."""
    done = python("import rtap, os; print(os.path.dirname(rtap.__file__))")
    assert done.stdout.strip() == os.path.dirname(rtap.__file__)
