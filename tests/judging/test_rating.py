"""The published prompt of LLaVABench's rating, and the parsing of the judge's output."""

import hashlib
import json

import pytest
import yaml

from safervlm.judging.rating import SYSTEM, Rating, rating_key, rating_prompt, read_ratings
from safervlm.recipes import CONFIGS
from safervlm.records import Question, Response

QUESTION = Question(
    id="LLaVABench/1.jpg/rated/0",
    dataset="LLaVABench",
    image="1.jpg",
    image_path=None,
    capability="rated",
    prompt_number=0,
    prompt="What {0} is it?",
    category="conv",
    concept="",
    answer="A reference.",
    context="A {cap}tion.\nTwo lines.",
)
RESPONSE = Response(QUESTION, "A [System] response.", "stop", 5)


def test_the_prompt_is_the_published_one():
    """A different space or word would be a different measurement.

    The hash is that of the output of VLMEvalKit's build_prompt (commit e8e78f05) for the same texts, which is the same
    for conv, detail and complex.
    """
    published = "d6b0f977283bfcc836d9308c413226154c136291ac7e01313a4b3c4bee4c8fb2"
    assert hashlib.sha256(rating_prompt(RESPONSE).encode()).hexdigest() == published


def test_swapped_prompt_differs_only_in_the_order_of_the_two_responses():
    published, swapped = rating_prompt(RESPONSE), rating_prompt(RESPONSE, swapped=True)
    assert published.count("A reference.") == published.count("A [System] response.") == 1
    place = published.replace("A reference.", "(*)").replace("A [System] response.", "A reference.")
    assert swapped == place.replace("(*)", "A [System] response.") != published


def test_shipped_judge_configuration_uses_the_published_prompt_and_model():
    settings = yaml.safe_load((CONFIGS / "llavabench_judge.yaml").read_text())["init_args"]
    assert settings["system"] == SYSTEM
    assert settings["model"] == "gpt-4o"
    assert settings["blank"] is False


@pytest.mark.parametrize(
    ("text", "ratings"),
    [
        ("8 9", (8, 9)),
        ("8 9\nAssistant 2 saw 3 dogs.", (8, 9)),
        ("8, 9\n\nBoth", (8, 9)),
        ("8,9", (8, 9)),
        ("8.5   10", (8.5, 10)),
        ("1 10\r\nwindows", (1, 10)),
        (" 7 7 ", (7, 7)),
    ],
)
def test_two_numbers_on_the_first_line_are_ratings(text, ratings):
    assert read_ratings(text) == ratings


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n8 9", "9", "Both are good", "8 9 extra", "8 9 7", "Scores: 8 9", "8 9."),
        *("11 3", "3 11", "0 5", "5 0.9", "10.1 5", "-8 9", "8 -9"),
        *("8/10 9/10", "8 and 9", "8\n9", "89", "8;9", "8,,9", "8\t9", "1e1 5", "nan 5", "inf 5", "٨ ٩", "**8 9**"),
        *('{"1": 8, "2": 9}', "[8, 9]", "```\n8 9\n```"),
    ],
)
def test_output_that_is_not_two_ratings_is_not_parsed_as_ratings(text):
    assert read_ratings(text) is None


def test_ratings_are_unchanged_after_a_json_round_trip():
    rated = Rating("a", True, 8.0, 7.5, "", "gpt-4o", "gpt-4o-2024-08-06", "7.5 8\nä", "0123456789abcdef")
    missing = Rating("a", False, None, None, "why", "gpt-4o", "", "", "0123456789abcdef")
    for rating in (rated, missing):
        assert Rating.from_dict(json.loads(json.dumps(rating.to_dict()))) == rating


def test_rating_key_depends_on_model_system_prompt_id_and_prompt():
    judge = {"model": "m", "system": SYSTEM}
    keys = {
        rating_key(judge, "a", "prompt"),
        rating_key(judge | {"model": "n"}, "a", "prompt"),
        rating_key(judge | {"system": ""}, "a", "prompt"),
        rating_key(judge, "b", "prompt"),
        rating_key(judge, "a", "another"),
    }
    assert len(keys) == 5
    assert rating_key(dict(reversed(judge.items())), "a", "prompt") in keys


@pytest.mark.parametrize(("name", "value"), [("TEMPERATURE", 0.3), ("TOP_P", 0.9), ("MAX_NEW_TOKENS", 9), ("SEED", 1)])
def test_the_key_depends_on_how_the_judge_samples(monkeypatch, name, value):
    before = rating_key({}, "a", "prompt")
    monkeypatch.setattr(f"safervlm.judging.rating.{name}", value)
    assert rating_key({}, "a", "prompt") != before
