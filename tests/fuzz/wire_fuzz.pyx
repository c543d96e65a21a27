# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3
"""One input for the messages between processes, from libFuzzer (see main.c): any bytes are decoded.

``rtap/sharing/wire.py`` is Python, so there is nothing for the sanitizers in it.  What has to hold:
decode() raises MessageError and nothing else, and what it lets through has the fields that its kind
has, can be encoded, and is then decoded to the same.  libFuzzer sees which lines were run one after
the other: a trace function counts them where it looks for more counters.
"""

from libc.stdint cimport uint8_t
from libc.stdlib cimport abort

import os
import sys
import traceback

from rtap.sharing import wire

cdef extern from *:
    """
    enum { RTAP_LINES = 4096 };
    extern unsigned char rtap_lines[RTAP_LINES];
    """
    enum: RTAP_LINES
    uint8_t rtap_lines[RTAP_LINES]

cdef unsigned int last_line = 0


def note_line(frame, event, arg):
    global last_line
    cdef unsigned int line = frame.f_lineno
    cdef unsigned int place = (line * 7 + last_line * 31) % RTAP_LINES
    if rtap_lines[place] < 255:
        rtap_lines[place] += 1
    last_line = line
    return note_line


def note_call(frame, event, arg):
    return note_line if frame.f_code.co_filename == wire.__file__ else None


cdef object check(bytes data):
    try:
        message = wire.decode(data)
    except wire.MessageError:
        return None
    assert message.fds == []
    assert message.fields.keys() == wire.FIELDS[message.kind].keys()
    try:
        again = wire.encode(message.kind, **message.fields)
    except ValueError:          # escapes made it too long
        assert len(data) > wire.LIMIT // 12
        return None
    same = wire.decode(again)
    assert (same.kind, same.fields) == (message.kind, message.fields)
    return None


cdef int fuzz_one(const uint8_t *data, size_t size) noexcept nogil:
    global last_line
    with gil:
        last_line = 0
        try:
            check((<const char *>data)[:size])
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            abort()
    return 0


def address():
    """Where ``int fuzz_one(const uint8_t *, size_t)`` is."""
    if "RTAP_NO_LINES" not in os.environ:
        sys.settrace(note_call)
    return <size_t>&fuzz_one
