# SPDX-License-Identifier: BSD-3-Clause
"""Arguments that the generic device layer checks before it calls a driver."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fakes import STARTED, bring, ops_of

from rtap import (
    Burst,
    EthConf,
    EthDev,
    MbufFlag,
    Mempool,
    RxOffload,
    TxOffload,
)


@pytest.mark.parametrize(
    ("counts", "error", "says"),
    [
        ((0, 1), ValueError, "nb_rx_queues must be 1 to 4, got 0"),
        ((1, 0), ValueError, "nb_tx_queues must be 1 to 8, got 0"),
        ((5, 5), ValueError, "nb_rx_queues must be 1 to 4, got 5"),
        ((4, 9), ValueError, "nb_tx_queues must be 1 to 8, got 9"),
        ((-1, 1), ValueError, "got -1"),
        (("1", 1), TypeError, "nb_rx_queues must be an int, got str"),
        ((1, 1.0), TypeError, "nb_tx_queues must be an int, got float"),
        ((True, 1), TypeError, "got bool"),
        ((None, 1), TypeError, "got NoneType"),
    ],
)
def test_queue_counts(
    dev: EthDev, counts: tuple[Any, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        dev.configure(*counts)
    assert dev.state == "unconfigured"
    assert ops_of(dev).take() == []


@pytest.mark.parametrize(
    ("conf", "says"),
    [
        (
            EthConf(rx_offloads=RxOffload.VLAN_STRIP),
            "rx_offloads: this device cannot do VLAN_STRIP",
        ),
        (
            EthConf(rx_offloads=RxOffload.TCP_CKSUM | RxOffload.TCP_LRO | RxOffload.SCATTER),
            "cannot do TCP_LRO, SCATTER; it can do IPV4_CKSUM, UDP_CKSUM, TCP_CKSUM",
        ),
        (EthConf(rx_offloads=RxOffload(1 << 40)), "cannot do 0x10000000000"),
        (EthConf(tx_offloads=TxOffload.TCP_TSO), "cannot do TCP_TSO; it can do none"),
        (EthConf(mtu=99), "mtu must be 100 to 2000, got 99"),
        (EthConf(mtu=2001), "got 2001"),
    ],
)
def test_conf_the_device_cannot_do(dev: EthDev, conf: EthConf, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        dev.configure(1, 1, conf)
    assert dev.state == "unconfigured"
    assert ops_of(dev).take() == []


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"engine": "fast"}, ValueError, "engine must be one of auto, uring, syscall, got 'fast'"),
        ({"engine": None}, ValueError, "got None"),
        ({"gil": "keep"}, ValueError, "gil must be one of auto, release, hold, got 'keep'"),
        ({"rx_offloads": TxOffload.TCP_TSO}, TypeError, "RxOffload"),
        ({"tx_offloads": RxOffload.TCP_LRO}, TypeError, "TxOffload"),
        ({"tx_offloads": MbufFlag.TX_TCP_SEG}, TypeError, "TxOffload"),
        ({"rx_offloads": "TCP_LRO"}, TypeError, "str"),
        ({"rx_offloads": -1}, ValueError, "-1"),
    ],
)
def test_conf_that_is_none(fields: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        EthConf(**fields)


@pytest.mark.parametrize("conf", [5, "x", {"mtu": 1500}])
def test_conf_of_another_type(dev: EthDev, conf: Any) -> None:
    with pytest.raises(TypeError, match=f"conf must be an EthConf, got {type(conf).__name__}"):
        dev.configure(1, 1, conf)


@pytest.mark.parametrize("mtu", ["1500", 1500.0, True])
def test_mtu_of_another_type(dev: EthDev, mtu: Any) -> None:
    with pytest.raises(TypeError, match="mtu must be an int"):
        dev.mtu = mtu
    with pytest.raises(TypeError, match="mtu must be an int"):
        dev.configure(1, 1, EthConf(mtu=mtu))


@pytest.mark.parametrize("mtu", [99, 2001, -1])
def test_mtu_out_of_range(dev: EthDev, mtu: int) -> None:
    with pytest.raises(ValueError, match=f"mtu must be 100 to 2000, got {mtu}"):
        dev.mtu = mtu
    assert ops_of(dev).take() == []


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((1, 8), ValueError, "queue must be 0 to 0, got 1"),
        ((-1, 8), ValueError, "got -1"),
        (("0", 8), TypeError, "queue must be an int"),
        ((0, 0), ValueError, "nb_desc must be"),
        ((0, 33), ValueError, "nb_desc must be"),
        ((0, None), TypeError, "nb_desc must be an int"),
    ],
)
def test_queue_setup_arguments(
    dev: EthDev, pool: Mempool, args: tuple[Any, Any], error: type[Exception], says: str
) -> None:
    dev.configure(1, 1)
    with pytest.raises(error, match=says):
        dev.rx_queue_setup(*args, pool)
    with pytest.raises(error, match=says):
        dev.tx_queue_setup(*args)


def test_descriptor_limits_are_the_queues_own(dev: EthDev, pool: Mempool) -> None:
    dev.configure(1, 1)
    with pytest.raises(ValueError, match="nb_desc must be 2 to 32, got 1"):
        dev.rx_queue_setup(0, 1, pool)
    with pytest.raises(ValueError, match="nb_desc must be 1 to 16, got 17"):
        dev.tx_queue_setup(0, 17)
    dev.rx_queue_setup(0, 32, pool)
    dev.tx_queue_setup(0, 1)


@pytest.mark.parametrize("pool", [None, 5, "pool", b""])
def test_pool_of_another_type(dev: EthDev, pool: Any) -> None:
    dev.configure(1, 1)
    with pytest.raises(TypeError, match=f"pool must be a Mempool, got {type(pool).__name__}"):
        dev.rx_queue_setup(0, 8, pool)


@pytest.mark.parametrize("queue", [1, -1, 2**70])
def test_bursts_on_a_queue_that_is_not_there(dev: EthDev, pool: Mempool, queue: int) -> None:
    bring(dev, STARTED, pool)
    for call in (
        lambda: dev.rx_burst(queue),
        lambda: dev.tx_burst(queue, Burst()),
        lambda: dev.send(b"x", queue),
        lambda: dev.recv(0, queue),
    ):
        with pytest.raises(ValueError, match=f"queue must be 0 to 0, got {queue}"):
            call()
    with pytest.raises(ValueError, match="is not set up"):
        dev.rx_queue(queue)
    with pytest.raises(ValueError, match="is not set up"):
        dev.tx_queue(queue)


@pytest.mark.parametrize("queue", ["0", None, [0], 0.5])
def test_queue_of_another_type(dev: EthDev, pool: Mempool, queue: Any) -> None:
    bring(dev, STARTED, pool)
    for call in (
        lambda: dev.rx_burst(queue),
        lambda: dev.tx_burst(queue, Burst()),
        lambda: dev.send(b"x", queue),
        lambda: dev.recv(0, queue),
    ):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize(
    "mac", ["01:00:00:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", bytes(6)]
)
def test_only_unicast_addresses(dev: EthDev, mac: str) -> None:
    with pytest.raises(ValueError, match=r"^mac must be a unicast address, got"):
        dev.mac = mac
    with pytest.raises(ValueError, match=r"^app_mac must be a unicast address, got"):
        dev.app_mac = mac
    assert ops_of(dev).take() == []


@pytest.mark.parametrize(("mac", "error"), [("x", ValueError), (b"12", ValueError), (5, TypeError)])
def test_no_address_at_all(dev: EthDev, mac: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        dev.mac = mac
    with pytest.raises(error):
        dev.app_mac = mac


def test_app_mac_follows_mac_until_it_is_assigned(dev: EthDev) -> None:
    assert dev.app_mac == dev.mac.peer() != dev.mac
    dev.mac = b"\x02\0\0\0\0\x09"
    assert dev.mac == "02:00:00:00:00:09"
    assert dev.app_mac == dev.mac.peer()
    dev.app_mac = "02-00-00-00-00-77"
    dev.mac = "02:00:00:00:00:0a"
    assert dev.app_mac == "02:00:00:00:00:77"
    assert ops_of(dev).take() == [
        "mac_addr_set(02:00:00:00:00:09)",
        "mac_addr_set(02:00:00:00:00:0a)",
    ]


def test_info_has_what_the_layer_knows(dev: EthDev, pool: Mempool) -> None:
    info = dev.info()
    assert (info.name, info.state, info.nb_rx_queues, info.engine) == (
        "fake0",
        "unconfigured",
        0,
        "auto",
    )
    dev.configure(1, 2)
    assert dev.info().engine == "auto"
    dev.rx_queue_setup(0, 8, pool)
    info = dev.info()
    assert (info.state, info.nb_rx_queues, info.nb_tx_queues) == ("configured", 1, 2)
    assert (info.engine, info.engine_reason) == ("fake", "there is no other")
    assert info.driver_name == "fake"
    with pytest.raises(AttributeError):
        info.mtu = 5  # type: ignore[misc]
