"""A stand-in for the model that rates LLaVABench: ``python -m safervlm.pictograms.rater`` serves it on this machine.

It speaks OpenAI's chat completions and rates both answers by the words that they share with the caption (F1, from 1 to
10). Nothing but words is compared, so it is fit for pictograms' one-line answers and for nothing else.
"""

import argparse
import json
import re
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from safervlm.io.tables import say

LARGEST = 16 * 2**20  # bytes of a request
PROMPT = re.compile(
    r"\[Context\]\n(?P<caption>.*?)\n\n\[Question\]\n.*?\[Assistant 1\]\n(?P<first>.*?)\n\n\[End of Assistant 1\]"
    r".*?\[Assistant 2\]\n(?P<second>.*?)\n\n\[End of Assistant 2\]",
    re.DOTALL,
)


def rate_response(caption: str, answer: str) -> int:
    """1 to 10 by the F1 of an answer's words with the caption's."""
    said, shown = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, caption))
    shared = 2 * (said & shown).total() / max(said.total() + shown.total(), 1)
    return round(1 + 9 * shared)


def verdict(prompt: str) -> str:
    """What the stand-in says to a prompt of :func:`safervlm.judging.rating.rating_prompt`."""
    found = PROMPT.search(prompt)
    if found is None:
        return "I can only rate answers to LLaVABench."
    first, second = (rate_response(found["caption"], found[name]) for name in ("first", "second"))
    return f"{first} {second}\nBoth were compared with the caption, word by word."


def completion(request: Any) -> dict[str, Any]:
    """The chat completion that answers a request.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is no such request.
    """
    content = request["messages"][-1]["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    said = verdict(text)
    return {
        "id": "rating",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}],
        "usage": {"prompt_tokens": len(text.split()), "completion_tokens": len(said.split())},
    }


class Handler(BaseHTTPRequestHandler):
    """Answers ``/v1/chat/completions``."""

    timeout = 30  # seconds that a request may take to arrive

    def do_POST(self) -> None:
        """One completion, or 400 for what is no request for one."""
        try:
            length = int(self.headers["Content-Length"])
            if not 0 <= length <= LARGEST:
                raise ValueError(f"at most {LARGEST} bytes")
            body, status = completion(json.loads(self.rfile.read(length))), 200
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            body, status = {"error": {"message": f"no chat completion is asked for ({error})"}}, 400
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the library's name)
        """Keeps quiet."""


class RaterServer(ThreadingHTTPServer):
    """Takes as many requests at once as a client sends; five wait by default, and more are turned away."""

    request_queue_size = 128
    daemon_threads = True


def serve() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--port", type=int, default=8008, help="of this machine alone (default 8008)")
    port = parser.parse_args().port
    try:
        server = RaterServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        parser.error(
            f"--port: {port} can't be had ({reason}); end the other program, or name another port here and "
            "in a copy of configs/pictograms/rate.yaml"
        )
    say(f"rating on http://127.0.0.1:{port}/v1, end it with Ctrl-C, or kill %1 in the background")
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    serve()
