"""A server of raw sockets that violates HTTP, and replies of all kinds."""

import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from loopback import completion

from safervlm.records import Example, Question
from safervlm.vlm.base import Generation, Unanswered
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.client import Server

KEY = "sk-live-Zx81kQ/tw0+pLm44vB9"
GREEDY = Sampling(temperature=0, max_new_tokens=50)
Reply = bytes | Callable[[socket.socket], None]


class RawServer:
    """Replies to the n-th request for "question 1" with ``play(n)``, and to every other question with an echo."""

    def __init__(self, play: Callable[[int], Reply]) -> None:
        self.play, self.asked, self.requests, self.lock = play, [], [], threading.Lock()
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.socket.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self.serve, args=(self.socket.accept()[0],), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            content = b""
            while b"\r\n\r\n" not in content:
                content += (piece := connection.recv(65536))
                if not piece:
                    return
            head, _, body = content.partition(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head, re.I)[1])
            while len(body) < length:
                body += (piece := connection.recv(65536))
                if not piece:
                    return
            request = json.loads(body)
            said = request["messages"][-1]["content"]
            prompt = said if isinstance(said, str) else said[-1]["text"]
            with self.lock:
                self.asked.append(prompt)
                self.requests.append((head, request))
                reply = self.reply(prompt, len(self.asked))
            if callable(reply):
                reply(connection)
            else:
                connection.sendall(reply)
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                connection.settimeout(0.5)
                connection.recv(1)

    def reply(self, prompt: str, number: int) -> Reply:
        return self.play(self.asked.count(prompt)) if prompt == "question 1" else ok(f"echo of {prompt}")

    def close(self) -> None:
        self.socket.close()


class Counting(RawServer):
    """Replies to the n-th request, for any question, with ``play(n)``."""

    def reply(self, prompt: str, number: int) -> Reply:
        return self.play(number)


def http(body: bytes | str | Any, status: str = "200 OK", length: int | None = None, **headers: str) -> bytes:
    if not isinstance(body, bytes):
        body = (body if isinstance(body, str) else json.dumps(body)).encode("utf-8", "surrogatepass")
    given = {"Content-Type": "application/json", "Content-Length": str(len(body) if length is None else length)}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value != "")
    return f"HTTP/1.1 {status}\r\n{lines}Connection: close\r\n\r\n".encode("latin-1") + body


def ok(text: Any, finish: Any = "stop", usage: Any = None, **message: Any) -> bytes:
    body = completion(text, finish, **message)
    return http(body if usage is None else body | {"usage": usage})


def counted(literal: str, name: str = "completion_tokens") -> bytes:
    """A reply whose usage contains a number literal that json.dumps would not write."""
    body = json.dumps(completion("counted")).replace('"completion_tokens": 3', f'"{name}": {literal}')
    return http(body)


def failed(status: str, message: str = "no", code: str | None = None, **headers: str) -> bytes:
    return http({"error": {"message": message, "type": "t", "code": code, "param": None}}, status, **headers)


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b" ")
        time.sleep(0.05)


def drip_head(connection: socket.socket) -> None:
    for byte in b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 100:
        connection.sendall(bytes([byte]))
        time.sleep(0.02)


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def endless_informational(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)
        time.sleep(0.01)


def hang(connection: socket.socket) -> None:
    connection.settimeout(20)
    connection.recv(1)


def reset(connection: socket.socket) -> None:
    connection.sendall(http("{}", length=5000))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


NESTED = "[" * 200_000
HUGE_GZIP = gzip.compress(b" " * 200_000_000)
BODY = json.dumps(completion("packed")).encode()
CONTROLS = "a\x1b[2J\rb\x00\u202ec"
KEPT = "kept"
SOON = {"timeout": 0.5}  # seconds; a busy machine needs longer for an answer that does arrive


def questions(count: int = 3) -> list[Example]:
    make = ("T", "i", None, "alignment", 0)
    return [Example(Question(f"T/i/alignment/{n}", *make, f"question {n}", "Hate", "x", "Safe")) for n in range(count)]


def ask(server: Server, examples: list[Example] | None = None) -> list[Generation | str]:
    """Returns the responses or the reasons for missing ones; raises only if no question could be sent."""
    answers = server.generate(server.collator(examples or questions()), GREEDY, seed=0)
    return [answer.reason if isinstance(answer, Unanswered) else answer for answer in answers]


def new(*servers: RawServer, **options: Any) -> Server:
    usual = {"blank": False, "concurrency": 1, "timeout": 10, "max_retries": 1}
    return Server("m", [server.address for server in servers], **usual | options)
