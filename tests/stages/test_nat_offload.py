# SPDX-License-Identifier: BSD-3-Clause
"""Addresses rewritten in frames whose checksums the kernel has left unfinished."""

from __future__ import annotations

import hashlib
import socket
import threading
from typing import Any

import pytest
from rigs import MAC_B, wire
from support import ip

from rtap import Burst, RxOffload, TxOffload, Worker, offload, stages

pytestmark = pytest.mark.root

OFFLOADS: dict[str, Any] = {
    "rx_offloads": RxOffload.TCP_CKSUM | RxOffload.TCP_LRO,
    "tx_offloads": TxOffload.TCP_CKSUM | TxOffload.TCP_TSO,
}
CLIENT, SERVER, PUBLIC = (socket.inet_aton(f"10.9.0.{n}") for n in (1, 2, 3))


def rewritten(at: int, old: bytes, new: bytes, fill: bool) -> Any:
    def nat(burst: Burst) -> None:
        for mbuf in burst:
            if mbuf[12:14] == b"\x08\x00" and mbuf[at : at + 4] == old:
                mbuf[at : at + 4] = new
        if fill:
            offload.fill_burst(burst)

    return nat


@pytest.mark.parametrize("by", ["ChecksumFill", "fill_burst"])
def test_a_connection_through_nat(engine: str, by: str) -> None:
    """A connection to an address without a host works: frames, super-frames and answers arrive."""
    options = {"engine": engine, "nb_mbufs": 1024, **OFFLOADS}
    data = hashlib.shake_128(b"nat").digest(1 << 20)
    after = [stages.ChecksumFill()] if by == "ChecksumFill" else []
    with wire(a=options, b=options) as w:
        ip(w.left, "neigh", "add", "10.9.0.3", "lladdr", MAC_B, "dev", "a0")
        worker = Worker()
        for source, target, at, old, new in (
            (w.a, w.b, 30, PUBLIC, SERVER),
            (w.b, w.a, 26, SERVER, PUBLIC),
        ):
            worker.forward(
                (source, 0),
                (target, 0),
                stages=[rewritten(at, old, new, not after), *after],
                on_full="retry",
            )
        with worker, w.right.call(socket.create_server, ("10.9.0.2", 0)) as server:
            server.settimeout(10)
            port = server.getsockname()[1]
            client = w.left.call(socket.create_connection, ("10.9.0.3", port), 10)
            connection, peer = server.accept()
            assert peer[0] == "10.9.0.1"
            connection.settimeout(10)

            def push() -> None:
                with client:
                    client.sendall(data)

            thread = threading.Thread(target=push)
            thread.start()
            got = b""
            with connection:
                while piece := connection.recv(1 << 18):
                    got += piece
            thread.join()
        assert got == data
        assert w.a.xstats()["rx_q0_lro_packets"] > 0
        assert w.a.xstats()["rx_q0_checksum_none"] > 0
        assert not any(route.error for route in worker.stats().routes)
