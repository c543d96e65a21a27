# SPDX-License-Identifier: BSD-3-Clause
"""make ports compiles with the right flags, and leaves nothing mounted or registered.

Its trees themselves are made by make ports alone.
"""

from __future__ import annotations

import importlib
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import eventually

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module(name)


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Any:
    return tool("port_emulation", monkeypatch)


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> Any:
    return tool("port_tree", monkeypatch)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Any:
    return tool("port_build", monkeypatch)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    return tool("port_run", monkeypatch)


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> Any:
    return tool("ports", monkeypatch)


# ---- what runs the programs

RULE = r":qemu-s390x:M::\x7f\x45\x4c\x46\x02\x02:\xff\xff\xff\xff\xff\xff:/usr/libexec/q:OPF"


def test_rule(emulation: Any) -> None:
    ours = r":rtap-s390x:M::\x7f\x45\x4c\x46\x02\x02:\xff\xff\xff\xff\xff\xff:/usr/libexec/q:OPF"
    assert emulation.rule(f"# a comment\n{RULE}\n", "rtap-s390x") == ours
    # Without the flag F, QEMU is looked for in the other tree.
    with pytest.raises(emulation.Unavailable):
        emulation.rule(RULE.replace("OPF", "OP"), "rtap-s390x")


@pytest.fixture
def machine(emulation: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with QEMU for s390x and a binfmt_misc that is mounted and has no rules."""
    (tmp_path / "register").touch()
    (tmp_path / "qemu-s390x.conf").write_text(RULE)
    monkeypatch.setattr(emulation, "BINFMT", tmp_path)
    monkeypatch.setattr(emulation, "RULES", tmp_path)
    monkeypatch.setattr(emulation, "LOCK", tmp_path / "lock")

    def runs(arch: str, *options: str) -> bool:
        return not options and (tmp_path / "register").read_text() != ""

    monkeypatch.setattr(emulation, "runs", runs)
    return tmp_path


def test_a_rule_is_removed_again(emulation: Any, machine: Path) -> None:
    def interrupted() -> None:
        with emulation.running("s390x", "s390x") as emulated:
            assert emulated
            assert (machine / "register").read_text().startswith(":rtap-s390x:M:")
            assert not (machine / "rtap-s390x").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (machine / "rtap-s390x").read_text() == "-1"


def test_rules_of_the_machine_stay(emulation: Any, machine: Path) -> None:
    (machine / "register").write_text("as if the machine had one")
    with emulation.running("s390x", "s390x"):
        pass
    assert (machine / "register").read_text() == "as if the machine had one"
    assert not (machine / "rtap-s390x").exists()


def test_a_rule_that_was_left_behind_is_taken_over(emulation: Any, machine: Path) -> None:
    (machine / "register").write_text("as if it had been used")
    (machine / "rtap-s390x").write_text("enabled")
    with emulation.running("s390x", "s390x"):
        assert (machine / "rtap-s390x").read_text() == "enabled"
    assert (machine / "rtap-s390x").read_text() == "-1"


def test_a_machine_without_qemu_says_so(emulation: Any, machine: Path) -> None:
    with (
        pytest.raises(emulation.Unavailable, match=r"no QEMU that runs programs for arm here"),
        emulation.running("armhf", "arm"),
    ):
        pass


# ---- trees


def test_why_there_is_no_tree(trees: Any) -> None:
    log = (
        "I: downloads\nE: Failed to fetch a\nE: apt failed\nI: main\nE: mmdebstrap failed to run\n"
    )
    assert trees.why(log) == "Failed to fetch a"
    assert trees.why("mmdebstrap: not found\n") == "mmdebstrap: not found"
    assert trees.why("") == "it printed nothing"


def test_sources_of_a_tree(trees: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["deb [a] http://a.example/debian trixie main", "deb [a] http://b trixie-security main"]
    monkeypatch.setattr(trees, "sources_of", lambda suite: lines)
    assert trees.release_sources("trixie") == lines[:1]


def test_a_tree_with_other_packages_is_made_anew(trees: Any, tmp_path: Path) -> None:
    arch = trees.ARCHITECTURES["s390x"]
    assert trees.ready(arch, tmp_path) is None
    done = tmp_path / trees.DONE
    done.parent.mkdir(parents=True)
    done.write_text("\n".join(["today", *trees.PACKAGES]) + "\n")
    assert trees.ready(arch, tmp_path).path == tmp_path
    done.write_text("\n".join(["today", *trees.PACKAGES[1:]]) + "\n")
    assert trees.ready(arch, tmp_path) is None


def test_setup_knows_the_architectures(trees: Any) -> None:
    text = (ROOT / "tools/setup").read_text()
    for arch in trees.ARCHITECTURES.values():
        assert f"{arch.name}) want_port {arch.cpu} {arch.compiler.removesuffix('-gcc')} ;;" in text


# ---- what is compiled

VARIABLES = {
    "CC": "s390x-linux-gnu-gcc",
    "CFLAGS": "-fwrapv -O2",
    "CCSHARED": "-fPIC",
    "LDSHARED": "s390x-linux-gnu-gcc -shared -Wl,-O1",
    "EXT_SUFFIX": ".cpython-313-s390x-linux-gnu.so",
}


def test_all_modules_are_compiled(builds: Any) -> None:
    names = {".".join(p.with_suffix("").parts) for p in Path(ROOT).glob("rtap/**/*.pyx")}
    found = {each.name for each in builds.extensions()}
    assert len(found) > 40
    assert {name[name.index("rtap.") :] for name in names} >= found


def test_flags(builds: Any, tmp_path: Path) -> None:
    """Those of the other Python, then those of setup.py, which win; none of this machine's."""
    found = {each.name: each for each in builds.extensions()}
    one = builds.step(
        found["rtap._core.pool"], ["cc", "--sysroot=T"], VARIABLES, (["-IT"], ["-luring"]), tmp_path
    )
    assert one.out == tmp_path / "rtap/_core/pool.cpython-313-s390x-linux-gnu.so"
    compiling, linking = one.commands
    assert compiling[:5] == ["cc", "--sysroot=T", "-fwrapv", "-O2", "-fPIC"]
    assert compiling.index("-O2") < compiling.index("-O3")
    assert "-DCYTHON_WITHOUT_ASSERTIONS=1" in compiling
    assert str(ROOT / "build/cython-release/rtap/_core/pool.c") in compiling
    assert [word for word in compiling if word.startswith(("-m", "-I/usr"))] == []
    assert linking[:4] == ["cc", "--sysroot=T", "-shared", "-Wl,-O1"]
    assert linking[-1] == "-luring"


# ---- what is run


def test_script(runs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command gets its very words and the environment, and its status is that of the script."""
    programs, tree = tmp_path / "programs", tmp_path / "a tree"
    programs.mkdir()
    tree.mkdir()
    monkeypatch.setattr(runs, "SOURCE", str(tmp_path))
    for name in ("mount", "pivot_root", "ln", "umount", "chroot"):
        does = 'shift; exec "$@"' if name == "chroot" else "exit 0"
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(stat.S_IRWXU)
    words = ["sh", "-c", 'printf "%s\\n" "$A" "$@"; exit 7', "sh", "it's", "$HOME", 'a"b', "x y"]
    path = f"{programs}:/usr/bin:/bin"
    text = runs.script(tree, tmp_path, words, {"A": "x y", "PATH": path}, ["net/tun"])
    done = subprocess.run(
        ["sh", "-c", text], env={"PATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.stdout.splitlines(), done.stderr) == (["x y", *words[4:]], "")
    assert done.returncode == 7
    assert (tree / "dev/net/tun").exists()


def test_modules_come_after_those_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    boots = tool("port_boot", monkeypatch)
    text = "k/a.ko.xz: k/b.ko.xz k/c.ko.xz\nk/b.ko.xz: k/c.ko.xz\nk/c.ko.xz:\nk/d.ko.xz:\n"
    assert boots.needed(text, ["d", "a"]) == [f"k/{name}.ko.xz" for name in "dcba"]
    assert boots.needed(text, ["b", "a"]) == [f"k/{name}.ko.xz" for name in "cba"]
    with pytest.raises(boots.Unavailable, match="no module e"):
        boots.needed(text, ["e"])


def test_a_guest_of_arm64(monkeypatch: pytest.MonkeyPatch) -> None:
    boots = tool("port_boot", monkeypatch)
    for text in (boots._INIT, boots._RUN):
        script = text.format(
            modules="a.ko b.ko", source="/s", results="/r", environment="A='x y'", command="true"
        )
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_arguments(ports: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [*ports.CORE, *ports.MORE, *ports.DEVICES]
    assert [path for path in chosen if not (ROOT / path).exists()] == []
    assert sorted(ports.arguments([]).archs) == ["arm64", "armhf", "i386", "ppc64el", "s390x"]
    assert ports.arguments([]).tests == chosen
    assert ports.arguments(["arm64", "s390x"]).archs == ["arm64", "s390x"]
    assert ports.arguments(["arm64", "--core"]).tests == list(ports.CORE)
    assert ports.arguments(["arm64", "--tests", "tests/core"]).tests == ["tests/core"]
    assert ports.arguments(["arm64", "--boot"]).tests == list(ports.DEVICES)
    with pytest.raises(SystemExit):
        ports.arguments(["armhf", "--boot"])
    with pytest.raises(SystemExit):
        ports.arguments(["sparc"])
    assert "no architecture sparc: " in capsys.readouterr().err


def test_a_session_ends_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = tool("session", monkeypatch)
    assert session.run(["sh", "-c", "echo said; exit 3"], tmp_path / "log") == 3
    assert (tmp_path / "log").read_text() == "said\n"
    lasting = "sleep 1000 & echo $! >child; wait"
    monkeypatch.chdir(tmp_path)
    assert session.run(["sh", "-c", lasting], tmp_path / "log", 0.5) is None
    child = int((tmp_path / "child").read_text())
    eventually(lambda: not Path(f"/proc/{child}").exists(), "the child has ended")
