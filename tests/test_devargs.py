# SPDX-License-Identifier: BSD-3-Clause
"""Device arguments: what they mean, and refusals that name the offending piece."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import links

import rtap
from rtap import NetNS
from rtap.devargs import NAME_MAX, DevArgs, parse_devargs


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
        ("net_rtap0,ifce=foo", "'ifce=foo', expected iface=NAME, persist"),
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
        (
            "net_tap0,iface=foo",
            "'net_tap0', its name must start with one of eth_null, eth_rtap, net_null, net_rtap",
        ),
        ("rtap0", "'rtap0'"),
    ],
)
def test_probe_refuses_and_leaves_nothing(netns: NetNS, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        netns.call(rtap.probe, text)
    assert rtap.devices() == []
    assert links(netns) == ["lo"]
    with netns.call(rtap.probe, "net_rtap0,iface=foo0") as dev:  # the name was not used up
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
