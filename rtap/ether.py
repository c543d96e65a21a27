# SPDX-License-Identifier: BSD-3-Clause
"""Ethernet addresses."""

from __future__ import annotations

import re
from typing import TypeAlias

__all__ = ["MacAddr", "MacLike"]

_TEXT = re.compile(r"[0-9a-f]{2}([:-]?)(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}", re.IGNORECASE)


class MacAddr(str):
    """An Ethernet address: a ``str`` in the form ``02:00:00:00:00:01``, with its six bytes.

    Made from such a text (also with dashes or without separators) or from 6 bytes. ``bytes(mac)``
    is the wire form. ValueError or TypeError for anything else.

    Equal to its text and to its six bytes, so that ``mbuf[0:6] == dev.mac`` works as expected;
    ``mbuf[0:6] = dev.mac`` writes the bytes. Its hash is that of the text: in a set or dict of
    addresses, look bytes up as ``MacAddr(raw)``.
    """

    __slots__ = ()

    def __new__(cls, value: MacLike) -> MacAddr:
        if isinstance(value, MacAddr):
            return value
        if isinstance(value, str):
            if _TEXT.fullmatch(value) is None:
                raise ValueError(f"an Ethernet address looks like 02:00:00:00:00:01, got {value!r}")
            raw = bytes.fromhex(value.replace(":", "").replace("-", ""))
        elif isinstance(value, (bytes, bytearray, memoryview)):
            raw = bytes(value)
            if len(raw) != 6:
                raise ValueError(f"an Ethernet address has 6 bytes, got {len(raw)}: {raw!r}")
        else:
            raise TypeError(f"an Ethernet address is a str or 6 bytes, got {type(value).__name__}")
        return super().__new__(cls, raw.hex(":"))

    def __bytes__(self) -> bytes:
        return self.packed

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (bytes, bytearray, memoryview)):
            return self.packed == other
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __buffer__(self, flags: int, /) -> memoryview:
        """The six bytes, read-only (Python 3.12)."""
        return memoryview(self.packed)

    @property
    def packed(self) -> bytes:
        """The six bytes."""
        return bytes.fromhex(self.replace(":", ""))

    @property
    def is_multicast(self) -> bool:
        """True for group addresses, including broadcast (IEEE 802: lowest bit of byte 0)."""
        return bool(self.packed[0] & 1)

    @property
    def is_local(self) -> bool:
        """True for locally administered addresses (IEEE 802: second lowest bit of byte 0)."""
        return bool(self.packed[0] & 2)

    def peer(self) -> MacAddr:
        """The address for the other end of the wire: stable, and never equal to this one.

        Locally administered, with the top bit of the first byte flipped; numbering devices
        02:00:00:00:00:01, :02, ... therefore never produces a collision.
        """
        raw = bytearray(self.packed)
        raw[0] = (raw[0] | 2) ^ 0x80
        return MacAddr(raw)


MacLike: TypeAlias = "str | bytes | bytearray | memoryview"
