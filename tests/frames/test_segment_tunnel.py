# SPDX-License-Identifier: BSD-3-Clause
"""Super-frames inside VXLAN and Geneve: their header, their split, what is malformed, and the
kernel's own split beside it (Linux 6.17)."""

from __future__ import annotations

import fcntl
import random
import struct
from collections import Counter
from collections.abc import Iterator

import pytest
import this_kernel
from hypothesis import given
from hypothesis import strategies as st
from oracle import UDP, Maker, Oracle, ones_sum, oracle
from patience import fewer
from support import skip_without_devices

from rtap import offload
from rtap.offload import TunnelVnetHdr, VnetHdr

TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8  # linux/if_tun.h
CSUM, TSO4, TSO6, USO4, USO6, TUNNEL, TUNNEL_CSUM = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
SHAPES = fewer(3000)


def tunnel(maker: Maker) -> tuple[bytes, TunnelVnetHdr, str]:
    """A super-frame of the maker, put into a UDP tunnel."""
    dice: random.Random = maker.dice
    inner = maker.super_frame()
    while len(inner.frame) > 60000:
        inner = maker.super_frame()
    geneve = dice.choice([False, True])
    options = maker.data(4 * dice.choice([0, 1, 5])) if geneve else b""
    tunnel_head = (
        bytes([len(options) // 4, 0]) + b"\x65\x58" + maker.data(3) + b"\0" + options
        if geneve
        else b"\x08\0\0\0" + maker.data(3) + b"\0"
    )
    version, summed = dice.choice([4, 6]), dice.choice([False, True])
    datagram = 8 + len(tunnel_head) + len(inner.frame)
    network, seed = maker.network(version, UDP, datagram)
    ports = struct.pack("!HH", dice.randrange(1024, 65536), 6081 if geneve else 4789)
    udp = ports + struct.pack("!HH", datagram, seed if summed else 0)
    ethertype = b"\x08\x00" if version == 4 else b"\x86\xdd"
    head = inner.frame[:12] + ethertype + network
    l3 = offload.parse(inner.frame).l2_len
    front = len(head) + 8 + len(tunnel_head)
    plain = inner.hdr
    kind = plain.gso_type | (0x20 if version == 4 else 0x40)
    hdr = TunnelVnetHdr(
        plain.flags | (8 if summed else 0),
        kind,
        plain.hdr_len and front + plain.hdr_len,
        plain.gso_size,
        front + plain.csum_start,
        plain.csum_offset,
        len(head),
        front + l3,
    )
    about = f"outer IPv{version}, {'Geneve' if geneve else 'VXLAN'}, sum {summed}"
    return head + udp + tunnel_head + inner.frame, hdr, f"{about}, {hdr}"


@pytest.fixture(scope="module")
def kernel() -> Iterator[Oracle]:
    skip_without_devices()
    if this_kernel.kernel() < (6, 17):
        pytest.skip("tunnel super-frames need Linux 6.17")
    with oracle() as rig:
        fcntl.ioctl(rig.a.fd, TUNSETVNETHDRSZ, struct.pack("i", 24))
        kinds = CSUM | TSO4 | TSO6 | USO4 | USO6 | TUNNEL | TUNNEL_CSUM
        fcntl.ioctl(rig.a.fd, TUNSETOFFLOAD, kinds)
        yield rig


@pytest.mark.root
def test_the_kernel_splits_alike(kernel: Oracle) -> None:
    maker, seen = Maker(31), Counter[str]()
    for _ in range(SHAPES):
        frame, hdr, about = tunnel(maker)
        plain = VnetHdr(hdr.flags, hdr.gso_type & 0x9F, 0, hdr.gso_size)
        hdr = hdr._replace(gso_size=kernel.as_taken(plain).gso_size)
        mine = offload.segment(frame, hdr)
        theirs = kernel.ask(type("Question", (), {"frame": frame, "hdr": hdr})(), len(mine))
        assert mine == theirs, (about, frame[:200].hex())
        seen[about.partition(", Tunnel")[0]] += 1
    assert len(seen) == 8  # outer version, kind of tunnel, with a checksum or without


def test_packed_header() -> None:
    hdr = TunnelVnetHdr(9, 0x21, 104, 1410, 84, 16, 34, 64)
    packed = hdr.pack()
    assert packed == bytes.fromhex("092168008205540010000000000000000000000022004000")
    assert TunnelVnetHdr.unpack(packed + b"frame") == hdr
    with pytest.raises(ValueError, match="24 bytes, got 23"):
        TunnelVnetHdr.unpack(packed[:23])
    with pytest.raises(ValueError, match="inner_nh_offset"):
        TunnelVnetHdr(inner_nh_offset=65536)


def test_malformed() -> None:
    frame, hdr, _ = tunnel(Maker(32))
    other = hdr.gso_type ^ 0x60
    wrong = [
        hdr._replace(gso_type=hdr.gso_type | 0x60),
        hdr._replace(gso_type=other),
        hdr._replace(gso_type=hdr.gso_type & 0x60),
        hdr._replace(gso_type=0),
        hdr._replace(flags=9, gso_type=hdr.gso_type & 0x9F),
        hdr._replace(outer_th_offset=0),
        hdr._replace(outer_th_offset=hdr.outer_th_offset + 1),
        hdr._replace(outer_th_offset=65535),
        hdr._replace(inner_nh_offset=hdr.outer_th_offset + 7),
        hdr._replace(inner_nh_offset=65535),
        hdr._replace(csum_start=hdr.inner_nh_offset),
        hdr._replace(csum_start=65535),
        hdr._replace(gso_size=0),
        hdr._replace(hdr_len=65535),
    ]
    for one in wrong:
        if one.gso_type == 0:
            one = one._replace(flags=9)
        with pytest.raises(ValueError, match=r"gso_|tunnel|offset|csum_|hdr_len|outer"):
            offload.segment(frame, one)
    with pytest.raises(ValueError, match="in a tunnel"):
        offload.complete(frame, hdr)


@given(st.data())
def test_any_header_any_frame(data: st.DataObject) -> None:
    """Nothing but a ValueError, and sums that are right, whatever the header says."""
    frame, hdr, _ = tunnel(Maker(data.draw(st.integers(0, 50))))
    frame = frame[: data.draw(st.integers(0, len(frame)))]
    for name in data.draw(st.lists(st.sampled_from(hdr._fields), max_size=3)):
        top = 255 if name in ("flags", "gso_type") else 65535
        hdr = hdr._replace(**{name: data.draw(st.integers(0, top))})
    try:
        frames = offload.segment(frame, hdr)
    except ValueError:
        return
    if hdr.gso_type & 0x20:
        for one in frames:
            assert ones_sum(one[14 : hdr.outer_th_offset]) == 0xFFFF
