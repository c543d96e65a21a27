# SPDX-License-Identifier: BSD-3-Clause
"""Whether a burst releases the GIL: each queue has its own ``gil_t``, which learns."""

from libc.stdint cimport uint64_t

cimport rtap._core.compat as _compat

cdef enum:
    # gil_t.mode
    GIL_AUTO = 0
    GIL_RELEASE = 1
    GIL_HOLD = 2

    HOLD_BURST_MAX = 64         # longer bursts always release the GIL
    SLOW_ACQUIRE_NS = 500_000   # if taking the GIL back takes longer, another thread uses it,
    HOLD_NS = 250_000_000       # and the GIL is kept for this long before the next try


cdef struct gil_t:
    int mode
    uint64_t hold_until         # CLOCK_MONOTONIC ns


cdef inline int gil_mode(str name) except -1:
    """The mode of that name: "auto", "release" or "hold".  ValueError for another one."""
    if name == "auto":
        return GIL_AUTO
    if name == "release":
        return GIL_RELEASE
    if name == "hold":
        return GIL_HOLD
    raise ValueError(f"gil must be one of auto, release, hold, got {name!r}")


cdef inline bint gil_keep(gil_t *g, Py_ssize_t n) noexcept:
    """Whether a burst of ``n`` frames keeps the GIL."""
    if g.mode == GIL_RELEASE or n > HOLD_BURST_MAX:
        return False
    if g.mode == GIL_HOLD:
        return True
    return g.hold_until != 0 and _compat.now_ns() < g.hold_until


cdef inline void gil_taken_back(gil_t *g, uint64_t asked) noexcept:
    """Learns from the time since ``asked``.

    Beside a busy Python thread each release costs a switch interval (5 ms), a thousand times a
    short burst.  So the GIL is kept for a while; an occasional release finds out whether the
    other thread is still busy."""
    cdef uint64_t now = _compat.now_ns()
    g.hold_until = now + HOLD_NS if now - asked > SLOW_ACQUIRE_NS else 0
