# SPDX-License-Identifier: BSD-3-Clause
"""Device arguments: what they mean, and errors that name the wrong part."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import PacketSocket, frame, links

import rtap
from rtap import Mempool, NetNS
from rtap.ethdev.devargs import NAME_MAX, DevArgs, parse_devargs


@pytest.mark.parametrize(
    ("text", "name", "args"),
    [
        ("net_rtap0", "net_rtap0", {}),
        ("net_rtap0,persist", "net_rtap0", {"persist": None}),
        ("net_rtap0,iface=foo0,persist", "net_rtap0", {"iface": "foo0", "persist": None}),
        ("net_rtap_a.b:c-d,iface=", "net_rtap_a.b:c-d", {"iface": ""}),
        ("x,a=b=c", "x", {"a": "b=c"}),
        ("x,a= b ", "x", {"a": " b "}),
        ("x" * NAME_MAX, "x" * NAME_MAX, {}),
    ],
)
def test_parse(text: str, name: str, args: dict[str, str | None]) -> None:
    assert parse_devargs(text) == DevArgs(name, args)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "''"),
        (",iface=foo", "''"),
        ("net rtap", "'net rtap'"),
        ("net_rtap0 ,persist", "'net_rtap0 '"),
        ("net_rtap0=1", "'net_rtap0=1'"),
        ("x" * (NAME_MAX + 1), "x" * (NAME_MAX + 1)),
        ("net_rtap0,", "key or key=value, got ''"),
        ("net_rtap0,,persist", "got ''"),
        ("net_rtap0,=foo", "'=foo'"),
        ("net_rtap0,persist,persist", "'persist' given more than once"),
        ("net_rtap0,iface=a,iface=b", "'iface=b' given more than once"),
        ("net_rtap0,persist,persist=1", "'persist=1' given more than once"),
    ],
)
def test_parse_refuses(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_devargs(text)


@pytest.mark.parametrize("value", [None, b"net_rtap0", 5])
def test_only_text(value: object) -> None:
    with pytest.raises(TypeError, match=type(value).__name__):
        parse_devargs(value)  # type: ignore[arg-type]


@pytest.mark.fuzz
@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parsed = parse_devargs(text)
    except ValueError:
        return
    pieces = [key if value is None else f"{key}={value}" for key, value in parsed.args.items()]
    assert ",".join([parsed.name, *pieces]) == text


def test_what_is_taken_is_gone() -> None:
    args = parse_devargs("dev0,iface=foo%d,persist,depth=5")
    assert args.take_flag("persist") is True
    assert args.take_flag("persist") is False
    assert args.take_ifname("iface", "x") == "foo%d"
    assert args.take_ifname("iface", "x") == "x"
    assert args.take_str("depth", "1") == "5"
    args.finish(("iface", "persist", "depth"))


# ---- as net_rtap takes them


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("net_rtap0,ifce=foo", "'ifce=foo', expected iface=NAME, persist, owner"),
        ("net_rtap0,iface=foo,remote", "'remote'"),
        ("net_rtap0,iface", "'iface'"),
        ("net_rtap0,iface=", "'iface='"),
        ("net_rtap0,persist=1", "'persist=1'"),
        ("net_rtap0,persist=", "'persist='"),
        ("net_rtap0,iface=a/b", "'iface=a/b'"),
        ("net_rtap0,iface=a b", "'iface=a b'"),
        ("net_rtap0,iface=" + "a" * 16, "'iface=" + "a" * 16 + "'"),
        ("net_rtap0,iface=%s", "'iface=%s'"),
        ("net_rtap0,iface=x%d%d", "'iface=x%d%d'"),
        ("net_rtap0,iface=..", "'iface=..'"),
        ("net_rtap0,owner", "owner needs a value (owner=...), got 'owner'"),
        ("net_rtap0,owner=", "got 'owner='"),
        ("net_rtap0,owner=no such user", "net_rtap0: owner: there is no user 'no such user'"),
        ("net_rtap0,owner=a\0b", "net_rtap0: owner: there is no user 'a\\x00b'"),
        ("net_rtap0,owner=-1", "there is no user '-1'"),
        ("net_rtap0,owner=4294967295", "owner must be None or a name or a number, 0 to 4294967294"),
        ("net_rtap0,group=no-such-group", "net_rtap0: group: there is no group 'no-such-group'"),
        ("net_rtap0,group=4294967295", "group must be"),
        ("net_rtap0,txqueuelen", "got 'txqueuelen'"),
        ("net_rtap0,txqueuelen=0", "txqueuelen must be 1 to 524288, got '0'"),
        ("net_rtap0,txqueuelen=524289", "got '524289'"),
        ("net_rtap0,txqueuelen=1e3", "got '1e3'"),
        ("net_rtap0,sndbuf=0", "sndbuf must be 1 to 2147483647, got '0'"),
        ("net_rtap0,sndbuf=2147483648", "got '2147483648'"),
        ("net_rtap0,fd=", "got 'fd='"),
        ("net_rtap0,fd=-1", "fd must be 0 to 2147483647, got '-1'"),
        ("net_rtap0,fd=1000000", "fd: descriptor 1000000 is not open"),
        ("net_rtap0,iface=foo,fd=0", "iface=foo and fd=0 exclude each other"),
        (
            "net_tap0,iface=foo",
            "'net_tap0', its name must start with one of eth_af_packet, eth_null, eth_rtap, "
            "net_af_packet, net_null, net_rtap",
        ),
        ("rtap0", "'rtap0'"),
    ],
)
def test_probe_refuses_and_leaves_nothing(netns: NetNS, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        netns.call(rtap.probe, text)
    assert rtap.devices() == []
    assert links(netns) == ["lo"]
    with netns.call(rtap.probe, "net_rtap0,iface=foo0") as dev:  # the name is still free
        assert dev.name == "net_rtap0"


@pytest.mark.parametrize(
    ("text", "name", "ifname", "persist"),
    [
        ("net_rtap0", "net_rtap0", "rtap0", False),
        ("net_rtap7,persist,iface=foo0", "net_rtap7", "foo0", True),
        ("eth_rtap0,iface=bar%d", "eth_rtap0", "bar0", False),
        ("net_rtap_left", "net_rtap_left", "rtap0", False),
        ("net_rtap,iface=" + "a" * 15, "net_rtap", "a" * 15, False),
    ],
)
def test_probe(netns: NetNS, text: str, name: str, ifname: str, persist: bool) -> None:
    with netns.call(rtap.probe, text) as dev:
        info = dev.info()
        assert (dev.name, dev.ifname, dev.state) == (name, ifname, "unconfigured")
        assert (info.driver_name, info.persist, info.mode) == ("net_rtap", persist, "tap")
        assert links(netns) == ["lo", ifname]
    assert links(netns) == (["lo", ifname] if persist else ["lo"])


def test_many_devices(netns: NetNS) -> None:
    """Each has its own name, port number and wire, whatever happens to the others."""
    with contextlib.ExitStack() as stack:
        pool = Mempool(512)
        devs = []
        for n in range(32):
            dev = netns.call(rtap.probe, f"net_rtap{n},iface=x{n}")
            devs.append(stack.enter_context(dev))
            dev.configure()
            dev.rx_queue_setup(0, 8, pool)
            dev.tx_queue_setup(0, 8)
            dev.start()
        peers = [stack.enter_context(PacketSocket(netns, f"x{n}")) for n in range(32)]
        assert {dev.name for dev in rtap.devices()} == {f"net_rtap{n}" for n in range(32)}
        assert len({dev.port_id for dev in devs}) == 32
        for step in (1, 2):
            for n in range(0, 32, step):
                assert rtap.device(f"net_rtap{n}") is devs[n]
                assert devs[n].send(frame(n))
                peers[n].send(frame(100 + n))
            for n in range(0, 32, step):
                assert peers[n].frames(1) == [frame(n)]
                assert devs[n].recv(5) == frame(100 + n)
                assert devs[n].stats().ipackets == devs[n].stats().opackets == step
            for n in range(1, 32, 2):
                devs[n].close()
                with pytest.raises(KeyError, match=f"no device 'net_rtap{n}'; open devices: net_"):
                    rtap.device(f"net_rtap{n}")
        # Their names and numbers are free again.
        with netns.call(rtap.probe, "net_rtap31,iface=x1") as again:
            assert again.port_id == devs[1].port_id
    assert links(netns) == ["lo"]
