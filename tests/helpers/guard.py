# SPDX-License-Identifier: BSD-3-Clause
"""Bytes at the very end of readable memory: a read past them kills the process."""

from __future__ import annotations

import ctypes
import mmap

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


class Guard:
    """A region of up to `n` bytes in front of an inaccessible page."""

    def __init__(self, n: int = 1 << 17) -> None:
        self.room = -(-n // _PAGE) * _PAGE
        self._map = mmap.mmap(-1, self.room + _PAGE)
        self._view = memoryview(self._map)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + self.room
        if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(_PAGE), _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    def put(self, data: bytes) -> memoryview:
        """The same bytes, ending just before that page. The next put overwrites them."""
        start = self.room - len(data)
        self._view[start : self.room] = data
        return self._view[start : self.room]
