# SPDX-License-Identifier: BSD-3-Clause
"""Stages of the user's own: native functions, and Python ones."""

cimport cython
from cpython.buffer cimport (
    PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.pycapsule cimport PyCapsule_CheckExact, PyCapsule_GetName, PyCapsule_GetPointer
from libc.stdint cimport uint32_t, uintptr_t

from rtap._burst cimport Burst, burst_make
from rtap._chain cimport DROP, STAGE_ARRAYS, STAGE_WRITES, rtap_burst, stage_fn
from rtap._linux cimport ECANCELED
from rtap._pool cimport mbuf_t
from rtap.stages._stage cimport Stage

import ctypes
import logging
import traceback
from operator import index

logger = logging.getLogger("rtap")

cdef tuple CTYPES_POINTERS = (ctypes._CFuncPtr, ctypes._Pointer, ctypes.c_void_p)


cdef uintptr_t address_of(value, str what) except? 0:
    """Where something native lies: a number, or what a PyCapsule, a numba ``@cfunc``, or a pointer
    of ctypes or cffi points to."""
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


cdef class Native(Stage):
    """Calls a native function ``int stage(void *ctx, rtap_burst *burst)``, see rtap_stage.h.

    function: its address, a PyCapsule (as in a Cython module's ``__pyx_capi__``), a numba
              ``@cfunc``, a ctypes or cffi function pointer
    ctx:      what it is given: an address or any of those, or a writable buffer (bytearray, array,
              NumPy array, ctypes object), which is handed over as it lies in memory

    Function and ctx are kept alive.  An int, a cffi pointer or a capsule says nothing of what it
    points to: whoever passes one sees to it that this lives as long.  The function is called from
    the worker's thread, and from several at once when the stage is in routes of several workers.
    """

    cdef object function
    cdef object context
    cdef Py_buffer buffer

    def __init__(self, function, ctx=0):
        if self.fn != NULL:
            raise RuntimeError("a Native stage is made once")
        address = address_of(function, "function")
        if address == 0:
            raise ValueError("the function's address is NULL")
        # A ctypes pointer has a buffer as well: the pointer itself.
        if PyObject_CheckBuffer(ctx) and not isinstance(ctx, CTYPES_POINTERS):
            PyObject_GetBuffer(ctx, &self.buffer, PyBUF_WRITABLE)
            self.ctx = self.buffer.buf
        else:
            self.ctx = <void *><uintptr_t>address_of(0 if ctx is None else ctx, "ctx")
        self.function = function
        self.context = ctx
        self.flags = STAGE_WRITES | STAGE_ARRAYS
        self.fn = <stage_fn><void *><uintptr_t>address

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)

    @property
    def name(self):
        name = getattr(self.function, "__name__", None)
        return f"Native({name})" if isinstance(name, str) else "Native"


cdef int call(void *ctx, rtap_burst *burst) noexcept with gil:
    cdef Call stage = <Call>ctx
    cdef Burst frames
    cdef mbuf_t **v = <mbuf_t **>burst.frames
    cdef uint32_t i
    try:
        frames = burst_make(burst.n)
        for i in range(burst.n):
            frames.push(v[i])
        verdicts = stage.function(frames)
        if verdicts is None:
            return 0
        if len(verdicts) != burst.n:
            raise ValueError(f"{len(verdicts)} verdicts for a burst of {burst.n}")
        for i in range(burst.n):
            verdict = index(verdicts[i])
            if verdict != DROP and not 0 <= verdict < burst.n_targets:
                raise ValueError(f"verdict {verdict} is neither DROP nor one of "
                                 f"{burst.n_targets} targets")
            burst.verdict[i] = <uint32_t>verdict
        return 0
    except BaseException as exc:
        with cython.critical_section(stage):
            stage.raised = exc
        logger.exception("stage %s failed", stage.name)
        traceback.clear_frames(exc.__traceback__)       # or it keeps the burst
        return -ECANCELED


cdef class Call(Stage):
    """Calls a Python function with each burst, which takes the GIL once.

    ``function(burst)`` gets a :class:`rtap.Burst` and returns None, or for each frame ``DROP`` or
    the index of a target.  Frames may be read and written; those that it keeps beyond the call stay
    as they are then, later stages that write work on copies.  A plain callable in a route's
    ``stages`` becomes one of these.

    An exception ends the route, and is logged; ``exception`` has it.  Called on a burst from Python
    it is raised as it is.
    """

    cdef object function
    cdef object raised

    def __init__(self, function):
        if not callable(function):
            raise TypeError(f"a stage is a Stage or a callable, got {type(function).__name__}")
        self.function = function
        self.flags = STAGE_WRITES
        self.ctx = <void *>self
        self.fn = <stage_fn>call

    @property
    def exception(self):
        """The last one that the function raised in a route; None before."""
        with cython.critical_section(self):
            return self.raised

    @property
    def name(self):
        name = getattr(self.function, "__name__", None)
        return name if isinstance(name, str) else type(self.function).__name__

    cdef int failed(self, int error) except -1:
        with cython.critical_section(self):
            exception, self.raised = self.raised, None
        if exception is None:
            return Stage.failed(self, error)
        raise exception
