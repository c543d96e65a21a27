# SPDX-License-Identifier: BSD-3-Clause
"""``net_udp`` beside the kernel's own sockets: every datagram arrives once, as it was sent."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Iterator

import pytest
from clients import enable_ipv6
from datagrams import HERE, PORT, counts, plain, send_all, take, with_loopback
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import patient
from support import eventually, pattern

import rtap
from rtap import Burst, EthDev, Mempool, NetNS

pytestmark = pytest.mark.root


@pytest.fixture
def ns(netns: NetNS) -> NetNS:
    return with_loopback(netns)


@pytest.fixture
def dev(ns: NetNS) -> Iterator[EthDev]:
    with rtap.open_udp((HERE, PORT), netns=ns, unknown="learn") as device:
        yield device


def test_to_and_fro(ns: NetNS, dev: EthDev) -> None:
    with plain(ns) as a, plain(ns) as b:
        for sock, text in ((a, b"one"), (b, b"two"), (a, b"three")):
            sock.sendto(text, (HERE, PORT))
        burst = take(dev, 3)
        assert [bytes(m) for m in burst] == [b"one", b"two", b"three"]
        assert list(burst.peers) == [1, 2, 1]
        assert {m.port for m in burst} == {dev.port_id}
        assert dev.peers[2] == b.getsockname()
        assert dev.tx_burst(0, burst) == 3
        assert [a.recv(99), a.recv(99), b.recv(99)] == [b"one", b"three", b"two"]
    stats = dev.stats()
    assert (stats.ipackets, stats.ibytes, stats.opackets, stats.obytes) == (3, 11, 3, 11)
    assert (stats.ierrors, stats.oerrors, stats.imissed) == (0, 0, 0)
    assert dev.pool.in_use == 0


def test_every_size(ns: NetNS, dev: EthDev) -> None:
    """Longer datagrams are chains; the longest fills the kernel's limit."""
    sizes = [0, 1, 2047, 2048, 2049, 4096, 9000, 65506, 65507]
    with plain(ns) as peer:
        for size in sizes:
            peer.sendto(pattern(size, size), (HERE, PORT))
        burst = take(dev, len(sizes))
        assert list(burst.lengths) == sizes
        assert [bytes(m) for m in burst] == [pattern(n, n) for n in sizes]
        assert [m.nb_segs for m in burst] == [1, 1, 1, 1, 2, 2, 5, 32, 32]
        send_all(dev, burst)
        assert [peer.recv(1 << 16) for _ in sizes] == [pattern(n, n) for n in sizes]
    assert counts(dev)["tx_q0_multiseg_packets"] == 5


@pytest.mark.parametrize("local", ["::", "::1"])
def test_ipv6(ns: NetNS, local: str) -> None:
    enable_ipv6(ns, "lo")
    with (
        rtap.open_udp((local, PORT), netns=ns, unknown="learn") as dev,
        plain(ns, ("::1", 0), socket.AF_INET6) as six,
        plain(ns) as four,
    ):
        six.sendto(b"six", ("::1", PORT))
        burst = take(dev, 1)
        assert dev.peers[1] == ("::1", six.getsockname()[1])
        if local == "::":
            four.sendto(b"four", (HERE, PORT))
            burst.extend(list(take(dev, 1)))
            assert dev.peers[2] == four.getsockname()
        send_all(dev, burst)
        assert six.recv(9) == b"six"
        if local == "::":
            assert four.recv(9) == b"four"


def test_only_the_remote(ns: NetNS) -> None:
    with (
        plain(ns) as peer,
        plain(ns) as stranger,
        rtap.open_udp(remote=peer.getsockname(), netns=ns) as dev,
    ):
        assert dev.send(b"hello")
        data, address = peer.recvfrom(99)
        assert data == b"hello"
        stranger.sendto(b"no", address)
        peer.sendto(b"yes", address)
        burst = take(dev, 1)
        assert [(bytes(m), m.peer) for m in burst] == [(b"yes", 0)]
        assert len(dev.rx_burst(0)) == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2]),
            st.one_of(st.sampled_from([1, 100, 100, 100, 1400]), st.integers(0, 3000)),
        ),
        max_size=200,
    )
)
def test_any_burst(ns: NetNS, dev: EthDev, frames: list[tuple[int, int]]) -> None:
    """Datagrams of any sizes to three peers: the kernel's sockets get what a loop of sendto()
    would have sent, in this order."""
    with plain(ns) as a, plain(ns) as b, plain(ns) as c:
        socks = (a, b, c)
        numbers = [dev.peers.add(sock.getsockname()) for sock in socks]
        data = [pattern(i, size) for i, (_, size) in enumerate(frames)]
        burst = dev.pool.alloc_burst(len(frames), data) if frames else Burst()
        burst.peers = [numbers[peer] for peer, _ in frames]
        send_all(dev, burst)
        for k, sock in enumerate(socks):
            for (peer, _), sent in zip(frames, data, strict=True):
                if peer == k:
                    assert sock.recv(1 << 16) == sent
        for number in numbers:
            del dev.peers[number]
    assert dev.pool.in_use == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(1, 1500), st.integers(1, 64), st.integers(0, 1500)), max_size=12
    ),
    st.integers(1, 300),
)
def test_any_message(ns: NetNS, dev: EthDev, messages: list[tuple[int, int, int]], n: int) -> None:
    """What the kernel gives as one message is handed out as it was sent, in bursts of any size."""
    with plain(ns) as peer:
        sent = []
        for k, (size, count, last) in enumerate(messages):
            parts = [pattern(k + i, size) for i in range(count)]
            parts[-1] = parts[-1][: max(1, min(last, size))]
            while sum(map(len, parts)) > 65507:
                parts.pop(0)
            peer.sendmsg(
                [b"".join(parts)],
                [(17, 103, size.to_bytes(2, "little"))] if len(parts) > 1 else [],
                0,
                (HERE, PORT),
            )
            sent += parts
        got: list[bytes] = []
        while len(got) < len(sent):
            got += [bytes(m) for m in take(dev, min(n, len(sent) - len(got)))]
        assert got == sent
    assert dev.pool.in_use == 0


def test_batches(ns: NetNS, dev: EthDev) -> None:
    """A burst of equal datagrams is one message for the kernel, which a device gets as one."""
    with rtap.open_udp(remote=(HERE, PORT), netns=ns) as client:
        burst = client.pool.alloc_burst(65, bytes(900))
        burst[64].trim(100)
        assert client.tx_burst(0, burst) == 65
        assert list(take(dev, 65).lengths) == [900] * 64 + [800]
        sent, got = counts(client), counts(dev)
        assert (sent["tx_q0_gso_sends"], sent["tx_q0_gso_segments"]) == (1, 64)
        assert (got["rx_q0_gro_messages"], got["rx_q0_gro_segments"]) == (1, 64)


def test_few_buffers(ns: NetNS) -> None:
    """Nothing is lost while the pool is empty, and no datagram waits for ever."""
    with rtap.open_udp((HERE, PORT), netns=ns, nb_mbufs=8) as dev, plain(ns) as peer:
        for start in range(0, 60, 20):
            data = b"".join(pattern(start + i, 500) for i in range(20))
            peer.sendmsg([data], [(17, 103, (500).to_bytes(2, "little"))], 0, (HERE, PORT))
        got: list[bytes] = []
        while len(got) < 60:
            held = dev.rx_burst(0, 64, patient(5))
            assert len(held) <= 8
            if len(held) == 8:
                assert len(dev.rx_burst(0, 64)) == 0
            got += [bytes(m) for m in held]
            del held
        assert got == [pattern(i, 500) for i in range(60)]
        assert counts(dev)["rx_q0_mbuf_alloc_failed"] > 0


def test_too_long_for_the_pool(ns: NetNS) -> None:
    with rtap.open_udp((HERE, PORT), netns=ns, nb_mbufs=4, data_room=100) as dev, plain(ns) as peer:
        peer.sendto(bytes(401), (HERE, PORT))
        peer.sendto(bytes(400), (HERE, PORT))
        assert list(take(dev, 1).lengths) == [400]
        assert dev.stats().ierrors == 1
        assert counts(dev)["rx_q0_gso_too_long_packets"] == 1


def test_waiting_datagrams_wake(ns: NetNS, dev: EthDev) -> None:
    """Those that were read and did not fit into the burst make the interrupt's descriptor
    readable."""
    dev.rx_queue_intr_enable(0)
    fd = dev.rx_queue_intr_fd(0)

    def readable() -> bool:
        return bool(select.select([fd], [], [], 0)[0])

    assert not readable()
    with plain(ns) as peer:
        data = bytes(30)
        peer.sendmsg([data], [(17, 103, (10).to_bytes(2, "little"))], 0, (HERE, PORT))
        eventually(readable, "the datagrams are there")
        assert len(dev.rx_burst(0, 2)) == 2
        assert readable()
        assert len(dev.rx_burst(0, 2, None)) == 1
        assert len(dev.rx_burst(0, 2)) == 0
        assert not readable()


def test_stop_and_start(ns: NetNS, dev: EthDev) -> None:
    """What had come before is gone, and counted."""
    with plain(ns) as peer:
        data = bytes(30)
        peer.sendmsg([data], [(17, 103, (10).to_bytes(2, "little"))], 0, (HERE, PORT))
        assert len(take(dev, 1)) == 1
        dev.stop()
        assert counts(dev)["rx_q0_stopped_packets"] == 2
        for _ in range(5):
            peer.sendto(b"old", (HERE, PORT))
        dev.start()
        assert counts(dev)["rx_q0_purged_packets"] == 5
        peer.sendto(b"new", (HERE, PORT))
        assert bytes(take(dev, 1)[0]) == b"new"


def test_missed(ns: NetNS) -> None:
    """The kernel drops what the socket's buffer has no room for."""
    with rtap.open_udp((HERE, PORT), netns=ns, rcvbuf=20000) as dev, plain(ns) as peer:
        for _ in range(100):
            peer.sendto(bytes(1000), (HERE, PORT))
        got = 0
        while n := len(dev.rx_burst(0)):
            got += n
        assert dev.stats().imissed == dev.xstats()["rx_missed_packets"] == 100 - got > 0
        dev.stats_reset()
        assert dev.stats().imissed == 0


def test_own_socket(ns: NetNS) -> None:
    """It may be blocking, and connected; the caller keeps it."""
    with plain(ns) as peer, plain(ns) as mine:
        mine.setblocking(True)
        mine.connect(peer.getsockname())
        with rtap.open_udp(sock=mine) as dev:
            assert len(dev.rx_burst(0)) == 0
            assert dev.send(b"x")
            assert peer.recv(9) == b"x"
            assert dev.info().max_rx_queues == 1
            with pytest.raises(ValueError, match="nb_rx_queues must be 1 to 1"):
                rtap.open_udp(sock=mine, queues=2)
        mine.send(b"y")
        assert peer.recv(9) == b"y"
        for options in ({"local": (HERE, 0)}, {"pmtu": "do"}, {"rcvbuf": 1 << 20}):
            with pytest.raises(ValueError, match="the socket has its addresses and options"):
                rtap.open_udp(sock=mine, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sock", [5, "x", object()])
def test_no_socket(sock: object) -> None:
    with pytest.raises(TypeError, match="sock is a socket"):
        rtap.open_udp(sock=sock)


def test_another_kind_of_socket() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local,
    ):
        for sock in (tcp, local):
            with pytest.raises(ValueError, match="a UDP socket of IPv4 or IPv6"):
                rtap.open_udp(sock=sock)


def test_drops_of_before_are_not_the_devices(ns: NetNS) -> None:
    with plain(ns) as mine, plain(ns) as peer:
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 5000)
        for _ in range(50):
            peer.sendto(bytes(1000), mine.getsockname())
        with rtap.open_udp(sock=mine) as dev:
            assert dev.stats().imissed == 0


def test_an_address_in_use(ns: NetNS, dev: EthDev) -> None:
    for queues in (1, 2):
        with pytest.raises(OSError, match="in use") as caught:
            rtap.open_udp((HERE, PORT), netns=ns, queues=queues)
        assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError, match="net_udp9: another program has that address"):
        ns.call(rtap.probe, f"net_udp9,local={HERE}:{PORT}")
    dev.close()
    with rtap.open_udp((HERE, PORT), netns=ns, queues=2) as two:
        two.stop()
        two.configure(1, 1)
        two.configure(3, 3)


def test_queues(ns: NetNS) -> None:
    """Each sender's datagrams come on one queue, and all queues send from one address."""
    with rtap.open_udp((HERE, PORT), netns=ns, queues=4, unknown="learn") as dev:
        used = set()
        for _ in range(16):
            with plain(ns) as peer:
                peer.sendto(b"x", (HERE, PORT))
                found: list[int] = []

                def came(found: list[int] = found) -> bool:
                    for q in range(4):
                        for mbuf in dev.rx_burst(q):
                            found.append(q)
                            assert dev.tx_burst((q + 1) % 4, Burst([mbuf])) == 1
                    return bool(found)

                eventually(came, "a datagram on some queue")
                used.update(found)
                assert peer.recvfrom(9) == (b"x", (HERE, PORT))
        assert len(used) > 1


def test_in_a_pool_of_the_callers(ns: NetNS) -> None:
    with (
        Mempool(64, 1000, 300) as pool,
        ns.call(rtap.probe, f"net_udp40,local={HERE}:{PORT}") as dev,
    ):
        dev.configure(1, 1)
        dev.rx_queue_setup(0, 64, pool)
        dev.tx_queue_setup(0, 64)
        dev.start()
        with plain(ns) as peer:
            peer.sendto(b"abc", (HERE, PORT))
            mbuf = take(dev, 1)[0]
            mbuf.prepend(300)[:] = bytes(300)
            assert len(mbuf) == 303
            del mbuf
