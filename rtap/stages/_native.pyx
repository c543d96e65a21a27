# SPDX-License-Identifier: BSD-3-Clause
"""Stages of the user's own: native functions, and Python ones."""

cimport cython
from cpython.buffer cimport (
    PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.pycapsule cimport PyCapsule_CheckExact, PyCapsule_GetName, PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint32_t, uintptr_t
from libc.string cimport memcpy, memset

from rtap._core.burst cimport Burst, burst_make
from rtap._core.linux cimport ECANCELED
from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport LAYER_ANY
from rtap.stages._runner cimport (
    DROP, STAGE_ARRAYS, STAGE_WHY, STAGE_WRITES, rtap_burst, stage_burst_t, stage_fn, stage_t,
)
from rtap.stages._stage cimport Stage

import ctypes
import logging
import traceback
from operator import index

logger = logging.getLogger("rtap")

cdef tuple CTYPES_POINTERS = (ctypes._CFuncPtr, ctypes._Pointer, ctypes.c_void_p)


cdef uintptr_t address_of(value, str what) except? 0:
    """The address of something native: a number, or the target of a PyCapsule, a numba ``@cfunc``,
    or a pointer of ctypes or cffi."""
    if PyCapsule_CheckExact(value):
        return <uintptr_t>PyCapsule_GetPointer(value, PyCapsule_GetName(value))
    if hasattr(value, "address") and hasattr(value, "ctypes"):      # numba
        return value.address
    if isinstance(value, CTYPES_POINTERS):
        return ctypes.cast(value, ctypes.c_void_p).value or 0
    if type(value).__module__ == "_cffi_backend":
        from _cffi_backend import FFI
        return int(FFI().cast("uintptr_t", value))
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{what} must be an address, a PyCapsule, or a pointer of ctypes, cffi or "
                        f"numba, got {type(value).__name__}") from None


cdef str name_of(function, str otherwise):
    """The name of a function, for messages.  Asked once, since it may be any object, and may
    fail."""
    try:
        name = function.__name__
    except Exception:
        return otherwise
    return name if type(name) is str else otherwise


cdef class Native(Stage):
    """Native(function, ctx=0)\n--\n

    Calls a native function ``int stage(void *ctx, rtap_burst *burst)``, see rtap_stage.h.

    function: its address, a PyCapsule (as in a Cython module's ``__pyx_capi__``), a numba
              ``@cfunc``, a ctypes or cffi function pointer
    ctx:      its first argument: an address or any of those, or a writable buffer (bytearray,
              array, NumPy array, ctypes object), whose memory is passed directly

    Function and ctx are kept alive.  With an int, a cffi pointer or a capsule, you have to keep its
    target alive yourself.  The function is called from
    the worker's thread, and from several at once when the stage is in routes of several workers.
    """

    cdef object function
    cdef object context
    cdef Py_buffer buffer
    cdef str label              # as `name`, without asking the function again

    def __init__(self, function, ctx=0):
        cdef uintptr_t address = address_of(function, "function"), where = 0
        cdef Py_buffer view
        if address == 0:
            raise ValueError("the function's address is NULL")
        name = name_of(function, None)
        memset(&view, 0, sizeof(view))
        # A ctypes pointer also has a buffer, which is the pointer itself.
        if PyObject_CheckBuffer(ctx) and not isinstance(ctx, CTYPES_POINTERS):
            PyObject_GetBuffer(ctx, &view, PyBUF_WRITABLE)
            where = <uintptr_t>view.buf
        else:
            where = address_of(0 if ctx is None else ctx, "ctx")
        try:
            self.once()
        except RuntimeError:
            PyBuffer_Release(&view)
            raise
        self.buffer = view
        self.function = function
        self.context = ctx
        self.label = "Native" if name is None else f"Native({name})"
        self.ctx = <void *>where
        self.flags = STAGE_WRITES | STAGE_ARRAYS
        self.fn = <stage_fn><void *>address

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)

    @property
    def name(self):
        """The function's name, or its class's name if it has none."""
        return self.label or type(self).__name__

    cdef int passes(self, int layer, uint32_t n_targets) except -1:
        Stage.passes(self, layer, n_targets)
        return LAYER_ANY        # it may do anything to frames


cdef str text_of(exc):
    """An exception in one line.  Raises nothing, even if the exception's own code does."""
    try:
        text = " ".join(f"{type(exc).__name__}: {exc}".split())
    except BaseException:
        try:
            text = f"{type(exc).__name__}, whose message cannot be read"
        except BaseException:
            return ""
    return text.removesuffix(":")


cdef int put_text(char *to, str text) except -1:
    """Writes as much of the text as there is room for, in whole characters."""
    cdef bytes code = text[:STAGE_WHY].encode("utf-8", "backslashreplace")[:STAGE_WHY - 1]
    cdef bytes whole = code.decode("utf-8", "ignore").encode()
    memcpy(to, <const char *>whole, len(whole) + 1)
    return 0


cdef int let_go(exc) except -1:
    """Clears the local variables in the tracebacks of an exception and its causes; a burst is among
    them."""
    cdef list found = [exc]
    for exc in found:
        traceback.clear_frames(exc.__traceback__)
        found += [other for other in (exc.__cause__, exc.__context__)
                  if other is not None and not any(other is known for known in found)]
    return 0


cdef bint passed(void *ctx, rtap_burst *burst) noexcept with gil:
    """Whether the function succeeded for all frames.  If anything fails, even the handling of a
    failure, this is false, which a `noexcept` function returns then."""
    cdef Call stage = <Call>ctx
    cdef stage_t *how = (<stage_burst_t *>burst).stage
    cdef Burst frames
    cdef mbuf_t **v = <mbuf_t **>burst.frames
    cdef uint32_t i
    try:
        frames = burst_make(burst.n)
        for i in range(burst.n):
            frames.push(v[i])
        verdicts = stage.function(frames)
        if verdicts is None:
            return True
        if len(verdicts) != burst.n:
            raise ValueError(f"{len(verdicts)} verdicts for a burst of {burst.n}")
        for i in range(burst.n):
            verdict = index(verdicts[i])
            if verdict != DROP and not 0 <= verdict < burst.n_targets:
                raise ValueError(f"verdict {verdict} is neither DROP nor one of "
                                 f"{burst.n_targets} targets")
            burst.verdict[i] = <uint32_t>verdict
        return True
    except BaseException as exc:
        try:
            stage.tell(how, exc)
        finally:
            let_go(exc)
    return False


cdef int call(void *ctx, rtap_burst *burst) noexcept nogil:
    return 0 if passed(ctx, burst) else -ECANCELED


cdef class Call(Stage):
    """Call(function)\n--\n

    Calls a Python function with each burst, which takes the GIL once.

    ``function(burst)`` gets a :class:`rtap.Burst` and returns None, or for each frame ``DROP`` or
    the index of a target.  Frames may be read and written.  Frames that it keeps beyond the call do
    not change: later stages that write work on copies.  A plain callable in a route's ``stages``
    becomes a Call.

    An exception, of any class, frees the burst and ends the route; it is logged, and the route's
    ``error`` has its text.  ``exception`` is the last one.  When Python calls the stage on a burst,
    it raises the exception instead.
    """

    cdef object function
    cdef object raised
    cdef str label              # as `name`, without asking the function again

    def __init__(self, function):
        if not callable(function):
            raise TypeError(f"a stage is a Stage or a callable, got {type(function).__name__}")
        name = name_of(function, type(function).__name__)
        self.once()
        self.function = function
        self.label = name
        self.flags = STAGE_WRITES
        self.ctx = <void *>self
        self.fn = <stage_fn>call

    @property
    def exception(self):
        """The last exception that the function raised in a route; None before."""
        with cython.critical_section(self):
            return self.raised

    @property
    def name(self):
        """The function's name, or its class's name if it has none."""
        return self.label or type(self).__name__

    cdef int passes(self, int layer, uint32_t n_targets) except -1:
        Stage.passes(self, layer, n_targets)
        return LAYER_ANY        # it may do anything to frames

    cdef int tell(self, stage_t *how, exc) except -1:
        """Reports an exception: to the caller from Python, else to the route and the log."""
        if how.direct:
            how.raised = <void *>exc
            Py_INCREF(exc)
            return 0
        with cython.critical_section(self):
            self.raised = exc
        put_text(how.why, text_of(exc))
        logger.error("stage %s failed", self.label, exc_info=exc)
        return 0

    cdef int failed(self, stage_t *stage, int error) except -1:
        if stage.raised == NULL:
            return Stage.failed(self, stage, error)
        exc = <object>stage.raised
        stage.raised = NULL
        Py_DECREF(exc)
        raise exc
