# SPDX-License-Identifier: BSD-3-Clause
"""Constructors of the extension types: signatures, objects made twice, and objects never made."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rtap
from rtap import Burst, Mbuf, Mempool, Worker, offload, stages
from rtap._core.queue import QueueBase
from rtap._core.rx_queue import RxQueueBase
from rtap._core.tx_queue import TxQueueBase
from rtap._queues.generate import GenerateRxQueue
from rtap._queues.noisy import NoisyRxQueue
from rtap._queues.null import NullRxQueue, NullTxQueue
from rtap._queues.shm_ring import ShmRing
from rtap._ring import RxQueue, TxQueue
from rtap._udp.peers import Peers
from rtap._udp.queues import UdpRxQueue, UdpTxQueue

# The queues made here have no descriptor.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed [rt]x queue:ResourceWarning")

SOURCES = Path(__file__).resolve().parents[2]
#: Of arguments, in a ``.pyx``.
TYPES = r"bint|int|str|bytes|uint\d+_t|Mempool|Peers|RxQueueBase"


def stage(burst: Burst) -> None:
    pass


class Held(int):
    """A descriptor that its owner keeps open."""

    owner: object


def shared_ring() -> dict[str, Any]:
    pool = Mempool(8, shared=True)
    ring = ShmRing.create(pool, 8)
    fd = Held(ring.fd)
    fd.owner = ring
    return {"fd": fd, "size": 8, "pool": pool, "event_fd": ring.event_fd, "name": "r"}


#: Each class, with arguments of all kinds for its constructor.
MADE: dict[type, Callable[[], dict[str, Any]]] = {
    Worker: lambda: {
        "cpu": None,
        "wait": "poll",
        "burst": 8,
        "resume_latency": 0,
        "name": "w",
    },
    Mempool: lambda: {
        "n": 8,
        "data_room": 256,
        "headroom": 64,
        "memfd": False,
        "shared": True,
        "name": "p",
    },
    offload.Gro: lambda: {
        "udp": True,
        "timeout": 0.5,
        "max_flows": 4,
        "max_frames": 16,
        "max_length": 2000,
        "fixed_id": True,
        "l2": True,
    },
    Peers: lambda: {"family": 2, "size": 8, "unknown": "drop"},
    UdpRxQueue: lambda: {
        "fd": 1 << 20,
        "pool": Mempool(8),
        "peers": Peers(2),
        "name": "q",
        "connected": True,
        "queue_id": 1,
        "port": 2,
        "nb_desc": 32,
        "gil": "hold",
    },
    UdpTxQueue: lambda: {
        "fd": 1 << 20,
        "peers": Peers(10),
        "name": "q",
        "connected": True,
        "queue_id": 1,
        "port": 2,
        "nb_desc": 32,
        "gil": "hold",
    },
    RxQueue: lambda: {
        "fd": 1 << 20,
        "pool": Mempool(8),
        "name": "q",
        "queue_id": 1,
        "port": 2,
        "nb_desc": 8,
        "vnet_hdr": True,
        "max_frame": 1514,
        "scatter": True,
        "l2": True,
        "offloads": 0,
        "split": None,
        "shared": False,
        "packet": False,
        "state_fd": -1,
        "engine": "syscall",
        "gil": "hold",
    },
    TxQueue: lambda: {
        "fd": 1 << 20,
        "name": "q",
        "queue_id": 1,
        "port": 2,
        "nb_desc": 8,
        "vnet_hdr": True,
        "l2": True,
        "ordered": True,
        "on_refused": None,
        "gro": True,
        "gro_udp": True,
        "shared": False,
        "packet": False,
        "state_fd": -1,
        "engine": "syscall",
        "gil": "hold",
    },
    NullRxQueue: lambda: {
        "pool": Mempool(8),
        "name": "q",
        "size": 64,
        "queue_id": 1,
        "port": 2,
        "nb_desc": 8,
        "gil": "hold",
    },
    NullTxQueue: lambda: {"name": "q", "queue_id": 1, "port": 2, "nb_desc": 8, "gil": "hold"},
    NoisyRxQueue: lambda: {
        "inner": NullRxQueue(Mempool(8), name="q"),
        "buffer_size": 2,
        "flush_ms": 1,
        "memory_mb": 1,
        "reads": 1,
        "writes": 1,
        "reads_writes": 1,
    },
    GenerateRxQueue: lambda: {
        "pool": Mempool(8),
        "header": bytes(14) + b"E" + bytes(19),
        "lengths": [64],
        "name": "q",
        "flows": 2,
        "vary": "source",
    },
    ShmRing: shared_ring,
    stages.Call: lambda: {"function": stage},
    stages.ChecksumFill: lambda: {"l2": True},
    stages.ChecksumVerify: lambda: {"drop": False, "l2": True},
    stages.Counter: dict,
    stages.Echo: lambda: {"mac": "02:00:00:00:00:01", "others": 1},
    stages.FiveTupleSwap: dict,
    stages.Gro: lambda: {"udp": True, "max_length": 2000, "fixed_id": True, "l2": True},
    stages.Gso: lambda: {"pool": Mempool(8), "l2": True},
    stages.MacRewrite: lambda: {"destination": bytes(6), "source": bytes(6)},
    stages.MacSwap: dict,
    stages.Match: lambda: {
        "protocol": 17,
        "source": "10.0.0.0/8",
        "destination": "10.0.0.0/8",
        "source_port": 1,
        "destination_port": (1, 2),
        "action": 1,
        "otherwise": 2,
        "l2": True,
    },
    stages.Native: lambda: {"function": 1, "ctx": 2},
    stages.Spread: lambda: {"ports": True, "l2": True, "seed": 3},
}
classes = pytest.mark.parametrize("cls", MADE, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")


class Sly:
    """Replaces a value, and runs code whenever it is read."""

    def __init__(self, value: Any, act: Callable[[], None]) -> None:
        self.value, self.act = value, act

    def look(self) -> Any:
        self.act()
        return self.value

    def __index__(self) -> int:
        return int(self.look())

    def __float__(self) -> float:
        return float(self.look())

    def __bool__(self) -> bool:
        return bool(self.look())

    def __eq__(self, other: object) -> bool:
        return bool(self.look() == other)

    def __hash__(self) -> int:
        return hash(self.look())

    def __len__(self) -> int:
        return len(self.look())

    def __getitem__(self, key: Any) -> Any:
        return self.look()[key]

    def __str__(self) -> str:
        return str(self.look())

    def __call__(self, burst: Burst) -> None:
        self.act()

    @property
    def __name__(self) -> str:
        self.act()
        return "sly"


class Liar(int):
    """A number that claims to be in any range."""

    def __ge__(self, other: object) -> bool:
        return True

    __le__ = __gt__ = __lt__ = __ge__


def outcome_of(act: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    try:
        act(*args, **kwargs)
    except Exception as exc:  # noqa: BLE001 - any exception, but no crash
        return f"{type(exc).__name__}: {exc}"
    return "made"


# ---- made only once


@classes
def test_made_once(cls: Any) -> None:
    thing = cls(**MADE[cls]())
    with pytest.raises(RuntimeError, match="once"):
        thing.__init__(**MADE[cls]())
    never = cls.__new__(cls)
    never.__init__(**MADE[cls]())


@classes
def test_made_once_whatever_an_argument_does(cls: Any) -> None:
    """When an argument's code initializes the object first, it keeps that state."""
    for name in MADE[cls]():
        thing = cls.__new__(cls)
        arguments = MADE[cls]()
        looks: list[str] = []

        def act(thing: Any = thing, looks: list[str] = looks) -> None:
            if not looks:
                looks.append("made")
                thing.__init__(**MADE[cls]())

        arguments[name] = Sly(arguments[name], act)
        outcome = outcome_of(thing.__init__, **arguments)
        if looks:
            assert re.match("RuntimeError: .*once|TypeError|ValueError", outcome), name
        else:
            assert re.match("made|TypeError|ValueError", outcome), name


def test_the_arguments_that_run_code_do() -> None:
    """Otherwise the test above would show nothing."""
    cases: list[tuple[Any, str]] = [
        (Worker, "burst"),
        (Worker, "resume_latency"),
        (Mempool, "n"),
        (Mempool, "memfd"),
        (offload.Gro, "timeout"),
        (NoisyRxQueue, "buffer_size"),
        (GenerateRxQueue, "lengths"),
        (RxQueue, "max_frame"),
        (TxQueue, "gro"),
        (stages.Match, "action"),
        (stages.Native, "function"),
        (stages.Call, "function"),
    ]
    for cls, name in cases:
        looked: list[bool] = []
        arguments = MADE[cls]()
        arguments[name] = Sly(arguments[name], lambda looked=looked: looked.append(True))
        cls(**arguments)
        assert looked, (cls, name)


def test_numbers_that_lie_about_themselves() -> None:
    for make in (
        lambda: Worker(burst=Liar(100_000)),
        lambda: Mempool(Liar(1 << 40)),
        lambda: Mempool(8, Liar(-5)),
        lambda: stages.Spread(seed=Liar(1 << 70)),
        lambda: stages.Match(action=Liar(-1)),
    ):
        with pytest.raises(ValueError, match=r"must be \d+\.\.\d+, got "):
            make()
    with pytest.raises(ValueError, match="must be"):
        NullRxQueue(Mempool(8), name="q", nb_desc=Liar(1 << 20))


def test_no_arguments_are_taken_that_mean_nothing() -> None:
    makers: list[Any] = [stages.MacSwap, stages.FiveTupleSwap, stages.Counter]
    for make in makers:
        with pytest.raises(TypeError):
            make(5)
        with pytest.raises(TypeError):
            make(l2=False)


# ---- never made


def attempts(pool: Mempool) -> list[tuple[Any, ...]]:
    burst = pool.alloc_burst(1, bytes(60))
    return [(), (0,), (1,), (0, 1), (burst,), (bytes(60), pool), (1500, pool), (0, bytes(1))]


def used(thing: Any, name: str, arguments: tuple[Any, ...]) -> None:
    found = getattr(thing, name)
    if callable(found):
        found(*arguments)


NEVER: list[type] = [*MADE, Burst, Mbuf, stages.Stage, QueueBase, RxQueueBase, TxQueueBase]
UNTOUCHED = {"__class__", "__new__", "__init__", "__dict__", "__pyx_vtable__"}


@pytest.mark.parametrize("cls", NEVER, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_an_object_that_was_never_made(cls: Any) -> None:
    """After ``__new__`` without ``__init__``, every use raises or returns, and does not crash."""
    pool = Mempool(16)
    for name in dir(cls):
        if name in UNTOUCHED:
            continue
        for arguments in attempts(pool):
            thing = cls.__new__(cls)
            outcome = outcome_of(used, thing, name, arguments)
            assert not outcome.startswith("SystemError"), (name, arguments)
        for value in (0, None, "x"):
            thing = cls.__new__(cls)
            outcome = outcome_of(setattr, thing, name, value)
            assert not outcome.startswith("SystemError"), (name, value)
    assert pool.in_use == 0


def test_it_says_that_it_was_never_made() -> None:
    burst = Burst()
    cases: list[Callable[[], object]] = [
        lambda: Worker.__new__(Worker).start(),
        lambda: Worker.__new__(Worker).stats(),
        lambda: Worker.__new__(Worker).join(),
        lambda: offload.Gro.__new__(offload.Gro).coalesce(burst),
        lambda: RxQueue.__new__(RxQueue).rx_burst(),
        lambda: TxQueue.__new__(TxQueue).tx_burst(burst),
        lambda: NoisyRxQueue.__new__(NoisyRxQueue).start(),
        lambda: NoisyRxQueue(RxQueue.__new__(RxQueue)),
        lambda: stages.Match.__new__(stages.Match)(burst),
        lambda: stages.MacSwap.__new__(stages.MacSwap)(burst),
    ]
    for use in cases:
        with pytest.raises(RuntimeError, match="never initialised"):
            use()


# ---- signatures


def stub_of(cls: type) -> inspect.Signature:
    """The signature of a class's constructor in its module's stub, without annotations."""
    module = importlib.import_module(cls.__module__)
    assert module.__file__ is not None
    stub = Path(module.__file__).parent / f"{cls.__module__.rpartition('.')[2]}.pyi"
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    return made_of(ast.unparse(part.args))
    return inspect.Signature()


def source_of(cls: type) -> inspect.Signature:
    """The signature of a class's constructor in the source, without C types."""
    path = SOURCES / (cls.__module__.replace(".", "/") + ".pyx")
    text = path.read_text().partition(f"cdef class {cls.__name__}(")[2]
    text = text or path.read_text().partition(f"cdef class {cls.__name__}:")[2]
    found = re.search(
        r"    def __init__\((.*?)\):\n", text.partition("\ncdef class ")[0], re.DOTALL
    )
    if found is None:
        return inspect.Signature()
    return made_of(
        re.sub(
            r"\b(?:bint|int|str|bytes|uint\d+_t|Mempool|Peers|RxQueueBase) |not None", "", found[1]
        )
    )


def made_of(arguments: str) -> inspect.Signature:
    namespace: dict[str, Any] = {"DROP": stages.DROP}
    exec(f"from __future__ import annotations\ndef f({arguments}): ...", namespace)
    signature = inspect.signature(namespace["f"])
    return signature.replace(
        parameters=[
            p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"
        ]
    )


@classes
def test_a_signature_is_that_of_the_constructor(cls: type) -> None:
    """``help()``, the stub, the source and the accepted arguments all agree."""
    shown = inspect.signature(cls)
    assert shown == source_of(cls)
    stub = stub_of(cls)
    assert list(shown.parameters) == list(stub.parameters) == list(MADE[cls]())
    for name, parameter in stub.parameters.items():
        assert shown.parameters[name].kind == parameter.kind, name
        if parameter.default is not ...:
            assert shown.parameters[name].default == parameter.default, name
    assert cls.__doc__ is not None
    assert "--" not in cls.__doc__.partition("\n\n")[0]


def test_everything_public_has_a_signature() -> None:
    made_by_others = {Mbuf}
    modules: list[Any] = [rtap, stages, offload]
    for module in modules:
        for name in module.__all__:
            thing = getattr(module, name)
            if not callable(thing) or thing in made_by_others:
                continue
            if isinstance(thing, type) and issubclass(thing, BaseException):
                continue
            inspect.signature(thing)
            if not isinstance(thing, type) or not thing.__module__.startswith("rtap"):
                continue
            for attribute, value in vars(thing).items():
                if not attribute.startswith("_") and callable(value):
                    inspect.signature(value)
