# SPDX-License-Identifier: BSD-3-Clause
"""Everything public has a docstring."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import rtap
from rtap import offload, stages

MODULES: tuple[ModuleType, ...] = (rtap, stages, offload)


def public(module: ModuleType) -> dict[str, Any]:
    names = [*module.__all__, *(["open"] if module is rtap else [])]
    found = {f"{module.__name__}.{name}": getattr(module, name) for name in names}
    return {
        name: thing
        for name, thing in found.items()
        if isinstance(thing, type) or (callable(thing) and not inspect.ismodule(thing))
    }


THINGS = {name: thing for module in MODULES for name, thing in public(module).items()}
CLASSES = {name: thing for name, thing in THINGS.items() if isinstance(thing, type)}


def said(thing: object) -> str:
    """A docstring without the signature that Cython puts in front."""
    if isinstance(thing, (classmethod, staticmethod)):
        thing = thing.__func__
    text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    # "name(arguments)" or "Class.name: type" on its own line, or over several if it is long.
    return re.sub(
        r"\A[\w.]+(?:\(.*?\)(?: -> [^\n]+)?|: \w+)(?:\n|\Z)", "", text, flags=re.S
    ).strip()


def members(cls: type) -> Iterator[tuple[str, object]]:
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "rtap":
            yield from ((k, v) for k, v in vars(base).items() if not k.startswith("_"))


def documented_elsewhere(cls: type) -> set[str]:
    """Names in the docstring of a class or of a base, and names with a ``#:`` comment."""
    found: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] != "rtap":
            continue
        text = base.__doc__ or ""
        for quoted in re.findall(r"`([^`\n]+)`", text):
            found |= set(re.findall(r"\w+", quoted))
        found |= set(re.findall(r"^ +(\w+): ", text, re.M))
        try:
            source = inspect.getsource(base)
        except (TypeError, OSError):  # a compiled class
            continue
        found |= set(re.findall(r"^ +#: [^\n]*\n(?: +#:[^\n]*\n)* +(\w+)\b", source, re.M))
    return found


def values(cls: type) -> set[str]:
    """Data members, which cannot have a docstring: fields, slots, readonly attributes."""
    if issubclass(cls, enum.Enum):
        return set(cls.__members__)
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    fields = set(getattr(cls, "_fields", ()))
    plain = {
        name
        for name, member in members(cls)
        if inspect.ismemberdescriptor(member)
        or (inspect.isgetsetdescriptor(member) and not member.__doc__)
        or isinstance(member, int)
    }
    return fields | plain


@pytest.mark.parametrize("name", sorted(THINGS))
def test_every_public_name_says_what_it_is(name: str) -> None:
    assert len(said(THINGS[name])) > 15


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_member_says_what_it_is(name: str) -> None:
    cls = CLASSES[name]
    silent = {member for member, value in members(cls) if not said(value)} - values(cls)
    assert silent == set()


# The names of packet types combine the layers that the docstring explains.
@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"rtap.offload.PacketType"}))
def test_every_value_is_explained_by_its_class(name: str) -> None:
    assert sorted(values(CLASSES[name]) - documented_elsewhere(CLASSES[name])) == []


def test_a_class_that_says_nothing_is_seen() -> None:
    """Checks this module's own detection."""

    class Silent:
        __module__ = "rtap.somewhere"

        def method(self) -> None: ...

        @property
        def value(self) -> int:
            """A value."""
            return 0

    assert [name for name, value in members(Silent) if not said(value)] == ["method"]
    assert said(rtap.Mempool.alloc_burst).startswith("A :class:`Burst`")

    def signed() -> None: ...

    signed.__doc__ = "Mbuf.free(self, a: int = (1))\n"
    assert said(signed) == ""
