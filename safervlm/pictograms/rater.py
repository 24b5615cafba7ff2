"""A stand-in for the model that rates LLaVABench: ``python -m safervlm.pictograms.rater`` serves it on this machine.

It implements OpenAI's chat completions interface. Both responses are rated from 1 to 10 by the F1 score of their words
with respect to the caption. Only words are compared, so the ratings are meaningful only for one-line responses about
pictograms.
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

LARGEST = 16 * 2**20  # maximum size of a request, in bytes
PROMPT = re.compile(
    r"\[Context\]\n(?P<caption>.*?)\n\n\[Question\]\n.*?\[Assistant 1\]\n(?P<first>.*?)\n\n\[End of Assistant 1\]"
    r".*?\[Assistant 2\]\n(?P<second>.*?)\n\n\[End of Assistant 2\]",
    re.DOTALL,
)


def rate_response(caption: str, answer: str) -> int:
    """Rates a response from 1 to 10 by the F1 score of its words with respect to the caption.

    Args:
        caption: Caption of the image.
        answer: Response to rate.
    """
    said, shown = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, caption))
    shared = 2 * (said & shown).total() / max(said.total() + shown.total(), 1)
    return round(1 + 9 * shared)


def verdict(prompt: str) -> str:
    """Returns the reply to a prompt of :func:`safervlm.judging.rating.rating_prompt`: both ratings and a sentence.

    Args:
        prompt: Text of the prompt. The reply to any other text is fixed, without ratings.
    """
    found = PROMPT.search(prompt)
    if found is None:
        return "I can only rate answers to LLaVABench."
    first, second = (rate_response(found["caption"], found[name]) for name in ("first", "second"))
    return f"{first} {second}\nBoth were compared with the caption, word by word."


def completion(request: Any) -> dict[str, Any]:
    """Computes the chat completion for a request.

    Args:
        request: Decoded JSON body of the request.

    Returns:
        The body of the reply.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: The request is malformed.
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
    """HTTP handler of ``/v1/chat/completions``. The path of a request is not checked."""

    timeout = 30  # socket timeout, in seconds

    def do_POST(self) -> None:
        """Replies with one completion, or with status 400 to a malformed request."""
        try:
            body, status = completion(json.loads(self._content())), 200
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            body, status = {"error": {"message": f"no chat completion is asked for ({error})"}}, 400
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _content(self) -> bytes:
        length = int(self.headers["Content-Length"])
        if not 0 <= length <= LARGEST:
            raise ValueError(f"at most {LARGEST} bytes")
        return self.rfile.read(length)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the library's name)
        """Suppresses the log line of each request.

        Args:
            format: Unused.
            *args: Unused.
        """


class RaterServer(ThreadingHTTPServer):
    """Server that queues up to 128 connections; the default of 5 rejects some of a client's concurrent requests."""

    request_queue_size = 128
    daemon_threads = True


def serve() -> None:
    """Serves on the local host until interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--port", type=int, default=8008, help="on this machine only (default 8008)")
    port = parser.parse_args().port
    try:
        server = RaterServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        parser.error(
            f"--port: {port} is unavailable ({reason}); end the other program, or name another port here and "
            "in a copy of configs/pictograms/rate.yaml"
        )
    say(f"rating on http://127.0.0.1:{port}/v1, end it with Ctrl-C, or kill %1 in the background")
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    serve()
