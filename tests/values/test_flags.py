# SPDX-License-Identifier: BSD-3-Clause
"""Flags have DPDK's names and values, also in the C header that the native core reads."""

from __future__ import annotations

import re
from enum import IntFlag
from pathlib import Path

import pytest

import rtap
from rtap import MbufFlag, RxOffload, TxOffload
from rtap.ethdev.ops import as_flags
from rtap.flags import flag_names

# rte_ethdev.h and rte_mbuf_core.h of DPDK 24.11: bit numbers.
RX_OFFLOAD = {
    "VLAN_STRIP": 0,
    "IPV4_CKSUM": 1,
    "UDP_CKSUM": 2,
    "TCP_CKSUM": 3,
    "TCP_LRO": 4,
    "QINQ_STRIP": 5,
    "OUTER_IPV4_CKSUM": 6,
    "VLAN_FILTER": 9,
    "VLAN_EXTEND": 10,
    "SCATTER": 13,
    "TIMESTAMP": 14,
    "KEEP_CRC": 16,
    "SCTP_CKSUM": 17,
    "OUTER_UDP_CKSUM": 18,
    "RSS_HASH": 19,
}
TX_OFFLOAD = {
    "VLAN_INSERT": 0,
    "IPV4_CKSUM": 1,
    "UDP_CKSUM": 2,
    "TCP_CKSUM": 3,
    "SCTP_CKSUM": 4,
    "TCP_TSO": 5,
    "UDP_TSO": 6,
    "OUTER_IPV4_CKSUM": 7,
    "QINQ_INSERT": 8,
    "VXLAN_TNL_TSO": 9,
    "GRE_TNL_TSO": 10,
    "IPIP_TNL_TSO": 11,
    "GENEVE_TNL_TSO": 12,
    "MT_LOCKFREE": 14,
    "MULTI_SEGS": 15,
    "MBUF_FAST_FREE": 16,
    "UDP_TNL_TSO": 18,
    "IP_TNL_TSO": 19,
    "OUTER_UDP_CKSUM": 20,
}
MBUF = {
    "RX_VLAN": 0,
    "RX_RSS_HASH": 1,
    "RX_FDIR": 2,
    "RX_L4_CKSUM_BAD": 3,
    "RX_IP_CKSUM_BAD": 4,
    "RX_OUTER_IP_CKSUM_BAD": 5,
    "RX_VLAN_STRIPPED": 6,
    "RX_IP_CKSUM_GOOD": 7,
    "RX_L4_CKSUM_GOOD": 8,
    "RX_QINQ_STRIPPED": 15,
    "RX_LRO": 16,
    "RX_QINQ": 20,
    "RX_OUTER_L4_CKSUM_BAD": 21,
    "RX_OUTER_L4_CKSUM_GOOD": 22,
    "TX_OUTER_UDP_CKSUM": 41,
    "TX_UDP_SEG": 42,
    "TX_QINQ": 49,
    "TX_TCP_SEG": 50,
    "TX_TCP_CKSUM": 52,
    "TX_SCTP_CKSUM": 53,
    "TX_IP_CKSUM": 54,
    "TX_IPV4": 55,
    "TX_IPV6": 56,
    "TX_VLAN": 57,
    "TX_OUTER_IP_CKSUM": 58,
    "TX_OUTER_IPV4": 59,
    "TX_OUTER_IPV6": 60,
    "EXTERNAL": 61,
    "INDIRECT": 62,
}
# Whole numbers: fields of two bits, combinations, zero.
RX_OFFLOAD_SUMS = {"CHECKSUM": 0xE, "VLAN": 0x621}
MBUF_SUMS = {
    "RX_L4_CKSUM_UNKNOWN": 0,
    "RX_L4_CKSUM_NONE": 1 << 3 | 1 << 8,
    "RX_L4_CKSUM_MASK": 1 << 3 | 1 << 8,
    "RX_IP_CKSUM_UNKNOWN": 0,
    "RX_IP_CKSUM_NONE": 1 << 4 | 1 << 7,
    "RX_IP_CKSUM_MASK": 1 << 4 | 1 << 7,
    "RX_OUTER_L4_CKSUM_UNKNOWN": 0,
    "RX_OUTER_L4_CKSUM_INVALID": 3 << 21,
    "RX_OUTER_L4_CKSUM_MASK": 3 << 21,
    "TX_L4_NO_CKSUM": 0,
    "TX_UDP_CKSUM": 3 << 52,
    "TX_L4_MASK": 3 << 52,
}
OURS = {"UDP_LRO": 63}  # DPDK has no name for it


@pytest.mark.parametrize(
    ("kind", "bits", "sums"),
    [
        (RxOffload, RX_OFFLOAD | OURS, RX_OFFLOAD_SUMS),
        (TxOffload, TX_OFFLOAD, {}),
        (MbufFlag, MBUF, MBUF_SUMS),
    ],
)
def test_values_are_those_of_dpdk(
    kind: type[IntFlag], bits: dict[str, int], sums: dict[str, int]
) -> None:
    expected = {name: 1 << bit for name, bit in bits.items()} | sums
    assert {name: int(flag) for name, flag in kind.__members__.items()} == expected


def test_the_native_core_uses_the_same_values() -> None:
    text = (Path(rtap.get_include()) / "rtap_compat.h").read_text()
    found = re.findall(r"^#define RTAP_([RT]X_\w+)\s+\(UINT64_C\((\w+)\) << (\d+)\)$", text, re.M)
    native = {name: int(factor, 0) << int(bit) for name, factor, bit in found}
    assert native.pop("TX_TUNNEL_MASK") == 0xF << 45
    for name in [name for name in native if name.startswith("RX_OFFLOAD_")]:
        assert native.pop(name) == RxOffload[name.removeprefix("RX_OFFLOAD_")]
    assert len(native) >= 8
    assert native == {name: MbufFlag[name] for name in native}


@pytest.mark.parametrize(
    ("flags", "kind", "names"),
    [
        (0, MbufFlag, []),
        (RxOffload.TCP_LRO | RxOffload.TCP_CKSUM, RxOffload, ["TCP_CKSUM", "TCP_LRO"]),
        (RxOffload.CHECKSUM, RxOffload, ["IPV4_CKSUM", "UDP_CKSUM", "TCP_CKSUM"]),
        (RxOffload.UDP_LRO | 1, RxOffload, ["VLAN_STRIP", "UDP_LRO"]),
        (3 << 52, MbufFlag, ["TX_UDP_CKSUM"]),
        (1 << 52 | 1 << 55, MbufFlag, ["TX_TCP_CKSUM", "TX_IPV4"]),
        (2 << 52, MbufFlag, ["TX_SCTP_CKSUM"]),
        (MbufFlag.RX_L4_CKSUM_NONE, MbufFlag, ["RX_L4_CKSUM_NONE"]),
        (MbufFlag.RX_L4_CKSUM_BAD, MbufFlag, ["RX_L4_CKSUM_BAD"]),
        (3 << 21, MbufFlag, ["RX_OUTER_L4_CKSUM_INVALID"]),
        (1 << 30 | 3 << 52, MbufFlag, ["0x40000000", "TX_UDP_CKSUM"]),
        (1 << 40, RxOffload, ["0x10000000000"]),
        (1 << 70, TxOffload, [hex(1 << 70)]),
    ],
)
def test_flag_names(flags: int, kind: type[IntFlag], names: list[str]) -> None:
    assert flag_names(flags, kind) == names


def test_flag_names_of_a_negative_number() -> None:
    with pytest.raises(ValueError, match="-1"):
        flag_names(-1)


def test_as_flags_takes_numbers_and_its_own_kind() -> None:
    assert as_flags(0x18, RxOffload, "x") is RxOffload.TCP_CKSUM | RxOffload.TCP_LRO
    assert as_flags(TxOffload.TCP_TSO, TxOffload, "x") is TxOffload.TCP_TSO
    assert int(as_flags(1 << 40, RxOffload, "x")) == 1 << 40


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (TxOffload.TCP_TSO, TypeError, "rx_offloads takes RxOffload flags, got.*TCP_TSO"),
        (MbufFlag.RX_LRO, TypeError, "RX_LRO"),
        (True, TypeError, "bool"),
        ("TCP_LRO", TypeError, "str"),
        (1.0, TypeError, "float"),
        (None, TypeError, "NoneType"),
        (-8, ValueError, "negative number -8"),
    ],
)
def test_as_flags_refuses(value: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        as_flags(value, RxOffload, "rx_offloads")  # type: ignore[arg-type]


def test_a_udp_checksum_request_is_no_tcp_one() -> None:
    asked = MbufFlag.TX_UDP_CKSUM
    assert asked & MbufFlag.TX_L4_MASK != MbufFlag.TX_TCP_CKSUM
    assert MbufFlag.TX_TCP_CKSUM | MbufFlag.TX_SCTP_CKSUM == MbufFlag.TX_UDP_CKSUM
