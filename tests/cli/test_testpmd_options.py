# SPDX-License-Identifier: BSD-3-Clause
"""``rtap testpmd``'s options: which are refused, with which message; which port sends where."""

from __future__ import annotations

import argparse

import pytest
from support import eventually

from rtap import MacAddr, RxOffload, TxOffload
from rtap.cli import main
from rtap.cli.testpmd import add_arguments, prepare
from rtap.cli.testpmd.forwarding import Forwarding
from rtap.cli.testpmd.modes import MODES
from rtap.cli.testpmd.options import Options
from rtap.cli.testpmd.ports import forwards_to, open_ports

NULL = "--vdev=net_null0"


def add_arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    add_arguments(parser)
    return parser._actions


def options(*argv: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return Options.of(parser.parse_args([NULL, *argv]))


def test_defaults() -> None:
    got = options()
    assert (got.forward_mode, got.rxq, got.txq, got.burst, got.nb_cores) == ("io", 1, 1, 32, 1)
    assert (got.txpkts, got.port_topology, got.duration) == ([64], "paired", None)
    assert not got.interactive


def test_values() -> None:
    got = options(
        "--rx-offloads=0x1c", "--tx-offloads", "8000", "--txpkts=64,128", "--eth-peer",
        "0,02:00:00:00:00:aa", "--enable-scatter", "--coremask=1", "--mbuf-size=4096", "-a",
    )  # fmt: skip
    assert got.rx_offloads == (
        RxOffload.TCP_CKSUM | RxOffload.UDP_CKSUM | RxOffload.TCP_LRO | RxOffload.SCATTER
    )
    assert got.tx_offloads == TxOffload.MULTI_SEGS
    assert got.txpkts == [64, 128]
    assert got.eth_peers == {0: MacAddr("02:00:00:00:00:aa")}
    assert (got.cpus, got.mbuf_size, got.auto_start) == ([0], 4096, True)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--forward-mode=fast"], "'fast'"),
        (["--rxq=0"], "--rxq: 1 to 128 is expected, got 0"),
        (["--txq=many"], "'many'"),
        (["--burst=513"], "1 to 512 is expected, got 513"),
        (["--nb-cores=0"], "--nb-cores"),
        (["--txpkts=64,x"], "got 'x' in '64,x'"),
        (["--txpkts=40"], "got 40"),
        (["--txpkts=64,0"], "64,0"),
        (["--txpkts=60000,6000"], "60000,6000"),
        (["--rx-offloads=lots"], "'lots'"),
        (["--tx-offloads=-1"], "'-1'"),
        (["--coremask=0"], "'0'"),
        (["--coremask=8000000000000000"], "'8000000000000000'"),
        (["--stats-period=soon"], "'soon'"),
        (["--duration=-1"], "'-1'"),
        (["--duration=inf"], "'inf'"),
        (["--mbuf-size=10"], "got 10"),
        (["--eth-peer=0"], "'0'"),
        (["--eth-peer=x,02:00:00:00:00:01"], "'x,02:00:00:00:00:01'"),
        (["--noisy-lkup-memory=-1"], "got -1"),
        (["--port-topology=ring"], "ring"),
        (["--engine=steam"], "steam"),
        (["--turbo"], "--turbo"),
        (["there"], "there"),
    ],
)
def test_an_option_is_refused_by_the_word_in_question(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["testpmd", NULL, *argv])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert complaint in captured.err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "--vdev: at least one device"),
        (["--vdev=net_nil0"], "--vdev=net_nil0: no driver for device 'net_nil0'"),
        (["--vdev=net_null0,size=3"], "size=3"),
        (["--vdev=net_null0,speed=3"], "speed=3"),
        ([NULL, NULL], "there is a device 'net_null0' already"),
        ([NULL, "--rx-offloads=0x10"], "port 0 (net_null0): rx_offloads: this device cannot do "),
        ([NULL, "--eth-peer=1,02:00:00:00:00:01"], "--eth-peer: port 1 does not exist"),
        ([NULL, "--json", "-i"], "--json"),
        ([NULL, "--duration=1", "-i"], "--duration"),
        ([NULL, "--noisy-lkup-num-reads=1"], "--noisy-lkup-memory"),
        ([NULL, "--noisy-tx-sw-buffer-flushtime=1"], "--noisy-tx-sw-buffer-size"),
        (["--vdev=net_null0,size=9000", "--mbuf-size=1024"], "with --mbuf-size=1024: "),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["testpmd", *argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rtap testpmd: ")
    assert captured.err.count("\n") == 1
    assert complaint in captured.err


def test_help_lists_options_and_modes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["testpmd", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for action in add_arguments_of(argparse.ArgumentParser()):
        assert all(name in out for name in action.option_strings)
    for mode in MODES:
        assert mode in out


def test_the_separator_of_eal_options_is_taken_out() -> None:
    assert prepare(["testpmd", NULL, "--", "-i"]) == ["testpmd", NULL, "-i"]
    assert prepare(["testpmd", NULL]) == ["testpmd", NULL]


# ---- which port forwards to which


@pytest.mark.parametrize(
    ("topology", "ports", "targets"),
    [
        ("paired", 1, [0]),
        ("paired", 2, [1, 0]),
        ("paired", 3, [1, 0, 2]),
        ("paired", 4, [1, 0, 3, 2]),
        ("chained", 1, [0]),
        ("chained", 3, [1, 2, 0]),
        ("loop", 2, [0, 1]),
    ],
)
def test_topology(topology: str, ports: int, targets: list[int]) -> None:
    assert [forwards_to(n, ports, topology) for n in range(ports)] == targets


@pytest.mark.parametrize(
    ("cores", "shares"),
    [(1, [6]), (2, [3, 3]), (4, [1, 2, 1, 2]), (6, [1] * 6), (9, [1] * 6)],
)
def test_streams_are_spread_over_the_cores(cores: int, shares: list[int]) -> None:
    got = options("--vdev=net_null1", "--rxq=3", "--txq=4", f"--nb-cores={cores}")
    with open_ports(got) as ports:
        forwarding = Forwarding(ports, got)
        assert [len(share) for share in forwarding.shares()] == shares
        streams = [s for share in forwarding.shares() for s in share]
        assert [(s.rx.number, s.tx.number, s.queue) for s in streams] == [
            (port, 1 - port, queue) for port in range(2) for queue in range(3)
        ]
        forwarding.start()
        eventually(
            lambda: all(stats.rx_packets for _, stats in forwarding.routes()),
            "every stream forwards",
        )
        forwarding.stop()
        assert all(counts.rx_packets for counts in forwarding.statistics())
