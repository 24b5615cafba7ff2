"""Thinking models of each type of chat template: measured, judged, scored, trained and served."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from loopback import Loopback, Reply, completion, loopbacks, shorten_waits
from PIL import Image

from safervlm.api import LoadedVLM
from safervlm.errors import ArgumentError
from safervlm.judging.classifier import Judge
from safervlm.judging.panel import Panel
from safervlm.judging.rating import rating_prompt
from safervlm.judging.rules import occurs, yes_or_no
from safervlm.measure import Measure
from safervlm.objectives import SFT
from safervlm.protocol import LABELS
from safervlm.records import THINKING_UNFINISHED, Example, Question, Response
from safervlm.vlm.auto import Transformers
from safervlm.vlm.base import Generation
from safervlm.vlm.lora import LoRA
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.batch import ServerCollator
from safervlm.vlm.server.client import Server
from safervlm.vlm.template_forms import default_system, given_form
from safervlm.vlm.thinking import COMMON, Marks, answer_of, detect, many_unfinished, split, thinking_unfinished

THOUGHT = "Is the knife safe? Unsafe, I think."
ANSWER = "Yes, it is safe."
BLOCK = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
GREEDY = Sampling(temperature=0, max_new_tokens=8)
KINDS = tuple(families.THINKING)
# What a model of each type generates behind its prompt.
GENERATED = {"opened": BLOCK[8:], "kept": BLOCK[8:], "hybrid": ANSWER, "written": BLOCK, "system": ANSWER}


def folder_of(folder: Path, kind: str, special: bool = False) -> Path:
    families.thinking(folder, kind, special)
    return folder


def new(folder: Path, **settings: Any) -> Transformers:
    lora = LoRA(r=4, alpha=8, dropout=0.0)
    return Transformers(str(folder), **{"dtype": "float32", "lora": lora, **settings})


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp(kind), kind)


@pytest.fixture
def examples(make_questions: Callable[[int], list[Question]]) -> list[Example]:
    return families.ask(make_questions(3))


@pytest.fixture(scope="module")
def panel(tiny_judges: Path) -> Panel:
    names = ("alignment", "perception")
    checkpoints = {name: (str(tiny_judges / name / "epoch_10.pt"), str(tiny_judges / name)) for name in names}
    return Panel(*(Judge(checkpoints[name][0], LABELS[name], checkpoints[name][1]) for name in names))


def says(vlm: Transformers, text: str, monkeypatch: pytest.MonkeyPatch, ends: bool = True) -> None:
    """Makes the model generate a text whatever it is asked."""
    ids = vlm.tokenizer(text, add_special_tokens=False).input_ids + vlm.eos_token_ids[:1] * ends

    def generate(input_ids: torch.Tensor, logits_processor: Any, **inputs: Any) -> torch.Tensor:
        logits_processor(input_ids, torch.zeros(len(input_ids), vlm.words))
        return torch.cat([input_ids, torch.tensor([ids]).expand(len(input_ids), -1)], dim=1)

    monkeypatch.setattr(vlm.base, "generate", generate)


def measured(vlm: Any, questions: list[Question]) -> list[Response]:
    measure = Measure(vlm, GREEDY)
    records = measure.predict_step(measure.collator([Example(question) for question in questions]), 0)
    assert all(isinstance(record, Response) for record in records), records
    return records


# --- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer", "unfinished"),
    [
        (BLOCK, False, THOUGHT, ANSWER, False),
        (BLOCK[8:], True, THOUGHT, ANSWER, False),
        (BLOCK[8:], False, THOUGHT, ANSWER, False),  # a server's: the prompt is unknown
        (f"<think>{THOUGHT}", False, THOUGHT, "", True),
        (THOUGHT, True, THOUGHT, "", True),
        ("", True, "", "", True),
        (ANSWER, False, "", ANSWER, False),
        ("<think>\n\n</think>\n\nNo", False, "", "No", False),
        ("<think>a</think>b<think>c</think>d", False, "a</think>b<think>c", "d", False),
        ("<think>a</think>b<think>c", False, "a</think>b<think>c", "", True),
        ("◁think▷a◁/think▷b", False, "a", "b", False),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
            False,
            "a",
            "b",
            False,
        ),
        ("<|channel>thought\na<channel|>b", False, "a", "b", False),
    ],
)
def test_the_answer_is_the_text_after_the_last_mark(text, opened, reasoning, answer, unfinished):
    found = split(text, COMMON, opened)
    assert (found.reasoning, found.answer, found.unfinished) == (reasoning, answer, unfinished)
    assert opened or answer_of(text) == answer


@pytest.mark.parametrize(
    ("setting", "template", "tokens", "beginning", "marks", "opened", "closed", "expected"),
    [
        ("detected", "", [], "", (), False, False, False),
        ("detected", "{{ '<think>' }}</think>", [], "", COMMON[:1], False, False, True),
        ("detected", "x", ["<think>", "</think>"], "", COMMON[:1], False, False, False),  # of an instruct model, maybe
        ("detected", "<think>", [], "<|a|>\n<think>\n", COMMON[:1], True, False, True),
        ("detected", "<think>", [], "<|a|>\n<think>\n\n</think>\n\n", COMMON[:1], False, True, False),
        ("none", "<think></think>", ["<think>", "</think>"], "<think>", (), False, False, False),
        (["[A]", "[/A]"], "<think>", [], "", (Marks("[A]", "[/A]"),), False, False, True),
        (["", "</think>"], "", [], "", (Marks("", "</think>"),), True, False, True),
    ],
)
def test_marks_are_found_set_or_switched_off(setting, template, tokens, beginning, marks, opened, closed, expected):
    found = detect(setting, template, tokens, beginning)
    assert (found.marks, found.opened, found.closed, found.expected) == (marks, opened, closed, expected)
    assert bool(found.describe()) == bool(marks)
    assert (found.report() is not None) == (expected or closed)


@pytest.mark.parametrize("setting", ["on", ["<think>"], ["<a>", "<a>"], ["<a>", " "], ["a", "b", "c"]])
def test_invalid_thinking_settings_are_rejected(setting, tmp_path):
    for make in (lambda: new(tmp_path, thinking=setting), lambda: Server("m", ["http://a/v1"], thinking=setting)):
        with pytest.raises(ArgumentError, match=r"^vlm\.thinking: the opening and the closing mark"):
            make()


def test_answer_that_also_occurs_in_a_mark_is_found_after_the_mark():
    thinking = detect("detected", "<think>", [], "A:<think>\n")
    form = given_form("Q?A:<think>\n", "Q?A:<think>\n\n</think>\n\nthink</s>", "think", thinking)
    assert form is not None
    assert (form.continuation, form.rest, form.trains_without_thinking) == ("\n</think>\n\nthink", "</s>", True)
    assert given_form("Q?A:<think>\n", "Q?B:think", "think", thinking) is None


@pytest.mark.parametrize(
    ("with_system", "plain", "found"),
    [
        ("<s>[PROBE]Q", "<s>[Be kind.]Q", "Be kind."),
        ("<s>[PROBE]Q", "<s>Q", ""),
        ("PROBE USER: Q", "Be kind. USER: Q", "Be kind."),
        ("Q", "Q", ""),
    ],
)
def test_a_default_system_prompt_is_found(with_system, plain, found):
    assert default_system(with_system, plain, "PROBE") == found


# --- judging ----------------------------------------------------------------------------------------------------------


def test_rules_and_raters_receive_only_the_answer(make_questions):
    assert yes_or_no("Now, the image..</think>\nYes") == "Yes"
    assert yes_or_no("<think>Is there a dog? I see one.</think>\nYes") == "Yes"
    assert not occurs("knife", "<think>A knife?</think>A spoon.")
    assert occurs("spoon", "<think>A knife?</think>A spoon.")
    (question,) = make_questions(1)
    prompts = {rating_prompt(Response(question, text, "stop", 1)) for text in (BLOCK, ANSWER)}
    assert len(prompts) == 1


def test_the_verdict_is_the_same_with_and_without_reasoning(make_questions, panel):
    (question,) = make_questions(1)
    texts = (ANSWER, BLOCK, f"{'word ' * 200}</think>{ANSWER}")
    verdicts = panel.judge([Response(question, text, "stop", 1) for text in texts])
    assert len({json.dumps(verdict.probabilities) for verdict in verdicts}) == 1


def test_a_response_keeps_its_reasoning_and_older_files_load(make_questions):
    (question,) = make_questions(1)
    response = Response(question, ANSWER, "stop", 3, THOUGHT)
    assert Response.from_dict(response.to_dict()) == response
    assert "reasoning" not in Response(question, ANSWER, "stop", 3).to_dict()
    with pytest.raises(ValueError, match="'reasoning' must be a text"):
        Response.from_dict(response.to_dict() | {"reasoning": 1})
    assert thinking_unfinished(Response(question, "<think>hm", "length", 3))
    assert not thinking_unfinished(response)


def test_many_unfinished_responses_are_reported_with_the_argument():
    assert many_unfinished("run", 5, 100) is None
    assert many_unfinished("run", 0, 0) is None
    assert "increase sampling.max_new_tokens" in str(many_unfinished("run", 6, 100))


# --- every type of template -------------------------------------------------------------------------------------------


def test_thinking_model_is_measured_and_judged(kind, folder, make_questions, panel, monkeypatch):
    vlm = new(folder)
    vlm.load()
    says(vlm, GENERATED[kind], monkeypatch)
    responses = measured(vlm, make_questions(3))
    reasoning = THOUGHT if kind in ("opened", "kept", "written") else ""
    assert {(each.response, each.finish_reason, each.reasoning) for each in responses} == {(ANSWER, "stop", reasoning)}
    plain = panel.judge([replace(each, reasoning="") for each in responses])
    assert panel.judge(responses) == plain

    says(vlm, THOUGHT if kind in ("opened", "kept") else f"<think>{THOUGHT}", monkeypatch, ends=False)
    cut = measured(vlm, make_questions(2))
    expected = ("", THINKING_UNFINISHED, THOUGHT)
    if kind == "system":  # a model without any mark doesn't think
        expected = (f"<think>{THOUGHT}", "length", "")
    assert {(each.response, each.finish_reason, each.reasoning) for each in cut} == {expected}


def test_a_given_response_is_scored_in_the_templates_form(kind, folder, examples):
    vlm = families.with_effect(new(folder))
    example = replace(examples[0], completions=(ANSWER, "No."))
    batch = vlm.collator([example])
    scores = vlm.score(batch)
    image = Image.open(example.question.image_path).convert("RGB")
    for row, answer in enumerate(example.completions):
        asked = vlm.collator.messages(example.question.prompt)
        turns = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        whole = vlm.processor.apply_chat_template(turns).removesuffix("\n")
        if kind == "hybrid":  # the empty block is part of the prompt, as for a generated answer
            whole = whole.replace(answer, f"{families.EMPTY}{answer}")
        inputs = vlm.processor(images=image, text=whole, return_tensors="pt")
        given = {"kept": "\n</think>\n\n"}.get(kind, "") + answer
        length = len(vlm.tokenizer(given, add_special_tokens=False).input_ids) + 1
        with torch.no_grad():
            logprobs = vlm.base(**inputs).logits[0, -length - 1 : -1].log_softmax(-1)
        reference = logprobs.gather(-1, inputs["input_ids"][0, -length:, None])[:, 0]
        assert vlm.tokenizer.decode(batch.completions[0][row][:-1]) == given
        torch.testing.assert_close(scores.logprobs[row][scores.mask[row]], reference, atol=1e-5, rtol=0)
    # A prompt without completions, and generation from a batch with some, are unaffected.
    plain = vlm.collator([replace(example, completions=())])
    assert torch.equal(plain.encodings[0]["input_ids"], batch.encodings[0]["input_ids"])
    generated = vlm.collator([example]).select(torch.tensor([0]), [[5, 6]])
    assert generated.dropped == 0


def test_training_that_would_unlearn_thinking_is_rejected(kind, folder, examples):
    unlearns = kind in ("opened", "kept")
    for settings, rejected in (
        ({}, unlearns),
        ({"train_without_thinking": True}, False),
        ({"thinking": ["<think>", "</think>"]}, kind != "hybrid"),
        ({"thinking": "none"}, False),
    ):
        sft = SFT(new(folder, **settings))
        if rejected:
            with pytest.raises(ArgumentError, match=r"^vlm\.train_without_thinking: the chat template writes a given"):
                sft.setup("fit")
        else:
            sft.vlm.require_thinking_preserved()
    families.check_learning(families.with_effect(new(folder, train_without_thinking=True)), examples)


def test_thinking_enabled_by_template_arguments_is_kept(tmp_path):
    vlm = new(folder_of(tmp_path, "hybrid"), template_arguments={"enable_thinking": True})
    assert vlm.thinking.opened
    assert vlm.describe()["template_arguments"] == {"enable_thinking": True}
    example = vlm.collator([Example(Question("a", "", "", None, "alignment", 0, "Safe?", "", "", ""))])
    assert vlm.tokenizer.decode(example.encodings[0]["input_ids"][0]).endswith("assistant\n<think>\n")
    with pytest.raises(ArgumentError, match="train_without_thinking"):
        vlm.require_thinking_preserved()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template_arguments": {"tokenize": False}}, "'tokenize' is set by SaferVLM"),
        ({"template_arguments": {"a": 1}, "template": "{question}"}, r"vlm\.template replaces the chat template"),
    ],
)
def test_reserved_template_arguments_are_rejected(settings, message, tmp_path):
    with pytest.raises(ArgumentError, match=rf"^vlm\.template_arguments: .*{message}"):
        new(tmp_path, **settings)


def with_template(folder: Path, template: str, **settings: Any) -> Transformers:
    families.qwen3_vl(folder)
    (folder / "chat_template.jinja").write_text(template)
    return new(folder, **settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [("enable_thinkin", r"'enable_thinkin'; did you mean enable_thinking\?"), ("zzz", "'zzz'; remove it")],
)
def test_a_variable_that_the_template_lacks_is_rejected(name, message, tmp_path):
    vlm = new(folder_of(tmp_path, "hybrid"), template_arguments={name: False})
    with pytest.raises(ArgumentError, match=rf"^vlm\.template_arguments: .* has no variable {message}"):
        _ = vlm.collator


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
NO_ANSWER = "{% for m in messages if m.role == 'assistant' %}{{ raise_exception('No answer') }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "settings", "given", "message"),
    [
        (families.thinking_template("", first=NO_SYSTEM), {"system": "Be brief."}, False, "No system role.*vlm.system"),
        (families.thinking_template("{{ mode + 1 }}"), {}, False, "'mode' is undefined.*vlm.template_arguments"),
        (families.thinking_template("{% endif %}"), {}, False, "unknown tag"),
        (families.thinking_template("", first=NO_ANSWER), {}, True, "No answer.*vlm.template"),
    ],
)
def test_a_template_that_fails_is_reported_in_one_line(template, settings, given, message, tmp_path, examples):
    vlm = with_template(tmp_path, template, **settings)
    if given:  # it can be measured
        assert vlm.describe()["system"] == ""
    with pytest.raises(ArgumentError, match=rf"^vlm\.model: its chat template fails .*{message}") as raised:
        vlm.collator(examples)
    assert "\n" not in str(raised.value)


def test_a_template_without_a_system_role_is_measured(tmp_path):
    assert "default_system" not in with_template(tmp_path, families.thinking_template("", first=NO_SYSTEM)).describe()


def test_marks_in_a_template_that_is_not_used_are_ignored(tmp_path):
    families.qwen3_vl(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("<think>")
    vlm = new(tmp_path)
    assert set(vlm.processor.chat_template) == {"default", "tool_use"}
    assert not vlm.thinking.marks


@pytest.mark.parametrize(
    ("prompt", "given", "known"),
    [("<reason>\n", "", False), ("<reason>", "<reason>", True), ("[PLAN]", "", False), ("Answer:", "", True)],
)
def test_a_mark_that_is_not_known_is_reported(prompt, given, known, tmp_path, capsys):
    vlm = with_template(tmp_path, families.thinking_template(prompt, given))
    vlm.load()
    line = f"vlm.thinking: the prompt ends with {prompt.strip()}; if it opens reasoning"
    assert (line in capsys.readouterr().out) == (not known)
    marked = new(tmp_path, thinking=[prompt.strip(), "[END]"])
    assert marked.thinking.opened
    marked.load()
    assert line not in capsys.readouterr().out


def test_the_token_that_ends_a_response_in_the_template_is_an_end_token(tmp_path, examples, capsys):
    """Otherwise it would be suppressed, and the model could not end a response as it was trained to."""
    families.qwen3_vl(tmp_path)
    for file in ("tokenizer_config.json", "config.json", "generation_config.json"):
        text = (tmp_path / file).read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "</s>"')
        (tmp_path / file).write_text(re.sub(r'"eos_token_id": \d+', '"eos_token_id": 2', text))
    vlm = new(tmp_path)
    vlm.load()
    end = vlm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert vlm.eos_token_ids == [2, end]
    assert end not in vlm.suppressed
    assert vlm.collator(examples[:1]).completions[0][0][-1] == end
    assert vlm.generation([65, end, 66]).finish_reason == "stop"
    assert "vlm.model: <|im_end|> ends a response, too" in capsys.readouterr().out


def test_description_includes_thinking_marks_and_default_system_prompt(kind, folder):
    described = new(folder).describe()
    assert described.get("default_system") == ("You are kind." if kind == "system" else None)
    assert "default_system" not in new(folder, system="Be brief.").describe()
    assert ("thinking" in described) == (kind != "system")
    assert json.loads(json.dumps(described)) == described


def test_the_marks_are_reported_once(kind, folder, capsys):
    vlm = new(folder)
    vlm.load()
    vlm.load()
    said = capsys.readouterr().out.count("vlm.thinking: reasoning between <think> and </think>")
    assert said == (kind in ("opened", "kept", "hybrid"))


# --- marks that are special tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["detected", "none"])
def test_marks_that_are_special_tokens_can_be_generated(setting, tmp_path, monkeypatch, make_questions):
    vlm = new(folder_of(tmp_path, "written", special=True), thinking=setting)
    vlm.load()
    marks = {vlm.tokenizer.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>")}
    assert marks <= set(vlm.tokenizer.all_special_ids) | set(vlm.tokenizer.added_tokens_decoder)
    assert bool(marks & set(vlm.suppressed.tolist())) == (setting == "none")
    says(vlm, BLOCK, monkeypatch)
    (response,) = measured(vlm, make_questions(1))
    if setting == "detected":
        assert (response.response, response.reasoning) == (ANSWER, THOUGHT)
    else:
        assert response.reasoning == ""


def test_ask_returns_the_answer_without_reasoning(tmp_path, monkeypatch, capsys):
    loaded = LoadedVLM(new(folder_of(tmp_path, "opened")), torch.device("cpu"))
    loaded.vlm.load()
    says(loaded.vlm, BLOCK[8:], monkeypatch)
    assert loaded.ask(None, "Safe?") == ANSWER
    says(loaded.vlm, THOUGHT, monkeypatch, ends=False)
    assert loaded.ask(None, "Safe?") == ""
    assert "increase sampling.max_new_tokens" in capsys.readouterr().out


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loopback]]:
    shorten_waits(monkeypatch)
    with loopbacks() as start:
        yield start


PARTS: Any = [
    {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
    {"type": "text", "text": ANSWER},
]


def hidden(tokens: int) -> dict[str, Any]:
    body = completion("", "length")
    body["usage"]["completion_tokens_details"] = {"reasoning_tokens": tokens}
    return body


@pytest.mark.parametrize(
    ("body", "settings", "expected"),
    [
        (completion(ANSWER, reasoning_content=THOUGHT), {}, (ANSWER, "stop", THOUGHT)),
        (completion(ANSWER, reasoning=THOUGHT), {}, (ANSWER, "stop", THOUGHT)),
        (completion(BLOCK), {}, (ANSWER, "stop", THOUGHT)),
        (completion(BLOCK[8:]), {}, (ANSWER, "stop", THOUGHT)),
        (completion(BLOCK), {"thinking": "none"}, (BLOCK, "stop", "")),
        (completion(f"[T]{THOUGHT}[/T]{ANSWER}"), {"thinking": ["[T]", "[/T]"]}, (ANSWER, "stop", THOUGHT)),
        (completion(None, "length", reasoning_content=THOUGHT), {}, ("", THINKING_UNFINISHED, THOUGHT)),
        (completion("", "stop", reasoning=THOUGHT), {}, ("", THINKING_UNFINISHED, THOUGHT)),
        (completion(f"<think>{THOUGHT}", "length"), {}, ("", THINKING_UNFINISHED, THOUGHT)),
        (completion(THOUGHT, "length"), {"thinking": ["", "</think>"]}, ("", THINKING_UNFINISHED, THOUGHT)),
        (hidden(8), {}, ("", THINKING_UNFINISHED, "")),
        (hidden(0), {}, ("", "length", "")),
        (completion("Yes, it", "length"), {}, ("Yes, it", "length", "")),
        (completion("", "content_filter", reasoning=THOUGHT), {}, ("", "content_filter", THOUGHT)),
        (completion(PARTS), {}, (ANSWER, "stop", THOUGHT)),
        # Reasoning beside the answer and inside it.
        (completion(BLOCK, reasoning_content="First."), {}, (ANSWER, "stop", f"First.\n\n{THOUGHT}")),
        (completion(BLOCK, reasoning=THOUGHT, reasoning_content=THOUGHT), {}, (ANSWER, "stop", THOUGHT)),
        (completion(f"</think>{ANSWER}", reasoning=THOUGHT), {}, (ANSWER, "stop", THOUGHT)),
        (completion(f"<think>{THOUGHT}", reasoning="First."), {}, ("", THINKING_UNFINISHED, f"First.\n\n{THOUGHT}")),
        (completion(ANSWER, reasoning=THOUGHT), {"thinking": ["", "</think>"]}, (ANSWER, "stop", THOUGHT)),
    ],
)
def test_a_server_returns_reasoning_beside_or_inside_the_text(body, settings, expected, loopback, make_questions):
    there = loopback(lambda prompt, number, asked: Reply(body=body))
    server = Server("m", [there.address], **settings)
    batch = ServerCollator()([Example(question) for question in make_questions(1)])
    (answer,) = server.generate(batch, GREEDY, seed=0)
    assert isinstance(answer, Generation)
    assert (answer.text, answer.finish_reason, answer.reasoning) == expected
    (response,) = measured(server, make_questions(1))
    assert response.reasoning == expected[2]


def test_a_server_whose_prompts_open_the_reasoning_is_reported_once(loopback, make_questions, capsys):
    """A truncated response has no mark, so only the argument distinguishes reasoning from an answer."""
    there = loopback(lambda prompt, number, asked: Reply(body=completion(BLOCK[8:])))
    measured(Server("m", [there.address]), make_questions(3))
    assert capsys.readouterr().out.count("responses begin inside the reasoning (</think> without an opening mark)") == 1
    measured(Server("m", [there.address], thinking=["", "</think>"]), make_questions(1))
    assert "begin inside" not in capsys.readouterr().out


def test_further_fields_of_a_request_are_sent_and_described(loopback, make_questions):
    there = loopback()
    body = {"chat_template_kwargs": {"enable_thinking": False}}
    server = Server("m", [there.address], extra_body=body)
    measured(server, make_questions(1))
    assert there.asked[0][0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.describe()["extra_body"] == body
    assert not {"extra_body", "thinking"} & Server("m", [there.address]).describe().keys()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"temperature": 1}, "'temperature' has an argument of its own; give sampling.temperature"),
        ({"stream": True}, "'stream' would change what a response is"),
        ({"a": {1, 2}}, "plain JSON values"),
        ({"a": float("nan")}, "plain JSON values"),
    ],
)
def test_fields_that_cannot_be_sent_are_rejected(body, message):
    with pytest.raises(ArgumentError, match=rf"^vlm\.extra_body: {message}"):
        Server("m", ["http://a/v1"], extra_body=body)
