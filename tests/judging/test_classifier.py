"""The judges, with a tiny random RoBERTa and a tokenizer trained in this module."""

import csv
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from safervlm.data.labelled import LabelCollator, LabelledAnswers, read_labelled
from safervlm.errors import RecordError
from safervlm.judging.classifier import Judge
from safervlm.judging.panel import Panel
from safervlm.judging.rules import RULES
from safervlm.protocol import LABELS
from safervlm.records import Example, Question, Response

TEXTS = [
    "Yes, it is safe for viewing on social media.",
    "No.",
    "",
    "   ",
    "No, the image contains elements that could be considered harmful or exploitative. " * 3,
    "I can't tell <pad> you",
    "A: Swastika",
    "N/A",
]
POSITIONS = 48  # + 2, as RoBERTa counts


def tiny_config(**changes):
    settings = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": POSITIONS + 2,
        "type_vocab_size": 1,
        "initializer_range": 0.5,  # otherwise random weights do not distinguish texts
    }
    return RobertaConfig(**(settings | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder like 'roberta-base' on the Hub: configuration, tokenizer and weights (with an unused pooler)."""
    folder = tmp_path_factory.mktemp("base")
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=specials, show_progress=False)
    bpe.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    RobertaModel(tiny_config()).save_pretrained(folder)
    return folder


def published_state(n_labels, seed=1, **changes):
    """The state dict that the published training script saved, built without the code under test."""
    torch.manual_seed(seed)
    roberta = RobertaModel(tiny_config(**changes), add_pooling_layer=False)
    state = {f"roberta.{key}": value for key, value in roberta.state_dict().items()}
    return state | {"classifier.weight": torch.randn(n_labels, 16), "classifier.bias": torch.randn(n_labels)}


@pytest.fixture
def saved(tmp_path):
    def save(state, name="epoch_10.pt"):
        torch.save(state, tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def judge(base, saved):
    return Judge(saved(published_state(3)), base=str(base))


def test_a_published_checkpoint_returns_the_log_probabilities_of_a_plain_forward_pass(base, judge):
    roberta = RobertaModel(tiny_config(), add_pooling_layer=False).eval()
    state = published_state(3)
    roberta.load_state_dict({k.removeprefix("roberta."): v for k, v in state.items() if k.startswith("roberta.")})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    expected = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=POSITIONS)["input_ids"]])
        with torch.no_grad():
            first = roberta(ids).last_hidden_state[:, 0]
        expected.append(F.log_softmax(F.linear(first, state["classifier.weight"], state["classifier.bias"]), -1)[0])
    result = judge.judge(TEXTS)
    torch.testing.assert_close(result, torch.stack(expected), atol=1e-5, rtol=0)
    assert result.exp().max(dim=0).values.min() > 0.2, "random weights that always say the same would prove little"


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_verdicts_do_not_depend_on_batch_size_or_order(judge, batch_size):
    one_by_one = torch.cat([judge.judge([text]) for text in TEXTS])
    torch.testing.assert_close(judge.judge(TEXTS, batch_size), one_by_one, atol=1e-5, rtol=0)
    order = [5, 0, 7, 4, 2, 6, 1, 3]
    shuffled = judge.judge([TEXTS[place] for place in order], batch_size)
    torch.testing.assert_close(shuffled, one_by_one[order], atol=1e-5, rtol=0)


def test_labels_with_near_tied_logits_do_not_depend_on_the_batch(base, saved):
    """Two logits that differ by less than rounding: only the text determines the label."""
    texts = [" ".join(["a", "b", "yes", "no"][: 1 + n % 4] * (1 + n // 4 % 5)) + f" {n}" for n in range(150)]
    state = published_state(3)
    weights, bias = state["classifier.weight"], state["classifier.bias"]
    weights[1] = weights[0] * (1 + 2e-7 * torch.tensor([1.0, -1.0]).repeat(8))
    bias[:2], bias[2] = 0.0, -20.0
    judge = Judge(saved(state, "close.pt"), base=str(base))
    alone = torch.cat([judge.judge([text]) for text in texts])
    assert {*alone.argmax(-1).tolist()} == {0, 1}, "both must occur"
    for batch_size, step in ((4, 7), (37, 11), (150, 1)):
        order = [number * step % len(texts) for number in range(len(texts))]
        found = judge.judge([texts[number] for number in order], batch_size)
        assert found.argmax(-1).tolist() == alone[order].argmax(-1).tolist()
        torch.testing.assert_close(found.exp(), alone[order].exp(), atol=1e-5, rtol=0)


def test_judging_an_empty_list_returns_an_empty_tensor(judge):
    assert judge.judge([]).shape == (0, 3)


def test_a_long_text_is_cut_at_the_last_position(judge):
    long = "safe " * 200
    torch.testing.assert_close(judge.judge([long]), judge.judge([long + "harmful"]))


def test_probabilities_do_not_change_under_autocast(judge):
    expected = judge.judge(TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(judge.judge(TEXTS), expected)


def test_judge_stays_in_float32_inside_a_low_precision_module(base, judge):
    expected = judge.judge(TEXTS)
    other = Judge(judge.checkpoint, base=str(base))
    torch.set_default_dtype(torch.bfloat16)
    try:
        other.configure_model()
        parent = nn.ModuleList([other, nn.Linear(1, 1)]).bfloat16().to(torch.float16).half().to("cpu")
        result = other.judge(TEXTS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert parent[1].weight.dtype == torch.float16
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)


def test_checkpoint_with_position_ids_and_pooler_weights_is_loaded(base, judge, saved):
    state = published_state(3)
    state["roberta.embeddings.position_ids"] = torch.arange(POSITIONS + 2)[None]
    state["roberta.pooler.dense.weight"] = torch.randn(16, 16)
    state["roberta.pooler.dense.bias"] = torch.randn(16)
    other = Judge(saved(state, "stale.pt"), base=str(base))
    assert torch.equal(other.judge(TEXTS), judge.judge(TEXTS))


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("classifier.bias"), r"classifier\.bias is missing"),
        (without("roberta.embeddings.LayerNorm.weight"), r"roberta\.embeddings\.LayerNorm\.weight is missing"),
        (lambda state: state | {"roberta.pooler.weight": torch.zeros(1)}, r"roberta\.pooler\.weight is not of this"),
        (lambda state: state | {"position_ids": torch.zeros(1)}, r"position_ids is not of this model"),
        (
            lambda state: state | {"roberta.encoder.layer.1.output.dense.bias": torch.zeros(7)},
            r"roberta\.encoder\.layer\.1\.output\.dense\.bias has shape \(7,\), \(16,\) is needed",
        ),
        (lambda state: published_state(5), r"distinguishes 5 labels, labels names Safe, Unsafe, N/A"),
        (lambda state: published_state(3, num_hidden_layers=3), r"layer\.2\..* is not of this model; .* and 11 more"),
        (lambda state: {"model": state}, "not a plain state dict: names with tensors"),
        (lambda state: nn.Linear(1, 1), "not a plain state dict"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_rejected_in_one_line(base, saved, change, message):
    judge = Judge(saved(change(published_state(3))), base=str(base))
    with pytest.raises(ValueError, match=message) as caught:
        judge.judge(["Yes"])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("checkpoint: ")
    assert "epoch_10.pt" in str(caught.value)
    with pytest.raises(ValueError, match=message):  # a failed load leaves no partial judge behind
        judge.judge(["Yes"])


class Trap:
    """Calls a function when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_cannot_run_code(base, saved, tmp_path):
    judge = Judge(saved(published_state(3) | {"trap": Trap(str(tmp_path / "sprung"))}), base=str(base))
    with pytest.raises(ValueError, match="is not a plain state dict"):
        judge.judge(["Yes"])
    assert not (tmp_path / "sprung").exists()


def test_invalid_checkpoints_bases_and_labels_are_rejected(base, tmp_path, saved):
    good = saved(published_state(3))
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for file in base.glob("tokenizer*"):
        (tmp_path / "bert" / file.name).write_bytes(file.read_bytes())
    for settings, message in [
        ({"checkpoint": "nowhere.pt"}, "checkpoint: 'nowhere.pt' doesn't exist"),
        ({"checkpoint": str(tmp_path / "text.pt")}, "text.pt' is not a plain state dict"),
        ({"checkpoint": str(tmp_path / "text.safetensors")}, "text.safetensors' is not a plain state dict"),
        ({"checkpoint": str(tmp_path)}, "no model.safetensors in the folder"),
        ({"checkpoint": good, "base": str(tmp_path)}, f"base: {str(tmp_path)!r} can't be read (Unrecognized model"),
        ({"checkpoint": good, "base": str(tmp_path / "bert")}, "is a bert; the judge is built on a RoBERTa"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            Judge(**({"base": str(base)} | settings)).judge(["Yes"])
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="at least two labels"):
        Judge(good, labels=["Safe", "Safe"])
    with pytest.raises(ValueError, match="has to be fitted before"):
        _ = Judge(base=str(base)).fingerprint


def test_exported_judge_loads_without_its_base_and_keeps_its_labels(base, judge, tmp_path):
    expected = judge.judge(TEXTS)
    judge.save_pretrained(tmp_path / "judge")
    again = Judge(str(tmp_path / "judge"), base="no such base")
    assert torch.equal(again.judge(TEXTS), expected)
    assert sorted(load_file(tmp_path / "judge" / "model.safetensors")) == sorted(published_state(3))
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    assert config["id2label"] == {"0": "Safe", "1": "Unsafe", "2": "N/A"}
    assert judge.fingerprint == again.fingerprint
    with pytest.raises(
        ValueError, match=r"labels: Unsafe, Safe, N/A, but those of the judge in .* are Safe, Unsafe, N/A"
    ):
        Judge(str(tmp_path / "judge"), labels=["Unsafe", "Safe", "N/A"]).judge(["Yes"])


def test_the_fingerprint_distinguishes_judges_and_does_not_depend_on_the_path(base, saved, tmp_path):
    one = Judge(saved(published_state(3)), base=str(base)).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", one)
    copy = shutil.copy(saved(published_state(3)), tmp_path / "copy.pt")
    assert Judge(str(copy), base=str(base)).fingerprint == one
    assert Judge(saved(published_state(3, seed=2), "other.pt"), base=str(base)).fingerprint != one
    assert Judge(saved(published_state(3)), labels=["Unsafe", "Safe", "N/A"], base=str(base)).fingerprint != one


class Learner(LightningModule):
    """A module with a judge as its submodule."""

    def __init__(self, judge):
        super().__init__()
        self.judge = judge
        self.policy = nn.Linear(1, 1)

    def configure_model(self):
        self.judge.configure_model()

    def training_step(self, batch, batch_idx):
        rewards = self.judge.judge(TEXTS)
        return self.policy(torch.ones(1, 1)).mean() * rewards.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0, weight_decay=0.1)


def fast_trainer(folder, **changes):
    settings = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return Trainer(**(settings | changes))


@pytest.mark.filterwarnings("ignore")
def test_judge_inside_a_training_module_stays_frozen_and_in_eval_mode(judge, tmp_path):
    learner = Learner(judge)
    expected = judge.judge(TEXTS)
    before = {key: value.clone() for key, value in judge.state_dict().items()}
    learner.train()
    learner.requires_grad_(True)
    learner.judge.unfreeze()
    assert learner.training
    assert not any(module.training for module in judge.modules())
    assert torch.equal(judge.judge(TEXTS), expected), "dropout is at work"
    assert not judge.judge(TEXTS).requires_grad
    policy = learner.policy.weight.clone()
    fast_trainer(tmp_path, max_steps=3).fit(learner, torch.utils.data.DataLoader(range(4)))
    assert not torch.equal(policy, learner.policy.weight)
    assert not any(value.requires_grad for value in judge.parameters())
    assert not any(module.training for module in judge.modules())
    assert all(torch.equal(before[key], value) for key, value in judge.state_dict().items())


def separable(path, n=120):
    """Responses whose first word determines the label."""
    words = {"Safe": "Yes, fine", "Unsafe": "No, harmful", "N/A": "I can't tell"}
    with path.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["number", "text", "label"])
        for number in range(n):
            label = list(words)[number % 3]
            writer.writerow([number, f"{words[label]}, picture {number}", label])
    return str(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["base", "checkpoint"])
def test_fit_learns_reports_and_exports(base, judge, tmp_path, capsys, start):
    settings = {"lr": 3e-3, "base": str(base)}
    judge = Judge(judge.checkpoint if start == "checkpoint" else None, **settings)
    data = LabelledAnswers(separable(tmp_path / "answers.csv"), collator=judge.collator, batch_size=16, seed=0)
    trainer = fast_trainer(tmp_path / "run", max_epochs=6)
    before = trainer.validate(judge, data, verbose=False)[0]["validation/accuracy"]
    judge.requires_grad_(True)
    trainer.fit(judge, data)
    assert before < 0.7
    assert trainer.callback_metrics["validation/accuracy"] > 0.95
    assert not judge.training
    assert not any(value.requires_grad for value in judge.parameters())

    exported = Judge(str(tmp_path / "run" / "judge"))
    texts = ["Yes, fine, picture 1000", "No, harmful, picture 1000", "I can't tell, picture 1000"]
    assert exported.judge(texts).argmax(dim=-1).tolist() == [0, 1, 2]
    assert torch.equal(exported.judge(texts), judge.judge(texts))
    assert exported.fingerprint == judge.fingerprint

    rows = list(csv.reader((tmp_path / "run" / "confusion.csv").open()))
    assert rows[0] == ["label", "Safe", "Unsafe", "N/A"]
    counts = [[int(cell) for cell in row[1:]] for row in rows[1:]]
    held_out = data.parts.validation
    assert [sum(row) for row in counts] == [sum(a.question.answer == label for a in held_out) for label in judge.labels]
    wrong = [a for a in held_out if exported.labels[exported.judge(a.completions).argmax()] != a.question.answer]
    assert sum(row[i] for i, row in enumerate(counts)) == len(held_out) - len(wrong)
    printed = capsys.readouterr().out
    assert f"{len(held_out) - len(wrong)} of {len(held_out)} right" in printed
    assert "classified as Unsafe" in printed
    assert len(re.findall(r"epoch \d: held-out accuracy [01]\.\d{3}\n", printed)) == 6


@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_the_smoothed_cross_entropy(base, saved):
    judge = Judge(saved(published_state(3)), base=str(base), label_smoothing=0.3)
    log_probabilities = judge.judge(TEXTS[:3])
    targets = torch.tensor([2, 0, 1])
    expected = 0.0
    for row, target in zip(log_probabilities.tolist(), targets.tolist(), strict=True):
        expected -= 0.7 * row[target] + 0.1 * sum(row)
    loss = judge.training_step((TEXTS[:3], targets), 0)
    assert loss.item() == pytest.approx(expected / 3, rel=1e-5)
    judge.setup("fit")
    judge.configure_model()
    assert judge.training_step((TEXTS[:3], targets), 0).requires_grad
    assert not judge.judge(TEXTS).requires_grad


def test_the_confusion_counts_true_and_predicted_labels(judge):
    judge.confusion.update(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 1]))  # predicted, true
    assert judge.confusion.compute().tolist() == [[0, 0, 0], [2, 1, 0], [0, 0, 0]]


def test_a_base_without_weights_cannot_be_fitted_from(base, tmp_path):
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"base: .* can't be read \(Error no file named model.safetensors") as caught:
        Judge(base=str(tmp_path)).configure_model()
    assert "\n" not in str(caught.value)


def response(capability, text, number=0):
    question = Question(
        f"Set/images/1.png/{capability}/{number}",
        "Set",
        "images/1.png",
        None,
        capability,
        number,
        "?",
        "Hate",
        "x",
        "A",
    )
    return Response(question, text, "stop", 1)


def test_judged_batch_by_batch_the_probabilities_are_bit_equal(judge):
    together = judge.judge(TEXTS, 3)
    batches = judge.batches(TEXTS, 3)
    assert [len(batch) for batch in batches] == [3, 3, 2]
    assert sorted(place for batch in batches for place in batch) == [*range(len(TEXTS))]
    for batch in batches:
        assert torch.equal(judge.judge([TEXTS[place] for place in batch], 3), together[batch])


@pytest.fixture
def panel(base, saved):
    alignment = Judge(saved(published_state(3), "alignment.pt"), base=str(base))
    perception = Judge(saved(published_state(5, seed=3), "perception.pt"), labels=LABELS["perception"], base=str(base))
    return Panel(alignment, perception)


def test_panel_routes_each_response_to_the_judge_of_its_capability(panel):
    capabilities = ["perception", "alignment", "alignment_text_only", "perception", "alignment"]
    responses = [response(c, TEXTS[n], n) for n, c in enumerate(capabilities)]
    verdicts = panel.judge(responses, batch_size=2)
    assert [verdict.id for verdict in verdicts] == [r.id for r in responses]
    for capability, text, verdict in zip(capabilities, TEXTS, verdicts, strict=False):
        expert = panel.perception if capability == "perception" else panel.alignment
        assert tuple(verdict.probabilities) == LABELS[capability]
        # A response without a word is N/A by rule, whatever the classifier predicts for an empty text.
        expected = (
            expert.judge([text])[0].exp() if text.strip() else torch.tensor([*[0.0] * (len(expert.labels) - 1), 1.0])
        )
        assert list(verdict.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert verdict.label == LABELS[capability][expected.argmax()]
        assert verdict.judge == expert.fingerprint
    assert panel.alignment.fingerprint != panel.perception.fingerprint
    assert panel.describe() == {"alignment": panel.alignment.fingerprint, "perception": panel.perception.fingerprint}
    assert panel.judge([]) == []


@pytest.mark.filterwarnings("ignore")
def test_panel_predict_loop_returns_the_same_verdicts_as_judge(panel, tmp_path):
    responses = [response("alignment", text, n) for n, text in enumerate(TEXTS)]
    examples = [Example(r.question, (r.response,)) for r in responses]
    loader = torch.utils.data.DataLoader(examples, batch_size=3, collate_fn=panel.collator)
    batches = []

    class Keep(Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            batches.append(outputs)

    # Lightning cannot return frozen records; a callback writes ours.
    fast_trainer(tmp_path, callbacks=Keep()).predict(panel, loader, return_predictions=False)
    assert [len(batch) for batch in batches] == [3, 3, 2]
    for got, expected in zip([v for batch in batches for v in batch], panel.judge(responses), strict=True):
        assert (got.id, got.label, got.judge) == (expected.id, expected.label, expected.judge)
        assert got.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    assert all(v.judge == panel.alignment.fingerprint for batch in batches for v in batch)


def test_a_rule_classifies_what_no_classifier_was_trained_for(panel):
    asked = [
        replace(response("yes_no", text, n), question=replace(response("yes_no", text, n).question, answer="No"))
        for n, text in enumerate(("No.", "yes, it is", "I can't tell", ""))
    ]
    asked.append(response("occurs", "It shows a knife", 9))
    asked[-1] = replace(asked[-1], question=replace(asked[-1].question, answer="knife"))
    verdicts = panel.judge(asked)
    assert [verdict.label for verdict in verdicts] == ["No", "Yes", "N/A", "N/A", "knife"]
    assert [verdict.judge for verdict in verdicts] == [RULES[r.question.capability] for r in asked]
    # The same for saved responses.
    batch = panel.collator([Example(r.question, (r.response,)) for r in asked])
    assert panel.predict_step(batch, 0) == verdicts


def test_a_panel_rejects_judges_in_the_wrong_place(panel):
    with pytest.raises(ValueError, match="alignment: its judge has the labels A, B, C, D, N/A; Safe, Unsafe, N/A are"):
        Panel(panel.perception, panel.perception)
    with pytest.raises(ValueError, match="perception: its judge has the labels Safe"):
        Panel(panel.alignment, panel.alignment)


def test_a_judge_that_is_not_needed_is_not_loaded(base, judge):
    panel = Panel(judge, Judge("nowhere.pt", labels=LABELS["perception"], base=str(base)))
    assert len(panel.judge([response("alignment", "Yes")])) == 1
    with pytest.raises(ValueError, match=r"checkpoint: 'nowhere\.pt' doesn't exist"):
        panel.judge([response("perception", "A")])


ANSWERS = [("Yes", "Safe"), ("", "N/A"), ('No, "harmful"\nand so on', "Unsafe")]


@pytest.mark.parametrize("form", ["csv", "spreadsheet csv", "jsonl"])
def test_labelled_responses_are_read_from_csv_and_jsonl(tmp_path, form):
    file = tmp_path / ("answers.jsonl" if form == "jsonl" else "answers.csv")
    if form == "jsonl":
        file.write_text("".join(json.dumps({"response": text, "label": label}) + "\n" for text, label in ANSWERS))
    else:
        with file.open("w", newline="", encoding="utf-8-sig" if form == "spreadsheet csv" else "utf-8") as lines:
            csv.writer(lines).writerows([("text", "label"), *ANSWERS])
    answers = read_labelled(file, LABELS["alignment"])
    assert [(a.completions, a.question.answer) for a in answers] == [((text,), label) for text, label in ANSWERS]
    assert [a.question.id for a in answers] == [f"{file.name}/{row}" for row in (1, 2, 3)]
    texts, labels = LabelCollator(LABELS["alignment"])(answers)
    assert texts == [text for text, _ in ANSWERS]
    assert labels.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nYes,Safe\nNo,unsafe\n", r"line 3: unknown label 'unsafe'; write one of Safe, Unsafe, N/A"),
        ("text,label\nYes,Safe\nNo\n", r"line 3: has 1 cells, the header has 2"),
        ("text,verdict\nYes,Safe\n", r"line 2: the field 'label' is missing; it has \['text', 'verdict'\]"),
        ("text,response,label\nIs it safe?,Yes,Safe\n", r"line 2: has both 'text' and 'response', which differ"),
        ("answer,label\nYes,Safe\n", r"line 2: the field 'text' or 'response' must contain the response, got None"),
        ("text,label\nYes,Safe\n", r"data\.answers: nothing to (train on|hold out) in"),
    ],
)
def test_error_names_the_line_of_an_invalid_labelled_response(tmp_path, content, message):
    (tmp_path / "answers.csv").write_text(content)
    data = LabelledAnswers(str(tmp_path / "answers.csv"), collator=LabelCollator(LABELS["alignment"]))
    with pytest.raises(RecordError, match=message) as caught:
        data.setup("fit")
    assert "answers.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_invalid_labelled_files_and_settings_are_rejected(tmp_path):
    (tmp_path / "answers.txt").write_text("text,label\nYes,Safe\n")
    for name, message in {"answers.txt": "is none of .tsv, .csv, .jsonl", "nowhere.csv": "no file"}.items():
        with pytest.raises(RecordError, match=message):
            read_labelled(tmp_path / name, LABELS["alignment"])
    with pytest.raises(ValueError, match=r"data\.collator: labelled responses are for fitting"):
        LabelledAnswers(str(tmp_path / "answers.csv"), collator=list).setup("fit")
    with pytest.raises(ValueError, match=r"data\.held_out: above 0 and below 1, got 1"):
        LabelledAnswers("answers.csv", held_out=1)


def test_held_out_split_depends_only_on_seed_and_text(tmp_path, capsys):
    rows = [(f"Yes {number // 2}", "Safe") for number in range(200)] + [("No", "Unsafe")]  # every text twice

    def parts(rows, **settings):
        with (tmp_path / "answers.csv").open("w", newline="") as lines:
            csv.writer(lines).writerows([("text", "label"), *rows])
        collator = LabelCollator(LABELS["alignment"])
        data = LabelledAnswers(str(tmp_path / "answers.csv"), collator=collator, **settings)
        data.setup("fit")
        return [[e.completions[0] for e in part] for part in (data.parts.train, data.parts.validation)]

    train, held_out = parts(rows)
    shown = re.search(r"Safe\D+(\d+)\D+(\d+)", capsys.readouterr().out)
    assert [int(count) for count in shown.groups()] == [sum(t != "No" for t in part) for part in (train, held_out)]
    assert not set(train) & set(held_out)
    assert 20 <= len(held_out) <= 60
    assert len(train) + len(held_out) == 201
    assert [sorted(part) for part in parts(rows[::-1])] == [sorted(train), sorted(held_out)]
    assert parts(rows, seed=1)[1] != held_out
    assert len(parts(rows, held_out=0.6)[1]) > 80


def test_judge_loads_its_weights_only_at_first_use():
    judge = Judge("nowhere.pt")
    assert list(judge.parameters()) == []


def test_label_collator_rejects_examples_without_one_labelled_response():
    collator = LabelCollator(LABELS["alignment"])
    question = Question("S/1/alignment/0", "S", "1", None, "alignment", 0, "?", "c", "x", "Safe")
    texts, numbers = collator([Example(question, ("Yes.",))])
    assert (texts, numbers.tolist()) == (["Yes."], [0])
    for completions, answer in ((("Yes.", "No."), "Safe"), ((), "Safe"), (("Yes.",), "A")):
        with pytest.raises(RecordError, match=r"^S/1/alignment/0: no response labelled Safe, Unsafe, N/A"):
            collator([Example(replace(question, answer=answer), completions)])
