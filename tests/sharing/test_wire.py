# SPDX-License-Identifier: BSD-3-Clause
"""Messages that are none, whoever sends them: nobody is harmed by them but their sender."""

from __future__ import annotations

import array
import contextlib
import json
import os
import random
import resource
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import patient
from sharing import MakeProcess, no_leases
from support import (
    PacketSocket,
    Tap,
    Task,
    eventually,
    frame,
    none_left,
    open_fds,
    running_threads,
    threads_end,
)

import rtap
from rtap import EthDev, NetNS
from rtap._core import memfd
from rtap.sharing import connection, places, server, share, wire
from rtap.sharing.attached import checked_terms
from rtap.sharing.wire import FIELDS, LIMIT, MessageError, decode, encode

SAMPLES: dict[str, dict[str, Any]] = {
    "attach": {"version": wire.VERSION, "key": "k"},
    "lease": {"id": 1, "queues": [0, 1], "count": 0},
    "give_back": {"id": 2, "queues": [1]},
    "call": {"id": 3, "name": "set_mtu", "args": [1500]},
    "list": {},
    "welcome": {"name": "net_rtap0", "device": {}},
    "leased": {"id": 4, "queue": 1},
    "result": {"id": 5, "value": {"a": [1, None, 2.5]}},
    "error": {"id": 6, "type": "ValueError", "errno": 0, "text": "no"},
    "state": {"device": {"mtu": 1500}},
    "event": {"event": 1, "data": None},
    "listing": {"device": {}},
}
#: Kinds that this version has beside those above.
KINDS = sorted(FIELDS.keys() & SAMPLES.keys())

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)


# ---- decode


def checked(data: bytes) -> wire.Message | None:
    """What decode() makes of it: it raises nothing but MessageError, and returns nothing odd."""
    try:
        message = decode(data)
    except MessageError:
        return None
    assert message.kind in FIELDS
    assert message.fields.keys() == FIELDS[message.kind].keys()
    assert message.fds == []
    return message


def test_every_kind_passes() -> None:
    for kind in KINDS:
        message = checked(encode(kind, **SAMPLES[kind]))
        assert message is not None
        assert (message.kind, message.fields) == (kind, SAMPLES[kind])
        for name, value in SAMPLES[kind].items():
            assert getattr(message, name) == value


@pytest.mark.fuzz
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    checked(data)


@pytest.mark.fuzz
@given(JSON)
def test_any_json(value: Any) -> None:
    checked(json.dumps(value).encode())


@pytest.mark.fuzz
@given(st.sampled_from(KINDS), st.data())
def test_changed_bytes(kind: str, data: st.DataObject) -> None:
    message = bytearray(encode(kind, **SAMPLES[kind]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(message) - 1))
        what = data.draw(st.integers(0, 3))
        if what == 0:
            message[at] = data.draw(st.integers(0, 255))
        elif what == 1 and len(message) > 1:
            del message[at]
        elif what == 2:
            message[at:at] = data.draw(st.binary(max_size=8))
        else:
            del message[at + 1 :]
    checked(bytes(message))


@pytest.mark.fuzz
@given(st.sampled_from(KINDS), st.data())
def test_changed_fields(kind: str, data: st.DataObject) -> None:
    fields = {"kind": kind, **SAMPLES[kind]}
    name = data.draw(st.sampled_from(sorted(fields)))
    value = data.draw(JSON)
    fields[name] = value
    message = checked(json.dumps(fields).encode())
    if message is None or name == "kind":
        return
    expected = FIELDS[kind][name]
    if expected is int:
        assert type(value) is int
        assert -(1 << 63) <= value < 1 << 63
    elif expected == [int]:
        assert all(type(item) is int for item in value)
    elif isinstance(expected, type):
        assert isinstance(value, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_other_fields(kind: str) -> None:
    fields = {"kind": kind, **SAMPLES[kind]}
    for name in fields:
        less = {key: value for key, value in fields.items() if key != name}
        assert checked(json.dumps(less).encode()) is None
    for more in ("x", "", "kind ", "fds", "__class__"):
        assert checked(json.dumps({**fields, more: 1}).encode()) is None
    for wrong in (None, 1.5, True, [], {}, [[]], 1 << 64, ["x"], [1.0], [True], [None]):
        for name in fields:
            if FIELDS[kind].get(name) == "any" or (type(wrong), FIELDS[kind].get(name)) in (
                *((list, list), (dict, dict), (list, [int])),
            ):
                continue
            assert checked(json.dumps({**fields, name: wrong}).encode()) is None, (name, wrong)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'""',
        b"{}",
        b'{"kind":"list"} ' + b"x",
        b'{"kind":"list","kind":"list"}',
        b'{"kind":"give_back","id":1,"id":1,"queues":[]}',
        b'{"kind":"result","id":1,"value":NaN}',
        b'{"kind":"result","id":1,"value":Infinity}',
        b'{"kind":"result","id":1,"value":-Infinity}',
        b'{"kind":"result","id":1,"value":{"a":1,"a":2}}',
        b'{"kind":"result","id":NaN,"value":1}',
        b'{"kind":"result","id":1e3,"value":1}',
        b'{"kind":"result","id":1' + b"0" * 30_000 + b',"value":1}',
        b'{"kind":"result","id":1,"value":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"kind":"result","id":1,"value":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}",
        b'{"kind":"give_back","id":1,"queues":[' + b"1," * 2000 + b"1]}",
        b'\xff\xfe{"kind":"list"}',
        b'\xef\xbb\xbf{"kind":"list"}',
        '{"kind":"list"}'.encode("utf-16"),
        b'{"kind":"list\xff"}',
        b'{"kind":"list"}' + b" " * (LIMIT + 1 - 15),
        b'{"kind":["list"]}',
        b'{"kind":null}',
    ],
    ids=lambda data: data[:24].decode("latin-1") + f"-{len(data)}",
)
def test_no_messages(data: bytes) -> None:
    assert checked(data) is None


def test_longest() -> None:
    data = b'{"kind":"list"}'
    assert checked(data + b" " * (LIMIT - len(data))) is not None
    assert checked(data + b" " * (LIMIT + 1 - len(data))) is None
    with pytest.raises(ValueError, match="more than a message has"):
        encode("attach", version=1, key="k" * LIMIT)
    with pytest.raises(ValueError, match="out of range"):
        encode("give_back", id=1 << 63, queues=[])
    with pytest.raises(TypeError, match="has the fields"):
        encode("list", more=1)


def test_huge_numbers_inside_are_kept_small_in_time() -> None:
    """Python converts digits in quadratic time, and refuses more than 4300 of them."""
    data = b'{"kind":"result","id":1,"value":[' + b",".join([b"9" * 4000] * 15) + b"]}"
    began = time.process_time()
    checked(data)
    assert time.process_time() - began < patient(5)


# ---- a live share, and those who attack it


class Target:
    """A device that forwards while others attack its share."""

    def __init__(self, ns: NetNS, dev: EthDev, shared: rtap.Share, packets: PacketSocket) -> None:
        self.ns, self.dev, self.share, self.packets = ns, dev, shared, packets
        self.worker = rtap.Worker()
        self.worker.forward((dev, 0), (dev, 0))
        self.path = shared.path

    def client(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Python's timeout would make a connect to a full queue fail at once.
        wait = struct.pack("ll", int(patient(10)), 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        directory = os.open(os.path.dirname(self.path), os.O_PATH)
        try:
            sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(self.path)}")
        except BaseException:
            sock.close()
            raise
        finally:
            os.close(directory)
        sock.settimeout(patient(10))
        return sock

    def attached(self) -> socket.socket:
        sock = self.client()
        sock.send(encode("attach", version=wire.VERSION, key=""))
        assert json.loads(sock.recv(1 << 17))["kind"] == "welcome"
        return sock

    def moves(self) -> None:
        """Fails unless frames still pass, and the share still answers."""
        before = self.worker.stats().routes[0].rx_packets
        self.packets.send(frame(1))
        assert self.packets.frames(1) == [frame(1)]
        eventually(lambda: self.worker.stats().routes[0].rx_packets > before, "the worker goes on")
        with self.attached() as sock:
            sock.send(encode("lease", id=1, queues=[1], count=0))
            assert json.loads(sock.recv(1 << 17))["kind"] == "leased"
            assert json.loads(sock.recv(1 << 17))["kind"] == "result"
        no_leases(self.share)


@pytest.fixture
def target(netns: NetNS, runtime_dir: Path) -> Iterator[Target]:
    with (
        rtap.open("tap0", netns=netns, queues=2) as dev,
        rtap.share(dev, [1]) as shared,
        PacketSocket(netns, "tap0") as packets,
    ):
        made = Target(netns, dev, shared, packets)
        with made.worker:
            made.moves()
            threads = running_threads()
            before = open_fds()
            yield made
            made.moves()
            none_left(before)
            threads_end(threads)


def ends(sock: socket.socket) -> bool:
    """Whether the other end closes the connection, after an error or without one."""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(1 << 17):
            assert json.loads(data)["kind"] == "error"
    return True


REQUESTS = [encode(kind, **SAMPLES[kind]) for kind in KINDS]


@pytest.mark.root
def test_bad_messages_end_the_connection(target: Target) -> None:
    chance = random.Random(1)
    for data in (b"\0", b"{", b"x" * (LIMIT + 1), b" " * (LIMIT + 5000), b"[" * LIMIT):
        for client in (target.client, target.attached):
            with client() as sock:
                sock.send(data)
                assert ends(sock)
    for data in REQUESTS:
        for bad in (data[:-1], data + b"}", data[: len(data) // 2], data + bytes(1)):
            with target.attached() as sock:
                sock.send(bad)
                assert ends(sock)
    for _ in range(100):
        data = bytearray(chance.choice(REQUESTS))
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        with target.attached() as sock:
            sock.send(data)
    target.moves()


@pytest.mark.root
def test_before_attach_and_wrong_kinds(target: Target) -> None:
    for kind in KINDS:
        if kind in ("attach", "list"):
            continue
        with target.client() as sock:
            sock.send(encode(kind, **SAMPLES[kind]))
            answer = json.loads(sock.recv(1 << 17))
            assert (answer["kind"], answer["text"]) == ("error", "attach first")
    for kind in KINDS:
        if kind in ("attach", "list", "lease", "give_back", "call"):
            continue
        with target.attached() as sock:
            sock.send(encode(kind, **SAMPLES[kind]))
            assert ends(sock)
    with target.client() as sock:
        for version in (0, 2, -1, 1 << 62):
            sock.send(encode("attach", version=version, key=""))
            assert "both need the same rtap" in json.loads(sock.recv(1 << 17))["text"]


@pytest.mark.root
def test_wrong_requests(target: Target) -> None:
    """Any arguments of any request: an answer comes, and the connection stays."""
    odd = (
        None,
        True,
        -1,
        1 << 80,
        1.5,
        "",
        "x" * 5000,
        [],
        [[]],
        {},
        {"a": 1},
        "02:00:00:00:00:01",
    )
    with target.attached() as sock:
        for name in (*share.CALLS, "", "close", "__class__", "stop"):
            if name in ("set_link_down", "stats_reset", "xstats_reset"):
                continue
            for args in ([], [1, 2], *([value] for value in odd)):
                sock.send(encode("call", id=7, name=name, args=args))
                while (answer := json.loads(sock.recv(1 << 17)))["kind"] in ("state", "event"):
                    pass
                assert (answer["kind"] in ("result", "error"), answer["id"]) == (True, 7)
        for queues, count in (([5], 0), ([-1], 0), ([], -1), ([1, 0], 0), ([1 << 40], 1), ([], 9)):
            sock.send(encode("lease", id=8, queues=queues, count=count))
            assert json.loads(sock.recv(1 << 17))["kind"] == "error"
        sock.send(encode("give_back", id=9, queues=[0, 1, 5, -7]))
        assert json.loads(sock.recv(1 << 17))["value"] == []
    target.dev.promiscuous = True
    target.dev.set_link_up()
    target.dev.mac_addrs  # noqa: B018 - it still answers


@pytest.mark.root
def test_descriptors_are_closed(target: Target, tmp_path: Path) -> None:
    with (
        open(tmp_path / "file", "w") as file,
        Tap(target.ns, "other0") as tap,
        target.attached() as kept,
    ):
        r, w = os.pipe()
        for fds in ([file.fileno()], [tap.fd], [w] * 2, [r] * 4, [r] * 5, [r] * 253):
            rights = array.array("i", fds)
            for data in (*REQUESTS[:4], b"nonsense", b""):
                with target.attached() as sock, contextlib.suppress(OSError):
                    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        os.close(r)
        # No end of the pipe is left with the share.
        os.close(w)
        rights = array.array("i", [file.fileno()])
        for _ in range(50):
            kept.sendmsg(
                [encode("call", id=1, name="mtu", args=[])],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
            )
            assert json.loads(kept.recv(1 << 17))["value"] == 1500


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


@pytest.mark.root
def test_flood_of_connections(target: Target) -> None:
    """A thousand at once: 256 are served, and the others wait or are refused."""
    fds = len(os.listdir("/proc/self/fd"))
    socks: list[socket.socket] = []
    try:
        for _ in range(1000):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            directory = os.open(os.path.dirname(target.path), os.O_PATH)
            socks.append(sock)
            with contextlib.suppress(BlockingIOError):
                sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(target.path)}")
            os.close(directory)
        target.packets.send(frame(7))
        assert target.packets.frames(1) == [frame(7)]
        eventually(
            lambda: len(target.share._server._clients) <= server.MAX_CLIENTS, "no more than that"
        )
        assert len(os.listdir("/proc/self/fd")) <= fds + 1000 + server.MAX_CLIENTS + 2
    finally:
        for sock in socks:
            sock.close()
    eventually(lambda: not target.share._server._clients, "all are gone", 20)
    for _ in range(1000):
        with contextlib.suppress(ConnectionError, BlockingIOError):
            target.client().close()


@pytest.mark.root
def test_attaching_waits_for_room(runtime_dir: Path) -> None:
    """The queue of those who connect is full for a moment."""
    listening = places.listen("full", places.Allowed())
    listening.sock.setblocking(True)
    with contextlib.ExitStack() as stack:
        directory = os.open(runtime_dir, os.O_PATH)
        stack.callback(os.close, directory)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
                stack.enter_context(sock)
                sock.connect(f"/proc/self/fd/{directory}/full.sock")
        late = Task(places.connect, "full")
        where = Path(f"/proc/self/task/{late.native_id}/wchan")
        eventually(lambda: where.read_text() == "unix_wait_for_peer", "it waits for room")
        listening.sock.accept()[0].close()
        late.result().close()
    places.unlisten(listening)


@pytest.mark.root
def test_silent_connections_end(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ATTACH_S", 0.2)
    with target.client() as silent, target.client() as lists, target.attached() as attached:
        lists.send(encode("list"))
        assert json.loads(lists.recv(1 << 17))["kind"] == "listing"
        assert ends(silent)
        assert ends(lists)
        attached.send(encode("call", id=1, name="mtu", args=[]))
        assert json.loads(attached.recv(1 << 17))["value"] == 1500


@pytest.mark.root
def test_peers_that_never_read(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """They ask, and do not read: they lose their connections, and take little memory."""
    monkeypatch.setattr(server, "BEHIND_S", 1.0)
    before = resident()
    request = encode("call", id=1, name="info", args=[])
    socks = [target.attached() for _ in range(20)]
    for sock in socks:
        sock.setblocking(False)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        for sock in socks:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                sock.send(request)
        target.packets.send(frame(9))
        assert target.packets.frames(1) == [frame(9)]
    eventually(lambda: not target.share._server.clients(), "they are dropped", 20)
    assert resident() - before < 50 << 20
    for sock in socks:
        sock.close()


@pytest.mark.root
def test_many_attackers_at_once(target: Target) -> None:
    stop = threading.Event()

    def attack(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            with contextlib.suppress(OSError), target.client() as sock:
                for _ in range(chance.randrange(5)):
                    data = bytearray(chance.choice(REQUESTS))
                    if chance.random() < 0.5:
                        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
                    sock.send(data)

    threads = [threading.Thread(target=attack, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    try:
        for n in range(20):
            target.packets.send(frame(n))
            assert target.packets.frames(1) == [frame(n)]
            time.sleep(0.02)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    target.dev.set_link_up()
    eventually(lambda: not target.share._server._clients, "all are gone", 20)


# ---- other users


NOBODY = 65534


@pytest.mark.root
def test_other_users(
    netns: NetNS, process: MakeProcess, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become = (
        f"os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); "
        f"os.setresuid({NOBODY}, {NOBODY}, {NOBODY})"
    )
    with tempfile.TemporaryDirectory() as place, rtap.open("tap0", netns=netns) as dev:
        monkeypatch.setenv("RTAP_RUNTIME_DIR", place)
        other = process()
        other("os.environ['RTAP_RUNTIME_DIR'] = place", place=place)
        other(become)
        with rtap.share(dev) as shared:
            assert os.stat(place).st_mode & 0o777 == 0o700
            assert os.stat(shared.path).st_mode & 0o777 == 0o600
            with pytest.raises(PermissionError, match="this user may not use it"):
                other.attach(dev.name, [0])
            os.chmod(place, 0o711)
            with pytest.raises(PermissionError, match="this user may not use it"):
                other.attach(dev.name, [0])
            # The kernel is asked as well who connects.
            os.chmod(shared.path, 0o666)
            with pytest.raises(PermissionError, match="this user may not attach"):
                other.attach(dev.name, [0])
        with rtap.share(dev, groups=["nogroup"]) as shared:
            assert os.stat(shared.path).st_mode & 0o777 == 0o666
            other.attach(dev.name, [0])
            assert shared.leases[0].uid == NOBODY
            other("dev.close()")
            no_leases(shared)
        with rtap.share(dev, users=["nobody"]) as shared:
            other.attach(dev.name, [0])
            assert other("dev.send(data)", data=frame(1))
            other("dev.close()")
        with (
            rtap.share(dev, users=["bin"]),
            pytest.raises(PermissionError, match="this user may not attach"),
        ):
            other.attach(dev.name, [0])
        for wrong in ({"users": ["no such user"]}, {"groups": ["no such group"]}, {"users": [-2]}):
            with pytest.raises(ValueError, match=r"user|group|owner"):
                rtap.share(dev, **wrong)  # type: ignore[arg-type]


@pytest.mark.root
def test_directories_of_others_are_refused(
    netns: NetNS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rtap.open("tap0", netns=netns) as dev:
        writable, foreign, link = (tmp_path / name for name in ("writable", "foreign", "link"))
        writable.mkdir()
        writable.chmod(0o777)
        foreign.mkdir(mode=0o700)
        os.chown(foreign, NOBODY, NOBODY)
        (tmp_path / "mine").mkdir(mode=0o700)
        link.symlink_to(tmp_path / "mine")
        for path in (writable, foreign, link):
            monkeypatch.setenv("RTAP_RUNTIME_DIR", str(path))
            with pytest.raises(PermissionError, match="has to be a directory of this user"):
                rtap.share(dev)
        monkeypatch.setenv("RTAP_RUNTIME_DIR", "/proc/nothing")
        with pytest.raises(OSError, match="set RTAP_RUNTIME_DIR or XDG_RUNTIME_DIR"):
            rtap.share(dev)
        dev.rx_burst(0)


# ---- a first process that lies


class Liar:
    """Listens under a name, and answers as it is told: with a welcome, and with a lease."""

    def __init__(
        self,
        path: Path,
        welcome: bytes,
        answers: dict[str, Any] | None = None,
        rights: Sequence[int] | None = None,
    ) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        directory = os.open(path, os.O_PATH)
        self._sock.bind(f"/proc/self/fd/{directory}/liar.sock")
        os.close(directory)
        self._sock.listen(5)
        self._path = path / "liar.sock"
        self._welcome, self._answers, self._rights = welcome, answers or {}, rights
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        peer, _ = self._sock.accept()
        with peer, contextlib.suppress(OSError):
            while data := peer.recv(1 << 17):
                request = json.loads(data)
                if request["kind"] == "attach":
                    peer.send(self._welcome)
                elif request["kind"] == "call" and request["name"] in self._answers:
                    value = self._answers[request["name"]]
                    peer.send(encode("result", id=request["id"], value=value))
                elif request["kind"] == "lease" and self._rights is not None:
                    rights = array.array("i", self._rights)
                    peer.sendmsg(
                        [encode("leased", id=request["id"], queue=0)],
                        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else [],
                    )
                    peer.send(encode("result", id=request["id"], value=[0]))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self._sock.close()
        self._thread.join()
        self._path.unlink()


@pytest.fixture
def shared(netns: NetNS, runtime_dir: Path) -> Iterator[rtap.Share]:
    with rtap.open("tap0", netns=netns) as dev, rtap.share(dev) as shared:
        yield shared


@pytest.fixture
def terms(shared: rtap.Share) -> dict[str, Any]:
    """What a share says of its device."""
    dev = shared._dev()
    assert dev is not None
    return shared._state(dev)


@pytest.fixture
def answers(shared: rtap.Share) -> dict[str, Any]:
    """The true ones, as far as attaching needs them."""
    dev = shared._dev()
    return {name: share.CALLS[name](dev) for name in ("info", "app_mac", "mac", "mtu", "link")}


@pytest.fixture
def nothing_left(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(connection, "ANSWER_S", 0.5)  # nobody answers further requests
    rtap.sharing.places.directories()  # imported by now
    before = open_fds()
    threads = running_threads()
    devices = rtap.devices()
    yield
    threads_end(threads)
    none_left(before)
    assert rtap.devices() == devices


def lies(runtime_dir: Path, *answers: Any, queues: Any = None) -> str:
    """The text of the error."""
    with (
        Liar(runtime_dir, *answers),
        pytest.raises((ValueError, OSError, RuntimeError)) as caught,
    ):
        rtap.attach("liar", queues)
    return str(caught.value)


@pytest.mark.root
def test_wrong_welcomes(terms: dict[str, Any], nothing_left: None, runtime_dir: Path) -> None:
    for data in (
        b"",
        b"nonsense",
        b"x" * (LIMIT + 10),
        encode("result", id=1, value=None),
        encode("welcome", name="liar", device={}),
        encode("welcome", name="", device=terms),
        encode("welcome", name="../x", device=terms),
        encode("error", id=0, type="SystemExit", errno=0, text="x"),
        encode("error", id=0, type="DeviceGone", errno=-5, text="x"),
    ):
        assert lies(runtime_dir, data)
    for name, wrong in (
        ("state_size", 1),
        ("nb_queues", 0),
        ("nb_queues", 1 << 40),
        ("mode", "x"),
        ("mtu", -1),
        ("mtu", 1 << 40),
        ("rx_offloads", -1),
        ("rx_offloads", 1 << 62),
        ("rx", {"fd": 1}),
        ("rx", {"split": 1}),
        ("tx", {"ordered": "x"}),
        ("tx", []),
        ("rx", {"offloads": -1}),
        ("app_mac", "x"),
        ("mac_addrs", {"x": "y"}),
        ("mac_addrs", {"0": 5}),
        ("mc_addr_list", [5]),
        ("ifname", 5),
        ("driver", None),
    ):
        welcome = encode("welcome", name="liar", device={**terms, name: wrong})
        assert lies(runtime_dir, welcome), name


@pytest.mark.root
def test_wrong_answers(
    terms: dict[str, Any], answers: dict[str, Any], nothing_left: None, runtime_dir: Path
) -> None:
    welcome = encode("welcome", name="liar", device=terms)
    for name in ("info", "app_mac"):
        for wrong in (None, 5, "x", [], {}, [answers["info"]], {**answers["info"], "mac": 5}):
            assert lies(runtime_dir, welcome, {**answers, name: wrong})


@pytest.mark.fuzz
@given(JSON, st.data())
def test_any_terms(value: Any, data: st.DataObject) -> None:
    """MessageError or terms."""
    names = sorted(
        name
        for name in checked_terms.__globals__["Terms"].__dataclass_fields__  # all fields
    )
    device = dict.fromkeys(names, value)
    for name in names:
        if data.draw(st.booleans()):
            device[name] = data.draw(JSON)
    for case in (device, value if isinstance(value, dict) else {}):
        with contextlib.suppress(MessageError):
            checked_terms(case)


@pytest.mark.root
def test_wrong_descriptors(
    netns: NetNS,
    terms: dict[str, Any],
    answers: dict[str, Any],
    nothing_left: None,
    runtime_dir: Path,
    tmp_path: Path,
) -> None:
    welcome = encode("welcome", name="liar", device=terms)
    errors: list[str] = []
    size = terms["state_size"]
    with contextlib.ExitStack() as stack:
        fds: list[int] = []

        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            fds.append(fd)
            return fd

        file = keep(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT))
        os.ftruncate(file, 1 << 20)
        sealed = keep(memfd.make("sealed", size))
        small = keep(memfd.make("small", 8))
        unsealed = keep(os.memfd_create("unsealed", os.MFD_ALLOW_SEALING))
        os.ftruncate(unsealed, 1 << 20)
        null = keep(os.open("/dev/null", os.O_RDWR))
        loose = keep(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
        tap = stack.enter_context(Tap(netns, "tap7", multi_queue=True)).fd
        for rights in (
            [],
            [tap],
            [tap, tap, sealed],
            [file, file, sealed, sealed],
            [null, null, sealed, sealed],
            [loose, loose, sealed, sealed],
            [sealed, sealed, sealed, sealed],
            [tap, tap, file, file],
            [tap, tap, unsealed, sealed],
            [tap, tap, sealed, unsealed],
            [tap, tap, small, small],
            [tap, tap, null, null],
            [tap, tap, tap, tap],
            [tap, null, sealed, sealed],
            [tap] * 5,
            [tap] * 60,
        ):
            text = lies(runtime_dir, welcome, answers, rights, queues=[0])
            assert text
            errors.append(text)
    assert all("lent other queues" in text for text in errors[:3]), errors
    assert all("TUNGETIFF on tap0" in text for text in errors[3:7]), errors
    assert all("sealed memfd" in text for text in errors[7:13]), errors
