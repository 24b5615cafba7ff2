"""Promise 6: the replies of a server are bounded, whatever it sends; the other questions keep their responses.

The server is a raw socket, so that it can violate HTTP itself. It misbehaves for the second of three questions.
"""

import base64
import gzip
import json
import math
import pickle
import re
import resource
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from loopback import completion, shorten_waits
from raw_server import (
    BODY,
    CONTROLS,
    HUGE_GZIP,
    KEPT,
    KEY,
    NESTED,
    SOON,
    Counting,
    Reply,
    ask,
    counted,
    drip,
    drip_head,
    endless,
    endless_informational,
    failed,
    hang,
    http,
    new,
    ok,
    questions,
    reset,
)

from callbacks.attempt_log import AttemptFile
from safervlm.records import Example, Question, read_jsonl
from safervlm.vlm.base import Generation
from safervlm.vlm.server.bounds import Bounds
from safervlm.vlm.server.client import Server


@dataclass
class Case:
    """A misbehaviour.

    Attributes:
        name: name of the test.
        reply: the reply to each request. A list is sent one after the other; its last element is repeated.
        text: expected text of the response; None if there is none.
        finish: expected finish_reason.
        tokens: expected number of tokens.
        reason: expected part of the reason why there is no response.
        requests: expected number of requests for the question.
        stops: whether nothing more is asked, including the third question.
        options: settings of the server.
    """

    name: str
    reply: Reply | list[Reply]
    text: str | None = None
    finish: str = "stop"
    tokens: int | None = None
    reason: str = ""
    requests: int = 1
    stops: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def answer(name: str, reply: Reply | list[Reply], text: str = "counted", finish: str = "stop", **more: Any) -> Case:
    return Case(name, reply, text, finish, **more)


def broken(name: str, reply: Reply, reason: str, **more: Any) -> Case:
    """A case in which the question is asked again and then fails: two requests."""
    return Case(name, reply, reason=reason, **({"requests": 2} | more))


def stopped(name: str, reply: Reply, reason: str, **more: Any) -> Case:
    return Case(name, reply, reason=reason, stops=True, **more)


CASES = [
    # Numbers of tokens.
    answer("3e8 tokens", counted("3e8"), tokens=0),
    answer("1e15 tokens", counted("1000000000000000"), tokens=0),
    answer("1e999 tokens", counted("1e999"), tokens=0),
    answer("6,000 digits of tokens", counted("9" * 6000), tokens=0),
    answer("negative tokens", counted("-5"), tokens=0),
    answer("NaN tokens", counted("NaN"), tokens=0),
    answer("half a token", counted("2.5"), tokens=0),
    answer("whole float", counted("4.0"), tokens=4),
    answer("tokens as text", counted('"7"'), tokens=0),
    answer("tokens true", counted("true"), tokens=0),
    answer("tokens as a list", counted("[3]"), tokens=0),
    answer("usage null", http(completion("counted") | {"usage": None}), tokens=0),
    answer("usage a text", http(completion("counted") | {"usage": "much"}), tokens=0),
    answer("its own bound", counted("41"), tokens=0, options={"max_count": 40}),
    answer("more than asked for", [counted("60"), counted("20")], tokens=20, requests=2),
    answer("always more than asked for", counted("60"), tokens=60, requests=2),
    # Finish reasons.
    *(answer(f"finish_reason {word}", ok("x", word), "x", word) for word in ("eos_token", "end_turn", "STOP", "</s>")),
    answer("finish_reason missing", ok("x", None), "x", "unknown"),
    answer("finish_reason a number", ok("x", 2), "x", "2"),
    answer("finish_reason an object", ok("x", {"type": "length", "length": 5}), "x", "length"),
    answer("finish_reason with controls", ok("x", CONTROLS), "x", r"a\x1b[2J b\x00\u202ec"),
    answer("finish_reason of a megabyte", ok("x", "z" * 2**20), "x", "z" * 80),
    answer("max_tokens", ok("cut", "MAX_TOKENS"), "cut", "length"),
    answer("a filter without text", ok(None, "SAFETY"), "", "content_filter"),
    answer("a filter with text", ok("The", "blocked"), "The", "content_filter"),
    answer("refused", ok("I won't.", "refused"), "I won't.", "refusal"),
    answer("empty at an unknown end", ok("", "eos"), "", "eos"),
    broken("cancelled", ok("half an", "cancelled"), "did not end"),
    broken("no text, no reason", ok("", None), "not a chat completion"),
    # Contents.
    answer("parts", ok([{"type": "text", "text": " one"}, {"type": "output_text", "text": " two "}]), "one two"),
    answer("thoughts apart", ok([{"type": "thinking", "text": "hm"}, {"type": "text", "text": "No."}]), "No."),
    answer("a refusing part", ok([{"type": "refusal", "refusal": "Sorry."}]), "Sorry.", "refusal"),
    answer("several choices", http({**completion("a"), "choices": completion("a")["choices"] * 3}), "a"),
    answer("half a surrogate", ok("No \ud83d"), "No \ud83d"),
    answer("raw half a surrogate", http(json.dumps(completion("No \ud83d"), ensure_ascii=False)), "No \ud83d"),
    answer("control characters", ok(CONTROLS), CONTROLS),
    answer("a byte order mark", http(b"\xef\xbb\xbf" + BODY), "packed"),
    answer("UTF-16", http(BODY.decode().encode("utf-16")), "packed"),
    answer("another charset", http(json.dumps(completion("é"), ensure_ascii=False).encode("latin-1"),
           Content_Type="application/json; charset=latin-1"), "é"),
    answer("a wrong content type", http(BODY, Content_Type="text/html"), "packed"),
    answer("a megabyte", ok("y" * 2**20), "y" * 2**20),
    answer("unhashable types", ok([{"type": ["text"], "text": "a"}, {"type": "text", "text": "b"}]), "b"),
    *(
        broken(f"charset {name}", http(b"\xff", Content_Type=f"application/json; charset={name}"), "UnicodeDecodeError")
        for name in ("base64", "undefined", "idna", "nothing")
    ),
    broken("bad UTF-8", http(BODY.replace(b"packed", b"\xff\xfe")), "UnicodeDecodeError"),
    broken("tool calls", ok(None, "tool_calls", tool_calls=[{"id": "1"}]), "tool_calls"),
    broken("null content", ok(None), "NoneType"),
    broken("content a number", ok(5), "int"),
    broken("content NaN", http(BODY.replace(b'"packed"', b"NaN")), "float"),
    broken("no message", http({"choices": [{"finish_reason": "stop"}]}), "no message"),
    broken("message a text", http({"choices": [{"message": "a"}]}), "no message"),
    broken("empty choices", http({"choices": []}), "no choices"),
    broken("choices an object", http({"choices": {"0": "x"}}), "no choices"),
    broken("a list", http([1]), "list"),
    broken("null", http("null"), "NoneType"),
    broken("nested brackets", http(NESTED), "nested too deeply"),
    broken("nested in the content", http('{"choices": [{"message": {"content": ' + NESTED), "nested too deeply"),
    broken("content twice", http('{"choices": [{"message": {"content": "a", "content": "b"}}]}'), "occurs twice"),
    answer("another key twice", http(BODY.replace(b'{"id"', b'{"id": 1, "id"')), "packed"),
    broken("an HTML page", http("<html>\x1b[2J</html>", Content_Type="text/html"), "not a chat completion"),
    broken("nothing", http(""), "not a chat completion"),
    # Errors.
    broken("an error in 200", http({"error": {"message": "over\x1b[31mload", "code": 503.5}}), r"over\\x1b\[31mload"),
    Case("400 in 200", http({"error": {"message": "bad", "code": 400}}), reason=r"can't take it \(400: bad\)"),
    broken("an error that is a text", http({"error": "boom"}), "an error that came with the status 200"),
    broken("500 nested", http(NESTED, "500 Oh"), "500"),
    broken("500 list", http([{"message": 3}], "500 Oh"), "500"),
    Case("400 of odd types", http({"error": {"message": ["m"], "code": {"a": 1}, "type": [], "param": {}}}, "400 Bad"),
         reason="400"),
    Case("400 of a megabyte", failed("400 Bad", "z" * 2**20), reason=r"z{300}\.\.\.\)$"),
    Case("400 with escapes", failed("400 Bad", CONTROLS * 3), reason=r"^\S+: http\S+ can't take it \(400: a\\x1b\[2J"),
    Case("413", failed("413 Large"), reason=r"\(413: no\)"),
    # A server that answers other questions forbids only this one, like an input filter.
    Case("403 for one question", failed("403 Forbidden", "it was flagged"), reason=r"\(403: it was flagged"),
    Case("451 for one question", failed("451 Legal"), reason=r"can't take it \(451: no\)"),
    Case("418 for one question", http("", "418 Teapot"), reason=r"can't take it \(418"),
    stopped("410", failed("410 Gone"), r"^vlm\.addresses: .*410"),
    stopped("401", failed("401 No"), r"^vlm\.api_key_variable: .*\(401\)"),
    stopped("404", failed("404 No"), r"^vlm\.model: "),
    stopped("405", http("x", "405 No"), r"^vlm\.addresses: .*405"),
    # A parameter that the server rejects again and again must not cause endless requests.
    Case("unknown parameter, always", failed("400 Bad", "Unrecognized argument: max_completion_tokens"),
         reason="can't take it", requests=2),
    # Redirects.
    *(
        stopped(f"redirect {status}", http("", status, Location="http://127.0.0.9:1/v1/chat/completions?key=secret"),
                r"redirects to 127\.0\.0\.9 \(30\d\), which is not followed")
        for status in ("301 Moved", "302 Found", "303 Other", "307 Temporary", "308 Permanent")
    ),
    stopped("redirect to itself", http("", "307 T", Location="/v1/other"), "another path of the same host"),
    stopped("redirect to nowhere", http("", "307 T", Location="http://[::"), "no valid address"),
    stopped("redirect without a place", http("", "302 F"), r"it redirects \(302\)"),
    # Pauses.
    *(
        stopped(f"Retry-After {value[:12]}", failed("429 Slow", "later", Retry_After=value), r"more than vlm\.max_wait")
        for value in ("1e8", "99999999999", "Fri, 31 Dec 9999 23:59:59 GMT")
    ),
    stopped("a pause after 500", failed("500 Oh", Retry_After="1e9"), r"asks for a pause of 1000000000 s"),
    *(
        answer(f"Retry-After {value}", [failed("429 Slow", Retry_After=value), ok(KEPT)], KEPT, requests=2)
        for value in ("-5", "NaN", "inf", "1e999", "soon", "0", "Wed, 99 Foo 99999 99:99:99")
    ),
    Case("503 for one question alone", failed("503 Busy"), reason=r"no response after \d requests.*503", requests=2),
    # Bodies and connections.
    Case("too large", http(b" " * 3_000_000), reason=r"vlm\.max_body", options={"max_body": 2_000_000}),
    Case("endless", endless, reason=r"vlm\.max_body", options={"max_body": 1_000_000}),
    Case("gzip of 200 MB", http(HUGE_GZIP, Content_Encoding="gzip"), reason="decompressed"),
    Case("error with gzip of 200 MB", http(HUGE_GZIP, "500 Oh", Content_Encoding="gzip"), reason="decompressed"),
    answer("gzip", http(gzip.compress(BODY), Content_Encoding="gzip"), "packed"),
    answer("two gzip members", http(gzip.compress(BODY[:9]) + gzip.compress(BODY[9:]), Content_Encoding="x-gzip"),
           "packed"),
    answer("deflate", http(zlib.compress(BODY), Content_Encoding="deflate"), "packed"),
    answer("raw deflate", http(zlib.compress(BODY)[2:-4], Content_Encoding="deflate"), "packed"),
    broken("no gzip", http(BODY, Content_Encoding="gzip"), "not valid gzip"),
    broken("many gzip members", http(gzip.compress(b" ") * 100 + gzip.compress(BODY), Content_Encoding="gzip"),
           "more than 100 parts"),
    broken("cut gzip", http(gzip.compress(BODY)[:-20], Content_Encoding="gzip"), "ends in the middle"),
    broken("gzip twice", http(BODY, Content_Encoding="gzip, gzip"), "not asked for"),
    broken("a drip", drip, r"vlm\.timeout", options=SOON),
    broken("a drip of headers", drip_head, r"vlm\.timeout", options=SOON),
    broken("it hangs", hang, r"vlm\.timeout", options=SOON),
    broken("102 without end", endless_informational, r"vlm\.timeout|RemoteProtocolError", options=SOON),
    broken("reset in the body", reset, "connection failed"),
    broken("hangs up", b"", "RemoteProtocolError"),
    broken("a body too short", http(BODY, length=len(BODY) + 50), "RemoteProtocolError"),
    broken("a body too long", http(BODY, length=len(BODY) - 5), "not a chat completion"),
    broken("a negative length", http(BODY, Content_Length="-5"), "RemoteProtocolError"),
    broken("two lengths", http(BODY, Content_Length="5", content_length="6"), "RemoteProtocolError"),
    broken("bad chunks", http(b"zz\r\nabc", Content_Length="", Transfer_Encoding="chunked"), "RemoteProtocolError"),
    broken("headers of a megabyte", http(BODY, X="y" * 2**20), "RemoteProtocolError|ReadError"),
    broken("HTTP/0.9", b"<html>hello</html>", "RemoteProtocolError"),
    broken("garbage", bytes(range(256)) * 20, "RemoteProtocolError"),
    broken("TLS on a plain port", b"\x15\x03\x01\x00\x02\x02\x46", "RemoteProtocolError"),
    # Time and caps.
    # The time ends in the pause that the server asks for, so that no request is on its way then.
    Case("a question's whole time", failed("503 Busy", Retry_After="4"), reason=r"vlm\.question_timeout",
         options={"question_timeout": 3, "max_retries": 60}),
    stopped("max_requests", failed("500 Oh"), r"^vlm\.max_requests: 5", requests=4,
            options={"max_requests": 5, "max_retries": 50}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_waits(monkeypatch, longest=0.02)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """The first question imports several libraries; no test's memory and time include that."""
    server = Counting(lambda count: ok("An answer."))
    ask(new(server))
    server.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_misbehaving_server_loses_at_most_one_question(case, raw, tmp_path, capsys):
    replies = case.reply if isinstance(case.reply, list) else [case.reply]
    there = raw(lambda number: replies[min(number, len(replies)) - 1])
    server = new(there, **case.options)
    log = AttemptFile(tmp_path / "attempts.jsonl")
    server.on_attempt = log.write
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, second, third = ask(server)
    log.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000, "kilobytes"
    assert isinstance(first, Generation)
    assert first.text == "echo of question 0"
    if case.text is None:
        assert isinstance(second, str)
        assert re.search(case.reason, second.split("not asked; ")[-1]), second
        assert "\n" not in second
        assert len(second) < 1000
    else:
        assert isinstance(second, Generation), second
        assert (second.text, second.finish_reason) == (case.text, case.finish)
        if case.tokens is not None:
            assert len(second.token_ids) == case.tokens
    if case.stops:
        assert isinstance(third, str)
        assert "question 2" not in there.asked
        with pytest.raises(ValueError, match=case.reason.removeprefix("^")):
            ask(server)
    else:
        assert isinstance(third, Generation)
    sent = there.asked.count("question 1")
    assert sent == case.requests
    history = list(read_jsonl(tmp_path / "attempts.jsonl"))
    assert len(history) == server.requests == len(there.asked)
    said = capsys.readouterr().out + (tmp_path / "attempts.jsonl").read_text()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", said)
    assert "secret" not in said
    assert max(map(len, said.splitlines())) < 1500


def test_at_least_50_distinct_server_misbehaviours_are_tested():
    assert len(CASES) >= 50
    assert len({case.name for case in CASES}) == len(CASES)


def test_impossible_token_count_is_recorded_in_the_log(raw):
    told = []
    server = new(raw(lambda number: counted("-3e5")))
    server.on_attempt = told.append
    ask(server)
    assert told[1]["impossible"] == {"completion_tokens": "-300000.0"}
    assert told[1]["completion_tokens"] is None
    assert server.tokens == 10 + 7 + 10


def test_placeholder_tokens_of_a_huge_count_take_no_memory():
    from safervlm.vlm.server.reading import UnknownTokens

    tokens = UnknownTokens(10**9)
    assert len(tokens) == 10**9
    assert len(pickle.dumps(tokens)) < 200
    assert tokens[5] == -1
    assert list(tokens[:3]) == [-1] * 3
    with pytest.raises(IndexError):
        tokens[10**9]


def test_max_requests_is_not_exceeded_by_concurrent_requests(raw):
    there = raw(lambda number: b"")
    server = new(there, concurrency=16, max_requests=5, max_retries=9)
    answers = ask(server, questions(12))
    assert len(there.asked) == server.requests == 5
    assert sum(isinstance(each, Generation) for each in answers) >= 4


def test_redirecting_server_is_skipped_and_the_other_server_answers(raw, capsys):
    stranger = raw(lambda number: ok("stolen"))
    first = raw(lambda number: http("", "307 T", Location=f"{stranger.address}/chat/completions"))
    second = raw(lambda number: ok("right"))
    answers = ask(new(first, second), questions(6))
    assert [each.text for each in answers] == [f"echo of question {n}" if n != 1 else "right" for n in range(6)]
    assert not stranger.asked
    said = capsys.readouterr().out
    assert said.count("\n") <= 1
    assert str(stranger.port) not in said


def test_requests_to_localhost_use_no_compression_and_no_proxy(raw, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    there = raw(lambda number: ok("direct"))
    assert all(isinstance(each, Generation) for each in ask(new(there)))
    assert all(b"accept-encoding: identity" in head.lower() for head, _ in there.requests)


@pytest.mark.parametrize(
    ("address", "proxy"),
    [
        ("http://127.0.0.1:8000/v1", None),
        ("http://127.9.9.9/v1", None),
        ("http://localhost:8000/v1", None),
        ("http://[::1]:8000/v1", None),
        ("http://inside.example/v1", None),
        ("http://outside.example/v1", "http://proxy.example:3128"),
        ("https://outside.example/v1", "http://tls.example:3128"),
        ("http://10.0.0.1/v1", "http://proxy.example:3128"),
    ],
)
def test_proxy_is_used_for_non_local_addresses_outside_no_proxy(address, proxy, monkeypatch):
    from safervlm.vlm.server.transport import proxy_for

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("HTTPS_PROXY", "http://tls.example:3128")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    assert proxy_for(address) == proxy


def test_a_key_that_is_echoed_in_any_form_is_cleaned(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    coded = [base64.b64encode(("x" * n + KEY).encode()).decode() for n in range(4)]
    urls = [base64.urlsafe_b64encode(("x" * n + KEY + "y").encode()).decode() for n in range(3)]
    echoes = [KEY, f"Bearer {KEY}", KEY[:14], KEY[-12:], KEY.encode().hex(), f"{KEY[:8]}****{KEY[-8:]}", *coded, *urls]
    for said in [*echoes, " " * 99_990 + KEY]:
        replies = [failed("500 Oh", f"<{said}>"), http(f"<{said}>"), ok(f"The key is {said}", f"end {said}")]
        there = raw(lambda number, replies=replies: replies[min(number, 3) - 1])
        told = []
        server = new(there, max_retries=3)
        server.on_attempt = told.append
        answers = ask(server)
        assert isinstance(answers[1], Generation), answers
        # A part of the key in a response, which is data, is kept; the whole key is not.
        written = json.dumps(told) + answers[1].finish_reason + capsys.readouterr().out
        written += answers[1].text if len(said) > len(KEY) - 1 and "*" not in said else ""
        for form in [KEY, *(KEY[start : start + 8] for start in range(len(KEY) - 7)), KEY.encode().hex()]:
            assert form not in written, said
        for piece in re.findall(r"[\w+/=-]{12,}", written):
            for start in range(4):
                for alphabet in (b"+/", b"-_"):
                    with suppress(ValueError):
                        plain = base64.b64decode(piece[start : start + (len(piece) - start) // 4 * 4], alphabet)
                        assert KEY[4:14].encode() not in plain, said
        assert "(key)" in written, said


def test_a_log_that_cannot_be_written_loses_no_response(raw, capsys):
    def full(attempt):
        raise OSError(28, "No space left on device")

    server = new(raw(lambda number: ok("paid")))
    server.on_attempt = full
    assert [each.text for each in ask(server)] == ["echo of question 0", "paid", "echo of question 2"]
    assert capsys.readouterr().out.count("the log of attempts is incomplete: OSError") == 1


def test_unexpected_exception_fails_only_one_question(raw, monkeypatch):
    import safervlm.vlm.server.request as request

    whole = request.read_completion

    def breaking(body, *settings):
        if "echo" not in str(body):
            raise MemoryError
        return whole(body, *settings)

    monkeypatch.setattr(request, "read_completion", breaking)
    first, second, third = ask(new(raw(lambda number: ok("x"))))
    assert isinstance(first, Generation)
    assert isinstance(third, Generation)
    assert second == "T/i/alignment/1: MemoryError: MemoryError"


def test_lone_surrogate_in_a_question_fails_only_that_question(raw):
    examples = questions()
    examples[1] = Example(Question("T/i/alignment/1", "T", "i", None, "alignment", 0, "cut \ud83d", "H", "x", "Safe"))
    there = raw(lambda number: ok("x"))
    first, second, third = ask(new(there), examples)
    assert isinstance(first, Generation)
    assert isinstance(third, Generation)
    assert "character 5 of the question is half of a surrogate pair" in second
    assert len(there.asked) == 2


@pytest.mark.parametrize(("count", "wait"), [(1, 2), (2, 4), (3, 7), (2000, 7)])
def test_retry_waits_follow_the_configured_bounds(count, wait):
    server = Server("m", ["http://h/v1"], bounds=Bounds(first_wait=2, longest_wait=7))
    assert wait / 2 <= server._back_off(count) <= wait


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        *(
            (name, value, "more than 0 seconds")
            for name in ("connect", "first_wait", "longest_wait")
            for value in (0, -1, math.inf, math.nan)
        ),
        ("failures_in_a_row", 0, "at least 1, got 0"),
        ("pauses", 0, "at least 1, got 0"),
        ("longest_wait", 0.5, "at least first_wait, 1 s, got 0.5"),
    ],
)
def test_invalid_server_bound_is_rejected_in_one_line(argument, value, message):
    with pytest.raises(ValueError, match=rf"^vlm\.bounds\.{argument}: {message}") as raised:
        Bounds(**{argument: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("addresses", ["http://user:hunter2@h/v1"], "the one at h contains a user name, a query"),
        ("addresses", ["http://h/v1?api-key=hunter2"], "contains a user name, a query"),
        ("addresses", ["http://h/v1#hunter2"], "contains a user name, a query"),
        ("addresses", ["http://h /v1"], "no spaces"),
        ("addresses", ["http://h/v 1"], "no spaces"),
        ("addresses", ["http://h/v1\n"], "no spaces"),
        ("addresses", ["http://h\u0435/v1"], "beyond ASCII"),
        ("addresses", ["http://h\\evil/v1"], "backslashes"),
        ("addresses", ["http://h:99999/v1"], "a base URL such as"),
        ("addresses", ["http://[::1/v1"], "a base URL such as"),
        ("addresses", ["ftp://h/v1"], "a base URL such as"),
        ("addresses", [""], "a base URL such as"),
        ("addresses", [None], "a base URL such as"),
        ("addresses", "http://h/v1", "a list of base URLs"),
        ("model", " ", "the name that the servers know"),
        ("model", "m\ud800", "half of a surrogate pair"),
        ("system", "\udc00", "half of a surrogate pair"),
        ("timeout", float("inf"), "above 0"),
        ("timeout", float("nan"), "above 0"),
        ("max_wait", 0, "above 0"),
        ("question_timeout", -1, "above 0"),
        ("max_body", 0, "at least 1, got 0"),
        ("max_count", 0, "at least 1, got 0"),
    ],
)
def test_invalid_server_argument_is_rejected_in_one_line(argument, value, message):
    with pytest.raises(ValueError, match=rf"^vlm\.{argument}: .*{message}") as raised:
        Server(**{"model": "m", "addresses": ["http://h/v1"]} | {argument: value})
    assert "\n" not in str(raised.value)
    assert "hunter2" not in str(raised.value)
