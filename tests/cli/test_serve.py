# SPDX-License-Identifier: BSD-3-Clause
"""``rtap serve`` and ``rtap ps``: what is shared, who uses it, and what is left of rights."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import clients
import pytest
from patience import patient
from served import NOBODY, Served, argv, ps, refused, runtime, serving, shared, without_rights
from support import child_place, eventually, ip, link, links, netdev

import rtap.cli
import rtap.cli.serve
from rtap import EthDev, NetNS, RxOffload, TxOffload
from rtap.cli.rights import CAP_NET_ADMIN, CAP_NET_RAW
from rtap.cli.serve import Device
from rtap.sharing import places
from rtap.sharing.wire import encode, receive, send

__all__ = ["runtime"]

pytestmark = pytest.mark.root

ONE = "--vdev=net_rtap0,iface=tap0,queues=4"
TWO = "--vdev=net_rtap1,iface=tap1"
COMMAND = Path(f"/proc/{os.getpid()}/comm").read_text().strip()


def left(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.exists() else []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_devices_are_shared_until_a_signal_comes(netns: NetNS, runtime: Path, signum: int) -> None:
    with serving(netns, ONE, TWO) as served:
        assert served.lines == [
            f"net_rtap0: interface tap0, 4 queues, socket {runtime}/net_rtap0.sock",
            f"net_rtap1: interface tap1, 1 queue, socket {runtime}/net_rtap1.sock",
        ]
        assert links(netns) == ["lo", "tap0", "tap1"]
        assert left(runtime) == ["net_rtap0.sock", "net_rtap1.sock"]
        with rtap.attach("net_rtap0", [1, 3]) as dev, rtap.attach("net_rtap1", 1):
            assert (dev.ifname, dev.queues) == ("tap0", (1, 3))  # type: ignore[attr-defined]
            assert dev.send(bytes(60), queue=3)
            assert served.end(signum) == (0, "")
            with pytest.raises(rtap.DeviceGone):
                dev.rx_burst(1, timeout=patient(20))
            eventually(lambda: links(netns) == ["lo"], "the interfaces are gone")
    assert left(runtime) == []


def test_ps_names_those_who_use_a_device(netns: NetNS, runtime: Path) -> None:
    assert ps() == (0, "nothing is shared\n", "")
    assert shared() == []
    with serving(netns, ONE, TWO) as served, rtap.attach("net_rtap0", [1, 2]):
        command = Path(f"/proc/{served.pid}/comm").read_text().strip()
        owner = f"process {served.pid} ({command})"
        me = f"process {os.getpid()} ({COMMAND}) of root"
        first = f"net_rtap0: interface tap0, {owner}, queues 0-3\n"
        second = f"net_rtap1: interface tap1, {owner}, queue 0\n"
        assert ps() == (0, f"{first}  queue 1: {me}\n  queue 2: {me}\n{second}", "")
        done = subprocess.run(argv("ps", "net_rtap1"), capture_output=True, **child_place())
        assert (done.returncode, done.stdout.decode(), done.stderr) == (0, second, b"")
        assert ps(f"{runtime}/net_rtap1.sock") == (0, second, "")
        lease = {"pid": os.getpid(), "command": COMMAND, "uid": 0, "user": "root"}
        found = shared()
        assert found[0] == {
            "name": "net_rtap0",
            "pid": served.pid,
            "command": command,
            "ifname": "tap0",
            "queues": [0, 1, 2, 3],
            "leases": [{"queue": 1, **lease}, {"queue": 2, **lease}],
            "ring": 0,
            "error": "",
        }
        assert (found[1]["name"], found[1]["leases"]) == ("net_rtap1", [])
    status, out, err = ps("net_rtap1")
    assert (status, out) == (1, "")
    assert err.startswith("rtap ps: no process shares 'net_rtap1'")


def test_killed_and_started_again(netns: NetNS, runtime: Path) -> None:
    with serving(netns, ONE) as first:
        first.end(signal.SIGKILL)
        assert left(runtime) == ["net_rtap0.sock"]
        with serving(netns, ONE) as second, rtap.attach("net_rtap0", [0]) as dev:
            assert [one["pid"] for one in shared()] == [second.pid]
            assert dev.send(bytes(60))
            second.end(signal.SIGKILL)
        assert ps() == (0, "nothing is shared\n", "")
        assert left(runtime) == []
    eventually(lambda: links(netns) == ["lo"], "the interface is gone")


WRONG: dict[str, tuple[tuple[str, ...], int]] = {
    "--vdev: at least one device is needed": ((), 1),
    "queues must be 1 to 128, got '0'": (("--vdev=net_rtap0,iface=tap0,queues=0",), 1),
    "--vdev=net_rtap0,mac=x: ": (("--vdev=net_rtap0,mac=x",), 1),
    "names joined by +": (("--vdev=net_rtap0,rx_offloads=LRO",), 1),
    "cannot be the name of something shared": (("--vdev=net:rtap0",), 1),
    "--name is for a single device": ((ONE, TWO, "--name=vpn"), 1),
    "'../x' cannot be the name": ((ONE, "--name=../x"), 1),
    "owner: there is no user 'there is none'": ((ONE, "--owner=there is none"), 2),
    "group: there is no group 'there is none'": ((ONE, "--group=there is none"), 2),
    "--user: there is no user 'there is none'": ((ONE, "--user=there is none"), 2),
    "unrecognized arguments: --nonsense": ((ONE, "--nonsense"), 2),
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], says: str
) -> None:
    def give_up(*args: object) -> None:
        raise AssertionError("it would have given up the rights of this process")

    monkeypatch.setattr(rtap.cli.serve, "_confine", give_up)
    options, status = WRONG[says]
    try:
        found = rtap.cli.main(["serve", *options])
    except SystemExit as exc:  # argparse
        found = int(exc.code or 0)
    out, err = capsys.readouterr()
    assert (found, out) == (status, "")
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--vdev=net_rtap0,nonsense=1",),
            "unknown device argument 'nonsense=1', expected iface=NAME, persist, owner=USER, "
            "group=GROUP, txqueuelen=N, sndbuf=BYTES, fd=N, queues=N, mtu=BYTES",
        ),
        (("--vdev=net_other0",), "no driver for device 'net_other0'"),
        (("--vdev=net_null0",), "net_null"),
        ((ONE, "--netns=there-is-none"), "there-is-none"),
    ],
)
def test_what_cannot_be_served(
    netns: NetNS, runtime: Path, options: tuple[str, ...], says: str
) -> None:
    code, line = refused(netns, *options)
    assert (code, line.startswith("rtap serve: ")) == (1, True)
    assert says in line
    assert links(netns) == ["lo"]
    assert left(runtime) == []


def test_nothing_is_left_when_the_second_device_fails(netns: NetNS, runtime: Path) -> None:
    ip(netns, "tuntap", "add", "tap1", "mode", "tun")
    code, line = refused(netns, ONE, TWO)
    assert code == 1
    assert line.startswith("rtap serve: ")
    assert "tap1" in line
    assert links(netns) == ["lo", "tap1"]
    assert left(runtime) == []


def test_a_name_that_another_process_has(netns: NetNS, runtime: Path) -> None:
    with serving(netns, ONE):
        code, line = refused(netns, "--vdev=net_rtap0,iface=tap1")
        assert (code, "another process shares 'net_rtap0'" in line) == (1, True)
        assert links(netns) == ["lo", "tap0"]
        assert [one["ifname"] for one in shared()] == ["tap0"]


def test_a_name_of_its_own(netns: NetNS, runtime: Path) -> None:
    with serving(netns, ONE, "--name=vpn"):
        assert [one["name"] for one in shared()] == ["vpn"]
        with rtap.attach("vpn", 4) as dev:
            assert dev.ifname == "tap0"


def test_interfaces_in_another_namespace(netns: NetNS, netns2: NetNS, runtime: Path) -> None:
    with serving(netns, ONE, f"--netns={netns2.path}") as served:
        assert (links(netns), links(netns2)) == (["lo"], ["lo", "tap0"])
        with rtap.attach("net_rtap0", 1) as dev:
            dev.mtu = 1300
            assert link(netns2, "tap0")["mtu"] == 1300
        assert served.end() == (0, "")
    assert links(netns2) == ["lo"]


def test_device_arguments() -> None:
    given = "net_rtap0,iface=tap0,queues=3,mtu=9000,mac=02:00:00:00:00:05,persist,tx_gro"
    parsed = Device.parse(f"{given},rx_offloads=TCP_CKSUM+TCP_LRO,tx_offloads=0x8")
    assert parsed.devargs == "net_rtap0,iface=tap0,persist"
    assert (parsed.queues, parsed.mac, parsed.conf.mtu) == (3, "02:00:00:00:00:05", 9000)
    assert parsed.conf.rx_offloads == RxOffload.TCP_CKSUM | RxOffload.TCP_LRO
    assert parsed.conf.tx_offloads == TxOffload.TCP_CKSUM
    assert (parsed.conf.tx_gro, parsed.conf.rx_gso) == (True, False)
    for wrong in ("rx_offloads=0x", "rx_offloads=1", "rx_offloads=", "mtu=67", "tx_gro=1"):
        with pytest.raises(ValueError, match="--vdev=net_rtap0,") as failure:
            Device.parse(f"net_rtap0,{wrong}")
        assert wrong.partition("=")[0] in str(failure.value)


def test_a_device_has_its_settings(netns: NetNS, runtime: Path) -> None:
    offloads = "rx_offloads=TCP_CKSUM+TCP_LRO,tx_offloads=TCP_CKSUM+TCP_TSO,tx_gro"
    options = f"{ONE},mtu=9000,mac=02:00:00:00:00:05,txqueuelen=77,persist,{offloads}"
    with serving(netns, options) as served:
        found = link(netns, "tap0")
        assert (found["mtu"], found["address"]) == (9000, "02:00:00:00:00:05")
        assert found["txqlen"] == 77
        with rtap.attach("net_rtap0", 1) as dev:
            info = dev.info()
            assert info.rx_offloads == RxOffload.TCP_CKSUM | RxOffload.TCP_LRO
            assert info.tx_offloads == TxOffload.TCP_CKSUM | TxOffload.TCP_TSO
            assert info.tx_gro
            dev.mtu = info.max_mtu  # it has the room
            assert link(netns, "tap0")["mtu"] == info.max_mtu
        assert served.end() == (0, "")
    assert links(netns) == ["lo", "tap0"]


# ---- when an interface goes


def test_a_deleted_interface_ends_it(netns: NetNS, runtime: Path) -> None:
    with serving(netns, ONE, TWO) as served:
        ip(netns, "link", "delete", "tap1")
        assert served.process.stderr is not None
        line = served.process.stderr.readline().decode()
        assert line == "rtap serve: the interface of net_rtap1 is gone\n"
        with rtap.attach("net_rtap0", 1) as dev:  # that one goes on
            assert dev.send(bytes(60), queue=dev.queues[0])  # type: ignore[attr-defined]
        ip(netns, "link", "delete", "tap0")
        code, out = served.end(None)
        assert code == 1
        assert out.splitlines() == [
            "rtap serve: the interface of net_rtap0 is gone",
            "rtap serve: no interface is left, start it again to make them anew",
        ]
    assert left(runtime) == []


# ---- rights


def has_only(served: Served, uid: int, *capabilities: int) -> None:
    """Every thread has these capabilities, and no way to others."""
    bits = f"{sum(1 << number for number in capabilities):016x}"
    none = "0" * 16
    threads = served.status()
    assert len(threads) >= 3  # with those that serve requests and notifications
    for status in threads:
        assert status["Uid"].split() == [str(uid)] * 4
        sets = [status[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")]
        assert sets == [bits, bits, bits, none, none]
        assert status["NoNewPrivs"] == "1"
        assert status["Umask"] == "0077"


def change_everything(dev: EthDev, ns: NetNS) -> None:
    """Makes all requests to the process that has the device."""
    dev.mtu = 1400
    dev.mac = "02:00:00:00:00:07"
    found = link(ns, "tap0")
    assert (found["mtu"], found["address"]) == (1400, "02:00:00:00:00:07")
    assert (dev.mtu, dev.mac) == (1400, "02:00:00:00:00:07")
    dev.set_link_down()
    assert not dev.link().link_status
    dev.set_link_up()
    assert dev.link().link_status
    dev.app_mac = "02:00:00:00:00:08"
    dev.promiscuous = dev.allmulticast = False
    dev.mac_addr_add("02:00:00:00:00:09")
    dev.mac_addr_remove("02:00:00:00:00:09")
    dev.mc_addr_list = ["01:00:5e:00:00:01"]
    assert dev.send(bytes(60))
    assert dev.stats().opackets == 1
    assert dev.xstats()["purged_packets"] == 0
    dev.stats_reset()
    dev.xstats_reset()
    assert dev.info().ifname == "tap0"


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_rights_are_given_up(netns: NetNS, runtime: Path, tmp_path: Path, user: str) -> None:
    uid = 0 if user == "root" else NOBODY
    options = [] if user == "root" else [f"--user={user}"]
    with serving(netns, ONE, *options, open_tun=tmp_path if options else None) as served:
        has_only(served, uid, CAP_NET_ADMIN)
        assert runtime.stat().st_uid == uid
        with rtap.attach("net_rtap0", [0]) as dev:
            change_everything(dev, netns)
        with rtap.attach("net_rtap0", [0]) as dev:
            assert dev.send(bytes(60))
        has_only(served, uid, CAP_NET_ADMIN)
        assert served.end() == (0, "")
    assert links(netns) == ["lo"]
    assert left(runtime) == []


def test_packet_sockets_keep_one_more_right(netns: NetNS, runtime: Path) -> None:
    ip(netns, "link", "add", "v0", "type", "veth", "peer", "v1")
    for ifname in ("v0", "v1"):
        ip(netns, "link", "set", ifname, "up")
    with serving(netns, "--vdev=net_af_packet0,iface=v0,queues=2") as served:
        has_only(served, 0, CAP_NET_ADMIN, CAP_NET_RAW)
        for _ in range(2):  # the second one is on new sockets
            with rtap.attach("net_af_packet0", [0, 1]) as dev:
                before = netdev(netns, "v1")["rx_packets"]
                assert dev.send(bytes(60), queue=1)
                assert netdev(netns, "v1")["rx_packets"] == before + 1
        assert served.end() == (0, "")
    assert sorted(links(netns)) == ["lo", "v0", "v1"]


def test_without_the_right_to_make_interfaces(netns: NetNS, runtime: Path) -> None:
    drop = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    done = netns.run([*drop, *argv("serve", ONE)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "CAP_NET_ADMIN" in done.stderr
    assert left(runtime) == []


# ---- systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_when_it_is_ready(
    netns: NetNS, runtime: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    path = str(runtime.parent / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        place = netns.call if abstract else lambda fn, *args: fn(*args)
        if abstract:  # such names are those of a network namespace
            manager.close()
            fd = place(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach())
            manager = socket.socket(fileno=fd)
        with manager:
            manager.bind("\0" + path if abstract else path)
            manager.settimeout(patient(20))
            monkeypatch.setenv("NOTIFY_SOCKET", "@" + path if abstract else path)
            with serving(netns, ONE) as served:
                assert manager.recv(100) == b"READY=1"
                assert served.end() == (0, "")


# ---- ps, and those who do not answer


def test_a_process_that_does_not_answer(netns: NetNS, runtime: Path) -> None:
    with serving(netns, ONE) as served, serving(netns, TWO):
        os.kill(served.pid, signal.SIGSTOP)
        try:
            first, second = shared()
            assert (first["name"], first["pid"]) == ("net_rtap0", served.pid)
            assert first["error"] == "does not answer"
            assert (second["name"], second["error"]) == ("net_rtap1", "")
            command = first["command"]
            said = f"net_rtap0: process {served.pid} ({command}): does not answer\n"
            assert ps("net_rtap0") == (0, said, "")
        finally:
            os.kill(served.pid, signal.SIGCONT)
        assert [one["error"] for one in shared()] == ["", ""]


LISTING = {"name": "x", "ifname": "t\x1b[0m", "pid": 1, "queues": [0], "leases": []}


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[None]:
    """Somebody who gives each peer that answer, under the name x."""
    listening = places.listen("x", places.Allowed())
    listening.sock.setblocking(True)
    pid = os.fork()
    if pid == 0:
        while True:
            sock, _ = listening.sock.accept()
            with contextlib.suppress(OSError), sock:
                receive(sock)
                send(sock, answer)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        places.unlisten(listening)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "it ends the connection"),
        (b"{}", "it is of no known kind"),
        (encode("event", event=1, data=None), "event is no listing"),
        (encode("error", id=0, type="OSError", errno=1, text="no\x1b[31m"), "no?[31m"),
        (encode("listing", device={}), "it is no listing"),
        (encode("listing", device=LISTING | {"name": "../y"}), "it is no listing"),
        (encode("listing", device=LISTING | {"queues": ["0"]}), "it is no listing"),
        (encode("listing", device=LISTING | {"leases": [[1, 2]]}), "it is no listing"),
        (encode("listing", device=LISTING | {"leases": [[1, 2, "x"]]}), "it is no listing"),
        (encode("listing", device=LISTING | {"ifname": 1}), "it is no listing"),
        (encode("listing", device=LISTING), "interface t?[0m"),
        (encode("listing", device=LISTING | {"leases": [[0, 0, 1 << 40]]}), "of another container"),
    ],
)
def test_what_others_say_is_checked(runtime: Path, answer: bytes, says: str) -> None:
    with answering(answer):
        status, out, err = ps()
        assert (status, err) == (0, "")
        assert out.startswith("x: ")
        assert says in out
        assert "\x1b" not in out
        assert [one["name"] for one in shared()] == ["x"]


def test_ps_of_another_user(netns: NetNS, runtime: Path) -> None:
    code = "sys.exit(rtap.cli.main(['ps', *sys.argv[1:]]))"

    def says(*names: str) -> tuple[int, str, str]:
        with without_rights(code, *names) as process:
            out, err = process.communicate(timeout=patient(30))
            return process.returncode, out, err

    with serving(netns, ONE, "--owner=nobody"), serving(netns, TWO):
        unseen = f"rtap ps: this user may not see what is in {runtime}, give the name\n"
        assert says() == (0, "", unseen)
        code_, out, err = says("net_rtap0")
        assert (code_, err) == (0, "")
        assert out.startswith("net_rtap0: interface tap0, process")
        _, out, _ = says("net_rtap1")
        assert out.endswith("this user may not use it\n")


# ---- a user without rights forwards

FORWARDER = """
import json
engine, = sys.argv[1:]
a, b = (rtap.attach(name, [0, 1], engine=engine) for name in ("net_rtap0", "net_rtap1"))
with a, b:
    worker = rtap.Worker()
    for queue in (0, 1):
        worker.forward((a, queue), (b, queue), on_full="retry")
        worker.forward((b, queue), (a, queue), on_full="retry")
    with worker:
        print("ready", a.info().engine, flush=True)
        sys.stdin.readline()
    assert os.getresuid() == (65534,) * 3
    routes = worker.stats().routes
    moved = [(route.rx_packets, route.tx_packets, route.drops) for route in routes]
print(json.dumps(moved))
"""
SIZE = 32 << 20


def accounted_for(dev: EthDev, ns: NetNS) -> bool:
    """Whether the kernel's counters are the device's. What the kernel sent while nobody had a pair
    is missed."""
    kernel, figures = netdev(ns, dev.ifname), dev.stats()
    assert (figures.ierrors, figures.oerrors, kernel["rx_dropped"]) == (0, 0, 0)
    missed = figures.imissed + dev.xstats()["link_down_drops"]
    return (kernel["tx_packets"], kernel["rx_packets"], kernel["tx_dropped"]) == (
        *(figures.ipackets, figures.opackets, missed),
    )


def passed_on(there: EthDev, back: EthDev) -> bool:
    came, went = there.stats(), back.stats()
    return (came.ipackets, came.ibytes) == (went.opackets, went.obytes)


@pytest.mark.skipif(shutil.which("iperf3") is None, reason="needs iperf3")
def test_a_user_without_rights_forwards_iperf3(
    netns: NetNS, netns2: NetNS, runtime: Path, engine: str
) -> None:
    """TCP between two namespaces, whose interfaces two services have; each frame is accounted
    for."""
    offloads = "rx_offloads=TCP_CKSUM+TCP_LRO,tx_offloads=TCP_CKSUM+TCP_TSO"
    options = f"queues=2,txqueuelen=20000,{offloads}"
    with (
        serving(netns, f"--vdev=net_rtap0,iface=tap0,{options}", "--owner=nobody"),
        serving(netns2, f"--vdev=net_rtap1,iface=tap1,{options}", "--owner=nobody"),
        without_rights(FORWARDER, engine) as forwarder,
    ):
        assert forwarder.stdout is not None
        assert forwarder.stdout.readline() == f"ready {engine}\n"
        for ns, ifname, address in ((netns, "tap0", "10.9.0.1"), (netns2, "tap1", "10.9.0.2")):
            ip(ns, "addr", "add", f"{address}/24", "dev", ifname)
        for one in shared():
            assert [lease["user"] for lease in one["leases"]] == ["nobody"] * 2
        end, _ = clients.iperf3(netns, netns2, "10.9.0.2", "-n", str(SIZE))
        assert end["sum_sent"]["bytes"] >= SIZE
        # The kernel has nothing to send any more: the last frames of a connection may be late.
        for ns, ifname in ((netns, "tap0"), (netns2, "tap1")):
            ip(ns, "addr", "flush", "dev", ifname)
            ip(ns, "neigh", "flush", "dev", ifname)
        with rtap.attach("net_rtap0") as a, rtap.attach("net_rtap1") as b:
            for dev, other, ns in ((a, b, netns), (b, a, netns2)):
                eventually(partial(passed_on, dev, other), "all that was received is sent")
                eventually(partial(accounted_for, dev, ns), "each frame is accounted for")
            out, err = forwarder.communicate("\n", timeout=patient(20))
            assert (forwarder.returncode, err) == (0, "")
            moved = json.loads(out)
            assert not any(drops for _, _, drops in moved)
            both = a.stats().ipackets + b.stats().ipackets
            assert sum(rx for rx, _, _ in moved) == sum(tx for _, tx, _ in moved) == both
            assert a.stats().ipackets > SIZE / 65536 / 2  # iperf3 does not count what is under way
            for dev, ns in ((a, netns), (b, netns2)):
                assert accounted_for(dev, ns)
