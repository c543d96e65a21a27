# SPDX-License-Identifier: BSD-3-Clause
"""The reference pages and the code agree: all that a page names exists, and the reverse."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from rtap import EthDev
from rtap.drivers.net_null import NetNull
from rtap.drivers.net_rtap import NetRtap
from rtap.ethdev.ops import EthDevOps

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the source tree")

#: The entries of the C driver's ops table.
C_OPS = """
dev_start dev_stop dev_configure dev_infos_get dev_close link_update dev_set_link_up
dev_set_link_down mac_addr_set mtu_set promiscuous_enable promiscuous_disable allmulticast_enable
allmulticast_disable stats_get stats_reset xstats_get xstats_get_names xstats_reset rx_queue_setup
rx_queue_release tx_queue_setup tx_queue_release rx_queue_intr_enable rx_queue_intr_disable
"""

#: The cases of the C driver's own suite.
C_CASES = """
ethdev_configure_ports dev_info link_status link_up_down get_stats stats_reset stats_imissed
promiscuous allmulticast mac_address mtu multiqueue multiqueue_reduce multiqueue_mismatch
queue_reconfigure rx_inject tx_capture tx_multiseg rx_multiseg offload_config tx_csum_offload
lsc_interrupt rxq_interrupt xstats_get_names xstats_get_values xstats_reset xstats_packet_sizes
xstats_packet_types xstats_multiqueue xstats_offload_stats fd_leak command_line_rtap_port
"""


def pages() -> dict[str, str]:
    return {page.name: page.read_text() for page in sorted(DOCS.glob("*.md"))}


def ops() -> set[str]:
    return {name for name in vars(EthDevOps) if not name.startswith("_")}


def tables(text: str) -> list[list[list[str]]]:
    """The rows of cells of every table on a page, heading first."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not set(line) <= set("|- "):
                found[-1].append(cells)
        inside = line.startswith("|")
    return found


def documented_ops() -> dict[str, str]:
    """The page that documents each entry of the ops table."""
    found = {}
    for page, text in pages().items():
        for heading, *rows in tables(text):
            if "ops table" in heading:
                column = heading.index("ops table")
                for row in rows:
                    assert len(row) == len(heading), f"{page}: {row}"
                    for name in re.findall(r"`([a-z_]+)`", row[column]):
                        found[name] = page
    return found


def test_tables_are_read() -> None:
    """Checks this module's own parser."""
    (table,) = tables("text\n| a | ops table |\n|---|---|\n| `b` | `c`, `d` |\n| e | |\n\n")
    assert table == [["a", "ops table"], ["`b`", "`c`, `d`"], ["e", ""]]


def test_every_entry_of_the_ops_table_is_documented() -> None:
    assert sorted(ops() - set(documented_ops())) == []


def test_every_documented_entry_is_in_the_ops_table() -> None:
    there = ops()
    assert {name: page for name, page in documented_ops().items() if name not in there} == {}


@pytest.mark.parametrize("name", C_OPS.split())
def test_entries_of_the_c_driver(name: str) -> None:
    assert name in ops()
    for driver in (NetRtap, NetNull):
        assert callable(getattr(driver, name)), driver


@pytest.mark.parametrize("driver", [NetRtap, NetNull])
def test_drivers_have_every_entry(driver: type) -> None:
    assert sorted(name for name in ops() if not hasattr(driver, name)) == []


def test_documented_methods_exist() -> None:
    missing = {
        f"{page}: dev.{name}"
        for page, text in pages().items()
        for name in re.findall(r"\bdev\.([a-z]\w*)", text)
        if not hasattr(EthDev, name)
    }
    assert missing == set()


def test_public_methods_are_documented() -> None:
    """Every public method of EthDev is on some page, bursts included."""
    text = "\n".join(pages().values())
    public = {name for name in dir(EthDev) if not name.startswith("_")}
    assert sorted(n for n in public if not re.search(rf"\bdev\.{n}\b", text)) == []


# ---- tests that pages name


@functools.cache
def names_in(module: str) -> frozenset[str]:
    (path,) = (ROOT / "tests").glob(f"*/{module}.py")
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def named_tests() -> list[tuple[str, str, str]]:
    return [
        (page, module, name)
        for page, text in pages().items()
        for module, name in re.findall(r"`(test_\w+)::(test_\w+)`", text)
    ]


def test_tests_that_pages_name_exist() -> None:
    named = named_tests()
    missing = [(page, f"{m}::{name}") for page, m, name in named if name not in names_in(m)]
    assert missing == []
    assert len(named) > 50


def test_every_fault_has_a_test() -> None:
    faults, own, cases = tables(pages()["faults.md"])
    for row in (*faults[1:], *own[1:], *cases[1:]):
        assert "::" in row[-1], row
    wanted = [f"test_{case}" for case in C_CASES.split()]
    assert [row[0].strip("`") for row in cases[1:]] == wanted
    assert len(wanted) == 32
