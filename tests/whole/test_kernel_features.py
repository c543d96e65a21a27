# SPDX-License-Identifier: BSD-3-Clause
"""The table of docs/kernels.md: what this kernel has and lacks, and what rtap does without it.

On other kernels ``make kernels`` runs these tests.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rigs import Shape, bridged, talk
from support import PacketSocket, Tap, carrier, eventually, frame, link, pattern
from this_kernel import kernel

import rtap
from rtap import Burst, NetNS, RxOffload, TxOffload
from rtap.control import tun

DOCS = Path(__file__).resolve().parents[2] / "docs/kernels.md"


def ring(netns: NetNS) -> bool:
    """`engine="uring"`; without it, "auto" takes system calls, and both say why."""
    refusal = ""
    with rtap.open("t0", netns=netns) as dev:
        auto = dev.info()
    try:
        with rtap.open("t0", netns=netns, engine="uring") as dev:
            assert dev.info().engine == "uring"
    except OSError as exc:
        refusal = str(exc)
    if refusal:
        assert auto.engine == "syscall"
        assert all("need Linux 5.19" in said for said in (refusal, auto.engine_reason))
    return not refusal


def nowait(netns: NetNS) -> bool:
    """RWF_NOWAIT on TAP descriptors; both answers are errors, since no frame is there."""
    with Tap(netns, "t0") as tap:
        os.set_blocking(tap.fd, True)
        with pytest.raises(OSError) as refused:  # noqa: PT011 - the number is looked at
            os.preadv(tap.fd, [bytearray(2048)], 0, os.RWF_NOWAIT)
    assert refused.value.errno in (errno.EAGAIN, errno.EOPNOTSUPP)
    return refused.value.errno == errno.EAGAIN


def uso_received(netns: NetNS) -> bool:
    """`UDP_LRO`; a kernel without it is named in `rx_offloads_refused`."""
    asked = RxOffload.UDP_CKSUM | RxOffload.UDP_LRO
    with rtap.open("t0", netns=netns, rx_offloads=asked) as dev:
        info = dev.info()
        assert info.rx_offloads | info.rx_offloads_refused == asked
        return not info.rx_offloads_refused & RxOffload.UDP_LRO


def uso_sent(_: NetNS) -> bool:
    """`UDP_TSO`; where the kernel refuses it, rtap splits and the same frames arrive."""
    shape = Shape(4, "udp")
    payload = pattern(1, 5000)
    wanted = shape.segments(payload, 1400)
    with bridged(a={"tx_offloads": TxOffload.UDP_CKSUM | TxOffload.UDP_TSO}) as bridge:
        mbuf = shape.request(bridge.a.pool.alloc(shape.unfinished(payload)), 1400)
        assert bridge.a.tx_burst(0, Burst([mbuf])) == 1
        assert bridge.arriving(len(wanted)) == wanted
        return not bridge.a.info().tx_offloads_refused & TxOffload.UDP_TSO


def namespace_of_a_descriptor(netns: NetNS) -> bool:
    with Tap(netns, "t0") as tap, tun.device_netns(tap.fd) as found:
        return os.fstat(found.fileno()).st_ino == os.fstat(netns.fd).st_ino


def datagrams_cut(netns: NetNS) -> bool:
    """A datagram with UDP_SEGMENT, to a device without offloads; with UDP_CKSUM it always goes."""
    payload = pattern(1, 3000)
    with rtap.open("t0", netns=netns, rx_offloads=RxOffload.UDP_CKSUM) as dev:
        talk(netns, dev, payload, segment=1000)
        assert len(dev.rx_burst(0, 8, 5)) > 0
    with rtap.open("t0", netns=netns) as dev:
        try:
            talk(netns, dev, payload, segment=1000)
        except OSError as exc:
            refusal = exc.errno
        else:
            return len(dev.rx_burst(0, 8, 5)) > 0
    assert refusal == errno.EIO
    return False


def drops_counted(netns: NetNS) -> bool:
    """Frames of the kernel that find the carrier off."""
    with rtap.open("t0", netns=netns) as dev, PacketSocket(netns, "t0") as sender:
        dev.set_link_down()
        eventually(lambda: link(netns, "t0")["operstate"] == "DOWN", "the queues are closed")
        sender.send(frame(1))
        return dev.xstats()["link_down_drops"] == 1


def carrier_falls(netns: NetNS) -> bool:
    """A persistent interface whose last descriptor was closed has no carrier."""
    with Tap(netns, "t0") as tap:
        tun.set_persist(tap.fd, True)
        assert carrier(netns, "t0")
    return not carrier(netns, "t0")


FEATURES: dict[str, tuple[tuple[int, int], Callable[[NetNS], bool]]] = {
    "io_uring for TAP devices": ((5, 19), ring),
    "RWF_NOWAIT on TAP devices": ((6, 4), nowait),
    "UDP super-frames received (`UDP_LRO`)": ((6, 2), uso_received),
    "UDP super-frames sent (`UDP_TSO`)": ((6, 2), uso_sent),
    "datagrams that the kernel cuts (`UDP_SEGMENT`), to a device without checksum offload": (
        (6, 11),
        datagrams_cut,
    ),
    "drops while the link is down are counted (`link_down_drops`)": ((6, 11), drops_counted),
    "the namespace of a descriptor": ((5, 2), namespace_of_a_descriptor),
    "a persistent interface loses its carrier when nobody has it open": ((3, 9), carrier_falls),
}


def rows() -> dict[str, tuple[int, int]]:
    """The features and versions of the page."""
    found = re.findall(r"^\| (.+?) \| (\d+)\.(\d+) \| .+ \|$", DOCS.read_text(), re.MULTILINE)
    return {name: (int(major), int(minor)) for name, major, minor in found}


def test_the_page_has_these_features() -> None:
    assert rows() == {name: since for name, (since, _) in FEATURES.items()}


@pytest.mark.root
@pytest.mark.parametrize("name", FEATURES)
def test_feature(netns: NetNS, name: str) -> None:
    since, has = FEATURES[name]
    assert has(netns) is (kernel() >= since)
