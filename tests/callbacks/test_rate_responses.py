"""RateResponses with fair, biased, faulty and absent judges on loopback: ratings are kept, none is requested twice."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from loopback import Loopback, Reply, completion, error, loopbacks, prompt_of, shorten_waits

from callbacks.rate_responses import UNREADABLE, RateResponses
from safervlm.cli.main import main
from safervlm.data.module import Parts, SaferData
from safervlm.errors import RecordError
from safervlm.hashing import seed_for
from safervlm.judging.rating import SYSTEM, Rating, rating_prompt
from safervlm.recipes import CONFIGS
from safervlm.records import Example, Question, Response, read_jsonl, write_jsonl
from safervlm.vlm.server.client import Server

KEY = "sk-very-secret-0123456789"
Answer = Callable[[str, int, dict[str, Any]], Reply | None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_waits(monkeypatch)


@pytest.fixture
def judge_of() -> Iterator[Callable[..., Loopback]]:
    """``judge_of(play)``: a judge that replies with the result of ``play``, or fairly if that is None."""
    with loopbacks() as start:

        def judging(play: Answer = lambda prompt, number, body: None, bias: int = 0) -> Loopback:
            return start(lambda prompt, number, body: play(prompt, number, body) or Reply(body=fair(prompt, bias)))

        yield judging


def fair(prompt: str, bias: int = 0) -> dict[str, Any]:
    """Rates each response by the number in it; a bias favours the first position."""
    first, second = (int(found) for found in re.findall(r"worth (\d+)\.", prompt))
    return completion(f"{first + bias} {second}\nAssistant 1 is worth {first}.")


def rated(place: int, worth: int | None = None) -> Response:
    """A response worth 1 to 5, with a reference worth 8."""
    question = Question(
        id=f"LLaVABench/{place}.jpg/rated/0",
        dataset="LLaVABench",
        image=f"{place}.jpg",
        image_path="/nowhere/that/a/judge/looks.jpg",
        capability="rated",
        prompt_number=0,
        prompt=f"question {place}",
        category=("conv", "detail", "complex")[place % 3],
        concept="",
        answer="This is worth 8.",
        context=f"caption {place}",
    )
    return Response(question, f"That is worth {worth or 1 + place % 5}.", "stop", 5)


def other(place: int) -> Response:
    question = Question(f"S/{place}/alignment/0", "S", str(place), None, "alignment", 0, "?", "Hate", "x", "Safe")
    return Response(question, "Yes.", "stop", 2)


def server(*judges: Loopback, name: str = "judge", **options: Any) -> Server:
    addresses = [judge.address for judge in judges]
    return Server(name, addresses, **{"system": SYSTEM, "blank": False, "concurrency": 1, "max_retries": 3} | options)


def play(run: Path, judge: Server, rank: int = 0, received_sigterm: bool = False, **options: Any) -> None:
    trainer = SimpleNamespace(is_global_zero=rank == 0, default_root_dir=str(run), received_sigterm=received_sigterm)
    RateResponses(judge, **options).on_predict_end(trainer, None)


def write(run: Path, *responses: Response) -> None:
    write_jsonl(run / "responses.jsonl", [response.to_dict() for response in responses])


def ratings(run: Path) -> list[Rating]:
    return [Rating.from_dict(record) for record in read_jsonl(run / "ratings.jsonl")]


def asked(judge: Loopback) -> list[str]:
    """The questions that the judge received, in order."""
    return [re.search(r"\[Question\]\n(.*)\n", prompt_of(body))[1] for body, _ in judge.asked]


# --- requests and records ---------------------------------------------------------------------------------------------


def test_responses_are_rated_with_the_published_request_in_order(judge_of, tmp_path):
    judge = judge_of()
    write(tmp_path, rated(2), other(0), rated(0), rated(1))
    play(tmp_path, server(judge), batch_size=2)
    assert [prompt_of(body) for body, _ in judge.asked] == [rating_prompt(rated(place)) for place in (2, 0, 1)]
    for (body, _), place in zip(judge.asked, (2, 0, 1), strict=True):
        assert body == {
            "model": "judge",
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": rating_prompt(rated(place))},  # no image, not even a blank one
            ],
            "temperature": 0.2,
            "top_p": 1.0,
            "max_completion_tokens": 1024,
            "seed": seed_for(0, rated(place).id) % 2**31,
        }
    there = ratings(tmp_path)
    assert [(each.id, each.swapped, each.reference, each.response) for each in there] == [
        (rated(place).id, False, 8.0, 1.0 + place) for place in (2, 0, 1)
    ]
    assert {(each.reason, each.judge, each.model) for each in there} == {("", "judge", "served")}
    assert there[0].text == "8 3\nAssistant 1 is worth 8."
    attempts = list(read_jsonl(tmp_path / "ratings-attempts.jsonl"))
    assert [(each["id"], each["status"], each["result"]) for each in attempts] == [
        (rated(place).id, 200, "stop") for place in (2, 0, 1)
    ]
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"]["ratings"] == {
        "settings": {
            "judge": {"class": "safervlm.vlm.server.client.Server", "model": "judge", "system": SYSTEM, "blank": False},
            "sampling": {"temperature": 0.2, "top_p": 1.0, "max_new_tokens": 1024},
            "both_orders": False,
            "attempts": 3,
        },
        "finished": True,
    }


def test_rating_in_both_orders_cancels_position_bias(judge_of, tmp_path):
    """The judge rates Assistant 1 one point too high.

    By hand: the reference is rated 9 and 8, the response (worth 1 + index) 1 + index and one more. Both means are half
    a point too high, and their difference is correct; in the published order alone it is one point too large. Code
    that swapped the two positions would assign the response's ratings to the reference.
    """
    judge = judge_of(bias=1)
    write(tmp_path, *map(rated, range(4)))
    play(tmp_path, server(judge), both_orders=True)
    there = ratings(tmp_path)
    assert [(each.id, each.swapped) for each in there] == [
        (rated(place).id, swapped) for place in range(4) for swapped in (False, True)
    ]
    for place in range(4):
        published, swapped = there[2 * place : 2 * place + 2]
        assert (published.reference, published.response) == (9, 1 + place)
        assert (swapped.reference, swapped.response) == (8, 2 + place)
    reference, response = (sum(getattr(each, name) for each in there) / 8 for name in ("reference", "response"))
    assert (reference, response) == (8.5, 3.0)  # worth 8 and 2.5
    published = [each for each in there if not each.swapped]
    assert sum(each.reference - each.response for each in published) / 4 == 8 - 2.5 + 1
    assert len({body["seed"] for body, _ in judge.asked}) == len({each.key for each in there}) == 8
    assert len({each["id"] for each in read_jsonl(tmp_path / "ratings-attempts.jsonl")}) == 8


def test_swapped_order_can_be_requested_later_without_repeating_the_first(judge_of, tmp_path):
    judge = judge_of()
    write(tmp_path, *map(rated, range(3)))
    play(tmp_path, server(judge))
    play(tmp_path, server(judge), both_orders=True)
    assert asked(judge) == ["question 0", "question 1", "question 2"] * 2
    assert [each.swapped for each in ratings(tmp_path)] == [False, True] * 3


def test_equal_responses_with_different_ids_get_separate_ratings(judge_of, tmp_path):
    judge = judge_of()
    twin = replace(rated(0), question=replace(rated(0).question, id="LLaVABench/twin.jpg/rated/0"))
    write(tmp_path, rated(0), twin)
    play(tmp_path, server(judge))
    assert [each.id for each in ratings(tmp_path)] == [rated(0).id, twin.id]
    assert len(judge.asked) == 2


# --- existing ratings are kept ----------------------------------------------------------------------------------------


def test_second_run_requests_no_ratings(judge_of, tmp_path, capsys):
    judge = judge_of()
    write(tmp_path, *map(rated, range(5)))
    play(tmp_path, server(judge), both_orders=True)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    judge.die()
    play(tmp_path, server(judge), both_orders=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(judge.asked) == 10
    assert capsys.readouterr().out == ""


def test_responses_that_have_changed_are_rated_again(judge_of, tmp_path, capsys):
    judge = judge_of()
    write(tmp_path, *map(rated, range(4)))
    play(tmp_path, server(judge))
    write(tmp_path, rated(0), rated(1, worth=9), rated(5), rated(3))
    play(tmp_path, server(judge))
    assert asked(judge)[4:] == ["question 1", "question 5"]
    assert [each.response for each in ratings(tmp_path)][-4:] == [1, 9, 1, 4]
    assert "2 ratings by other judges or settings, or of other responses, are kept" in capsys.readouterr().out


def test_ratings_by_other_judges_and_settings_are_kept_and_not_repeated(judge_of, tmp_path, capsys):
    """Another judge, then both orders, then the first again: no rating is requested twice."""
    judge, another = judge_of(), judge_of(bias=2)
    write(tmp_path, *map(rated, range(4)))
    play(tmp_path, server(judge), both_orders=True)
    play(tmp_path, server(another, name="another"))
    assert "8 ratings by other judges or settings, or of other responses, are kept" in capsys.readouterr().out
    assert len(another.asked) == 4
    assert {(r.judge, r.reference) for r in ratings(tmp_path)[-4:]} == {("another", 10)}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["stages"]["ratings"]["settings"]["judge"]["model"] == "another"
    play(tmp_path, server(judge))
    play(tmp_path, server(judge), both_orders=True)
    play(tmp_path, server(another, name="another"))
    assert (len(judge.asked), len(another.asked), len(ratings(tmp_path))) == (8, 4, 12)
    assert {r.judge for r in ratings(tmp_path)[-4:]} == {"another"}


def test_interrupted_rating_loses_and_repeats_no_request(judge_of, tmp_path, monkeypatch):
    judge = judge_of()
    write(tmp_path, *map(rated, range(12)))
    whole, calls = Server.generate, []

    def breaking(*args):
        calls.append(1)
        if len(calls) in (3, 5):
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(Server, "generate", breaking)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, server(judge), batch_size=4)
    assert len(judge.asked) == len(ratings(tmp_path)) == 8
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"]["ratings"]["finished"] is False
    for name in ("ratings.jsonl", "ratings-attempts.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"id": "torn')
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, server(judge), batch_size=2)
    assert len(ratings(tmp_path)) == 10  # after complete lines
    play(tmp_path, server(judge), batch_size=4)
    assert asked(judge) == [f"question {place}" for place in range(12)]
    assert [each.id for each in ratings(tmp_path)] == [rated(place).id for place in range(12)]
    assert len(list(read_jsonl(tmp_path / "ratings-attempts.jsonl"))) == 12


def test_a_killed_process_loses_the_batch_at_work_and_no_more(judge_of, tmp_path):
    killed: list[multiprocessing.Process] = []

    def killing(prompt, number, body):
        if len(judge.asked) == 6 and killed:
            os.kill(killed.pop().pid, signal.SIGKILL)
            return Reply(0)
        return None

    judge = judge_of(killing)
    write(tmp_path, *map(rated, range(12)))
    process = multiprocessing.get_context("fork").Process(
        target=play, args=(tmp_path, server(judge)), kwargs={"batch_size": 4}
    )
    killed.append(process)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(ratings(tmp_path)) == 4
    play(tmp_path, server(judge), batch_size=4)
    assert asked(judge) == [f"question {place}" for place in [*range(6), *range(4, 12)]]
    assert [each.response for each in ratings(tmp_path)] == [1 + place % 5 for place in range(12)]


def test_sigterm_ends_rating_after_the_current_batch(judge_of, tmp_path):
    judge = judge_of()
    write(tmp_path, *map(rated, range(6)))
    with pytest.raises(SIGTERMException):
        play(tmp_path, server(judge), batch_size=4, received_sigterm=True)
    assert len(judge.asked) == len(ratings(tmp_path)) == 4


# --- misbehaving judges -----------------------------------------------------------------------------------------------

GARBAGE = ["Both are good", "9", "11 3", "8 9 extra", "", '{"assistant_1": 8, "assistant_2": 9}']


def test_unparseable_judge_output_is_requested_again_with_another_seed(judge_of, tmp_path):
    def once(prompt, number, body):
        return Reply(body=completion(GARBAGE[int(re.search(r"question (\d)", prompt)[1])])) if number == 1 else None

    judge = judge_of(once)
    write(tmp_path, *map(rated, range(len(GARBAGE))))
    play(tmp_path, server(judge), batch_size=4)
    assert [(each.reference, each.response) for each in ratings(tmp_path)] == [(8, 1 + p % 5) for p in range(6)]
    seeds: dict[str, set[int]] = {}
    for body, _ in judge.asked:
        seeds.setdefault(prompt_of(body), set()).add(body["seed"])
    assert [len(each) for each in seeds.values()] == [2] * 6
    assert len(judge.asked) == 12


def test_unparseable_ratings_are_reported_missing_and_retried_by_the_next_run(judge_of, tmp_path, capsys):
    def never(prompt, number, body):
        place = int(re.search(r"question (\d)", prompt)[1])
        return Reply(body=completion(GARBAGE[place])) if place < len(GARBAGE) else None

    judge = judge_of(never)
    write(tmp_path, *map(rated, range(8)))
    play(tmp_path, server(judge), attempts=4)
    assert len(judge.asked) == 4 * 6 + 2
    there = ratings(tmp_path)
    assert [(each.reference, each.response, each.reason) for each in there[:6]] == [(None, None, UNREADABLE)] * 6
    assert [each.text for each in there[:6]] == GARBAGE
    assert [(each.reference, each.reason) for each in there[6:]] == [(8, "")] * 2
    said = capsys.readouterr().out
    assert f"6 of 8 ratings are missing, for example of {rated(0).id}: {UNREADABLE}; " in said
    assert "ratings.jsonl lists them" in said
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"]["ratings"]["finished"] is False
    better = judge_of()
    play(tmp_path, server(better), attempts=4)
    assert asked(better) == [f"question {place}" for place in range(6)]
    assert [each.reason for each in ratings(tmp_path)] == [""] * 8
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"]["ratings"]["finished"] is True


def test_transient_errors_are_retried_without_lost_or_duplicate_ratings(judge_of, tmp_path):
    kinds = {
        0: lambda: error(429, "rate_limit_exceeded", Retry_After="0.3"),
        1: lambda: error(500),
        2: lambda: Reply(body=completion("8 3"), cut=True),
        3: lambda: Reply(body=b'{"choices": [{"mess'),
        4: lambda: Reply(0),
    }

    def once(prompt, number, body):
        place = int(re.search(r"question (\d)", prompt)[1])
        return kinds[place]() if place in kinds and number == 1 else None

    judge = judge_of(once)
    write(tmp_path, *map(rated, range(7)))
    play(tmp_path, server(judge, concurrency=8))
    assert [(each.reference, each.response) for each in ratings(tmp_path)] == [(8, 1 + p % 5) for p in range(7)]
    assert len(judge.asked) == 7 + 5
    attempts = list(read_jsonl(tmp_path / "ratings-attempts.jsonl"))
    assert len(attempts) == 7 + 5
    assert {each["status"] for each in attempts} == {None, 200, 429, 500}


def test_refused_ratings_are_missing_and_not_retried_in_the_same_run(judge_of, tmp_path):
    replies = [
        Reply(body=completion(None, refusal="I can't rate 8 9.")),
        Reply(body=completion("8 9", "content_filter")),
        error(400, "content_filter", "Azure's filter"),
        error(400, message="context too long"),
    ]
    judge = judge_of(lambda prompt, number, body: next(iter(replies[int(prompt.split("question ")[1][0]) :]), None))
    write(tmp_path, *map(rated, range(5)))
    play(tmp_path, server(judge))
    there = ratings(tmp_path)
    assert [each.reference for each in there] == [None] * 4 + [8]
    assert [each.reason for each in there[:3]] == [
        f"the judge declines ({kind})" for kind in ("refusal", "content_filter", "content_filter")
    ]
    assert "can't take it (400: context too long)" in there[3].reason
    assert [each.text for each in there[:2]] == ["I can't rate 8 9.", "8 9"]
    assert [each.model for each in there] == ["served", "served", "", "", "served"]
    assert len(judge.asked) == 5


def test_ratings_received_before_the_judge_fails_are_kept(judge_of, tmp_path, capsys):
    def gone(prompt, number, body):
        return error(401, message="expired") if len(judge.asked) > 6 else None

    judge = judge_of(gone)
    write(tmp_path, *map(rated, range(12)))
    play(tmp_path, server(judge), batch_size=4)
    there = ratings(tmp_path)
    assert [each.reference for each in there] == [8] * 6 + [None] * 6
    assert len(judge.asked) == 7
    assert all("judge.api_key_variable: " in each.reason and "(401)" in each.reason for each in there[6:])
    said = capsys.readouterr().out
    assert "6 of 12 ratings are missing" in said
    assert "judge.api_key_variable: " in said
    assert "export it, the same command resumes" in said
    better = judge_of()
    play(tmp_path, server(better), batch_size=4)
    assert asked(better) == [f"question {place}" for place in range(6, 12)]
    assert [each.reference for each in ratings(tmp_path)] == [8] * 12


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (None, r"^judge\.addresses: no server responds any more"),
        (error(404, message="no model"), r"^judge\.model: .* has no 'judge'"),
        (error(429, "insufficient_quota", "pay"), r"^judge: .* the account is used up"),
        (
            error(400, None, "bad value", "temperature"),
            r"^judge\.model: .* name another judge \(sampling\.temperature: ",
        ),
    ],
)
def test_unavailable_judge_leaves_ratings_missing_with_a_reason(judge_of, tmp_path, capsys, reply, reason):
    judge = judge_of(lambda prompt, number, body: reply)
    if reply is None:
        judge.die()
    write(tmp_path, *map(rated, range(5)))
    play(tmp_path, server(judge), batch_size=2)
    there = ratings(tmp_path)
    assert [(each.reference, each.response) for each in there] == [(None, None)] * 5
    assert re.search(reason, there[0].reason), there[0].reason
    assert len(judge.asked) == (0 if reply is None else 1)
    assert there[0].reason in capsys.readouterr().out


@pytest.mark.parametrize("kind", [ValueError, MemoryError, BaseException, RecordError])
@pytest.mark.parametrize("bad", [{3}, {0, 4}])
def test_request_that_cannot_be_built_is_the_only_missing_rating(judge_of, tmp_path, monkeypatch, kind, bad):
    judge = judge_of()
    write(tmp_path, *map(rated, range(5)))
    rater = server(judge)
    collate = rater.collator

    def collator(examples: list[Example]) -> Any:
        if any(example.question.id == rated(place).id for example in examples for place in bad):
            raise kind("it can't be packed")
        return collate(examples)

    monkeypatch.setattr(Server, "collator", staticmethod(collator))
    play(tmp_path, rater)
    there = ratings(tmp_path)
    assert {place for place, each in enumerate(there) if each.reason} == bad
    assert all("it can't be packed" in each.reason for each in there if each.reason)
    assert sorted(asked(judge)) == [f"question {place}" for place in range(5) if place not in bad]


def test_ratings_are_missing_if_the_openai_package_is_not_installed(judge_of, tmp_path, monkeypatch, capsys):
    judge = judge_of()
    write(tmp_path, rated(0))
    monkeypatch.setitem(sys.modules, "openai", None)
    play(tmp_path, server(judge))
    assert "pip install 'safervlm[api]'" in ratings(tmp_path)[0].reason
    assert "pip install 'safervlm[api]'" in capsys.readouterr().out


# --- no requests ------------------------------------------------------------------------------------------------------


def test_run_without_responses_to_rate_makes_no_requests(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")  # that would be rejected
    write(tmp_path, other(0), other(1))
    play(tmp_path, Server("judge", ["http://127.0.0.1:9/v1"], blank=False))
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]
    assert capsys.readouterr().out == ""


def test_only_the_first_process_rates(judge_of, tmp_path):
    judge = judge_of()
    write(tmp_path, rated(0))
    play(tmp_path, server(judge), rank=1)
    assert not judge.asked
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]


def test_dry_run_estimates_the_requests_and_sends_none(judge_of, tmp_path, capsys):
    judge = judge_of()
    write(tmp_path, *map(rated, range(3)))
    play(tmp_path, server(judge))
    write(tmp_path, *map(rated, range(5)))
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    play(tmp_path, server(judge, dry_run=True), both_orders=True)
    said = capsys.readouterr().out
    found = re.fullmatch(
        r"7 of 10 ratings would be requested: 7 questions to judge: about (\d+) tokens of text \(4 characters per "
        rf"token\), at most {7 * 1024} tokens of responses; retries come on top\n",
        said,
    )
    assert found, said
    assert 7 * len(SYSTEM + rating_prompt(rated(0))) // 4 == pytest.approx(int(found[1]), abs=7)
    assert len(judge.asked) == 3
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_system_prompt_is_reported(judge_of, tmp_path, capsys):
    write(tmp_path, rated(0))
    play(tmp_path, server(judge_of(), system=""))
    assert "judge.system: '' is not the published prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attempts": 0}, r"^RateResponses\.attempts: at least 1, got 0"),
        ({"batch_size": 0}, r"^RateResponses\.batch_size: at least 1, got 0"),
        ({"judge": Server("m", ["http://x/v1"])}, r"^RateResponses\.judge\.blank: .*give false"),
    ],
)
def test_invalid_rating_arguments_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        RateResponses(**{"judge": Server("m", ["http://x/v1"], blank=False)} | options)


# --- on the command line ----------------------------------------------------------------------------------------------


class Rated(SaferData):
    """Six text-only questions whose responses are to be rated."""

    def load(self) -> Parts:
        questions = [replace(rated(place).question, image_path=None) for place in range(6)]
        return Parts(predict=[Example(question) for question in questions])


class Afterwards(Callback):
    """A callback after the ratings, like a table of scores."""

    def on_predict_end(self, trainer, pl_module):
        assert len(ratings(Path(trainer.default_root_dir))) == 12
        (Path(trainer.default_root_dir) / "afterwards").touch()


@pytest.fixture
def line(judge_of, tmp_path) -> Callable[[Loopback], list[str]]:
    """The command that measures a model on a server and rates it with the shipped judge at another address."""
    vlm = judge_of(lambda prompt, number, body: Reply(body=completion("That is worth 3.")))
    shutil.copy(CONFIGS / "llavabench_judge.yaml", tmp_path)
    callbacks = [
        {"class_path": "callbacks.record_writer.RecordWriter"},
        {
            "class_path": "callbacks.rate_responses.RateResponses",
            "init_args": {"judge": "llavabench_judge.yaml", "both_orders": True},
        },
        {"class_path": f"{__name__}.Afterwards"},
    ]
    recipe = {
        "model": {
            "class_path": "safervlm.measure.Measure",
            "init_args": {
                "vlm": {
                    "class_path": "safervlm.vlm.server.client.Server",
                    "init_args": {"model": "vlm", "addresses": [vlm.address]},
                }
            },
        },
        "data": {"class_path": f"{__name__}.Rated"},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "callbacks": callbacks},
    }

    def arguments(judge: Loopback) -> list[str]:
        shipped = yaml.safe_load((CONFIGS / "llavabench_judge.yaml").read_text())
        shipped["init_args"] |= {"addresses": [judge.address], "api_key_variable": "JUDGE_KEY", "max_retries": 2}
        (tmp_path / "llavabench_judge.yaml").write_text(yaml.safe_dump(shipped))
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return ["predict", f"--config={tmp_path / 'recipe.yaml'}", f"--run={tmp_path / 'run'}"]

    return arguments


def test_api_key_from_a_recipe_is_sent_but_not_stored(judge_of, line, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def telling(prompt, number, body):
        """Repeats its input in its error messages, as servers do."""
        place = int(re.search(r"question (\d)", prompt)[1])
        message = f"the key {KEY} asks {prompt}"
        if place == 5:
            return error(400, message=message)
        return (error(500, message=message) if place % 2 else Reply(body=message.encode())) if number == 1 else None

    judge = judge_of(telling)
    with pytest.raises(SystemExit, match="3"):
        main(line(judge))
    run = tmp_path / "run"
    assert {headers["authorization"] for _, headers in judge.asked} == {f"Bearer {KEY}"}
    assert {body["model"] for body, _ in judge.asked} == {"gpt-4o"}
    there = ratings(run)
    assert [(each.reference, each.response) for each in there] == [(8, 3)] * 10 + [(None, None)] * 2
    assert len(judge.asked) == 5 * 2 * 2 + 2
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path.name for path in files} == {
        *("manifest.json", "predict.yaml", "responses.jsonl", "ratings.jsonl", "ratings-attempts.jsonl", "afterwards"),
        ".lock",
    }
    said = capfd.readouterr()
    for where, content in (files | {Path("shell"): (said.out + said.err).encode()}).items():
        assert KEY.encode() not in content, where
    assert "(key)" in (run / "ratings-attempts.jsonl").read_text()
    assert "2 of 12 ratings are missing" in said.out

    better = judge_of()
    main(line(better))  # the judge's address does not affect the ratings
    assert asked(better) == ["question 5"] * 2
    main(line(better))
    assert len(better.asked) == 2
    assert [each.reference for each in ratings(run)] == [8] * 12


def test_run_without_a_reachable_judge_completes_with_exit_code_3(judge_of, line, tmp_path, capsys):
    judge = judge_of()
    judge.die()
    with pytest.raises(SystemExit, match="3"):
        main(line(judge))
    assert (tmp_path / "run" / "afterwards").exists()
    assert len(list(read_jsonl(tmp_path / "run" / "responses.jsonl"))) == 6
    assert "12 of 12 ratings are missing" in capsys.readouterr().out
