# SPDX-License-Identifier: BSD-3-Clause
"""iperf3 between two namespaces with rtap in between: frame sizes, and no losses."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import clients
import pytest
from rigs import Wire, iproute, wire, write_in, wrong_checksums

import rtap
from rtap import EthDev, NetNS, RxOffload, TxOffload

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("iperf3") is None, reason="needs iperf3"),
]

LRO = RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM | RxOffload.TCP_LRO | RxOffload.UDP_LRO
TSO = TxOffload.TCP_CKSUM | TxOffload.UDP_CKSUM | TxOffload.TCP_TSO | TxOffload.UDP_TSO
SIZE = 64 << 20
DATAGRAMS = 3000


def transfer(w: Wire, address: str, size: int = SIZE) -> None:
    """Sends that many bytes over TCP from left to right; all must arrive."""
    clients.at_any_speed(w)
    end, _ = clients.iperf3(w.left, w.right, address, "-n", str(size))
    assert end["sum_sent"]["bytes"] >= size
    # The server stops counting once the client has written all.
    assert end["sum_received"]["bytes"] >= size - clients.ON_ITS_WAY


@contextmanager
def forwarded(**options: Any) -> Iterator[Wire]:
    """A wire with a worker between its devices, and room for a whole window of frames."""
    with wire(a=options, b=options) as w:
        for ns, dev in ((w.left, w.a), (w.right, w.b)):
            iproute(ns, f"link set dev {dev.ifname} txqueuelen 20000")
        worker = rtap.Worker()
        worker.forward((w.a, 0), (w.b, 0), on_full="retry")
        worker.forward((w.b, 0), (w.a, 0), on_full="retry")
        with worker:
            yield w


def received_ect0(ns: NetNS) -> int:
    """The number of ECN-capable packets that the namespace has received."""
    v6 = dict(line.split() for line in clients.proc_net(ns, "snmp6").splitlines())
    return clients.netstat(ns)["IpExtInECT0Pkts"] + int(v6["Ip6InECT0Pkts"])


CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "ipv4": ("10.9.0.2", False, {}),
    "ipv6": ("fd09::2", False, {}),
    "ipv4-ecn": ("10.9.0.2", True, {}),
    "ipv6-ecn": ("fd09::2", True, {}),
    "scatter": ("10.9.0.2", False, {"data_room": 2048}),
}


@pytest.mark.parametrize("case", CASES)
def test_tcp_super_frames_stay_whole(engine: str, case: str) -> None:
    address, ecn, options = CASES[case]
    scatter = RxOffload.SCATTER if options else RxOffload(0)
    options |= {"rx_offloads": LRO | scatter, "tx_offloads": TSO | TxOffload.MULTI_SEGS}
    with forwarded(engine=engine, nb_mbufs=32768 if scatter else 1024, **options) as w:
        if ":" in address:
            clients.six(w)
        for ns in (w.left, w.right):
            write_in(ns, "/proc/sys/net/ipv4/tcp_ecn", "1" if ecn else "0")
        transfer(w, address)
        clients.assert_nothing_lost(w)
        came, left = w.a.xstats(), w.b.xstats()
        # Nearly all data came and left in super-frames, far longer than the MTU.
        whole = came["rx_q0_lro_packets"]
        assert w.a.stats().ibytes / w.a.stats().ipackets > 5 * 1500
        assert came["rx_q0_size_above_1518_packets"] <= whole
        assert left["tx_q0_tso_packets"] == whole > SIZE / 65536 * 0.9
        assert left["tx_q0_checksum_offload"] == came["rx_q0_checksum_none"] >= whole
        assert left["tx_q0_software_gso_packets"] == 0
        assert (received_ect0(w.right) > whole / 2) is ecn


def test_udp_with_checksums_left_undone(engine: str) -> None:
    with forwarded(engine=engine, nb_mbufs=1024, rx_offloads=LRO, tx_offloads=TSO) as w:
        options = ("-u", "-b", "200M", "-l", "1400", "-n", str(DATAGRAMS * 1400))
        clients.iperf3(w.left, w.right, "10.9.0.2", *options)
        # The client's end message takes the same way, after all frames.
        clients.assert_nothing_lost(w)
        assert w.a.stats().ipackets >= DATAGRAMS
        assert w.a.xstats()["rx_q0_checksum_none"] >= DATAGRAMS
        received = clients.snmp(w.right)
        assert received["IpInDelivers"] >= DATAGRAMS
        assert received["UdpInCsumErrors"] == 0


class Watched:
    """Two Python threads that forward between the devices and inspect the frames."""

    def __init__(self, a: EthDev, b: EthDev) -> None:
        self.stop = threading.Event()
        self.longest = 0
        self.flags = 0
        self.samples: list[bytes] = []
        self.threads = [threading.Thread(target=self.run, args=pair) for pair in ((a, b), (b, a))]
        for thread in self.threads:
            thread.start()

    def run(self, source: EthDev, target: EthDev) -> None:
        seen = 0
        while not self.stop.is_set():
            burst = source.rx_burst(0, 64, 0.05)
            for mbuf in burst:
                self.longest = max(self.longest, mbuf.pkt_len)
                self.flags |= mbuf.ol_flags
                seen += 1
                if seen < 50 or seen % 100 == 0:
                    self.samples.append(bytes(mbuf))
                mbuf.free()
            while len(burst) and not self.stop.is_set():
                target.tx_burst(0, burst)

    def close(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.parametrize("version", [4, 6])
def test_without_offloads_frames_are_plain(engine: str, version: int) -> None:
    """Frames are within the MTU, have finished checksums, and carry no offload flags."""
    with wire(a={"engine": engine}, b={"engine": engine}) as w:
        if version == 6:
            clients.six(w)
        assert not w.a.info().vnet_hdr
        watched = Watched(w.a, w.b)
        try:
            transfer(w, "10.9.0.2" if version == 4 else "fd09::2", 8 << 20)
        finally:
            watched.close()
        assert watched.longest == 1514
        assert watched.flags == 0
        tcp = [
            f for f in watched.samples if f[12:14] == (b"\x08\x00" if version == 4 else b"\x86\xdd")
        ]
        tcp = [f for f in tcp if f[23 if version == 4 else 20] == 6]
        assert len(tcp) > 100
        assert [wrong_checksums(f) for f in tcp] == [[]] * len(tcp)
