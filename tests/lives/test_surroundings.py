# SPDX-License-Identifier: BSD-3-Clause
"""Programs that give up rights, lose /proc, are interrupted, or have replaced their threads."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from support import child_environment, python, skip_without_devices

from rtap import NetNS


def run(netns: NetNS, code: str, *args: str) -> None:
    done = netns.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env=child_environment(),
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


CONFINED = """
import os, sys, tempfile
import rtap
how, where, engine = sys.argv[1:]
ns = rtap.NetNS() if where == "other" else None
dev = rtap.open("vpn0", netns=ns, engine=engine)
if "chroot" in how:
    empty = tempfile.mkdtemp()
    os.chdir(empty)
    os.rmdir(empty)  # stays as our root, and is gone with us
    os.chroot(".")
if "setuid" in how:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    try:
        dev.mtu = 1400
        raise SystemExit("the MTU could be set")
    except PermissionError as exc:
        assert "set the MTU to 1400 on vpn0" in str(exc), exc
else:
    dev.mtu = 1400
    assert dev.mtu == 1400
dev.rx_burst(0)
assert dev.send(bytes(60))
assert dev.stats().opackets == 1
dev.xstats(), dev.info()
assert dev.link().link_status
dev.set_link_down()
assert not dev.link().link_status
dev.set_link_up()
dev.stop()
dev.start()
assert dev.link().link_status
dev.stop()
dev.close()
print("fine")
"""


@pytest.mark.parametrize("where", ["own", "other"])
@pytest.mark.parametrize("how", ["chroot", "setuid", "chroot+setuid"])
def test_confined_after_open(netns: NetNS, how: str, where: str, engine: str) -> None:
    run(netns, CONFINED, how, where, engine)


REGAINED = """
import os
import rtap
ns = rtap.NetNS()
with rtap.open("t0", netns=ns) as dev:
    os.seteuid(65534)
    pid = os.fork()  # the child makes its socket anew
    if pid == 0:
        from rtap.control.netlink import Control, find_link
        status = 1
        try:
            os.seteuid(0)
            link = find_link(ns.fd, "t0")
            control = Control(rtap.NetNS.from_fd(ns.fd), link.index, "t0")
            # One that was made without rights does not keep them from who has them.
            control._channel.close()
            def make():
                os.seteuid(65534)
                try:
                    return control._channel._make(None)
                finally:
                    os.seteuid(0)

            control._channel._sock = ns.call(make)
            control.set_mtu(1400)
            assert control.get().mtu == 1400
            status = 0
        finally:
            os._exit(status)
    os.seteuid(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert dev.mtu == 1400
print("fine")
"""


def test_rights_that_came_later(netns: NetNS) -> None:
    run(netns, REGAINED)


FORKED = """
import os
import rtap
ns = rtap.NetNS()
dev = rtap.open("t0", netns=ns)
dev.stats()
pid = os.fork()
if pid == 0:
    status = 1
    try:
        with rtap.open("t1", netns=ns) as own:
            own.mtu = 1400
            own.stats()
            assert own.mtu == 1400
        status = 0
    finally:
        os._exit(status)
assert os.waitpid(pid, 0)[1] == 0
for _ in range(20):
    assert dev.mtu == 1500
dev.close()
print("fine")
"""


def test_a_forked_child_has_a_socket_of_its_own(netns: NetNS) -> None:
    run(netns, FORKED)


ALARMS = """
import random, signal, sys, time
import rtap

class TooLong(Exception):
    pass

def alarm(*_):
    raise TooLong

lost = []
sys.unraisablehook = lost.append
ns = rtap.NetNS() if sys.argv[1] == "other" else None
dev = rtap.open("s0", netns=ns)
calls = (dev.stats, dev.xstats, dev.link, dev.info)
rnd = random.Random(7)
signal.signal(signal.SIGALRM, alarm)
for _ in range(150):
    try:
        signal.setitimer(signal.ITIMER_REAL, rnd.uniform(0.001, 0.006))
        while not lost:
            for call in calls:
                call()
    except TooLong:
        pass
    assert not lost, lost
assert dev.mtu == 1500
dev.mtu = 1400
assert dev.mtu == 1400
dev.close()
print("fine")
"""


@pytest.mark.parametrize("where", ["own", "other"])
def test_what_a_signal_handler_raises_arrives(netns: NetNS, where: str) -> None:
    run(netns, ALARMS, where)


FIRST_OPENS = """
import threading, time
import rtap

failed = []
start = threading.Barrier(12)

def life(i):
    start.wait()
    time.sleep(i * 0.01)  # while the first one imports what it needs
    try:
        rtap.open(f"r{i}").close()
    except BaseException as exc:
        failed.append(repr(exc))

threads = [threading.Thread(target=life, args=(i,)) for i in range(12)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not failed, failed
print("fine")
"""


def test_first_opens_in_several_threads(netns: NetNS) -> None:
    run(netns, FIRST_OPENS)


REFUSED = """
import os
import rtap
{patch}
before = os.readlink("/proc/thread-self/ns/net")
for what in (rtap.NetNS, lambda: rtap.open("t0"), lambda: rtap.probe("net_rtap0,iface=t0"),
             lambda: rtap.callback_register(rtap.EthEvent.NEW, print)):
    try:
        what()
    except RuntimeError as exc:
        assert "threads of the operating system" in str(exc), exc
    else:
        raise SystemExit(f"{{what}} was not refused")
assert os.readlink("/proc/thread-self/ns/net") == before
assert not os.path.exists("/sys/class/net/t0"), "left behind"
assert rtap.devices() == []
os.write(1, b"fine\\n")
os._exit(0)
"""
PATCHES = {
    # Patches the modules as the libraries do, so that the test needs none of them.
    "stand-in": "import _thread; _thread.start_new_thread = lambda *args: args[0](*args[1])",
    "no epoll": "import select; del select.epoll",
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import warnings; warnings.simplefilter('ignore'); import eventlet; "
    "eventlet.monkey_patch()",
}


@pytest.mark.parametrize("library", PATCHES)
def test_green_threads_are_refused(library: str) -> None:
    skip_without_devices()
    if library in ("gevent", "eventlet") and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    done = python(REFUSED.format(patch=PATCHES[library]))
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
