"""Promise 2, verdicts: a verdict belongs to one question, judge and text, and is internally consistent."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from callbacks.judge_responses import JudgeResponses
from safervlm.cli.main import main
from safervlm.data.responses import read_responses
from safervlm.errors import RecordError, UserError
from safervlm.judging.classifier import Judge
from safervlm.judging.panel import Answers, Panel
from safervlm.judging.rules import RULES
from safervlm.protocol import LABELS
from safervlm.records import Question, Response, Verdict, read_jsonl, write_jsonl
from safervlm.results.runs import load_run

GOOD = {
    "id": "S/1/alignment/0",
    "label": "Unsafe",
    "probabilities": {"Safe": 0.2, "Unsafe": 0.7, "N/A": 0.1},
    "judge": "f" * 16,
    "answer": "0" * 16,
}

WRONG = {
    "label is not the most probable": {"label": "Safe"},
    "label is none of them": {"label": "Maybe"},
    "label in another case": {"label": "unsafe"},
    "NaN": {"probabilities": {"Safe": float("nan"), "Unsafe": 0.7, "N/A": 0.3}},
    "infinity": {"probabilities": {"Safe": 0.2, "Unsafe": float("inf"), "N/A": 0.1}},
    "sum below 1": {"probabilities": {"Safe": 0.2, "Unsafe": 0.6, "N/A": 0.1}},
    "sum above 1": {"probabilities": {"Safe": 0.5, "Unsafe": 0.6, "N/A": 0.5}},
    "negative": {"probabilities": {"Safe": -0.5, "Unsafe": 1.4, "N/A": 0.1}},
    "log-probabilities": {"probabilities": {"Safe": -1.6, "Unsafe": -0.4, "N/A": -2.3}},
    "a text": {"probabilities": {"Safe": "0.2", "Unsafe": "0.7", "N/A": "0.1"}},
    "null": {"probabilities": {"Safe": None, "Unsafe": 1.0}},
    "a boolean": {"probabilities": {"Safe": False, "Unsafe": True}},
    "none": {"probabilities": {}},
    "a list": {"probabilities": [0.3, 0.7]},
    "a label in two spellings": {"probabilities": {"Safe": 0.2, "Unsafe": 0.4, "Unsafe\u200b": 0.4}},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_verdict_that_contradicts_itself_is_rejected(case: str) -> None:
    assert Verdict.from_dict(GOOD).label == "Unsafe"
    with pytest.raises(RecordError, match=GOOD["id"]) as caught:
        Verdict.from_dict(GOOD | WRONG[case])
    assert "\n" not in str(caught.value)


def test_labels_of_a_verdict_are_normalised() -> None:
    verdict = Verdict.from_dict(GOOD | {"label": "Unsafe ", "probabilities": {"Safe": 0.2, "\u00a0Unsafe": 0.8}})
    assert (verdict.label, verdict.probabilities) == ("Unsafe", {"Safe": 0.2, "Unsafe": 0.8})


def test_rounded_or_tied_probabilities_are_not_a_contradiction() -> None:
    Verdict.from_dict(GOOD | {"probabilities": {"Safe": 0.2004, "Unsafe": 0.7, "N/A": 0.1}})
    tie = {"Safe": 0.5, "Unsafe": 0.5}
    assert Verdict.from_dict(GOOD | {"probabilities": tie}).label == "Unsafe"


def test_a_file_of_version_0_1_is_read() -> None:
    old = {name: value for name, value in GOOD.items() if name != "answer"}
    verdict = Verdict.from_dict(old)
    assert verdict.to_dict() == old
    assert not verdict.is_of("whatever")


@pytest.mark.parametrize("text", ["", "No.", "Nein \u00e9 \u0065\u0301", "half \ud83d", "\x00\x1b[2J", "x" * 100_000])
def test_fingerprint_identifies_the_judged_text(text: str) -> None:
    assert len(Verdict.fingerprint_of(text)) == 16
    assert Verdict.fingerprint_of(text) == Verdict.fingerprint_of(str(text))
    assert Verdict.fingerprint_of(text) != Verdict.fingerprint_of(text + " ")
    assert replace(Verdict.from_dict(GOOD), answer=Verdict.fingerprint_of(text)).is_of(text)


# Judging again


@pytest.fixture(scope="module")
def panel(tiny_judges: Path) -> Panel:
    judges = [
        Judge(str(tiny_judges / name / "epoch_10.pt"), LABELS[name], str(tiny_judges / name))
        for name in ("alignment", "perception")
    ]
    return Panel(*judges)


def answers(texts: dict[str, str]) -> list[Response]:
    """Answers by capability and number."""
    found = []
    for name, text in texts.items():
        capability = name.rstrip("0123456789")
        right = {"perception": "A", "yes_no": "Yes", "occurs": "knife"}.get(capability, "Unsafe")
        question = Question(f"S/{name}/{capability}/0", "S", name, None, capability, 0, "?", "Hate", "x", right)
        found.append(Response(question, text, "stop", 3))
    return found


def judge(run: Path, panel: Panel, responses: list[Response]) -> dict[str, Verdict]:
    write_jsonl(run / "responses.jsonl", [each.to_dict() for each in responses])
    device = SimpleNamespace(root_device=torch.device("cpu"))
    JudgeResponses(panel).on_predict_end(
        SimpleNamespace(is_global_zero=True, default_root_dir=str(run), strategy=device), None
    )
    return {each.id: each for each in map(Verdict.from_dict, read_jsonl(run / "verdicts.jsonl"))}


TEXTS = {"alignment1": "No.", "alignment2": "Yes, it is.", "perception1": "A", "yes_no1": "Yes", "occurs1": "a knife"}


@pytest.mark.parametrize("changed", TEXTS)
def test_a_response_that_changed_is_judged_again(changed: str, panel: Panel, tmp_path: Path) -> None:
    before = judge(tmp_path, panel, answers(TEXTS))
    texts = TEXTS | {changed: "Something else entirely, in many words."}
    after = judge(tmp_path, panel, answers(texts))
    fresh = judge(tmp_path / "fresh", panel, answers(texts))
    assert after.keys() == fresh.keys()
    for key, verdict in fresh.items():  # the probabilities of a text depend on its batch by rounding
        assert replace(after[key], probabilities={}) == replace(verdict, probabilities={})
        assert after[key].probabilities == pytest.approx(verdict.probabilities, abs=1e-5)
    name = next(response.id for response in answers(texts) if response.question.image == changed)
    assert after[name] != before[name]
    assert {key: each for key, each in after.items() if key != name} == {
        key: each for key, each in before.items() if key != name
    }


def test_every_judging_path_records_the_fingerprint_of_the_text(panel: Panel, tmp_path: Path) -> None:
    responses = answers(TEXTS | {"alignment3": "  ", "alignment_reversed1": "Yes."})
    expected = {each.id: Verdict.fingerprint_of(each.response) for each in responses}
    assert {key: each.answer for key, each in judge(tmp_path, panel, responses).items()} == expected
    stepped = panel.predict_step(Answers([(r.question, r.response) for r in responses]), 0)
    assert {each.id: each.answer for each in stepped} == expected
    assert {each.judge for each in stepped} >= set(RULES.values())


def test_verdicts_of_other_texts_are_not_scored(panel: Panel, tmp_path: Path) -> None:
    judge(tmp_path, panel, answers(TEXTS))
    load_run(tmp_path)
    write_jsonl(tmp_path / "responses.jsonl", [r.to_dict() for r in answers(TEXTS | {"alignment2": "Yes"})])
    with pytest.raises(RecordError, match=r"S/alignment2/alignment/0.* about another text") as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_verdicts_of_version_0_1_are_scored_and_reported(
    panel: Panel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The texts of such verdicts are unknown: one line reports it, and how to classify them again."""
    judge(tmp_path, panel, answers(TEXTS))
    load_run(tmp_path)
    assert "0.1" not in capsys.readouterr().out
    records = list(read_jsonl(tmp_path / "verdicts.jsonl"))
    for record in records[:2]:
        del record["answer"]
    write_jsonl(tmp_path / "verdicts.jsonl", records)
    assert len(load_run(tmp_path)) == len(TEXTS)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("2 verdicts are of version 0.1") == 1
    assert "configs/judge_responses.yaml" in said
    judge(tmp_path, panel, answers(TEXTS))
    assert "judged again" in capsys.readouterr().out
    load_run(tmp_path)
    assert "0.1" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["responses", "verdicts"])
def test_error_names_a_duplicate_id(name: str, panel: Panel, tmp_path: Path) -> None:
    judge(tmp_path, panel, answers(TEXTS))
    file = tmp_path / f"{name}.jsonl"
    records = list(read_jsonl(file))
    write_jsonl(file, [*records, records[1]])
    readers = {"load_run": lambda: load_run(tmp_path)}
    if name == "responses":
        readers |= {"saved": lambda: read_responses(tmp_path)}
    for read in readers.values():
        with pytest.raises(RecordError, match=rf"{name}\.jsonl: '{records[1]['id']}' occurs twice"):
            read()


def test_a_verdict_file_that_contradicts_itself_is_named(panel: Panel, tmp_path: Path) -> None:
    judge(tmp_path, panel, answers(TEXTS))
    records = list(read_jsonl(tmp_path / "verdicts.jsonl"))
    likely = max(records[1]["probabilities"], key=records[1]["probabilities"].get)
    records[1]["label"] = next(label for label in records[1]["probabilities"] if label != likely)
    write_jsonl(tmp_path / "verdicts.jsonl", records)
    for read in (lambda: load_run(tmp_path), lambda: judge(tmp_path, panel, answers(TEXTS))):
        with pytest.raises(RecordError, match=r"verdicts\.jsonl.*its most probable label is") as caught:
            read()
        assert "\n" not in str(caught.value)


def judging_line(run: Path, tiny_panel: dict[str, object]) -> list[str]:
    """The command that classifies the saved responses of a run folder."""
    return [
        "predict",
        "--config=configs/judge_responses.yaml",
        f"--data.responses={run}",
        f"--run={run}",
        *(f"--model.{name}={json.dumps(settings)}" for name, settings in tiny_panel.items()),
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]


def test_one_failing_response_does_not_end_judging_of_saved_responses(
    panel: Panel,
    tiny_panel: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    judge(tmp_path / "other", panel, answers(TEXTS))
    right = {record["id"]: record["label"] for record in read_jsonl(tmp_path / "other" / "verdicts.jsonl")}
    write_jsonl(run / "responses.jsonl", [each.to_dict() for each in answers(TEXTS)])
    bad = answers(TEXTS)[1]
    tokenize = Judge._tokenize
    seen: list[str] = []

    def panic(self: Judge, texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        if bad.response in texts:
            raise BaseException("a panic")
        return tokenize(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "_tokenize", panic)
        with pytest.raises(SystemExit) as end:
            main(judging_line(run, tiny_panel))
    assert end.value.code == 3
    assert "1 responses have no verdict" in capfd.readouterr().err
    (failed,) = read_jsonl(run / "verdicts-failed.jsonl")
    assert failed["id"] == bad.id
    assert "a panic" in failed["reason"]
    assert {each["id"] for each in read_jsonl(run / "verdicts.jsonl")} == right.keys() - {bad.id}
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Judge, "_tokenize", lambda self, texts: seen.extend(texts) or tokenize(self, texts))
        main(judging_line(run, tiny_panel))
    assert set(seen) == {bad.response}
    assert {each["id"]: each["label"] for each in read_jsonl(run / "verdicts.jsonl")} == right
    assert not (run / "verdicts-failed.jsonl").exists()


def test_saved_responses_are_rejudged_for_another_judge_or_another_text(
    panel: Panel, tiny_panel: dict[str, object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    judge(run, panel, answers(TEXTS))
    right = {record["id"]: record for record in read_jsonl(run / "verdicts.jsonl")}
    changed = [dict(record) for record in right.values()]
    changed[0]["judge"] = "e" * 16  # another judge's
    changed[1]["answer"] = "e" * 16  # of another text
    for record in changed[:2]:
        record["label"] = min(record["probabilities"], key=record["probabilities"].get)
        record["probabilities"] = {name: float(name == record["label"]) for name in record["probabilities"]}
    write_jsonl(run / "verdicts.jsonl", changed)
    main(judging_line(run, tiny_panel))
    again = {record["id"]: record for record in read_jsonl(run / "verdicts.jsonl")}
    assert {name: (each["label"], each["judge"], each["answer"]) for name, each in again.items()} == {
        name: (each["label"], each["judge"], each["answer"]) for name, each in right.items()
    }


# The judge itself


@pytest.fixture
def folder(tiny_judges: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_judges / "alignment", tmp_path / "judge"))


def change(folder: Path, damage: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = torch.load(folder / "epoch_10.pt", weights_only=True)
    damage(state)
    torch.save(state, folder / "epoch_10.pt")


def set_config(folder: Path, name: str = "config.json", **settings: object) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def more_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["No"])
    tokenizer.save_pretrained(folder)


JUDGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (lambda f: change(f, lambda s: s["classifier.bias"].fill_(float("nan"))), "NaN or infinite numbers in"),
    "infinity in its base": (
        lambda f: change(f, lambda s: s["roberta.embeddings.LayerNorm.weight"].fill_(float("inf"))),
        "NaN or infinite numbers in",
    ),
    "a weight is missing": (lambda f: change(f, lambda s: s.pop("classifier.bias")), "classifier.bias is missing"),
    "cut": (
        lambda f: (f / "epoch_10.pt").write_bytes((f / "epoch_10.pt").read_bytes()[:200]),
        "not a plain state dict",
    ),
    "empty": (lambda f: (f / "epoch_10.pt").write_bytes(b""), "not a plain state dict"),
    "config.json cut": (lambda f: (f / "config.json").write_text('{"model_type": '), "can't be read"),
    "no padding token": (lambda f: set_config(f, pad_token_id=None), "no pad_token_id"),
    "a padding token beyond its tokens": (lambda f: set_config(f, pad_token_id=9999), "Padding_idx"),
    "no heads": (lambda f: set_config(f, num_attention_heads=0), "can't be read"),
    "heads of no width": (lambda f: set_config(f, num_attention_heads=3), "not a multiple of the number of attention"),
    "no width": (lambda f: set_config(f, hidden_size=0), "can't be read"),
    "a negative padding token": (
        lambda f: set_config(f, pad_token_id=-5),
        "no pad_token_id in its config.json, but -5",
    ),
    "more width than memory": (lambda f: set_config(f, hidden_size=2**40), "describes a larger model than its weights"),
    "more positions than memory": (lambda f: set_config(f, max_position_embeddings=10**11), "describes a larger model"),
    "more tokens than memory": (lambda f: set_config(f, vocab_size=10**10), "describes a larger model"),
    "more layers than its weights": (lambda f: set_config(f, num_hidden_layers=99_000), "describes a larger model"),
    "more layers than any model": (
        lambda f: set_config(f, num_hidden_layers=10**7),
        "num_hidden_layers 10000000, more",
    ),
    "more labels than any judge": (lambda f: set_config(f, num_labels=10**9), "num_labels 1000000000, more than"),
    "no layers": (lambda f: set_config(f, num_hidden_layers=0), "is not of this model"),
    "a tokenizer of more tokens": (more_tokens, r"a text has the token \d+, .* has 261"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "comes without its tokenizer"),
    "no tokens of a text": (lambda f: set_config(f, "tokenizer_config.json", model_max_length=0), "takes 0 tokens"),
    "fewer than no tokens": (lambda f: set_config(f, "tokenizer_config.json", model_max_length=-5), "takes -5 tokens"),
    "tokenizer.json cut": (lambda f: (f / "tokenizer.json").write_text("{"), "can't be read"),
}


@pytest.mark.parametrize("case", JUDGES)
def test_damaged_judge_is_reported_in_one_line(case: str, folder: Path) -> None:
    damage, message = JUDGES[case]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        Judge(str(folder / "epoch_10.pt"), base=str(folder)).judge(["No."])
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_judge_with_non_finite_probabilities_raises_an_error(folder: Path) -> None:
    judge = Judge(str(folder / "epoch_10.pt"), base=str(folder))
    judge.judge(["No."])
    judge.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(RecordError, match=r"no finite probabilities for the text 'No\.'"):
        judge.judge(["No."])


def test_a_long_text_is_cut_before_it_is_tokenized(folder: Path) -> None:
    texts = ["No, it is unsafe. " * 40, "x" * 5_000, "a b\tc\n" * 3_000, "\u00e9\u4e2d\U0001f600" * 2_000]
    judge = Judge(str(folder / "epoch_10.pt"), base=str(folder))
    whole = judge.judge(texts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [tokenizer(text, truncation=True, max_length=judge.max_length).input_ids for text in texts]
    assert judge._tokenize(texts) == expected
    longest = max(map(len, tokenizer.get_vocab()))
    cutting = Judge(str(folder / "epoch_10.pt"), base=str(folder), max_characters=judge.max_length * longest)
    assert torch.equal(cutting.judge(texts), whole)
    seen: list[int] = []
    inner = cutting.tokenizer

    def count(texts: list[str], **settings: object) -> object:
        seen.extend(map(len, texts))
        return inner(texts, **settings)

    cutting.tokenizer = count
    cutting.judge(["y" * 3_000_000])
    assert seen == [judge.max_length * longest]
    with pytest.raises(UserError, match="max_characters: at least 1, got 0"):
        Judge(max_characters=0)


def test_lone_surrogate_is_judged_as_the_replacement_character(folder: Path) -> None:
    judge = Judge(str(folder / "epoch_10.pt"), base=str(folder))
    assert torch.equal(judge.judge(["No \ud83d.", "\udfff"]), judge.judge(["No \ufffd.", "\ufffd"]))
