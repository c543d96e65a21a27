# SPDX-License-Identifier: BSD-3-Clause
"""Runs every static check, even after one fails, and prints the output of those that fail.

Build the modules first (make build): stubtest imports them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
}


def files(*patterns: str) -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)
    )


def steps() -> dict[str, list[str]]:
    cython = files("rtap/**/*.pyx", "rtap/**/*.pxd", "bench/**/*.pyx", "tests/**/*.pyx")
    compiled = [".".join(Path(name).with_suffix("").parts) for name in files("rtap/**/*.pyx")]
    # Disjoint bases (PEP 800) would need a recent typing_extensions in every stub.
    stubtest = ["--concise", "--ignore-disjoint-bases", "--mypy-config-file", "pyproject.toml"]
    stubtest += ["--allowlist", "tools/stubtest-allowlist.txt", "--ignore-unused-allowlist"]
    return {
        "ruff check": ["ruff", "check", "--quiet"],
        "ruff format": ["ruff", "format", "--check", "--diff", "--quiet"],
        "cython-lint": ["cython-lint", *cython],
        "codespell": ["codespell"],
        "mypy": ["mypy", "--no-error-summary"],
        "stubtest": [sys.executable, "-m", "mypy.stubtest", *stubtest, *compiled],
        "tree": [sys.executable, "tools/check_tree.py"],
    }


def main() -> int:
    failed = []
    for name, command in steps().items():
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=ENVIRONMENT,
            text=True,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        print(f"lint: {name}: {'failed' if done.returncode else 'ok'}", flush=True)
        if done.returncode or name == "tree":
            print(done.stdout, end="", flush=True)
        if done.returncode:
            failed.append(name)
    if failed:
        print(f"lint: {len(failed)} of {len(steps())} failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
