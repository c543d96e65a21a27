# SPDX-License-Identifier: BSD-3-Clause
"""Coverage-guided fuzzing of the native code: libFuzzer with AddressSanitizer over its C.

The C files that Cython made for the release build are compiled again with clang, and a harness in
tests/fuzz feeds them. The harness documents what it does with an input and what it checks. There
are three: ``offload`` tests the kernels that read the bytes of one frame; ``frames`` runs programs
over pools, mbufs, requests, GSO, GRO and stages; ``wire`` decodes messages between processes, which
is Python code.

    python tools/fuzz.py                    10 million inputs for offload, 2 million for frames,
                                            200,000 for wire
    python tools/fuzz.py --target frames    only that harness
    python tools/fuzz.py --runs 0           no new inputs: seeds, corpus and earlier finds only
    python tools/fuzz.py --reduce           rewrite the corpus from what was found

The test suite replays the corpora of the repository through the same harnesses, compiled with gcc
and without coverage (``build_replay``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HARNESS = ROOT / "tests" / "fuzz"
GENERATED = ROOT / "build" / "cython-release" / "rtap"
OUT = ROOT / "build" / "fuzz"
KERNELS = (
    *("_core/burst", "_core/live", "_core/mbuf", "_core/mempool", "_core/pool", "_core/queue"),
    *("_core/memfd", "_core/shm", "_core/traffic", "_core/workers"),
    *("_frames/checksum", "_frames/coalesce", "_frames/gro", "_frames/parse", "_frames/request"),
    *("_frames/rewrite", "_frames/segment", "_frames/verify", "_frames/vnet"),
    *("stages/_checksums", "stages/_count", "stages/_mac", "stages/_merge", "stages/_runner"),
    *("stages/_split", "stages/_spread", "stages/_stage", "stages/_tuple"),
)
#: Python modules of rtap that the kernels import when they are loaded.
SCRIPTS = ("errors.py", "ether.py", "sharing/wire.py")
HARNESSES = (
    "frames_model",
    "frames_flat",
    "frames_program",
    "frames_fuzz",
    "offload_fuzz",
    "wire_fuzz",
)
SANITIZE = ["-g1", "-fno-omit-frame-pointer", "-fno-strict-aliasing", "-fno-sanitize-recover=all"]
LONGEST = 2048
#: Longest input in the repository's corpora, in bytes.
KEPT = 600
#: Largest size of such a corpus, in bytes.
CORPUS_MAX = 100 * 1024


@dataclass(frozen=True)
class Target:
    """A harness, its corpus, and a planted fault that it must detect."""

    name: str
    runs: float
    longest: int
    #: A file of rtap, and the replacements that plant the fault.
    planted: tuple[str, tuple[tuple[str, str], ...]]

    @property
    def corpus(self) -> Path:
        return HARNESS / ("corpus.bin" if self.name == "offload" else f"corpus-{self.name}.bin")

    def out(self, what: str) -> Path:
        return OUT / self.name / what

    def seeds(self) -> Iterator[bytes]:
        return {"offload": seeds, "frames": programs, "wire": messages}[self.name]()


TARGETS = {
    target.name: target
    for target in (
        # A wrong bound that makes the parser read one byte too far.
        Target(
            "offload",
            10e6,
            LONGEST,
            (
                "_frames/parse.pyx",
                (("        if q.l4 + 20 > seen:\n", "        if q.l4 + 12 > seen:\n"),),
            ),
        ),
        # A copy of a whole segment into one slot, even when the slot is smaller.
        Target(
            "frames",
            2e6,
            256,
            (
                "_core/pool.pyx",
                (
                    ("n if n <= m.buf_len else m.buf_len - m.data_off\n", "n\n"),
                    (
                        "    _compat.check(m.direct == NULL and m.data_off + k <= m.buf_len)\n"
                        "    memcpy(mbuf_data(m), src, k)\n",
                        "    memcpy(mbuf_data(m), src, k)\n",
                    ),
                ),
            ),
        ),
        # Fields that no message has get past the check.
        Target(
            "wire",
            2e5,
            LONGEST,
            (
                "sharing/wire.py",
                (("fields.keys() != expected.keys()", "not fields.keys() >= expected.keys()"),),
            ),
        ),
    )
}


def unavailable(compiler: str = "clang") -> str:
    """Why this machine cannot build the harness, in one phrase; "" when it can."""
    if shutil.which(compiler) is None:
        return f"needs {compiler}"
    if not any(GENERATED.glob("_frames/segment.c")):
        return "needs the release build (make build)"
    return ""


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"fuzz: {shlex.join(command)}\n{done.stdout}{done.stderr}")


def generate(source: Path, target: Path, include: Path) -> None:
    """Translate one .pyx file to C, with the build's settings."""
    from Cython.Compiler import Main
    from Cython.Compiler.Options import default_options

    directives = {"language_level": 3, "wraparound": False, "boundscheck": False}
    directives |= {"cdivision": True, "initializedcheck": False, "freethreading_compatible": True}
    options = Main.CompilationOptions(
        default_options,
        include_path=[str(include), str(HARNESS)],
        output_file=str(target),
        compiler_directives=directives,
    )
    done = Main.compile([str(source)], options)
    if done.num_errors:
        sys.exit(f"fuzz: Cython stopped at {source}")


def newer(target: Path, *sources: Path) -> bool:
    return target.exists() and all(
        target.stat().st_mtime > source.stat().st_mtime for source in sources
    )


def base(compiler: list[str]) -> list[str]:
    """The command that compiles one of the C files."""
    uring = subprocess.run(
        ["pkg-config", "--cflags", "liburing"], capture_output=True, text=True, check=True
    )
    include = [f"-I{ROOT / 'rtap' / 'include'}", f"-I{sysconfig.get_path('include')}"]
    return [*compiler, *SANITIZE, *include, *shlex.split(uring.stdout), "-DNDEBUG=1"]


def compile_all(
    cc: list[str], module: list[str], link: list[str], out: Path, planted: Path
) -> Path:
    """Compile what is out of date below `out`; `planted` replaces the kernel of the same name."""
    library = out / "lib"
    for package in {Path("rtap", name).parent for name in (*KERNELS, *SCRIPTS)}:
        (library / package).mkdir(parents=True, exist_ok=True)
        (library / package / "__init__.py").touch()
    for name in SCRIPTS:
        shutil.copy(ROOT / "rtap" / name, library / "rtap" / name)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    declared = [*(ROOT / "rtap").rglob("*.pxd"), *HARNESS.glob("*.pxd")]
    jobs = []
    for name in KERNELS:
        c_file = planted if planted.stem == Path(name).name else GENERATED / f"{name}.c"
        target = library / "rtap" / f"{name}{suffix}"
        if not newer(target, c_file):
            jobs.append([*cc, *module, str(c_file), "-o", str(target)])
    for name in HARNESSES:
        c_file = OUT / f"{name}.c"
        if not newer(c_file, HARNESS / f"{name}.pyx", *declared):
            generate(HARNESS / f"{name}.pyx", c_file, ROOT)
        target = library / f"{name}{suffix}"
        if not newer(target, c_file):
            jobs.append([*cc, *module, str(c_file), "-o", str(target)])
    fuzzer = out / "fuzzer"
    if not newer(fuzzer, HARNESS / "main.c"):
        where = sysconfig.get_config_var("LIBDIR")
        libraries = [f"-L{where}", f"-Wl,-rpath,{where}"]
        libraries += [f"-lpython{sysconfig.get_config_var('LDVERSION')}", "-rdynamic"]
        for needed in ("LIBS", "SYSLIBS"):  # needed to link a static libpython
            libraries += shlex.split(sysconfig.get_config_var(needed) or "")
        jobs.append([*cc, *link, str(HARNESS / "main.c"), "-o", str(fuzzer), *libraries])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(run, jobs))
    return fuzzer


def build() -> Path:
    """Build the fuzzer where it is out of date, and return its path."""
    module = ["-fsanitize=fuzzer-no-link,address", "-fPIC", "-shared"]
    return compile_all(base(["clang", "-O2"]), module, ["-fsanitize=fuzzer,address"], OUT, Path())


def build_replay(planted: Target | None = None) -> Path:
    """Build the harnesses with gcc, as a program that runs the inputs from stdin and ends.

    With `planted`, the fault of that target is compiled in.
    """
    module = ["-fsanitize=address", "-fPIC", "-shared"]
    link = ["-fsanitize=address", "-DRTAP_REPLAY"]
    cc = base(["gcc", "-O0"])
    out = OUT / "replay"
    program = compile_all(cc, module, link, out, Path())
    if planted:
        wrong = planted.out("planted")
        shutil.copytree(out, wrong, dirs_exist_ok=True)
        if planted.planted[0].endswith(".py"):
            program = compile_all(cc, module, link, wrong, Path())
            (wrong / "lib" / "rtap" / planted.planted[0]).write_text(faulty(planted))
        else:
            program = compile_all(cc, module, link, wrong, plant(planted, wrong))
    return program


def faulty(target: Target) -> str:
    """A file of rtap with the target's fault in it."""
    name, changes = target.planted
    text = (ROOT / "rtap" / name).read_text()
    for right, wrong in changes:
        if right not in text:
            sys.exit(f"fuzz: there is no {right!r} in {name}")
        text = text.replace(right, wrong, 1)
    return text


def plant(target: Target, out: Path) -> Path:
    """Write the C file of a kernel with the fault in it, and return its path."""
    package = out / "source" / "rtap"
    source = package / target.planted[0]
    text = faulty(target)
    for path in (ROOT / "rtap").rglob("*.pxd"):
        copy = package / path.relative_to(ROOT / "rtap")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        (copy.parent / "__init__.py").touch()
    source.write_text(text)
    c_file = source.with_suffix(".c")
    generate(source, c_file, package.parent)
    return c_file


def environment(fuzzer: Path, target: Target) -> dict[str, str]:
    """The environment variables of the fuzzer."""
    found = os.environ | {
        "RTAP_HARNESS": f"{target.name}_fuzz",
        "PYTHONPATH": str(fuzzer.parent / "lib"),
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=1:quarantine_size_mb=8",
    }
    # Free-threaded Python cannot keep its objects in malloc's memory. The inputs are there anyway.
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        found["PYTHONMALLOC"] = "malloc"
    return found


def pack(inputs: Iterator[bytes]) -> bytes:
    """Pack inputs into one file, each after its length."""
    return b"".join(struct.pack("<H", len(data)) + data for data in inputs)


def unpack(packed: bytes) -> Iterator[bytes]:
    """The inputs in a packed file."""
    at = 0
    while at < len(packed):
        (n,) = struct.unpack_from("<H", packed, at)
        yield packed[at + 2 : at + 2 + n]
        at += 2 + n


def seeds() -> Iterator[bytes]:
    """Inputs to start from: frames of every kind, single, in trains and as super-frames."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from frames import CASES
    from oracle import Maker

    for case in CASES.values():
        yield b"\x00" + case.frame
        yield b"\x08" + case.frame[14:]
        yield b"\x05" + bytes(10) + case.frame
        l2, l3 = case.headers.l2_len, case.headers.l3_len
        yield b"\x06" + bytes([l2, l3, 0, 0, 0, 2, 0x1F, 1, 0, 3]) + case.frame
    for n in range(60):
        maker = Maker(n)
        question = maker.super_frame()
        while len(question.frame) > LONGEST - 20:
            question = maker.super_frame()
        for kind in (1, 4, 5, 0x11, 0x14):
            yield bytes([kind]) + question.hdr.pack() + question.frame
        partial = maker.partial_frame()
        if len(partial.frame) < LONGEST - 20:
            yield b"\x02" + partial.hdr.pack() + partial.frame
        from rtap import offload

        pieces = offload.segment(question.frame, question.hdr)[:40]
        train = b"".join(struct.pack("<H", len(piece)) + piece for piece in pieces)
        if len(train) < LONGEST:
            yield b"\x33" + train
            yield b"\x23" + train


def messages() -> Iterator[bytes]:
    """A message of each kind, and what is almost one."""
    from rtap.sharing.wire import FIELDS

    values: dict[str, object] = {"id": 7, "queues": [0, 3], "args": [1500, "x", None, True]}
    values |= {"device": {"a": {"b": [1.5, -2]}}, "value": [{}, 1e30], "count": 2, "version": 1}
    values |= {"errno": 19, "event": 3, "queue": 1, "data": {"c": False}}
    for kind, fields in FIELDS.items():
        message = {"kind": kind, **{name: values.get(name, "text") for name in fields}}
        data = json.dumps(message).encode()
        yield from (data, data[:-1], data.replace(b"}", b',"x":1}'), data.replace(b":", b":[", 2))
    for text in ("NaN", "1e999", "[" * 300 + "]" * 300, "9" * 300, '{"a":1,"a":2}', '"\\ud800"'):
        yield f'{{"kind":"result","id":1,"value":{text}}}'.encode()


def programs() -> Iterator[bytes]:
    """Inputs for the ``frames`` harness: frames of every kind, then operations, some at random."""
    for kind in range(8):
        for pool in range(5):
            two = bytes((1, 32 + pool, kind, 1, 31))  # build: pool, kind, flow, payload
            # Two frames of a flow go into a table. One is held twice, and its window moves.
            for what in (2, 3):
                for at in (0, 1):
                    held = bytes((5, at, 0, 15, 1, 2, 0, 0, 1))
                    yield two + held + bytes((6, 2, what, 1, 16, 1))
            # Insert a tag into a frame with an unfinished checksum and no headroom.
            ask = bytes(
                (1, pool, kind | 32, 1, 7, 6, 0, 0, 32 - 16 * (pool in (1, 3)), 10, 0, 32, 0)
            )
            yield ask + bytes((11, 0, 12, 0))
            # Every stage that writes, on a frame whose tail is shared and whose head is not.
            for stage in range(5):
                tail = bytes((0, 0, stage, 1, pool, kind, 1, 60, 5, 1, 0, 8, 0, 1))
                yield tail + bytes((17, 0, 2, stage, 0, 1))
    r = random.Random(10)
    for n in range(400):
        program = bytearray()
        for _ in range(r.randrange(1, 5)):  # build: pool and number, kind, flow, payload
            program += bytes((1, r.randrange(160), r.randrange(128), r.randrange(3)))
            program += bytes((r.choice((0, 30, 100, 0xC5, 0xD0)), r.randrange(200)))
        for _ in range(r.randrange(12)):
            program += bytes((n % 18 if r.random() < 0.3 else r.randrange(18),))
            program += r.randbytes(r.randrange(6))
        yield bytes(program)


def spread(inputs: Iterator[bytes], directory: Path) -> Path:
    """Write each input to a file of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    for n, data in enumerate(inputs):
        (directory / f"{n:05d}").write_bytes(data)
    return directory


def prefixes() -> Iterator[bytes]:
    """Every frame of the tests, cut after each byte of its headers."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from frames import CASES

    for case in CASES.values():
        for n in range(min(len(case.frame), 130)):
            yield b"\x00" + case.frame[:n]


def replay(
    program: Path, target: Target, inputs: Iterator[bytes]
) -> subprocess.CompletedProcess[bytes]:
    """Run every input once."""
    return subprocess.run(
        [str(program)],
        input=pack(inputs),
        env=environment(program, target),
        capture_output=True,
        check=False,
    )


def stat(text: str, name: str) -> int:
    """One figure from the output of -print_final_stats."""
    found = re.search(rf"stat::{name}:\s+(\d+)", text)
    return int(found.group(1)) if found else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=TARGETS, help="one harness (default: all)")
    parser.add_argument("--runs", type=float, help="inputs for each (default: see above)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0, help="0: a new one each time")
    parser.add_argument("--reduce", action="store_true", help="rewrite the repository's corpora")
    parser.add_argument("--replays", action="store_true", help="only build what the suite replays")
    args = parser.parse_args(argv)
    if reason := unavailable("gcc") if args.replays else unavailable():
        print(f"fuzz: {reason}", file=sys.stderr)
        return 1
    if args.replays:
        for planted in (None, *TARGETS.values()):
            build_replay(planted)
        return 0
    fuzzer = build()
    bad = 0
    for target in [TARGETS[args.target]] if args.target else TARGETS.values():
        runs = int(target.runs if args.runs is None else args.runs)
        found = fuzz(fuzzer, target, runs, args.jobs, args.seed)
        bad += found
        if args.reduce and not found:
            reduce(fuzzer, target)
    return 1 if bad else 0


def fuzz(fuzzer: Path, target: Target, runs: int, jobs: int, seed: int) -> int:
    """Share ``runs`` inputs among ``jobs`` processes; return how many processes found a fault."""
    spread(target.seeds(), target.out("seeds"))
    if target.corpus.exists():
        spread(unpack(target.corpus.read_bytes()), target.out("kept"))
    for name in ("kept", "corpus"):
        target.out(name).mkdir(exist_ok=True)
    running = []
    for n in range(jobs if runs else 1):
        log = target.out(f"fuzz-{n}.log").open("w")
        command = [str(fuzzer), f"-runs={runs // max(1, jobs)}", f"-max_len={target.longest}"]
        command += [f"-seed={seed + n if seed else 0}", "-reload=1", "-timeout=20"]
        command += ["-print_final_stats=1", f"-artifact_prefix={OUT / target.name}/"]
        command += [str(target.out(name)) for name in ("corpus", "kept", "seeds")]
        process = subprocess.Popen(
            command, env=environment(fuzzer, target), stdout=log, stderr=subprocess.STDOUT
        )
        running.append((process, log.name))
    inputs, bad = 0, 0
    for process, name in running:
        bad += process.wait() != 0
        text = Path(name).read_text(errors="replace")
        inputs += stat(text, "number_of_executed_units")
        if process.returncode:
            print(text[-6000:])
        else:
            print("\n".join(line for line in text.splitlines()[-8:] if line))
    print(f"fuzz: {target.name}: {inputs} inputs, {bad} of {len(running)} processes found a fault")
    return bad


def reduce(fuzzer: Path, target: Target) -> None:
    """Keep the smallest inputs that together cover everything, until the corpus is full."""
    least = target.out("least")
    shutil.rmtree(least, ignore_errors=True)
    least.mkdir()
    sources = [str(target.out(name)) for name in ("corpus", "kept", "seeds")]
    run_in = [str(fuzzer), "-merge=1", f"-max_len={KEPT}", str(least), *sources]
    subprocess.run(run_in, env=environment(fuzzer, target), check=True, capture_output=True)
    files = sorted(least.iterdir(), key=lambda path: (path.stat().st_size, path.name))
    packed, kept = b"", 0
    for path in files:
        packed += pack(iter([path.read_bytes()]))
        if len(packed) > CORPUS_MAX:
            break
        target.corpus.write_bytes(packed)
        kept += 1
    size = target.corpus.stat().st_size
    print(f"fuzz: {kept} of {len(files)} inputs, {size} bytes in {target.corpus.name}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
