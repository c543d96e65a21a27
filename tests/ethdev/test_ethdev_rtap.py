# SPDX-License-Identifier: BSD-3-Clause
"""States and arguments that depend on the kernel: net_rtap behind the generic layer."""

from __future__ import annotations

import errno
import fcntl
import gc
import re
import threading
from typing import Any

import pytest
from fakes import STOPPED, bring
from support import (
    PacketSocket,
    eventually,
    frame,
    ip,
    link,
    links,
    none_left,
    open_fds,
    python,
    settle,
)
from this_kernel import no_uso
from together import in_threads

import rtap
from rtap import Burst, DeviceStateError, EthConf, EthDev, Mempool, NetNS, RxOffload, TxOffload
from rtap.control import tun
from rtap.control.tun import TunFeature

# ---- a real device


def test_real_states(netns: NetNS, engine: str) -> None:
    conf = EthConf(engine=engine)
    with Mempool(512) as pool, netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        assert (dev.state, links(netns)) == ("unconfigured", ["lo", "t0"])
        dev.configure(2, 2, conf)
        assert dev.info().engine == engine
        for q in range(2):
            dev.rx_queue_setup(q, 64, pool)
            dev.tx_queue_setup(q, 64)
        with pytest.raises(DeviceStateError, match="not started"):
            dev.rx_burst(0)
        with pytest.raises(DeviceStateError, match="not started"):
            dev.send(frame())
        for n in range(1, 4):
            dev.start()
            assert dev.link().link_status
            assert dev.send(frame(), queue=1)
            assert dev.tx_burst(0, pool.alloc_burst(3, frame())) == 3
            assert dev.stats().q_opackets == [3 * n, n]
            assert dev.rx_burst(1) is not None
            dev.stop()
            assert not dev.link().link_status
            for call in (
                lambda: dev.rx_burst(0),
                lambda: dev.tx_burst(0, Burst()),
                lambda: dev.recv(0),
                lambda: dev.send(frame()),
            ):
                with pytest.raises(DeviceStateError, match="not started"):
                    call()
        assert settle(pool) == 0
        dev.configure(1, 1, conf)
        assert dev.info().nb_rx_queues == 1
        dev.rx_queue_setup(0, 1, pool)
        dev.tx_queue_setup(0, 1)
        dev.start()
        assert dev.send(frame())
        assert dev.stats().q_opackets == [1]
    assert links(netns) == ["lo"]


@pytest.mark.root
def test_a_refused_set_up_leaves_the_queue(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine) as dev, Mempool(16, data_room=64) as small:
        dev.stop()
        with pytest.raises(ValueError, match="data_room of at least 1523"):
            dev.rx_queue_setup(0, 64, small)
        dev.start()
        with PacketSocket(netns, "t0") as peer:
            peer.send(frame(1))
            assert dev.recv(5) == frame(1)
            dev.stop()
            dev.rx_queue_setup(0, 64, dev.pool)
            dev.tx_queue_setup(0, 64)
            dev.start()
            peer.send(frame(2))
            assert dev.recv(5) == frame(2)
            assert dev.send(frame(3))
            assert frame(3) in peer.drain()


def queues(ns: NetNS, ifname: str) -> int:
    found: int = link(ns, ifname)["linkinfo"]["info_data"]["numqueues"]
    return found


def test_queues_taken_away_and_added(netns: NetNS, engine: str) -> None:
    before = open_fds()
    with Mempool(2048) as pool, netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        ip(netns, "addr", "add", "10.0.0.1/24", "dev", "t0")
        for n in (4, 2, 6, 1, 128, 3):
            dev.configure(n, n, EthConf(engine=engine))
            for q in range(n):
                dev.rx_queue_setup(q, 64, pool)
                dev.tx_queue_setup(q, 64)
            dev.start()
            assert queues(netns, "t0") == n == dev.info().nb_rx_queues
            for q in range(n):
                assert dev.tx_burst(q, pool.alloc_burst(2, frame(q))) == 2
                assert len(dev.rx_burst(q)) == 0
            stats = dev.stats()
            assert stats.q_opackets == [2] * n
            assert stats.opackets == 2 * n
            assert len(stats.q_ipackets) == len(stats.q_errors) == n
            dev.stop()
        assert "10.0.0.1" in ip(netns, "addr", "show", "dev", "t0")
    gc.collect()
    # The ring of this thread stays for the next device.
    none_left(before, but=1)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((1, 2), "nb_rx_queues and nb_tx_queues must be equal, got 1 and 2"),
        ((128, 127), "got 128 and 127"),
        ((129, 129), "nb_rx_queues must be 1 to 128, got 129"),
        ((128, 129), "nb_tx_queues must be 1 to 128, got 129"),
        ((0, 0), "nb_rx_queues must be 1 to 128, got 0"),
    ],
)
def test_real_queue_counts_refused(netns: NetNS, counts: tuple[int, int], says: str) -> None:
    with Mempool(64) as pool, netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        bring(dev, STOPPED, pool)
        with pytest.raises(ValueError, match=re.escape(says)):
            dev.configure(*counts)
        assert dev.state == "stopped"
        assert queues(netns, "t0") == 1
        dev.start()
        assert dev.send(frame())


@pytest.mark.parametrize(
    ("offloads", "says"),
    [
        (RxOffload.VLAN_STRIP, "cannot do VLAN_STRIP"),
        (RxOffload.CHECKSUM | RxOffload.RSS_HASH | RxOffload.KEEP_CRC, "KEEP_CRC, RSS_HASH"),
        (RxOffload(1 << 50), hex(1 << 50)),
        (RxOffload.TCP_LRO, "TCP_LRO needs TCP_CKSUM too"),
        (RxOffload.TCP_LRO | RxOffload.UDP_CKSUM, "TCP_LRO needs TCP_CKSUM too"),
        (RxOffload.UDP_LRO | RxOffload.TCP_CKSUM, "UDP_LRO needs UDP_CKSUM too"),
    ],
)
def test_real_rx_offloads_refused(netns: NetNS, offloads: RxOffload, says: str) -> None:
    with netns.call(rtap.probe, "net_rtap0,iface=t0") as dev:
        with pytest.raises(ValueError, match=says):
            dev.configure(1, 1, EthConf(rx_offloads=offloads))
        assert dev.state == "unconfigured"
    with pytest.raises(ValueError, match=says):
        rtap.open("t0", netns=netns, rx_offloads=offloads)
    assert links(netns) == ["lo"]


@pytest.mark.parametrize(
    ("offloads", "says"),
    [
        (TxOffload.SCTP_CKSUM, "tx_offloads: this device cannot do SCTP_CKSUM"),
        (TxOffload.TCP_TSO | TxOffload.VXLAN_TNL_TSO, "cannot do VXLAN_TNL_TSO"),
        (TxOffload(1 << 60), hex(1 << 60)),
    ],
)
def test_real_tx_offloads_refused(netns: NetNS, offloads: TxOffload, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rtap.open("t0", netns=netns, tx_offloads=offloads)
    assert links(netns) == ["lo"]


def test_everything_it_says_it_can_do_it_does(netns: NetNS) -> None:
    with rtap.open("t0", netns=netns) as dev:
        info = dev.info()
    with rtap.open(
        "t0", netns=netns, rx_offloads=info.rx_offload_capa, tx_offloads=info.tx_offload_capa
    ) as dev:
        assert dev.info().rx_offloads == info.rx_offload_capa & ~lacking()
        assert dev.info().tx_offloads == info.tx_offload_capa
        assert dev.send(frame())


def lacking() -> RxOffload:
    """The receive offloads that this kernel does not have."""
    return RxOffload.UDP_LRO if no_uso() else RxOffload(0)


@pytest.mark.parametrize("old", [False, True], ids=["this kernel", "an older one"])
def test_what_the_kernel_lacks_is_named(
    netns: NetNS, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, old: bool
) -> None:
    ioctl = fcntl.ioctl

    def without_uso(fd: int, request: int, *args: Any) -> Any:
        if request == tun.TUNSETOFFLOAD and args[0] & (TunFeature.USO4 | TunFeature.USO6):
            raise OSError(errno.EINVAL, "Invalid argument")
        return ioctl(fd, request, *args)

    lacked = lacking()
    if old:
        monkeypatch.setattr(fcntl, "ioctl", without_uso)
        lacked = RxOffload.UDP_LRO
    asked = RxOffload.CHECKSUM | RxOffload.TCP_LRO | RxOffload.UDP_LRO
    with rtap.open("t0", netns=netns, rx_offloads=asked) as dev:
        dev.stop()
        for _ in range(2):
            info = dev.info()
            assert (info.rx_offloads, info.rx_offloads_refused) == (asked & ~lacked, lacked)
            dev.configure(1, 1, EthConf(rx_offloads=asked))
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        warning = "t0: this kernel does not have UDP_LRO (rx_offloads), it is off"
        assert said == ([warning] if lacked else [])
        dev.configure(1, 1, EthConf(rx_offloads=asked & ~RxOffload.UDP_LRO))
        assert dev.info().rx_offloads_refused == 0


@pytest.mark.parametrize(
    ("mtu", "offloads", "room"),
    [
        (1500, 0, 1500 + 22 + 1),
        (9000, 0, 9000 + 22 + 1),
        (68, 0, 68 + 22 + 1),
        (1500, int(RxOffload.TCP_CKSUM | RxOffload.TCP_LRO), 65535 + 40 + 22 + 1),
    ],
)
def test_data_room_names_what_it_has_to_be(
    netns: NetNS, mtu: int, offloads: int, room: int
) -> None:
    conf = EthConf(rx_offloads=RxOffload(offloads), mtu=mtu)
    with (
        Mempool(8, room) as enough,
        Mempool(8, room - 1) as short,
        netns.call(rtap.probe, "net_rtap0,iface=t0") as dev,
    ):
        dev.configure(1, 1, conf)
        with pytest.raises(
            ValueError, match=rf"data_room of at least {room}, the pool's is {room - 1}"
        ):
            dev.rx_queue_setup(0, 64, short)
        dev.rx_queue_setup(0, 64, enough)
        assert dev.pool is enough
        dev.configure(1, 1, EthConf(conf.rx_offloads | RxOffload.SCATTER, mtu=mtu))
        dev.rx_queue_setup(0, 64, short)


def test_mtu_that_the_buffers_cannot_take(netns: NetNS, engine: str) -> None:
    with rtap.open("t0", netns=netns, engine=engine, queues=2, data_room=2048) as dev:
        with pytest.raises(ValueError, match=r"MTU of 9000 needs .* at least 9023, .* is 2048"):
            dev.mtu = 9000
        assert dev.mtu == link(netns, "t0")["mtu"] == 1500
        dev.mtu = 2048 - 22 - 1
        assert link(netns, "t0")["mtu"] == 2025
        with pytest.raises(ValueError, match="2049"):
            dev.mtu = 2026
    with rtap.open("t0", netns=netns, mtu=9000) as dev:
        assert (dev.mtu, dev.pool.data_room) == (9000, 9023)
        for mtu in (68, 1500, 9000):
            dev.mtu = mtu
            assert link(netns, "t0")["mtu"] == mtu
    for mtu, scatter in ((65521, 0), (65521, int(RxOffload.SCATTER))):
        with rtap.open("t0", netns=netns, mtu=mtu, rx_offloads=scatter) as dev:
            assert dev.mtu == mtu
            assert dev.pool.data_room == (2048 if scatter else 65521 + 23)


@pytest.mark.parametrize("mtu", [67, 65522, 0, -5])
def test_mtu_limits(netns: NetNS, mtu: int) -> None:
    with pytest.raises(ValueError, match=f"mtu must be 68 to 65521, got {mtu}"):
        rtap.open("t0", netns=netns, mtu=mtu)
    assert links(netns) == ["lo"]
    with rtap.open("t0", netns=netns) as dev, pytest.raises(ValueError, match="68 to 65521"):
        dev.mtu = mtu


def test_mac(netns: NetNS) -> None:
    with rtap.open("t0", netns=netns, mac="02-00-00-00-00-33") as dev:
        assert dev.mac == link(netns, "t0")["address"] == "02:00:00:00:00:33"
        assert dev.app_mac == "82:00:00:00:00:33"
        dev.mac = bytes.fromhex("02000000ff01")
        assert link(netns, "t0")["address"] == "02:00:00:00:ff:01"
        ip(netns, "link", "set", "dev", "t0", "address", "02:00:00:00:00:44")
        assert dev.mac == dev.info().mac == "02:00:00:00:00:44"


# ---- stopping


def test_stop_ends_waits_in_other_threads(netns: NetNS, engine: str) -> None:
    ends: list[BaseException] = []
    with rtap.open("t0", netns=netns, engine=engine, queues=2) as dev:

        def wait(queue: int) -> None:
            try:
                dev.rx_burst(queue, 64, None)
            except BaseException as exc:  # noqa: BLE001 - checked below
                ends.append(exc)

        for end in (dev.stop, dev.close):
            ends.clear()
            threads = [threading.Thread(target=wait, args=(q,)) for q in range(2)]
            for thread in threads:
                thread.start()
            for q in range(2):
                eventually(lambda q=q: busy(dev, q), "the other thread waits")  # type: ignore[misc]
            end()
            for thread in threads:
                thread.join(10)
                assert not thread.is_alive()
            assert [type(exc) for exc in ends] == [DeviceStateError] * 2
            if dev.state == "stopped":
                dev.start()


def busy(dev: EthDev, queue: int) -> bool:
    try:
        dev.rx_burst(queue)
    except DeviceStateError as exc:
        return "in use by another thread" in str(exc)
    return False


def test_control_from_many_threads(netns: NetNS) -> None:
    with rtap.open("t0", netns=netns) as dev:

        def work(n: int) -> None:
            for i in range(15):
                dev.mtu = 1400 + n
                dev.link(), dev.stats(), dev.info()
                dev.set_link_down() if i % 2 else dev.set_link_up()
                if n == 0:
                    dev.stop()
                    dev.start()

        in_threads(work, 6)
        assert 1400 <= dev.mtu < 1406
    assert links(netns) == ["lo"]


# ---- after fork


def test_a_forked_child_cannot_use_the_device_but_can_open_its_own(netns: NetNS) -> None:
    done = python(
        """
        import os, sys, traceback, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        import rtap
        dev = rtap.open("t0", netns=sys.argv[1])
        read, write = os.pipe()
        again, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                said = []
                for call in (
                    lambda: dev.rx_burst(0), lambda: dev.send(bytes(60)), lambda: dev.mtu,
                    lambda: dev.info(), lambda: dev.stats(), lambda: dev.stop(),
                    lambda: dev.configure(1, 1), lambda: dev.__enter__(),
                ):
                    try:
                        call()
                        said.append("nothing")
                    except rtap.DeviceStateError as exc:
                        said.append("ok" if "fork" in str(exc) else str(exc))
                dev.close()
                assert rtap.devices() == []
                assert repr(dev).endswith("inherited>"), repr(dev)
                with rtap.NetNS() as ns, rtap.open("t0", netns=ns) as own:
                    assert own.name == "net_rtap0"
                    assert own.send(bytes(60))
                    own.rx_burst(0)
                os.write(write, " ".join(said).encode())
                os.read(again, 1)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(write)
        print(os.read(read, 999).decode())
        assert dev.send(bytes(60)) and dev.stats().opackets == 1
        dev.close()                     # while the child lives
        with rtap.NetNS.from_name(sys.argv[1]) as ns:
            print(ns.run(["ip", "-br", "link"], capture_output=True, text=True).stdout.split()[::4])
        os.write(go, b"x")
        print(os.waitpid(pid, 0)[1])
        """,
        netns.path,
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.split() == ["ok"] * 8
    assert rest == ["['lo']", "0"]
    assert done.stderr == ""
