"""A misbehaving server on loopback."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import signature
from typing import Any

import pytest

from safervlm.vlm.server.client import Server


class Reply:
    """The reply of a server; the default is a chat completion."""

    def __init__(self, status=200, body=None, headers=(), cut=False, sleep=0.0):
        self.status, self.headers, self.cut, self.sleep = status, dict(headers), cut, sleep
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def completion(text: str | None, finish: str | None = "stop", tokens: int = 3, **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
    return {"id": "x", "object": "chat.completion", "model": "served", "choices": [choice], "usage": usage}


def error(status: int, code: str | None = None, message: str = "no", param: str | None = None, **headers: str) -> Reply:
    body = {"error": {"message": message, "type": "some_error", "code": code, "param": param}}
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


class Loopback:
    """A server that replies to the n-th request for a prompt with ``play(prompt, n, body)``, or with an echo if None.

    Attributes:
        asked: the bodies and headers of the requests, in order of arrival.
        times: their arrival times.
        answered: the prompts that received a chat completion.
        most: the maximum number of concurrent requests.
    """

    def __init__(self, play: Callable[[str, int, dict[str, Any]], Reply | None]) -> None:
        self.asked: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.times: list[float] = []
        self.answered: list[str] = []
        self.most = self.now = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = prompt_of(body)
                with outer.lock:
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    outer.times.append(time.monotonic())
                    outer.asked.append((body, {name.lower(): value for name, value in self.headers.items()}))
                    number = sum(prompt_of(other) == prompt for other, _ in outer.asked)
                try:
                    reply = play(prompt, number, body)
                    echo = reply is None
                    reply = reply or Reply(body=completion(f" echo of {prompt}\n"))
                    time.sleep(reply.sleep)
                finally:
                    with outer.lock:
                        outer.now -= 1
                if reply.status == 0:  # hangs up
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body) + 100 * reply.cut))
                self.end_headers()
                self.wfile.write(reply.body)
                self.close_connection = reply.cut
                if echo:
                    outer.answered.append(prompt)

            def handle(self):
                with contextlib.suppress(ConnectionError):  # the client gave up
                    super().handle()

            def log_message(self, *args):
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128  # with the default of 5, a sixth pending connection is reset
            daemon_threads = True

        self.server = Listener(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def prompt_of(body: dict[str, Any]) -> str:
    """Returns the text of the question in a request, with or without an image."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[1]["text"]


@contextlib.contextmanager
def loopbacks() -> Iterator[Callable[..., Loopback]]:
    """Yields a function that starts servers; they end with the block."""
    servers = []

    def start(play: Callable[[str, int, dict[str, Any]], Reply | None] = lambda prompt, number, body: None) -> Loopback:
        servers.append(Loopback(play))
        return servers[-1]

    yield start
    for server in servers:
        server.die()


def shorten_waits(monkeypatch: pytest.MonkeyPatch, longest: float = 0.05) -> None:
    """Minimises waits between retries, disables the proxy for loopback, and unsets the key."""
    usual = signature(Server).parameters["bounds"].default  # of each server that a test creates
    for name, seconds in (("first_wait", 0.01), ("longest_wait", longest)):
        monkeypatch.setitem(vars(usual), name, seconds)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
