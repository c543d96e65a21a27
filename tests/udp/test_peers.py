# SPDX-License-Identifier: BSD-3-Clause
"""The table of peers: numbers for addresses. Needs no root."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap._udp.peers import Peers

V4, V6 = int(socket.AF_INET), int(socket.AF_INET6)


def test_numbers() -> None:
    peers = Peers(V4, 4)
    assert peers.add(("10.0.0.1", 5)) == 1
    assert peers.add(("10.0.0.2", 5)) == 2
    assert peers.add(("10.0.0.1", 6)) == 3
    assert peers.add(("10.0.0.1", 5)) == 1
    assert (len(peers), list(peers), peers.size) == (3, [1, 2, 3], 4)
    assert peers[2] == ("10.0.0.2", 5)
    assert peers.find(("10.0.0.1", 6)) == 3
    assert peers.find(("10.0.0.9", 6)) is None
    assert 2 in peers
    del peers[2]
    assert 2 not in peers
    assert peers.find(("10.0.0.2", 5)) is None
    assert peers.add(("10.0.0.7", 7)) == 2
    assert peers.add(("10.0.0.8", 7)) == 4
    with pytest.raises(OSError, match="the table of peers is full: it has 4"):
        peers.add(("10.0.0.9", 7))
    assert peers.items() == [
        (1, ("10.0.0.1", 5)),
        (2, ("10.0.0.7", 7)),
        (3, ("10.0.0.1", 6)),
        (4, ("10.0.0.8", 7)),
    ]
    assert repr(peers) == "<Peers 4 of 4>"
    assert peers.unknown() == []


def test_a_peer_moves() -> None:
    """Its new address had a number for a moment."""
    peers = Peers(V4)
    old, new = peers.add(("10.0.0.1", 5)), peers.add(("10.0.0.2", 9))
    peers[old] = peers[new]
    assert peers.items() == [(old, ("10.0.0.2", 9))]
    peers[old] = ("10.0.0.2", 9)
    peers[7] = ("10.0.0.3", 1)
    assert peers.find(("10.0.0.3", 1)) == 7
    assert peers.add(("10.0.0.4", 1)) == 2


def test_both_families() -> None:
    peers = Peers(V6)
    assert peers.add(("fd00::1", 5)) == 1
    assert peers.add(("10.0.0.1", 5)) == 2
    assert peers.add(("fe80::1%7", 5)) == 3
    assert peers.add(("fe80::1%8", 5)) == 4
    assert peers.items() == [
        (1, ("fd00::1", 5)),
        (2, ("10.0.0.1", 5)),
        (3, ("fe80::1%7", 5)),
        (4, ("fe80::1%8", 5)),
    ]
    assert peers.find(("::ffff:10.0.0.1", 5)) == 2


@pytest.mark.parametrize(
    ("address", "error", "text"),
    [
        (("10.0.0.1", 0), ValueError, "1 to 65535, got 0"),
        (("10.0.0.1", 65536), ValueError, "1 to 65535"),
        (("10.0.0", 5), ValueError, "'10.0.0'"),
        (("fd00::1", 5), ValueError, "the socket is of IPv4"),
        ("10.0.0.1:5", TypeError, "tuple of host and port"),
        (5, TypeError, "tuple of host and port"),
        (("10.0.0.1", True), TypeError, "tuple of host and port"),
        ((b"10.0.0.1", 5), TypeError, "tuple of host and port"),
        ((), TypeError, "tuple of host and port"),
    ],
)
def test_wrong_addresses(address: Any, error: type[Exception], text: str) -> None:
    peers = Peers(V4)
    for use in (peers.add, peers.find, lambda a: peers.__setitem__(1, a)):
        with pytest.raises(error, match=text):
            use(address)
    assert len(peers) == 0


class Liar(int):
    """A number that claims to be in any range."""

    def __ge__(self, other: object) -> bool:
        return True

    __le__ = __gt__ = __lt__ = __ge__


@pytest.mark.parametrize("number", [0, -1, 5, 1 << 70])
def test_wrong_numbers(number: int) -> None:
    peers = Peers(V4, 4)
    for use in (peers.__getitem__, peers.__delitem__):
        with pytest.raises(KeyError):
            use(number)
    with pytest.raises(KeyError):
        peers[number] = ("10.0.0.1", 5)
    assert number not in peers
    with pytest.raises(KeyError):
        peers[Liar(5)]
    with pytest.raises(ValueError, match="1 to 65535"):
        peers.add(("10.0.0.1", Liar(70000)))
    with pytest.raises(TypeError):
        peers["1"]  # type: ignore[index]
    assert "1" not in peers


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1,), "AF_INET or AF_INET6"),
        ((V4, 0), "peers must be 1..65535"),
        ((V4, 65536), "peers must be 1..65535"),
        ((V4, 4, "x"), "learn, deliver or drop"),
    ],
)
def test_wrong_tables(arguments: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Peers(*arguments)


ADDRESSES = st.tuples(st.sampled_from([f"10.0.0.{n}" for n in range(1, 9)]), st.integers(1, 4))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), ADDRESSES),
        st.tuples(st.just("set"), st.integers(1, 8), ADDRESSES),
        st.tuples(st.just("del"), st.integers(1, 8)),
    ),
    max_size=60,
)


@given(STEPS)
def test_as_a_dict(steps: list[Any]) -> None:
    peers, model = Peers(V4, 8), dict[int, tuple[str, int]]()

    def number_of(address: tuple[str, int]) -> int | None:
        return next((n for n, a in model.items() if a == address), None)

    for step in steps:
        if step[0] == "add":
            free = next((n for n in range(1, 9) if n not in model), None)
            number = number_of(step[1]) or free
            if number is None:
                with pytest.raises(OSError, match="full"):
                    peers.add(step[1])
            else:
                assert peers.add(step[1]) == number
                model[number] = step[1]
        elif step[0] == "set":
            other = number_of(step[2])
            if other is not None:
                del model[other]
            peers[step[1]] = step[2]
            model[step[1]] = step[2]
        elif step[1] in model:
            del peers[step[1]], model[step[1]]
        else:
            with pytest.raises(KeyError):
                del peers[step[1]]
        assert dict(peers.items()) == model
        assert len(peers) == len(model)
        assert [peers.find(a) for a in model.values()] == list(model)
