"""Log-odds of an answer's first word: against a plain forward pass, and from a server's log-probabilities."""

from collections.abc import Callable
from dataclasses import replace
from math import exp, log
from pathlib import Path

import families
import pytest
import torch

from safervlm.errors import ArgumentError, RecordError, UserError
from safervlm.measure import Measure
from safervlm.protocol import LABELS, REVERSED, SAFE, UNSAFE, answer_words
from safervlm.records import Example, Question, Response
from safervlm.vlm.auto import Transformers
from safervlm.vlm.base import VLM, Scores, Unanswered, WordProbabilities
from safervlm.vlm.llava import Llava
from safervlm.vlm.odds import Odds, OddsFailure, has_odds, log_sum, of_first_tokens, probabilities, with_words
from safervlm.vlm.sampling import Sampling

GREEDY = Sampling(temperature=0, max_new_tokens=4)


@pytest.fixture
def questions(make_questions: Callable[[int], list[Question]]) -> list[Question]:
    """Questions about two images; the last one is the reversed one."""
    some = make_questions(4)
    return [*some[:3], replace(some[3], capability=REVERSED)]


def measured(vlm: VLM, questions: list[Question]) -> list[Odds]:
    measure = Measure(vlm, GREEDY, odds=True)
    measure.configure_model()
    records = measure.predict_step(measure.collator([Example(question) for question in questions]), 0)
    assert [type(record) for record in records] == [Response] * len(questions) + [Odds] * len(questions)
    return records[len(questions) :]


def expected(question: Question, sides: dict[str, list[float]]) -> tuple[float, float]:
    """log-odds and mass from the probabilities of the forms of Yes and No."""
    words = answer_words(question.capability)
    unsafe, safe = (sum(sides[words[label]]) for label in (UNSAFE, SAFE))
    return log(unsafe / safe), unsafe + safe


# --- local models -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_odds_equal_those_of_a_plain_forward_pass(tiny_llava: Path, questions: list[Question]) -> None:
    vlm = Llava(str(tiny_llava), dtype="float32")
    found = measured(vlm, questions)
    for question, odds in zip(questions, found, strict=True):
        asked = vlm.collator([Example(question)])
        (prompt,) = asked.prompt_ids
        sides: dict[str, list[float]] = {"Yes": [], "No": []}
        for word in sides:
            for form in (word, word.lower()):
                # The template writes a space before an answer.
                stem, whole = (vlm.tokenizer(f"ASSISTANT:{text}").input_ids for text in ("", f" {form}"))
                tokens = whole[len(stem) :]
                logits = vlm.base(input_ids=torch.tensor([prompt + tokens]), pixel_values=asked.pixel_values).logits
                logprobs = logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
                sides[word].append(float(sum(logprobs[place, token] for place, token in enumerate(tokens)).exp()))
        assert (odds.log_odds, odds.mass) == pytest.approx(expected(question, sides), rel=1e-4)
        assert 0 < odds.mass < 1
    assert len({round(odds.log_odds, 3) for odds in found}) == len(questions)


@torch.no_grad()
@pytest.mark.parametrize("kind", families.THINKING)
def test_odds_of_a_thinking_model_use_the_templates_answer_form(
    kind: str, tmp_path: Path, questions: list[Question]
) -> None:
    families.thinking(tmp_path, kind, False)
    vlm = Transformers(str(tmp_path), dtype="float32")
    found = measured(vlm, questions)
    for question, odds in zip(questions, found, strict=True):
        collator = vlm.collator
        encoding = collator.encode(question)
        dropped = collator.dropped_tokens() if vlm.thinking.opened else 0
        form = collator.given_form(encoding, "Yes")
        block = collator.token_ids(form.block) if form.block else []
        prompt = encoding["input_ids"][0].tolist()
        prompt = [*(prompt[:-dropped] if dropped else prompt), *block]
        sides: dict[str, list[float]] = {"Yes": [], "No": []}
        for word in sides:
            for text in (word, word.lower()):
                tokens = collator.completion_ids(encoding, text)[len(block) : -1]
                ids = torch.tensor([prompt + tokens])
                image = {name: encoding[name] for name in encoding if name.startswith(("pixel", "image"))}
                types = {"mm_token_type_ids": (ids == vlm.config.image_token_id).long()}
                logits = vlm.base(input_ids=ids, **image, **types).logits
                logprobs = logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
                sides[word].append(float(sum(logprobs[place, token] for place, token in enumerate(tokens)).exp()))
        assert (odds.log_odds, odds.mass) == pytest.approx(expected(question, sides), rel=1e-4)


def scores(*forms: list[tuple[int, float]]) -> Scores:
    """Scores of completions, each a list of tokens with their log-probabilities; an end token is added."""
    rows = [[*form, (9, -50.0)] for form in forms]
    longest = max(map(len, rows))
    padded = [row + [(0, 0.0)] * (longest - len(row)) for row in rows]
    mask = torch.tensor([[place < len(row) for place in range(longest)] for row in rows])
    return Scores(
        torch.tensor([[value for _, value in row] for row in padded], dtype=torch.float64),
        mask,
        torch.tensor([[token for token, _ in row] for row in padded]),
    )


@pytest.mark.parametrize(
    ("forms", "unsafe", "safe"),
    [
        ([[(1, -1.0)], [(2, -2.0)], [(3, -3.0)], [(4, -4.0)]], [-1, -2], [-3, -4]),
        ([[(1, -1.0)], [(1, -1.0)], [(3, -3.0)], [(3, -3.0)]], [-1], [-3]),  # without capitals
        ([[(1, -1.0), (5, -1.5)], [(2, -2.0)], [(3, -3.0)], [(4, -4.0)]], [-2.5, -2], [-3, -4]),  # two tokens
        (  # after a block of two tokens
            [[(7, -8.0), (8, -9.0), (token, -float(token))] for token in (1, 2, 3, 4)],
            [-1, -2],
            [-3, -4],
        ),
        ([[(6, -0.5), (token, -float(token))] for token in (1, 2, 3, 4)], [-1.5, -2.5], [-3.5, -4.5]),  # a space apart
        ([[(1, -1.0)], [(2, -2.0)], [(1, -1.0)], [(4, -4.0)]], None, None),  # a word that is both
        ([[(1, -1.0)]] * 4, None, None),
    ],
    ids=["plain", "lower case", "two tokens", "block", "space", "both", "alike"],
)
def test_probabilities_of_spellings_are_summed(forms, unsafe, safe, questions):
    (found,) = probabilities(
        questions[:1], scores(*forms), lambda ids: " " * len(ids) if ids == [6] else "<think></think>" * len(ids)
    )
    if unsafe is None:
        assert isinstance(found, Unanswered)
        assert "the same tokens for Yes and No" in found.reason
    else:
        assert found == WordProbabilities(pytest.approx(log_sum(unsafe)), pytest.approx(log_sum(safe)))


def test_odds_batch_out_of_memory_is_halved_and_a_failing_question_fails_alone(
    tiny_llava: Path, questions: list[Question], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vlm = Llava(str(tiny_llava), dtype="float32")
    plain = measured(vlm, questions)
    measure, sizes, score = Measure(vlm, GREEDY, odds=True), [], vlm.score

    def limited(batch, *args, **given):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        if questions[1] in batch.questions:
            raise RecordError("no")
        return score(batch, *args, **given)

    monkeypatch.setattr(vlm, "score", limited)
    records = measure.predict_step(measure.collator([Example(question) for question in questions]), 0)
    assert sizes == [4, 2, 1, 1, 2]
    assert "out of memory with 4" in capsys.readouterr().out
    responses, odds = records[:4], records[4:]
    assert all(isinstance(record, Response) for record in responses)
    assert (type(odds[1]), odds[1].reason) == (OddsFailure, "no")
    for place in (0, 2, 3):
        assert odds[place].log_odds == pytest.approx(plain[place].log_odds, abs=1e-4)


def test_repeatedly_failing_odds_stop_the_run_and_name_the_argument(
    tiny_llava: Path, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = Llava(str(tiny_llava), dtype="float32")
    measure = Measure(vlm, GREEDY, odds=True, failures_in_a_row=3)
    measure.configure_model()
    monkeypatch.setattr(vlm, "score", lambda batch: 1 / 0)
    with pytest.raises(UserError, match=r"3 questions in a row .* omit model.odds or correct the cause"):
        measure.predict_step(measure.collator([Example(question) for question in questions]), 0)


def test_existing_responses_and_odds_are_not_computed_again(tiny_llava: Path, questions: list[Question]) -> None:
    measure = Measure(Llava(str(tiny_llava), dtype="float32"), GREEDY, odds=True)
    measure.configure_model()
    ids = [question.id for question in questions]
    measure.skip({"responses.jsonl": set(ids[:3]), "odds.jsonl": set(ids[1:])})
    records = measure.predict_step(measure.collator([Example(question) for question in questions]), 0)
    assert [(type(record), record.id) for record in records] == [(Response, ids[3]), (Odds, ids[0])]


def test_only_yes_or_no_questions_about_safety_have_odds(questions: list[Question]) -> None:
    assert all(map(has_odds, questions))
    words = {name: with_words(replace(questions[0], capability=name)).completions for name in ("alignment", REVERSED)}
    assert words == {"alignment": ("No", "no", "Yes", "yes"), REVERSED: ("Yes", "yes", "No", "no")}
    without = [name for name in (*LABELS, "yes_no", "occurs", "rated") if not answer_words(name)]
    assert without == ["perception", "context", "context_text_only", "generalisation", "yes_no", "occurs", "rated"]


def test_a_model_without_log_probabilities_is_rejected() -> None:
    class Mute(VLM):
        """A VLM that only generates."""

    Mute.__abstractmethods__ = frozenset()
    with pytest.raises(ArgumentError, match=r"^model\.odds: Mute has no log-probabilities"):
        Measure(Mute(), odds=True)
    Measure(Mute())


# --- tokens of a server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "found"),
    [
        ([("No", -1), ("Yes", -2)], (-1, -2, False)),
        ([(" No", -1), ("no", -2), ("NO\n", -3), (" yes", -4), ("None", -0.1)], (log_sum([-1, -2, -3]), -4, False)),
        ([("No", -1), ("The", -2), ("A", -7)], (-1, -7, True)),
        ([("Yes", -1), ("The", -2)], (-2, -1, True)),
        ([("The", -1), ("Yes,", -2), ("", -3)], None),
    ],
)
def test_probabilities_of_first_tokens_are_summed_by_word(first, found, questions):
    got = of_first_tokens(questions[0], first)
    if found is None:
        assert isinstance(got, Unanswered)
        assert "neither Yes nor No is among the 3 most probable" in got.reason
    else:
        assert got == WordProbabilities(pytest.approx(found[0]), pytest.approx(found[1]), found[2])
    turned = of_first_tokens(questions[3], first)
    assert found is None or (turned.unsafe, turned.safe) == (got.safe, got.unsafe)


# --- records ----------------------------------------------------------------------------------------------------------


def test_records_are_read_as_written(questions: list[Question]) -> None:
    for bound in (False, True):
        odds = Odds.of(questions[0], WordProbabilities(-1.0, -2.0, bound))
        assert odds.log_odds == 1
        assert odds.mass == pytest.approx(exp(-1) + exp(-2))
        assert Odds.from_dict(odds.to_dict()) == odds
        assert ("bound" in odds.to_dict()) == bound


@pytest.mark.parametrize(
    "wrong",
    [{"log_odds": "1"}, {"log_odds": float("inf")}, {"log_odds": True}, {"mass": 1.5}, {"mass": -0.1}, {"bound": 1}],
    ids=str,
)
def test_invalid_odds_values_are_rejected(wrong):
    with pytest.raises(RecordError, match=f"the field '{next(iter(wrong))}' must be"):
        Odds.from_dict({"id": "a", "log_odds": 1.0, "mass": 0.5} | wrong)
