"""Odds from a server: one-token requests whose failures do not affect responses."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import log
from typing import Any

import pytest
from loopback import Loopback, Reply, completion, error, loopbacks, shorten_waits

from safervlm.measure import Measure
from safervlm.records import Example, Failure, Question, Response
from safervlm.vlm.odds import Odds, OddsFailure
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.bounds import Bounds
from safervlm.vlm.server.client import Server
from safervlm.vlm.server.first_token import read_first_token

GREEDY = Sampling(temperature=0, max_new_tokens=8)


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loopback]]:
    shorten_waits(monkeypatch)
    with loopbacks() as start:
        yield start


def tokens(*first: tuple[str, float], own: tuple[str, float] | None = None, **message: Any) -> Reply:
    """A completion of one token with the log-probabilities of its alternatives."""
    own = own or first[0]
    entry = {"token": own[0], "logprob": own[1], "bytes": None}
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in first]
    body = completion(own[0], "length", 1, **message)
    body["choices"][0]["logprobs"] = {"content": [entry | {"top_logprobs": top}]}
    return Reply(body=body)


def measured(server: Server, questions: list[Question], batch: int = 100) -> list[Any]:
    measure = Measure(server, GREEDY, odds=True)
    records = []
    for start in range(0, len(questions), batch):
        examples = [Example(question) for question in questions[start : start + batch]]
        records += measure.predict_step(measure.collator(examples), 0)
    return records


def of(records: list[Any], kind: type) -> list[Any]:
    return [record for record in records if isinstance(record, kind)]


def test_probabilities_of_yes_and_no_tokens_of_a_server_are_summed(loopback, make_questions):
    first = (("No", log(0.5)), (" no", log(0.1)), ("Yes", log(0.2)), ("The", log(0.1)))
    there = loopback(lambda prompt, number, body: tokens(*first) if "logprobs" in body else None)
    server, told = Server("m", [there.address], system="Be brief.", extra_body={"top_k": 5}), []
    server.on_attempt = told.append
    records = measured(server, make_questions(3))
    assert len(of(records, Response)) == len(of(records, Odds)) == 3
    for odds in of(records, Odds):
        assert (odds.log_odds, odds.mass, odds.bound) == (pytest.approx(log(3)), pytest.approx(0.8), False)
    plain, short = ([body for body, _ in there.asked if ("logprobs" in body) == one] for one in (False, True))
    for body, other in zip(
        *(sorted(some, key=lambda body: str(body["messages"])) for some in (plain, short)), strict=True
    ):
        assert (other["messages"], other["top_k"], other["model"]) == (body["messages"], 5, "m")
        assert (other["max_completion_tokens"], other["temperature"], other["top_logprobs"]) == (1, 1, 20)
    assert [attempt.get("odds", False) for attempt in told].count(True) == 3
    assert server.requests == 6


def no_logprobs(prompt: str, number: int, body: dict[str, Any]) -> Reply | None:
    return None


def rejects(prompt: str, number: int, body: dict[str, Any]) -> Reply | None:
    return error(400, message="logprobs is not supported", param="logprobs") if "logprobs" in body else None


def fails(prompt: str, number: int, body: dict[str, Any]) -> Reply | None:
    return error(500) if "logprobs" in body else None


def takes_no_temperature(prompt: str, number: int, body: dict[str, Any]) -> Reply | None:
    if "logprobs" not in body:
        return None
    if "temperature" in body:
        return error(400, message="temperature is not supported", param="temperature")
    return tokens(("No", -1.0), ("Yes", -2.0))


def long_tokens(prompt: str, number: int, body: dict[str, Any]) -> Reply | None:
    if "logprobs" not in body:
        return None
    reply = tokens(("No", -1.0), ("Yes", -2.0))
    return reply if "max_tokens" in body else Reply(body=completion("No, it is", "stop", 5))


@pytest.mark.parametrize(
    ("play", "odds", "reason", "most"),
    [
        (no_logprobs, False, "returns no log-probabilities (logprobs), which the odds need; omit it", 8),
        (rejects, False, "logprobs is not supported", 12),
        (fails, False, "500", 80),
        (takes_no_temperature, True, "", 60),
        (long_tokens, True, "", 60),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_server_without_log_probabilities_returns_responses_without_odds(
    play, odds, reason, most, loopback, make_questions
):
    there = loopback(play)
    server = Server("m", [there.address], max_retries=2, bounds=Bounds(0.5, 0.01, 0.02, failures_in_a_row=10))
    questions = make_questions(24)
    records = measured(server, questions, batch=4)
    assert [record.response for record in of(records, Response)] == [f"echo of {each.prompt}" for each in questions]
    assert len(of(records, Odds)) == 24 * odds
    failures = of(records, Failure)
    assert {type(failure) for failure in failures} <= {OddsFailure}
    assert len(failures) == 24 * (not odds)
    assert all(reason in failure.reason and "\n" not in failure.reason for failure in failures)
    assert sum("logprobs" in body for body, _ in there.asked) <= most
    # What was learnt about the server from the odds changes no request for a response.
    for body in (body for body, _ in there.asked if "logprobs" not in body):
        assert (body["max_completion_tokens"], body["temperature"]) == (8, 0)
    assert server.halted is None


def test_refused_odds_request_fails_alone(loopback, make_questions):
    questions = [replace(question, prompt=f"question {n}") for n, question in enumerate(make_questions(3))]

    def play(prompt, number, body):
        if "logprobs" not in body:
            return None
        if prompt == "question 1":
            return error(400, "content_filter")
        return Reply(body=completion("", "content_filter")) if prompt == "question 2" else tokens(("Yes", -1.0))

    records = measured(Server("m", [loopback(play).address]), questions)
    assert [odds.id for odds in of(records, Odds)] == [questions[0].id]
    assert of(records, Odds)[0].bound
    reasons = [failure.reason for failure in of(records, Failure)]
    assert ["content_filter" in reason or "returns no" in reason for reason in reasons] == [True, True]


@pytest.mark.parametrize(
    ("logprobs", "found"),
    [
        (None, ()),
        ([], ()),
        ({"content": None}, ()),
        ({"content": []}, ()),
        ({"content": [1]}, ()),
        ({"content": [{"token": "No", "logprob": -1}]}, (("No", -1.0),)),
        ({"content": [{"token": "No", "logprob": -1, "top_logprobs": "x"}]}, (("No", -1.0),)),
        (
            {"content": [{"token": "A", "logprob": -5, "top_logprobs": [{"token": "No", "logprob": 0.0001}]}]},
            (("A", -5.0), ("No", 0.0)),
        ),
        (
            {
                "content": [
                    {
                        "token": "No",
                        "logprob": -1,
                        "top_logprobs": [
                            {"token": "No", "logprob": -1.0},
                            {"token": "x", "logprob": float("nan")},
                            {"token": 3, "logprob": -2},
                            {"token": "y", "logprob": True},
                            {"token": "z", "logprob": 2},
                            [],
                        ],
                    }
                ]
            },
            (("No", -1.0),),
        ),
    ],
)
def test_malformed_log_probabilities_are_ignored(logprobs, found):
    assert read_first_token({"logprobs": logprobs}) == found
