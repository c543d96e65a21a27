# SPDX-License-Identifier: BSD-3-Clause
"""MacAddr: what it accepts and refuses, and the address of the wire's other end."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap import MacAddr, Mempool

RAW = bytes.fromhex("02aabbccddee")
TEXT = "02:aa:bb:cc:dd:ee"


@pytest.mark.parametrize(
    "value",
    [
        TEXT,
        "02:AA:BB:cc:dd:EE",
        "02-aa-bb-cc-dd-ee",
        "02aabbccddee",
        RAW,
        bytearray(RAW),
        memoryview(RAW),
        MacAddr(TEXT),
    ],
)
def test_every_form(value: str | bytes) -> None:
    mac = MacAddr(value)
    assert mac == TEXT
    assert isinstance(mac, str)
    assert bytes(mac) == mac.packed == RAW
    assert {mac: 1}[TEXT] == 1  # type: ignore[index]
    assert pickle.loads(pickle.dumps(mac)) == mac
    assert type(pickle.loads(pickle.dumps(mac))) is MacAddr


def test_bytes_of_frames_and_addresses_mix() -> None:
    """They compare in both orders, and an address can be written to a frame."""
    mac, other = MacAddr(RAW), MacAddr(RAW).peer()
    with Mempool(2) as pool:
        mbuf = pool.alloc(bytes(12) + b"tail")
        mbuf[0:6] = mac
        mbuf[6:12] = other
        assert bytes(mbuf) == RAW + other.packed + b"tail"
        assert mbuf[0:6] == mac
        assert mac == mbuf[0:6]
        assert (mbuf[0:6] != mac, mac != mbuf[0:6]) == (False, False)
        assert mbuf[6:12] != mac
        assert mac != mbuf[6:12]
        assert mbuf.data[0:6] == mac
        assert bytes(pool.alloc(mac)) == RAW
        with pytest.raises(ValueError, match="cannot put 6 bytes into 5"):
            mbuf[0:5] = mac
        with pytest.raises(TypeError):
            mbuf[0:6] = str(mac)
        assert mbuf[0:6] == RAW
        mbuf.free()
    assert bytearray(RAW) == mac
    assert mac == memoryview(RAW)
    assert mac != RAW + b"x"
    assert mac not in (RAW[:5], b"", None, 6, TEXT.encode(), TEXT.upper())
    assert hash(mac) == hash(TEXT)
    assert mac in {TEXT}
    assert MacAddr(RAW) in {mac: 1}


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ("", ValueError, "''"),
        ("02:aa:bb:cc:dd", ValueError, "02:aa:bb:cc:dd"),
        ("02:aa:bb:cc:dd:ee:ff", ValueError, "ee:ff"),
        ("02:aa-bb:cc-dd:ee", ValueError, "02:aa-bb"),
        ("2:aa:bb:cc:dd:ee", ValueError, "'2:aa"),
        ("02:aa:bb:cc:dd:eg", ValueError, "eg"),
        (" 02:aa:bb:cc:dd:ee", ValueError, "' 02"),
        ("02:aa:bb:cc:dd:ee\n", ValueError, "ee"),
        (b"", ValueError, "got 0"),
        (b"12345", ValueError, "got 5"),
        (b"1234567", ValueError, "got 7"),
        (0x02AABBCCDDEE, TypeError, "int"),
        (None, TypeError, "NoneType"),
    ],
)
def test_refusals(value: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        MacAddr(value)


@pytest.mark.parametrize(
    ("mac", "multicast", "local"),
    [
        ("00:00:00:00:00:01", False, False),
        ("02:00:00:00:00:01", False, True),
        ("01:00:5e:00:00:01", True, False),
        ("ff:ff:ff:ff:ff:ff", True, True),
    ],
)
def test_kinds(mac: str, multicast: bool, local: bool) -> None:
    assert MacAddr(mac).is_multicast is multicast
    assert MacAddr(mac).is_local is local


@given(st.binary(min_size=6, max_size=6).filter(lambda raw: not raw[0] & 1))
def test_peer_differs_is_unicast_and_local(raw: bytes) -> None:
    mac = MacAddr(raw)
    peer = mac.peer()
    assert peer != mac
    assert not peer.is_multicast
    assert peer.is_local
    assert peer == mac.peer()
    assert peer.packed[1:] == raw[1:]


def test_peers_of_numbered_devices_never_meet() -> None:
    macs = [MacAddr(b"\x02" + n.to_bytes(5, "big")) for n in range(300)]
    everybody = {*macs, *(mac.peer() for mac in macs)}
    assert len(everybody) == 600
