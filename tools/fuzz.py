# SPDX-License-Identifier: BSD-3-Clause
"""Coverage-guided fuzzing of the offload kernels: libFuzzer with AddressSanitizer over their C.

The C files that Cython made for the release build are compiled once more, with clang; a harness
(tests/fuzz) feeds them. What it does with an input, and what it checks, is said there.

    python tools/fuzz.py                    10 million inputs
    python tools/fuzz.py --runs 0           only what there is: seeds, corpus, earlier finds
    python tools/fuzz.py --reduce           writes the corpus anew from what was found

The test suite replays the corpus of the repository through the same harness, compiled with gcc and
without coverage (``build_replay``).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HARNESS = ROOT / "tests" / "fuzz"
CORPUS = HARNESS / "corpus.bin"
GENERATED = ROOT / "build" / "cython-release" / "rtap"
OUT = ROOT / "build" / "fuzz"
KERNELS = (
    *("_core/pool", "_frames/checksum", "_frames/gro", "_frames/parse", "_frames/request"),
    *("_frames/segment", "_frames/verify", "_frames/vnet"),
)
SANITIZE = ["-g1", "-fno-omit-frame-pointer", "-fno-strict-aliasing", "-fno-sanitize-recover=all"]
#: A wrong bound in the parser, with which it reads one byte too far, to see that this is seen.
PLANTED = ("_frames/parse.pyx", "        if q.l4 + 20 > seen:\n", "        if q.l4 + 12 > seen:\n")
LONGEST = 2048
#: Longest input of the repository's corpus.
KEPT = 600


def unavailable(compiler: str = "clang") -> str:
    """Why this machine cannot build the harness, in one sentence; "" when it can."""
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
    """C from one .pyx file, by the rules of the build."""
    from Cython.Compiler import Main
    from Cython.Compiler.Options import default_options

    directives = {"language_level": 3, "wraparound": False, "boundscheck": False}
    directives |= {"cdivision": True, "initializedcheck": False, "freethreading_compatible": True}
    options = Main.CompilationOptions(
        default_options,
        include_path=[str(include)],
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
    """Whatever is out of date below `out`, compiled; `planted` takes a kernel's place."""
    library = out / "lib"
    for package in {Path("rtap"), *(Path("rtap", name).parent for name in KERNELS)}:
        (library / package).mkdir(parents=True, exist_ok=True)
        (library / package / "__init__.py").touch()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    harness = OUT / "offload_fuzz.c"
    if not newer(harness, HARNESS / "offload_fuzz.pyx", *sorted((ROOT / "rtap").rglob("*.pxd"))):
        generate(HARNESS / "offload_fuzz.pyx", harness, ROOT)
    jobs = []
    for name in KERNELS:
        c_file = planted if planted.stem == Path(name).name else GENERATED / f"{name}.c"
        target = library / "rtap" / f"{name}{suffix}"
        if not newer(target, c_file):
            jobs.append([*cc, *module, str(c_file), "-o", str(target)])
    target = library / f"offload_fuzz{suffix}"
    if not newer(target, harness):
        jobs.append([*cc, *module, str(harness), "-o", str(target)])
    fuzzer = out / "fuzzer"
    if not newer(fuzzer, HARNESS / "main.c"):
        where = sysconfig.get_config_var("LIBDIR")
        libraries = [f"-L{where}", f"-Wl,-rpath,{where}"]
        libraries += [f"-lpython{sysconfig.get_config_var('LDVERSION')}", "-rdynamic"]
        for needed in ("LIBS", "SYSLIBS"):  # by a static libpython
            libraries += shlex.split(sysconfig.get_config_var(needed) or "")
        jobs.append([*cc, *link, str(HARNESS / "main.c"), "-o", str(fuzzer), *libraries])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(run, jobs))
    return fuzzer


def build() -> Path:
    """The fuzzer, built as far as it is not up to date."""
    module = ["-fsanitize=fuzzer-no-link,address", "-fPIC", "-shared"]
    return compile_all(base(["clang", "-O2"]), module, ["-fsanitize=fuzzer,address"], OUT, Path())


def build_replay(*, planted: bool = False) -> Path:
    """The same harness as a program that runs the inputs of a file and ends: gcc will do. With
    `planted`, one with a mistake in it."""
    module = ["-fsanitize=address", "-fPIC", "-shared"]
    link = ["-fsanitize=address", "-DRTAP_REPLAY"]
    cc = base(["gcc", "-O0"])
    out = OUT / "replay"
    program = compile_all(cc, module, link, out, Path())
    if planted:
        wrong = OUT / "planted"
        shutil.copytree(out, wrong, dirs_exist_ok=True)
        program = compile_all(cc, module, link, wrong, plant(wrong))
    return program


def plant(out: Path) -> Path:
    """C of the parser with the mistake in it."""
    name, right, wrong = PLANTED
    package = out / "source" / "rtap"
    source = package / name
    text = (ROOT / "rtap" / name).read_text()
    if right not in text:
        sys.exit(f"fuzz: there is no {right!r} in {name}")
    for path in (ROOT / "rtap").rglob("*.pxd"):
        copy = package / path.relative_to(ROOT / "rtap")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        (copy.parent / "__init__.py").touch()
    source.write_text(text.replace(right, wrong, 1))
    target = source.with_suffix(".c")
    generate(source, target, package.parent)
    return target


def environment(fuzzer: Path) -> dict[str, str]:
    """What the fuzzer runs under."""
    found = os.environ | {
        "PYTHONPATH": str(fuzzer.parent / "lib"),
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=1:quarantine_size_mb=8",
    }
    # Without a GIL Python's objects cannot be in malloc's memory; the inputs are, all the same.
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        found["PYTHONMALLOC"] = "malloc"
    return found


def pack(inputs: Iterator[bytes]) -> bytes:
    """Inputs as one file, each after its length."""
    return b"".join(struct.pack("<H", len(data)) + data for data in inputs)


def unpack(packed: bytes) -> Iterator[bytes]:
    """The inputs of such a file."""
    at = 0
    while at < len(packed):
        (n,) = struct.unpack_from("<H", packed, at)
        yield packed[at + 2 : at + 2 + n]
        at += 2 + n


def seeds() -> Iterator[bytes]:
    """Inputs to start from: frames of every kind, by themselves and in trains, as super-frames."""
    sys.path.insert(0, str(ROOT / "tests"))
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


def spread(inputs: Iterator[bytes], directory: Path) -> Path:
    """Writes each input to a file of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    for n, data in enumerate(inputs):
        (directory / f"{n:05d}").write_bytes(data)
    return directory


def prefixes() -> Iterator[bytes]:
    """Every frame of the tests cut after each byte of its headers."""
    sys.path.insert(0, str(ROOT / "tests"))
    from frames import CASES

    for case in CASES.values():
        for n in range(min(len(case.frame), 130)):
            yield b"\x00" + case.frame[:n]


def replay(program: Path, inputs: Iterator[bytes]) -> subprocess.CompletedProcess[bytes]:
    """Runs every input once."""
    return subprocess.run(
        [str(program)],
        input=pack(inputs),
        env=environment(program),
        capture_output=True,
        check=False,
    )


def stat(text: str, name: str) -> int:
    """A figure of -print_final_stats."""
    found = re.search(rf"stat::{name}:\s+(\d+)", text)
    return int(found.group(1)) if found else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=float, default=10e6, help="inputs in all (default 1e7)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--reduce", action="store_true", help="write the corpus of the repository")
    args = parser.parse_args(argv)
    if reason := unavailable():
        print(f"fuzz: {reason}", file=sys.stderr)
        return 1
    fuzzer = build()
    found = OUT / "corpus"
    spread(seeds(), OUT / "seeds")
    if CORPUS.exists():
        spread(unpack(CORPUS.read_bytes()), OUT / "kept")
    (OUT / "kept").mkdir(exist_ok=True)
    found.mkdir(exist_ok=True)
    each = int(args.runs) // max(1, args.jobs)
    running = []
    for n in range(args.jobs if args.runs else 1):
        log = (OUT / f"fuzz-{n}.log").open("w")
        command = [str(fuzzer), f"-runs={each}", f"-max_len={LONGEST}", "-print_final_stats=1"]
        command += [f"-seed={args.seed + n if args.seed else 0}", "-reload=1", "-timeout=20"]
        command += [f"-artifact_prefix={OUT}/", str(found), str(OUT / "kept"), str(OUT / "seeds")]
        process = subprocess.Popen(
            command, env=environment(fuzzer), stdout=log, stderr=subprocess.STDOUT
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
    print(f"fuzz: {inputs} inputs, {bad} of {len(running)} processes found something")
    if args.reduce and not bad:
        reduce(fuzzer, found)
    return 1 if bad else 0


def reduce(fuzzer: Path, found: Path) -> None:
    """Keeps the smallest inputs that cover what all of them cover."""
    least = OUT / "least"
    shutil.rmtree(least, ignore_errors=True)
    least.mkdir()
    sources = [str(found), str(OUT / "kept"), str(OUT / "seeds")]
    run_in = [str(fuzzer), "-merge=1", f"-max_len={KEPT}", str(least), *sources]
    subprocess.run(run_in, env=environment(fuzzer), check=True, capture_output=True)
    files = sorted(least.iterdir(), key=lambda path: (path.stat().st_size, path.name))
    CORPUS.write_bytes(pack(path.read_bytes() for path in files))
    print(f"fuzz: {len(files)} inputs, {CORPUS.stat().st_size} bytes in {CORPUS.name}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
