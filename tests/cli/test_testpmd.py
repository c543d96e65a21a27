# SPDX-License-Identifier: BSD-3-Clause
"""``rtap testpmd`` over net_null: modes, figures, the prompt, the output. Needs no root."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from rich.console import Console
from support import eventually
from testpmds import argv, attended, numbers, report, run, unattended

from rtap.cli.errors import CommandError
from rtap.cli.testpmd.display import Display, Lines, LiveTable, Rates, choose
from rtap.cli.testpmd.grammar import Argument, Command, parse
from rtap.cli.testpmd.modes import MODES
from rtap.cli.testpmd.ports import Port

PORTS = ("--vdev=net_null0,size=100", "--vdev=net_null1,size=200")
SHORT = ("--duration=0.2", "--stats-period=0")

#: Modes that send what they receive.
FORWARDING = ("io", "mac", "macswap", "csum", "5tswap", "noisy")


# ---- modes


@pytest.mark.parametrize("mode", FORWARDING)
def test_modes_that_forward(mode: str) -> None:
    out = report(*PORTS, *SHORT, f"--forward-mode={mode}")
    first, second = out["ports"]
    assert out["forward_mode"] == mode
    for one, other, size in ((first, second, 100), (second, first, 200)):
        assert one["rx_packets"] > 1000
        assert other["tx_packets"] == one["rx_packets"]
        assert one["rx_dropped"] == one["tx_dropped"] == 0
        assert one["rx_total"] == one["rx_packets"]
        assert one["stats"]["ibytes"] == one["rx_packets"] * size
    assert out["total"]["rx_packets"] == first["rx_packets"] + second["rx_packets"]
    assert out["seconds"] >= 0.2


def test_a_single_port_forwards_to_itself() -> None:
    (port,) = report(PORTS[0], *SHORT)["ports"]
    assert port["rx_packets"] == port["tx_packets"] > 1000


def test_rxonly_sends_nothing() -> None:
    for port in report(*PORTS, *SHORT, "--forward-mode=rxonly")["ports"]:
        assert port["rx_packets"] > 1000
        assert port["tx_packets"] == port["tx_dropped"] == 0


def test_txonly_receives_nothing() -> None:
    options = ("--forward-mode=txonly", "--txpkts=64,36", "--rxq=2", "--txq=2", "--nb-cores=2")
    out = report(*PORTS, *SHORT, *options)
    for port in out["ports"]:
        assert port["rx_packets"] == 0
        stats = port["stats"]
        assert min(stats["q_opackets"]) > 0
        assert stats["obytes"] == 100 * port["tx_packets"]


def test_flowgen_sends_and_receives() -> None:
    for port in report(*PORTS, *SHORT, "--forward-mode=flowgen", "--flowgen-flows=3")["ports"]:
        assert port["rx_packets"] > 1000
        assert port["tx_packets"] > 1000
        assert port["stats"]["obytes"] == 64 * port["tx_packets"]


def test_noisy_holds_frames_back() -> None:
    out = report(
        *PORTS, *SHORT, "--forward-mode=noisy", "--noisy-tx-sw-buffer-size=300",
        "--noisy-lkup-memory=1", "--noisy-lkup-num-reads=1", "--noisy-lkup-num-writes=1",
        "--noisy-lkup-num-reads-writes=1", "--noisy-forward-mode=5tswap",
    )  # fmt: skip
    assert out["held_back"] == 600
    assert out["total"]["rx_packets"] == out["total"]["tx_packets"] + 600


def test_icmpecho_answers_nothing_that_asks_nothing() -> None:
    for port in report(*PORTS, *SHORT, "--forward-mode=icmpecho")["ports"]:
        assert port["rx_packets"] > 1000
        assert port["tx_packets"] == port["tx_dropped"] == 0


def test_every_queue_forwards() -> None:
    out = report(*PORTS, *SHORT, "--rxq=4", "--txq=4", "--nb-cores=3", "--burst=7")
    for port in out["ports"]:
        assert min(port["stats"]["q_ipackets"]) > 0
        assert sum(port["stats"]["q_opackets"]) == port["tx_packets"]


def test_text_statistics_of_a_run() -> None:
    done = run(*PORTS, "--duration=0.7", "--stats-period=0.2", "--rxq=2", "--txq=2")
    assert (done.returncode, done.stderr) == (0, "")
    live = re.findall(r"^ +[\d.]+ s port 1 queue 1: rx ([\d,]+) packets/s", done.stdout, re.M)
    assert len(live) >= 2
    assert all(int(pps.replace(",", "")) > 1000 for pps in live)
    assert "Forward statistics for port 0" in done.stdout
    total = numbers(done.stdout)
    assert total["RX-packets"] == total["TX-packets"] == total["TX-total"] > 1000


# ---- the prompt


def test_a_script_on_standard_input() -> None:
    script = """
        show config fwd
        start           # and then
        start
        set burst 8
        set fwd rxonly
        port stop all
        clear port stats 1
        stop
        stop
        port stop 0
        start
        port start 0
        start
        stop
        set fwd txonly
        set txpkts 64,100
        start tx_first 2
        stop
        bogus
        show port
        show port stats 2
        set fwd fast
        set burst none
        set promisc all maybe
        quit now
        quit
        start
    """
    done = run(*PORTS, "-i", script=script)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "packet forwarding is started already",
        "port stop: ports are forwarding, stop comes first",
        "packet forwarding is not started",
        "port 0 is stopped: port start 0 starts it",
        "start, stop, show, clear, set, port, help or quit is expected, got 'bogus'",
        "show port: stats, xstats, info or summary is expected after it",
        "show port stats: a port from 0 to 1 or all is expected, got '2'",
        f"set fwd: one of {', '.join(MODES)} is expected, got 'fast'",
        "set burst: 1 to 512 is expected, got 'none'",
        "set promisc all: on or off is expected, got 'maybe'",
        "quit: nothing is expected after it, got 'now'",
    ]
    out = done.stdout
    assert out.count("Accumulated forward statistics") == 3
    assert "io packet forwarding - ports=2 - cores=1 - streams=2 - burst=32" in out
    assert "rxonly packet forwarding - ports=2 - cores=1 - streams=2 - burst=8" in out
    assert "RX P=0/Q=0 -> TX P=1/Q=0 peer=02:00:00:00:00:01" in out
    assert "burst set to 8, from the next start on" in out


def test_the_end_of_the_input_is_the_end() -> None:
    done = run(*PORTS, "-i", script="start")  # no newline
    assert (done.returncode, done.stderr) == (0, "")
    assert "packet forwarding - " in done.stdout
    assert numbers(done.stdout)["RX-packets"] >= 0


def test_help_names_every_command() -> None:
    out = run(*PORTS, "-i", script="help\n").stdout
    for command in (
        "start", "stop", "show port stats N|all", "show port xstats N|all", "show port info N|all",
        "clear port stats N|all", "set fwd MODE", "set promisc N|all on|off", "set burst N",
        "port stop N|all", "port start N|all", "help", "quit",
    ):  # fmt: skip
        assert re.search(rf"^(?:testpmd>)? +{re.escape(command)}  ", out, re.M), command


def test_figures_at_the_prompt() -> None:
    with attended(None, *PORTS) as pmd:
        assert "RX P=1/Q=0 -> TX P=0/Q=0" in pmd.say("start")
        pmd.say("show port stats all")
        time.sleep(0.1)
        text = pmd.say("show port stats 0")
        found = {name: int(n) for name, n in re.findall(r"([RT][Xx]-\w+): (\d+)", text)}
        assert found["RX-packets"] > 1000
        assert min(found[f"{way}-{what}"] for way in ("Rx", "Tx") for what in ("pps", "bps")) > 1000
        assert found["RX-missed"] == found["RX-errors"] == found["TX-errors"] == 0
        total = numbers(pmd.say("stop"))
        assert total["RX-packets"] == total["TX-packets"]
        packets, n_bytes = re.findall(r"RX-(?:packets|bytes): (\d+)", pmd.say("show port stats 0"))
        assert int(n_bytes) == 100 * int(packets) > 0

        xstats = pmd.say("show port xstats 1")
        assert int(re.findall(r"rx_q0_size_128_to_255_packets: (\d+)", xstats)[0]) > 1000
        pmd.say("clear port xstats 1")
        assert "rx_q0_size_128_to_255_packets: 0\n" in pmd.say("show port xstats 1")
        assert "RX-packets: 0 " not in pmd.say("show port stats 1")
        pmd.say("clear port stats all")
        for port in range(2):
            assert "RX-packets: 0 " in pmd.say(f"show port stats {port}")

        info = pmd.say("show port info all")
        for fact in ("Driver name: net_null", "State: started", "MTU: 1500", "RX queues: 1 of 128"):
            assert info.count(fact) == 2
        assert "Promiscuous mode: on" in info
        pmd.say("set promisc 1 off")
        assert "Promiscuous mode: off" in pmd.say("show port info 1")
        pmd.say("set allmulti all on")
        assert pmd.say("show port info all").count("Allmulticast mode: on") == 2
        pmd.say("port stop 1")
        assert re.search(r"^1 .* stopped down$", pmd.say("show port summary all"), re.M)


def test_clearing_counters_takes_nothing_from_forwarding() -> None:
    with attended(None, PORTS[0]) as pmd:
        pmd.say("start")
        eventually(lambda: "RX-packets: 0 " not in pmd.say("show port stats 0"), "frames move")
        pmd.say("clear port stats all")
        shown = re.findall(r"RX-packets: (\d+)", pmd.say("show port stats 0"))
        total = numbers(pmd.say("stop"))
        assert total["RX-packets"] == total["TX-packets"] > int(shown[0])


def test_auto_start_and_a_first_burst() -> None:
    with attended(None, *PORTS, "--auto-start", "--forward-mode=rxonly", "--tx-first") as pmd:
        eventually(lambda: "RX-packets: 0 " not in pmd.say("show port stats 0"), "frames come")
        total = numbers(pmd.say("stop"))
        assert total["TX-packets"] == 64
        assert total["RX-packets"] > 0


# ---- the end


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_how_it_ends(signum: signal.Signals) -> None:
    with unattended(None, *PORTS, "--stats-period=0.1") as pmd:
        pmd.until(r"port 1: rx ")
        status, out = pmd.end(signum)
        assert status == 0
        assert numbers(out)["RX-packets"] > 1000


def test_a_signal_before_the_time_is_over_is_no_success() -> None:
    with unattended(None, *PORTS, "--stats-period=0.1", "--duration=60") as pmd:
        pmd.until(r"port 1: rx ")
        status, out = pmd.end()
        assert status == 128 + signal.SIGINT
        assert numbers(out)["RX-packets"] > 1000
        assert out.endswith("rtap testpmd: stopped by SIGINT\n")


def test_a_signal_at_the_prompt_of_a_script() -> None:
    with attended(None, *PORTS) as pmd:
        pmd.say("start")
        eventually(lambda: "RX-packets: 0 " not in pmd.say("show port stats 0"), "frames move")
        status, out = pmd.end()
        assert status == 0
        assert numbers(out)["RX-packets"] > 0


@pytest.mark.parametrize("options", [["--stats-period=0.05"], ["-i"]])
def test_a_reader_that_goes_away_ends_it_quietly(options: list[str]) -> None:
    process = subprocess.Popen(
        argv(*PORTS, *options),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.read(1)
        process.stdout.close()
        if "-i" in options:
            process.stdin.write(b"start\n")
            process.stdin.flush()
        assert process.wait(20) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stderr.close()


def on_a_terminal(options: list[str], act: Callable[[int, bytes], bool]) -> tuple[int, bytes]:
    """Runs testpmd on a terminal, where ``act`` writes until it returns True.

    Returns its status and output.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", *argv(*PORTS, *options)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    seen, done = b"", False
    try:
        deadline = time.monotonic() + 20
        while select.select([ours], [], [], max(0, deadline - time.monotonic()))[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # EIO: the other end is closed
                break
            done = done or act(ours, seen)
        return process.wait(5), seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_on_a_terminal() -> None:
    def act(terminal: int, seen: bytes) -> bool:
        if not re.search(rb"port 1\S* +[\d,]{4,}", seen):
            return False
        os.write(terminal, b"\x03")
        return True

    status, seen = on_a_terminal(["--stats-period=0.1"], act)
    assert status == 0, seen
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h") == 1  # the cursor is back
    assert b"rx packets/s" in seen
    assert numbers(seen.decode())["RX-packets"] > 1000


def test_ctrl_c_at_a_prompt_on_a_terminal() -> None:
    def act(terminal: int, seen: bytes) -> bool:
        if seen.endswith(b"testpmd> "):
            if b"packet forwarding -" in seen:
                os.write(terminal, b"\x03")
                return True
            if seen.count(b"testpmd> ") == 1:
                os.write(terminal, b"start\n")
        return False

    status, seen = on_a_terminal(["-i"], act)
    assert status == 0, seen
    assert "RX-packets" in numbers(seen.decode())


# ---- output


NOTHING = Rates(0, 0, 0, 0, 0)


def show(display: Display, port: Port) -> None:
    busy = Rates(1234567, 8e9, 765432.1, 4e9, 12)
    with display:
        display.begin(["the title"])
        display.show(1.0, [(port, busy, [busy])])
        display.show(2.0, [(port, busy, [busy, NOTHING])])
        display.end(["the end"])


@pytest.fixture
def port() -> Port:
    return Port(3, None, None)  # type: ignore[arg-type]  # only its number is shown


def test_lines_without_a_terminal(port: Port, capsys: pytest.CaptureFixture[str]) -> None:
    display = choose(json=False)
    assert type(display) is Lines
    show(display, port)
    busy = "rx 1,234,567 packets/s 8.000 Gb/s, tx 765,432 packets/s 4.000 Gb/s, drops 12/s"
    idle = "rx 0 packets/s 0.000 Gb/s, tx 0 packets/s 0.000 Gb/s, drops 0/s"
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "the title",
        f"1.0 s port 3: {busy}",
        f"2.0 s port 3: {busy}",
        f"2.0 s port 3 queue 0: {busy}",
        f"2.0 s port 3 queue 1: {idle}",
        "the end",
    ]


def test_json_shows_nothing_meanwhile(port: Port, capsys: pytest.CaptureFixture[str]) -> None:
    show(choose(json=True), port)
    assert capsys.readouterr() == ("", "")


def test_table_on_a_terminal(port: Port) -> None:
    out = io.StringIO()
    show(LiveTable(Console(file=out, force_terminal=True, width=100, color_system=None)), port)
    text = out.getvalue()
    last = text[text.rindex("rx packets/s") :]
    rows = [line.split() for line in last.splitlines()]
    assert ["port", "3", "1,234,567", "8.000", "765,432", "4.000", "12"] in rows
    assert ["port", "3", "queue", "1", "0", "0.000", "0", "0.000", "0"] in rows
    assert text.rstrip().endswith("the end")


# ---- commands of words


def _letter(text: str) -> str:
    if len(text) != 1:
        raise ValueError(text)
    return text.upper()


COMMANDS = [
    Command(("go",), "", print),
    Command(("go", "to", Argument("X", "a letter", _letter)), "", print),
    Command(("go", "to", Argument("X", "a letter", _letter), "twice"), "", print),
    Command(("go", Argument("N", "a number", int)), "", print),
]


@pytest.mark.parametrize(
    ("line", "index", "values"),
    [("go", 0, []), (" go  to x", 1, ["X"]), ("go to x twice", 2, ["X"]), ("go 7", 3, [7])],
)
def test_lines_that_are_commands(line: str, index: int, values: list[object]) -> None:
    assert parse(COMMANDS, line) == (COMMANDS[index], values)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("come", "go is expected, got 'come'"),
        ("go away", "go: to or a number is expected, got 'away'"),
        ("go to", "go to: a letter is expected after it"),
        ("go to xy", "go to: a letter is expected, got 'xy'"),
        ("go to x thrice", "go to x: twice is expected, got 'thrice'"),
        ("go 7 8", "go 7: nothing is expected after it, got '8'"),
    ],
)
def test_lines_that_are_not(line: str, complaint: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse(COMMANDS, line)
    assert str(caught.value) == complaint
