# SPDX-License-Identifier: BSD-3-Clause
"""The program of the processes that :mod:`sharing` starts: Python code comes in, results go out.

The first process makes the others: it forks for each socket that it gets, since rtap is imported
there already. It has neither devices nor threads itself. A message is a line of JSON on a socket:
``{"run": CODE, "with": {NAME: VALUE}}`` is answered with ``{"value": VALUE}``, that of an
expression, or with ``{"error": CLASS, "text": TEXT, "errno": NUMBER}``.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any

import rtap
import rtap.sharing.attach
import rtap.sharing.share


def plain(value: Any) -> Any:
    """For JSON: bytes as text in an object, and what has a text for the rest."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)


def unplain(found: dict[str, Any]) -> Any:
    return bytes.fromhex(found["bytes"]) if found.keys() == {"bytes"} else found


def dumps(value: Any) -> str:
    return json.dumps(value, default=plain)


def loads(text: str) -> Any:
    return json.loads(text, object_hook=unplain)


def run(code: str, names: dict[str, Any]) -> Any:
    tree = ast.parse(code)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "<test>", "exec"), names)
        return None
    tree.body.pop()
    exec(compile(tree, "<test>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<test>", "eval"), names)


def serve(sock: socket.socket, environ: dict[str, str]) -> None:
    """One of the processes: until the socket ends."""
    os.environ.update(environ)
    names: dict[str, Any] = {"rtap": rtap, "os": os}
    with sock.makefile("rw") as lines:
        for line in lines:
            message = loads(line)
            try:
                names.update(message["with"])
                answer = {"value": run(message["run"], names)}
            except Exception as exc:  # noqa: BLE001 - the test gets it
                answer = {"error": type(exc).__name__, "text": str(exc)}
                answer["errno"] = getattr(exc, "errno", None)
                answer["classes"] = [kind.__name__ for kind in type(exc).__mro__]
            lines.write(dumps(answer) + "\n")
            lines.flush()


def main() -> None:
    control = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not data:
            return
        pid = os.fork()
        if pid:
            for fd in fds:
                os.close(fd)
            control.send(str(pid).encode())
            continue
        control.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with contextlib.suppress(OSError, ValueError):  # the test is over
            serve(socket.socket(fileno=fds[0]), json.loads(data))
        sys.exit()


if __name__ == "__main__":
    main()
