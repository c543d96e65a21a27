# SPDX-License-Identifier: BSD-3-Clause
"""Network namespaces: made, adopted, entered and left; and every form of ``netns=``."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
from patience import patient
from support import (
    child_environment,
    eventually,
    ip,
    links,
    none_left,
    open_fds,
    python,
    running_threads,
    skip_without_devices,
    threads_end,
)

import rtap
from rtap import NetNS
from rtap.control.netns import call_in, open_netns

NAME = f"rtap-test-{os.getpid()}"


def here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


@pytest.fixture
def named() -> Iterator[str]:
    """A namespace of ip-netns(8)."""
    skip_without_devices()
    subprocess.run(["ip", "netns", "add", NAME], check=True)
    try:
        yield NAME
    finally:
        subprocess.run(["ip", "netns", "del", NAME], check=True)


# ---- a new one


def test_a_new_one_has_only_lo_and_it_is_up(netns: NetNS) -> None:
    assert links(netns) == ["lo"]
    assert "LOOPBACK,UP" in ip(netns, "link", "show", "dev", "lo")
    with (
        netns.call(socket.create_server, ("127.0.0.1", 0)) as server,
        netns.call(socket.create_connection, server.getsockname(), 5),
    ):
        pass


def test_they_differ_and_the_caller_stays_where_it_is(netns: NetNS, netns2: NetNS) -> None:
    home = here()
    inodes = {home, netns.inode, netns2.inode}
    assert len(inodes) == 3
    assert netns.call(here) == netns.inode
    assert netns2.call(here) == netns2.inode
    assert here() == home


def test_it_goes_away_with_its_last_holder(netns: NetNS) -> None:
    inner = NetNS()
    other = NetNS.from_fd(inner.fd)
    ip(netns, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", inner.path)
    inner.close()
    assert links(other) == ["lo", "v1"]
    assert "v0" in links(netns)
    other.close()
    eventually(lambda: "v0" not in links(netns), "the namespace is gone, and its veth end with it")


def test_close(netns: NetNS) -> None:
    ns = NetNS.from_fd(netns.fd)
    assert (ns.closed, ns.fileno()) == (False, ns.fd)
    assert repr(ns) == f"<rtap.NetNS {netns.inode}>"
    ns.close()
    ns.close()
    assert ns.closed
    assert repr(ns) == "<rtap.NetNS closed>"
    for use in (
        lambda: ns.fd,
        lambda: ns.path,
        lambda: ns.inode,
        lambda: ns.call(here),
        lambda: ns.run(["true"]),
        lambda: rtap.open("t0", netns=ns),
    ):
        with pytest.raises(ValueError, match="the network namespace is closed"):
            use()
    assert rtap.devices() == []


def test_forgotten_ones_are_closed_with_a_warning(netns: NetNS) -> None:
    before = open_fds()
    held = [NetNS.from_fd(netns.fd)]
    with pytest.warns(ResourceWarning, match=re.escape(repr(held[0]))):
        held.clear()
    none_left(before)


def test_fifty_leave_neither_descriptors_nor_threads() -> None:
    skip_without_devices()
    NetNS().close()
    before, threads = open_fds(), running_threads()
    for _ in range(50):
        with NetNS() as ns:
            ns.call(here)
    none_left(before)
    threads_end(threads)


def test_without_rights() -> None:
    skip_without_devices()
    done = python(
        """
        import os, rtap
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            rtap.NetNS()
        except PermissionError as exc:
            print(exc)
        """
    )
    assert done.returncode == 0, done.stderr
    assert "unshare a network namespace" in done.stdout


# ---- calls and programs inside


def test_call_passes_arguments_results_and_exceptions(netns: NetNS) -> None:
    def f(*args: int, **kwargs: int) -> tuple[tuple[int, ...], dict[str, int], int]:
        return args, kwargs, threading.get_ident()

    args, kwargs, thread = netns.call(f, 1, b=2)
    assert (args, kwargs) == ((1,), {"b": 2})
    assert thread != threading.get_ident()
    error = KeyError("mine")

    def fail() -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        netns.call(fail)
    assert caught.value is error
    with pytest.raises(SystemExit):
        netns.call(sys.exit, 3)


def test_exceptions_leave_no_cycle(netns: NetNS) -> None:
    class Big:
        pass

    big = Big()
    alive = weakref.ref(big)

    def fail(thing: object) -> None:
        raise ValueError(thing)

    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            netns.call(fail, big)
        del big
        assert alive() is None
    finally:
        gc.enable()


def test_call_in_stays_in_the_thread_when_already_there(netns: NetNS) -> None:
    with NetNS.current() as current:
        assert call_in(current.fd, threading.get_ident) == threading.get_ident()
        assert call_in(current.fd, threading.get_ident, own_thread=True) != threading.get_ident()

        async def inside_a_loop() -> int:
            return call_in(current.fd, threading.get_ident)

        assert asyncio.run(inside_a_loop()) == threading.get_ident()
    assert call_in(netns.fd, here) == netns.inode


def test_not_a_namespace() -> None:
    with open("/dev/null") as f, pytest.raises(OSError, match="setns into a network namespace"):
        call_in(f.fileno(), here)


def test_sockets_stay_in_the_namespace(netns: NetNS, netns2: NetNS) -> None:
    with netns.call(socket.create_server, ("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with pytest.raises(ConnectionRefusedError):
            netns2.call(socket.create_connection, address, 5)
        with netns.call(socket.create_connection, address, 5) as client:
            assert client.getpeername() == address


def test_run(netns: NetNS) -> None:
    done = netns.run(
        [sys.executable, "-c", "import os; print(input(), os.stat('/proc/self/ns/net').st_ino)"],
        input="hello",
        text=True,
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, f"hello {netns.inode}\n")
    assert netns.run(["sh", "-c", "exit 3"]).returncode == 3
    with pytest.raises(subprocess.CalledProcessError) as caught:
        netns.run(["sh", "-c", "echo text; exit 3"], check=True, capture_output=True)
    assert (caught.value.returncode, caught.value.stdout) == (3, b"text\n")
    with pytest.raises(FileNotFoundError):
        netns.run(["/nonexistent/program"])


def test_run_ends_what_takes_too_long(netns: NetNS) -> None:
    before = open_fds()
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        netns.run(["sleep", "60"], timeout=0.1)
    assert time.monotonic() - start < patient(10)
    none_left(before)


def test_popen(netns: NetNS) -> None:
    with netns.popen(["sleep", "60"]) as process:
        assert os.stat(f"/proc/{process.pid}/ns/net").st_ino == netns.inode
        with open(f"/proc/{process.pid}/comm") as f:
            assert f.read() in ("sleep\n", f"{os.path.basename(sys.executable)[:15]}\n")
        with NetNS.from_pid(process.pid) as same:
            assert same.inode == netns.inode
        process.kill()
    assert process.returncode == -signal.SIGKILL


# ---- adopted ones


def test_path_is_for_others(netns: NetNS) -> None:
    done = subprocess.run(
        ["nsenter", f"--net={netns.path}", "readlink", "/proc/self/ns/net"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"net:[{netns.inode}]\n"


def test_current_and_from_fd() -> None:
    with NetNS.current() as current:
        assert current.inode == here()
        with NetNS.from_fd(current.fd) as copy:
            assert copy.fd != current.fd
            assert copy.inode == current.inode
    with pytest.raises(OSError, match="Bad file descriptor"):
        NetNS.from_fd(-1)


def test_from_name(named: str) -> None:
    with NetNS.from_name(named) as ns, NetNS.from_name(f"/run/netns/{named}") as same:
        assert ns.inode == same.inode != here()
        assert links(ns) == ["lo"]


@pytest.mark.parametrize("name", ["", None, 5])
def test_from_no_name(name: object) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        NetNS.from_name(name)  # type: ignore[arg-type]


def test_from_a_name_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="/run/netns/rtap-no-such"):
        NetNS.from_name("rtap-no-such")
    with pytest.raises(FileNotFoundError):
        NetNS.from_pid(2**22 + 1)


# ---- netns=


def test_device_by_every_form(netns: NetNS, named: str) -> None:
    with NetNS.from_name(named) as there:
        for form, ns in (
            (netns, netns),
            (netns.fd, netns),
            (netns.path, netns),
            (f"/proc/{os.getpid()}/fd/{netns.fd}", netns),
            (named, there),
            (f"/run/netns/{named}", there),
        ):
            with rtap.open("t0", netns=form) as dev:
                assert links(ns) == ["lo", "t0"]
                assert dev.link().link_status
            assert links(ns) == ["lo"]


def test_device_in_the_calling_threads_namespace(netns: NetNS) -> None:
    with netns.call(rtap.open, "t0") as dev:
        assert links(netns) == ["lo", "t0"]
        dev.stop()
        dev.mtu = 1300
        dev.start()
        assert dev.link().link_status
    assert links(netns) == ["lo"]


def test_device_keeps_its_namespace_alive() -> None:
    skip_without_devices()
    ns = NetNS()
    with rtap.open("t0", netns=ns) as dev:
        ns.close()
        dev.mtu = 1300
        assert dev.mtu == 1300
        dev.stop()
        dev.start()
        assert dev.link().link_status


@pytest.mark.parametrize(
    ("form", "error", "says"),
    [
        (4.5, TypeError, "float"),
        (True, TypeError, "bool"),
        (b"name", TypeError, "bytes"),
        ("", ValueError, "''"),
        ("rtap-no-such", FileNotFoundError, "rtap-no-such"),
        ("/dev/null", OSError, "setns"),
        (-1, OSError, "Bad file descriptor"),
    ],
)
def test_forms_refused(form: object, error: type[Exception], says: str) -> None:
    skip_without_devices()
    before = open_fds()
    with pytest.raises(error, match=says):
        rtap.open("t0", netns=form)  # type: ignore[arg-type]
    assert rtap.devices() == []
    none_left(before)


def test_open_netns_is_always_a_new_one(netns: NetNS) -> None:
    with open_netns(netns) as ns:
        assert ns is not netns
        assert ns.inode == netns.inode
    assert not netns.closed


def test_in_a_user_namespace() -> None:
    """``unshare -Urn``: root inside, without rights outside."""
    skip_without_devices()
    code = "import rtap; d = rtap.open('t0'); print(d.ifname, d.link().link_status); d.close()"
    done = subprocess.run(
        ["unshare", "-Urn", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=child_environment(),
        check=False,
    )
    if "unshare failed" in done.stderr:
        pytest.skip("needs user namespaces")
    assert (done.returncode, done.stdout, done.stderr) == (0, "t0 True\n", "")
