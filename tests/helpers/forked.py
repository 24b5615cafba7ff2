"""Replaces ``python -m safervlm`` without importing it: the fork server runs the commands."""

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from processes import CONTEXT, run_command

CLIENT = """
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    server.sendall(json.dumps([os.getpid(), os.getcwd(), sys.argv[2:], dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    code = int(server.makefile().read())
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
# Runs a command that starts others by the program in its first argument.
DRIVER = (
    "import sys; from safervlm.cli import main, sequence; sequence.PROGRAM = eval(sys.argv[1]); main.main(sys.argv[2:])"
)


def _answer(client: socket.socket) -> None:
    with client:
        pid, folder, args, environment = json.load(client.makefile())
        outputs = [Path(f"/proc/{pid}/fd/{number}") for number in (1, 2)]
        process = CONTEXT.Process(target=run_command, args=(args, Path(folder), *outputs, environment))
        process.start()
        process.join()
        with suppress(OSError):  # the client has been killed
            client.sendall(str(process.exitcode).encode())


def _serve(server: socket.socket) -> None:
    with suppress(OSError):  # it has been closed
        while True:
            Thread(target=_answer, args=(server.accept()[0],), daemon=True).start()


@contextmanager
def program() -> Iterator[list[str]]:
    """Yields the words of a command line that precede the arguments of ``safervlm``."""
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        address = f"{folder}/socket"
        server.bind(address)
        server.listen()
        Thread(target=_serve, args=(server,), daemon=True).start()
        yield [sys.executable, "-I", "-S", "-c", CLIENT, address]
        server.shutdown(socket.SHUT_RDWR)


def driver(program: list[str]) -> list[str]:
    """The first words of a command line that runs further commands by a program, see :func:`program`."""
    return [sys.executable, "-c", DRIVER, repr(program)]
