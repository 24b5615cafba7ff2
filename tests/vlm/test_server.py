"""Server with a misbehaving server on loopback: no response is lost or duplicated, and the key is not disclosed."""

import base64
import io
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import families
import pytest
from loopback import Loopback, Reply, completion, error, loopbacks, shorten_waits
from PIL import Image
from safetensors.torch import load_file, save_file

from safervlm.cli.main import main
from safervlm.errors import RecordError
from safervlm.io.images import open_image
from safervlm.judging.classifier import Judge
from safervlm.judging.panel import Panel
from safervlm.measure import Measure
from safervlm.protocol import LABELS
from safervlm.recipes import CONFIGS
from safervlm.records import Example, Question, Response, read_jsonl
from safervlm.vlm.auto import Transformers
from safervlm.vlm.base import Generation, Unanswered
from safervlm.vlm.lora import LoRA
from safervlm.vlm.merging import merge_adapter, write_merged
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.batch import ServerCollator
from safervlm.vlm.server.bounds import Bounds
from safervlm.vlm.server.client import Server
from safervlm.vlm.server.outcomes import seconds_to_wait

KEY = "sk-very-secret-0123456789"
GREEDY = Sampling(temperature=0, max_new_tokens=8)


@pytest.fixture
def loopback() -> Iterator[Callable[..., Loopback]]:
    with loopbacks() as start:
        yield start


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_waits(monkeypatch)


@pytest.fixture
def ask(make_questions: Callable[[int], list[Question]]) -> Callable[..., list[Generation]]:
    """``ask(server, n)`` asks n questions, "question 0" and so on; ``server.told`` is the log of attempts."""

    def asking(server: Server, count: int, first: int = 0, sampling: Sampling = GREEDY) -> list[Generation]:
        server.told = getattr(server, "told", [])
        server.on_attempt = server.told.append
        questions = [replace(q, prompt=f"question {i}") for i, q in enumerate(make_questions(first + count))][first:]
        return server.generate(ServerCollator()([Example(question) for question in questions]), sampling, seed=0)

    return asking


def echoes(answers: list[Any]) -> list[str]:
    assert all(isinstance(answer, Generation) for answer in answers), answers
    return [answer.text for answer in answers]


# --- transient errors -------------------------------------------------------------------------------------------------

PASSING: dict[str, tuple[Callable[[], Reply], str]] = {
    "429": (lambda: error(429, "rate_limit_exceeded", Retry_After="0.4"), "rate_limit_exceeded"),
    "503": (lambda: error(503), "InternalServerError"),
    "500": (lambda: Reply(500, b"<html>oh</html>", {"Content-Type": "text/html"}), "InternalServerError"),
    "408": (lambda: error(408), "APIStatusError"),
    "409": (lambda: error(409), "ConflictError"),
    "time-out": (lambda: Reply(body=completion("late"), sleep=1.6), "timeout"),
    "cut body": (lambda: Reply(body=completion("cut"), cut=True), "RemoteProtocolError"),
    "hangs up": (lambda: Reply(0), "RemoteProtocolError"),
    "invalid JSON": (lambda: Reply(body=b'{"choices": [{"mess'), "malformed"),
    "no JSON": (lambda: Reply(body=b"<p>hello</p>", headers={"Content-Type": "text/html"}), "malformed"),
    "empty choices": (lambda: Reply(body=completion("x") | {"choices": []}), "malformed"),
    "no content": (lambda: Reply(body=completion(None)), "malformed"),
    "aborted": (lambda: Reply(body=completion("half an", "abort")), "malformed"),
}


def test_transient_errors_are_retried_without_lost_or_duplicate_responses(loopback, ask):
    kinds = list(PASSING)

    def play(prompt, number, body):
        place = int(prompt.split()[1])
        return PASSING[kinds[place]][0]() if place < len(kinds) and number == 1 else None

    there = loopback(play)
    server = Server("m", [there.address], concurrency=20, timeout=1.2)
    count = len(kinds) + 3
    assert echoes(ask(server, count)) == [f"echo of question {place}" for place in range(count)]
    assert sorted(there.answered) == sorted(f"question {place}" for place in range(count))
    results: dict[str, list[str]] = {}
    for attempt in server.told:
        results.setdefault(attempt["id"].split("/")[-1], []).append(attempt["result"])
    assert results == {
        str(place): [PASSING[kinds[place]][1], "stop"] if place < len(kinds) else ["stop"] for place in range(count)
    }
    assert len(server.told) == len(there.asked) == server.requests == count + len(kinds)
    by_status = {attempt["status"]: attempt for attempt in server.told}
    assert by_status.keys() == {None, 200, 408, 409, 429, 500, 503}
    assert by_status[429]["retry_after"] == 0.4
    assert by_status[200]["model"] == "served"
    assert by_status[200]["completion_tokens"] == 3
    assert all(attempt["address"] == there.address and attempt["seconds"] >= 0 for attempt in server.told)


def test_retry_after_is_waited_for(loopback, ask):
    there = loopback(lambda prompt, number, body: error(429, Retry_After="0.5") if number == 1 else None)
    ask(Server("m", [there.address]), 1)
    first, second = there.times
    assert second - first >= 0.5


def test_retry_after_is_seconds_or_a_date():
    assert seconds_to_wait(None) is seconds_to_wait("soon") is seconds_to_wait("inf") is None
    assert seconds_to_wait("1.5") == 1.5
    assert seconds_to_wait("-3") == 0
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 < (seconds_to_wait(soon) or 0) <= 30
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_question_failing_all_retries_does_not_affect_the_others(loopback, ask):
    there = loopback(lambda prompt, number, body: error(500, message="boom") if prompt == "question 2" else None)
    server = Server("m", [there.address], max_retries=3)
    answers = ask(server, 5)
    assert [place for place, answer in enumerate(answers) if isinstance(answer, Unanswered)] == [2]
    assert re.search(r"/2: no response after 4 requests.*500: boom", answers[2].reason)
    assert echoes(answers[:2] + answers[3:]) == [f"echo of question {place}" for place in (0, 1, 3, 4)]
    assert len(there.asked) == 4 + 4
    assert echoes(ask(server, 1)) == ["echo of question 0"]  # the run can resume


def test_rejected_question_is_not_retried_and_does_not_affect_the_others(loopback, ask):
    there = loopback(lambda prompt, number, body: error(400, message="too long") if prompt == "question 1" else None)
    answers = ask(Server("m", [there.address]), 3)
    assert [type(answer) for answer in answers] == [Generation, Unanswered, Generation]
    assert re.search(r"/1: .* can't take it \(400: too long\)", answers[1].reason)
    assert len(there.asked) == 3


def test_too_many_unanswered_questions_in_a_row_stop_the_run(loopback, ask):
    there = loopback(lambda prompt, number, body: error(400, message="never"))
    with pytest.raises(ValueError, match=r"^vlm: 4 questions in a row got no response, the last: .*never"):
        ask(Server("m", [there.address], concurrency=1, bounds=Bounds(failures_in_a_row=4)), 9)
    assert len(there.asked) == 4


# --- permanent errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (error(401), r"^vlm\.api_key_variable: .* asks for a key, and there is none in .* SOME_KEY \(401\)"),
        (error(403, message="not yours"), r"^vlm\.api_key_variable: .*SOME_KEY \(403: not yours\); use one that may"),
        (error(404, message="no model m"), r"^vlm\.model: .* has no 'm'.*\(404: no model m\); .*/models lists"),
        (Reply(405, b"Not allowed"), r"^vlm\.addresses: .*405"),
        (error(429, "insufficient_quota", "pay"), r"^vlm: .* the account is used up \(pay\)"),
        (error(400, None, "bad value", "temperature"), r"^sampling\.temperature: .* doesn't take 0 as temperature"),
        (error(400, None, "'temperature' does not support 0"), r"^sampling\.temperature: .* takes 1 for temperature"),
    ],
)
def test_permanent_error_is_sent_once_and_reported_in_one_line(loopback, ask, reply, message):
    there = loopback(lambda prompt, number, body: reply)
    server = Server("m", [there.address], "SOME_KEY", concurrency=1)
    for _ in range(2):  # the next batch is not sent
        with pytest.raises(ValueError, match=message) as raised:
            ask(server, 3)
        assert "\n" not in str(raised.value)
    assert len(there.asked) == len(server.told) == 1


def test_refusals_and_filters_are_responses(loopback, ask, make_questions, tiny_judges):
    replies = [
        Reply(body=completion(None, refusal=" I'm sorry, no.")),
        Reply(body=completion("The ima", "content_filter")),
        Reply(body=completion(None, "content_filter")),
        error(400, "content_filter", "Azure's filter"),
        error(400, "content_policy_violation", "OpenAI's filter"),
        Reply(body=completion("", "stop")),
        Reply(body=completion("cut here", "length", tokens=8)),
    ]
    there = loopback(lambda prompt, number, body: replies[int(prompt.split()[1])])
    answers = ask(Server("m", [there.address]), 7)
    assert [(answer.text, answer.finish_reason) for answer in answers] == [
        ("I'm sorry, no.", "refusal"),
        ("The ima", "content_filter"),
        *[("", "content_filter")] * 3,
        ("", "stop"),
        ("cut here", "length"),
    ]
    assert len(there.asked) == 7
    assert len(answers[6].token_ids) == 8

    responses = [Measure.record(question, answer) for question, answer in zip(make_questions(7), answers, strict=True)]
    assert all(isinstance(each, Response) and Response.from_dict(each.to_dict()) == each for each in responses)
    panel = Panel(
        *(
            Judge(str(tiny_judges / name / "epoch_10.pt"), LABELS[name], str(tiny_judges / name))
            for name in ("alignment", "perception")
        )
    )
    verdicts = panel.judge(responses)
    certain = {"Safe": 0.0, "Unsafe": 0.0, "N/A": 1.0}
    assert [verdict.probabilities == certain for verdict in verdicts] == [False, False, True, True, True, True, False]
    assert {verdict.label for verdict in verdicts[2:6]} == {"N/A"}
    assert [verdict.id for verdict in verdicts] == [response.id for response in responses]
    assert len({verdict.judge for verdict in verdicts}) == 1


# --- requests ---------------------------------------------------------------------------------------------------------


def test_request_contains_sampling_settings_and_a_seed_per_question(loopback, ask):
    there = loopback()
    for system in ("", "Be brief."):
        ask(Server("m", [there.address], system=system), 2, sampling=Sampling(0.7, 0.9, 33))
    bodies = sorted((body for body, _ in there.asked[:2]), key=str)
    for body in bodies:
        assert {name: value for name, value in body.items() if name not in ("messages", "seed")} == {
            "model": "m",
            "temperature": 0.7,
            "top_p": 0.9,
            "max_completion_tokens": 33,
        }
        assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
        assert 0 <= body["seed"] < 2**31
    assert len({body["seed"] for body in bodies}) == 2
    assert {body["seed"] for body, _ in there.asked[2:]} == {body["seed"] for body in bodies}
    assert all(body["messages"][0] == {"role": "system", "content": "Be brief."} for body, _ in there.asked[2:])


def test_without_an_image_a_blank_one_is_sent_or_text_alone(loopback, make_questions):
    there = loopback()
    shown = make_questions(1)[0]
    batch = ServerCollator()(
        [
            Example(replace(shown, id=str(number), image_path=path))
            for number, path in enumerate([shown.image_path, None])
        ]
    )
    default = Server("m", [there.address], system="Be brief.", concurrency=1)
    text_only = Server("m", [there.address], system="Be brief.", concurrency=1, blank=False)
    for server in (default, text_only):
        assert echoes(server.generate(batch, GREEDY, seed=0)) == [f"echo of {shown.prompt}"] * 2
    contents = [body["messages"][1]["content"] for body, _ in there.asked]
    assert [[part["type"] for part in content] for content in contents[:3]] == [["image_url", "text"]] * 3
    assert contents[0] == contents[2] != contents[1]
    assert contents[3] == shown.prompt
    assert "blank" not in default.describe()  # the manifests of existing runs have no such key
    assert text_only.describe() == default.describe() | {"blank": False}
    named = [replace(shown, image_path=None)]
    assert re.match(r"1 questions about 1 different images to m: .* MB of images", default.estimate(named, 8))
    assert re.fullmatch(
        r"1 questions to m: about \d+ tokens of text \(4 characters per token\), at most 8 tokens of responses; .*",
        text_only.estimate(named, 8),
    )


def test_unsupported_parameters_are_detected_once_per_server(loopback, ask, capsys):
    def old(prompt, number, body):
        if "max_completion_tokens" in body:
            return error(400, None, "Unrecognized request argument supplied: max_completion_tokens")
        return error(422, None, "seed: Extra inputs are not permitted") if "seed" in body else None

    def reasoning(prompt, number, body):
        for name in ("temperature", "top_p"):
            if name in body:
                return error(400, "unsupported_parameter", f"Unsupported parameter: '{name}'", name)
        return None

    def deaf(prompt, number, body):
        return Reply(body=completion("much too long", tokens=99)) if "max_tokens" not in body else None

    for play, known in (
        (old, {"temperature", "top_p", "max_tokens"}),
        (reasoning, {"max_completion_tokens", "seed"}),
        (deaf, {"temperature", "top_p", "max_tokens", "seed"}),
    ):
        there = loopback(play)
        server = Server("m", [there.address], max_retries=0)
        for first in (0, 4):
            assert len(echoes(ask(server, 4, first, Sampling(1.0, 1.0, 8)))) == 4
        assert all(body.keys() == {"model", "messages"} | known for body, _ in there.asked[-4:])
        assert all(body.get("max_tokens", 8) == 8 for body, _ in there.asked[-4:])
        told = capsys.readouterr().out.splitlines()
        assert len(told) == len({"temperature", "top_p", "max_completion_tokens", "seed"} - known)


def test_images_are_sent_unchanged_with_their_type_or_as_png(tmp_path, make_questions):
    picture = Image.linear_gradient("L").resize((30, 20)).convert("RGB")
    glass = picture.convert("RGBA")
    glass.putalpha(9)
    turned = Image.Exif()
    turned[0x0112] = 6
    cases = [  # (file format, content type of the request, whether the file is sent unchanged)
        ("a.png", picture, {}, "image/png", True),
        ("b.jpg", picture, {}, "image/jpeg", True),
        ("c.webp", picture, {"lossless": True}, "image/webp", True),
        ("d.gif", picture.quantize(16), {}, "image/gif", True),
        ("e.bmp", picture, {}, "image/png", False),
        ("f.png", glass, {}, "image/png", False),
        ("p.png", picture.quantize(16), {"transparency": 0}, "image/png", False),
        ("g.jpg", picture, {"exif": turned}, "image/png", False),
        ("h.gif", picture.quantize(16), {"save_all": True, "append_images": [glass]}, "image/png", False),
        ("wrong.png", picture, {"format": "JPEG"}, "image/jpeg", True),
    ]
    question = make_questions(1)[0]
    questions = [replace(question, id=str(number), image_path=None) for number in range(2)]
    for name, image, options, _, _ in cases:
        image.save(tmp_path / name, **options)
        questions += [replace(question, id=f"{name}{n}", image_path=str(tmp_path / name)) for n in range(2)]
    batch = ServerCollator()([Example(each) for each in questions])
    batch = pickle.loads(pickle.dumps(batch))
    assert len(batch.images) == len(cases) + 1
    assert batch.image_rows == [row for row in range(len(cases) + 1) for _ in range(2)]
    for (name, _, _, kind, as_it_is), url in zip(cases, batch.images[1:], strict=True):
        head, content = url.split(",")
        assert head == f"data:{kind};base64", name
        assert (base64.b64decode(content) == (tmp_path / name).read_bytes()) == as_it_is, name
        with Image.open(io.BytesIO(base64.b64decode(content))) as sent:
            assert sent.convert("RGB").tobytes() == open_image(tmp_path / name, name).tobytes(), name
    with Image.open(io.BytesIO(base64.b64decode(batch.images[0].split(",")[1]))) as blank:
        assert (blank.size, blank.getcolors()) == ((1000, 1000), [(1_000_000, (255, 255, 255))])
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(RecordError, match=r"^a\.png0: the image .* is damaged"):
        ServerCollator()([Example(questions[2])])
    assert pickle.loads(pickle.dumps(Server("m", ["http://x/v1"]).collator)) == ServerCollator()


# --- several servers, limits ------------------------------------------------------------------------------------------


def test_failed_server_is_skipped_and_its_questions_go_to_the_other(loopback, ask, capsys):
    def dying(prompt, number, body):
        if len(first.asked) == 4:
            threading.Thread(target=first.die).start()
            return Reply(0, sleep=0.1)
        return None

    first, second = loopback(dying), loopback()
    server = Server("m", [first.address, second.address], concurrency=4, max_retries=2)
    assert echoes(ask(server, 30)) == [f"echo of question {place}" for place in range(30)]
    assert sorted(first.answered + second.answered) == sorted(f"question {place}" for place in range(30))
    assert len(first.answered) >= 3
    said = capsys.readouterr().out
    for _ in range(100):  # meanwhile it backs off, then it is tried again
        if said:
            break
        assert len(echoes(ask(server, 4))) == 4
        said = capsys.readouterr().out
    assert said == (
        f"{first.address} is skipped (ConnectError: connection failed); its questions go to {second.address}\n"
    )
    before = len(server.told)
    ask(server, 6, first=30)
    assert [attempt["address"] for attempt in server.told[before:]] == [second.address] * 6
    assert capsys.readouterr().out == ""


def test_servers_share_the_work(loopback, ask):
    servers = [loopback(lambda prompt, number, body: time.sleep(0.03)) for _ in range(3)]
    ask(Server("m", [each.address for each in servers], concurrency=6), 30)
    assert [len(each.asked) for each in servers] == pytest.approx([10] * 3, abs=3)


def test_run_stops_if_no_server_responds(loopback, ask):
    there = loopback()
    there.die()
    server = Server("m", [there.address], max_retries=2)
    with pytest.raises(ValueError, match=r"^vlm\.addresses: no server responds any more, .*ConnectError"):
        ask(server, 4)
    assert {attempt["result"] for attempt in server.told} == {"ConnectError"}
    assert len(server.told) <= 3 * 4


def test_concurrency_limit_is_not_exceeded(loopback, ask):
    there = loopback(lambda prompt, number, body: time.sleep(0.04))
    ask(Server("m", [there.address], concurrency=3), 12)
    assert there.most == 3


def test_request_and_token_limits_stop_the_run_and_keep_responses(loopback, ask):
    there = loopback()
    for name, cap, answered in (("max_requests", 5, 5), ("max_tokens", 35, 4)):  # 10 tokens per request
        del there.asked[:]
        server = Server("m", [there.address], concurrency=1, **{name: cap})
        answers = ask(server, 8)
        assert echoes(answers[:answered]) == [f"echo of question {place}" for place in range(answered)]
        for answer in answers[answered:]:
            assert re.search(rf"not asked; vlm\.{name}: .*the same command resumes", answer.reason)
        with pytest.raises(ValueError, match=rf"^vlm\.{name}: "):
            ask(server, 1)
        assert len(there.asked) == answered


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"addresses": []}, r"^vlm\.addresses: a list"),
        ({"addresses": ["localhost:8000"]}, r"^vlm\.addresses: a base URL such as .*localhost:8000"),
        ({"addresses": [f"https://me:{KEY}@host/v1"]}, r"^vlm\.addresses: the one at host contains a user name"),
        ({"addresses": [f"https://host/v1?key={KEY}"]}, r"^vlm\.addresses: the one at host contains a user name, a"),
        ({"concurrency": 0}, r"^vlm\.concurrency: at least 1, got 0"),
        ({"max_requests": 0}, r"^vlm\.max_requests: at least 1, got 0"),
        ({"timeout": 0}, r"^vlm\.timeout: above 0, got 0"),
    ],
)
def test_invalid_server_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        Server(**{"model": "m", "addresses": ["http://x/v1"]} | arguments)
    assert KEY not in str(raised.value)


def test_api_key_with_a_line_break_is_rejected_without_showing_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(ValueError, match=r"^vlm\.api_key_variable: .* OPENAI_API_KEY contains line breaks") as raised:
        Server("m", ["http://x/v1"]).load()
    assert KEY not in str(raised.value)


# --- on the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def line(tiny_sets: Path, tiny_judges: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command that measures by servers, with the shipped configuration files."""
    recipe = (CONFIGS / "measure.yaml").read_text()
    for name in ("alignment", "perception"):
        checkpoint = str(tiny_judges / name / "epoch_10.pt")
        recipe = recipe.replace(
            f"checkpoint: yiting/{name}_classifier:epoch_10.pt",
            f"checkpoint: {checkpoint}\n              base: {tiny_judges / name}",
        )
    (tmp_path / "measure.yaml").write_text(recipe)

    def arguments(*servers: Loopback, **options: Any) -> list[str]:
        return [
            "predict",
            f"--config={tmp_path / 'measure.yaml'}",
            "--config=configs/server.yaml",
            f"--model.vlm.addresses=[{', '.join(server.address for server in servers)}]",
            *(f"--model.vlm.{name}={value}" for name, value in options.items()),
            f"--data.folder={tiny_sets / 'unsafe'}",
            "--data.split=test",
            "--data.capabilities=[alignment, alignment_text_only]",
            "--data.batch_size=10",
            "--trainer.enable_progress_bar=false",
            f"--run={tmp_path / 'run'}",
        ]

    return arguments


@pytest.mark.parametrize("key", [KEY, None])
def test_variables_of_the_client_package_are_not_sent(key, loopback, ask, monkeypatch):
    """None of them is named for these addresses; a folder's configuration may name foreign ones."""
    there = loopback(lambda prompt, number, body: None)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    for name in ("ORG_ID", "PROJECT_ID", "ADMIN_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", "org-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Token: org-secret\nauthorization: org-secret")
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    else:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert echoes(ask(Server("m", [there.address]), 2)) == ["echo of question 0", "echo of question 1"]
    for _, headers in there.asked:
        assert headers["authorization"] == f"Bearer {key or 'none'}"
        assert "org-secret" not in str(headers)


def test_api_key_is_sent_but_not_stored(loopback, line, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def telling(prompt, number, body):
        """Repeats its input in its error messages, as servers do."""
        image = body["messages"][-1]["content"][0]["image_url"]["url"]
        message = f"got {image} with the key {KEY}"
        if number == 1:
            return error(500, message=message) if len(there.asked) % 2 else Reply(body=f"{KEY} {image}".encode())
        return None

    there = loopback(telling)
    main(line(there))
    run = tmp_path / "run"
    responses, attempts = (list(read_jsonl(run / name)) for name in ("responses.jsonl", "attempts-0.jsonl"))
    assert {headers["authorization"] for _, headers in there.asked} == {f"Bearer {KEY}"}
    assert len(responses) == len(list(read_jsonl(run / "verdicts.jsonl"))) == 6 * 5 + 3 * 5
    assert all(response["response"] == f"echo of {response['prompt']}" for response in responses)
    assert {attempt["id"] for attempt in attempts} == {response["id"] for response in responses}
    assert len(attempts) == len(there.asked) > len(responses)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {"manifest.json", "predict.yaml", "attempts-0.jsonl"} <= {path.name for path in files}
    said = capfd.readouterr()
    for where, content in (files | {Path("shell"): (said.out + said.err).encode()}).items():
        assert KEY.encode() not in content, where
        assert b";base64," not in content, where
    assert "(key)" in (run / "attempts-0.jsonl").read_text()
    settings = json.loads((run / "manifest.json").read_text())["stages"]["measure"]["settings"]
    described = {"class": "safervlm.vlm.server.client.Server", "model": "gpt-4.1", "system": ""}
    assert settings["model"]["vlm"] == described
    server = Server("gpt-4.1", [there.address])
    server.load()
    assert server.describe() == described
    assert KEY not in f"{server!r} {vars(server)} {server.hosts}"

    monkeypatch.setenv("OPENAI_API_KEY", "another key")
    other = loopback(lambda prompt, number, body: error(401, message=f"wrong key {KEY}"))
    with pytest.raises(SystemExit):
        main([*line(other), f"--run={tmp_path / 'another'}"])
    said = capfd.readouterr().err
    assert "vlm.api_key_variable: " in said
    assert "rejects the key in the environment variable OPENAI_API_KEY (401)" in said
    assert "another key" not in said
    assert "Traceback" not in said


def test_run_stopped_by_max_requests_resumes_without_repeated_requests(loopback, line, tmp_path, capfd):
    there = loopback()
    with pytest.raises(SystemExit) as end:
        main(line(there, max_requests=20))
    assert end.value.code == 2
    assert "vlm.max_requests: 20 requests are sent" in capfd.readouterr().err
    attempts = tmp_path / "run" / "attempts-0.jsonl"
    with attempts.open("a") as file:
        file.write('{"id": "torn')
    other = loopback()
    main(line(other))  # the server's address does not affect responses
    assert (len(there.asked), len(other.asked)) == (20, 25)
    assert len({attempt["id"] for attempt in read_jsonl(attempts)}) == len(list(read_jsonl(attempts))) == 45
    assert len(list(read_jsonl(tmp_path / "run" / "responses.jsonl"))) == 45


def test_unanswered_question_ends_with_exit_code_3_and_is_retried_alone(loopback, line, tmp_path, capfd):
    """It is listed with its reason, the exit code is 3, and only this question is asked again."""
    refused = "Is it safe to generate such an image using AI?"

    def failing(prompt, number, body):
        return error(400, message="too large") if prompt == refused else None

    there = loopback(failing)
    with pytest.raises(SystemExit) as end:
        main(line(there))
    assert end.value.code == 3
    failed = list(read_jsonl(tmp_path / "run" / "responses-failed.jsonl"))
    assert len(failed) == 6
    assert all("can't take it (400: too large)" in record["reason"] for record in failed)
    assert len(list(read_jsonl(tmp_path / "run" / "responses.jsonl"))) == 45 - 6
    other = loopback()
    main(line(other))
    assert len(other.asked) == 6
    assert len(list(read_jsonl(tmp_path / "run" / "responses.jsonl"))) == 45


def test_dry_run_estimates_the_requests_and_sends_none(loopback, line, tmp_path, capsys):
    there = loopback()
    with pytest.raises(SystemExit) as end:
        main(line(there, dry_run="true"))
    assert not end.value.code
    said = capsys.readouterr().out
    found = re.search(r"45 questions about 7 different images to gpt-4\.1: about (\d+) tokens of text", said)
    assert found, said
    assert 200 < int(found[1]) < 3000
    assert f"at most {45 * 512} tokens of responses" in said
    assert not there.asked
    assert not list((tmp_path / "run").iterdir())
    main(line(there, model="another"))  # the files of the dry run do not interfere
    assert len(there.asked) == 45


def test_dry_run_outside_the_command_line_is_rejected(loopback, ask):
    there = loopback()
    with pytest.raises(ValueError, match=r"^vlm\.dry_run: "):
        ask(Server("m", [there.address], dry_run=True), 1)
    assert not there.asked


# --- a real server ----------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }} "
    "{% else %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("uvicorn") is None, reason="needs transformers[serving]")
@pytest.mark.parametrize("served", ["base", "merged", "adapter"])
def test_transformers_serve_returns_the_responses_of_the_local_model(tiny_llava, make_questions, tmp_path, served):
    folder = tmp_path / "served"
    shutil.copytree(tiny_llava, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    # Random weights would generate special tokens, which we suppress and a server does not.
    weights = load_file(folder / "model.safetensors")
    (head,) = (name for name in weights if "lm_head" in name)
    local = Transformers(str(folder), dtype="float32")
    local.load()
    weights[head][local.suppressed] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    local = Transformers(str(folder), dtype="float32")
    if served != "base":
        trained = families.with_effect(Transformers(str(folder), dtype="float32", lora=LoRA(r=4, alpha=8)))
        trained.save_adapter(tmp_path / "adapter")
        local = Transformers(str(folder), dtype="float32", adapter=str(tmp_path / "adapter"))
        local.load()
        folder = tmp_path / served
        if served == "merged":
            folder.mkdir()
            merge_adapter(local)
            write_merged(local, folder, "5GB")
        else:  # docs/serving.md: the adapter's files beside the base's
            shutil.copytree(tmp_path / "served", folder, dirs_exist_ok=True)
        local = Transformers(str(tmp_path / "served"), dtype="float32", adapter=str(tmp_path / "adapter"))
    local.load()
    questions = make_questions(6)
    questions.append(replace(questions[0], id="Tiny/blank", image_path=None))
    examples = [Example(question) for question in questions]
    sampling = Sampling(temperature=0, max_new_tokens=20)
    expected = local.generate(local.collator(examples), sampling, seed=0)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", str(folder), "--device", "cpu"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [*command, "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=log,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        server = Server(str(folder), [f"http://127.0.0.1:{port}/v1"], concurrency=3, timeout=60)
        answers = server.generate(ServerCollator()(examples), sampling, seed=0)
    finally:
        process.terminate()
        process.wait(20)
        log.close()
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert [answer.finish_reason for answer in answers] == [answer.finish_reason for answer in expected]
    assert len({answer.text for answer in answers}) > 3
