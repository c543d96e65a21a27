# SPDX-License-Identifier: BSD-3-Clause
"""The thread that tells of changed links: callbacks that raise, notifications that were dropped."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from rtap import NetNS
from rtap.control import tun
from rtap.control.monitor import watch
from rtap.control.netlink import Control, find_link

LOOPBACK = 1

pytestmark = pytest.mark.root


@pytest.fixture
def control(netns: NetNS) -> Iterator[Control]:
    """Control of ``tap0``."""
    fd, _ = netns.call(tun.open_queue, "tap0")
    state = find_link(netns.fd, "tap0")
    assert state is not None
    control = Control(NetNS.from_fd(netns.fd), state.index, "tap0")
    yield control
    control.close()
    os.close(fd)


def test_a_callback_that_raises_keeps_no_hint_from_others(
    netns: NetNS, control: Control, caplog: pytest.LogCaptureFixture
) -> None:
    told = threading.Event()

    def fail(_: object) -> None:
        raise ValueError("not now")

    watches = [
        watch(netns.fd, control.index, fail),
        watch(netns.fd, control.index, lambda _: told.set()),
    ]
    try:
        for mtu in (1400, 1300):
            told.clear()
            control.set_mtu(mtu)
            assert told.wait(20)
    finally:
        for each in watches:
            each.cancel()
    assert f"looking at interface {control.index}" in caplog.text
    assert "ValueError: not now" in caplog.text


def test_dropped_notifications_are_a_hint_to_all(netns: NetNS, control: Control) -> None:
    """While the thread is busy, more changes come than its socket holds."""
    busy, go_on, told = threading.Event(), threading.Event(), threading.Event()

    def hold(_: object) -> None:
        busy.set()
        go_on.wait(60)

    watches = [
        watch(netns.fd, control.index, hold),
        watch(netns.fd, LOOPBACK, lambda _: told.set()),  # which nobody changes
    ]
    try:
        control.set_mtu(1400)
        assert busy.wait(20)
        for i in range(3000):
            control.set_mtu(1300 + i % 2)
        assert not told.is_set()
        go_on.set()
        assert told.wait(20)
    finally:
        go_on.set()
        for each in watches:
            each.cancel()
