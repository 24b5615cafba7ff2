"""Promise 2, models: a folder provides every weight, an adapter fits and has an effect, no foreign code runs."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from safervlm.errors import UserError
from safervlm.judging.classifier import Judge
from safervlm.records import Example, Question
from safervlm.vlm.auto import Transformers
from safervlm.vlm.base import Unanswered
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA, active
from safervlm.vlm.sampling import Sampling

Make = Callable[[int], list[Question]]
HEAD = "language_model.lm_head.weight"


@pytest.fixture
def model(tiny_llava: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_llava, tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the weights in a model folder."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def use(folder: Path, kind: type[Llava] | type[Transformers], questions: list[Question]) -> None:
    """Loads everything that a measurement reads from a folder."""
    vlm = kind(str(folder), dtype="float32", **({"template": "<image>{question}"} if kind is Transformers else {}))
    batch = vlm.collator([Example(question) for question in questions])
    vlm.describe()
    vlm.load()
    vlm.generate(batch, Sampling(max_new_tokens=2), 0)


def some(state: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(state) if part in name)


def with_number(part: str, number: float) -> Callable[[Path], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[some(state, part)].view(-1)[-1] = number

    return lambda folder: edit(folder, change)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


def set_config(**settings: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= settings
        (folder / "config.json").write_text(json.dumps(config))

    return change


def in_two_files(folder: Path, part: str) -> None:
    """Divides the weights between two files with an index; one weight is in both."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, again = sorted(state), some(state, part)
    files = {f"model-0000{number}-of-00002.safetensors": names[number - 1 :: 2] for number in (1, 2)}
    places = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for file, held in files.items():
        save_file({name: state[name] for name in held} | {again: state[again] + 1}, folder / file, {"format": "pt"})


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weight of a language layer": (lambda f: edit(f, lambda s: s.pop(some(s, "mlp.up_proj"))), "lacks 1 weights"),
    "no weight of the vision tower": (lambda f: edit(f, lambda s: s.pop(some(s, "fc2.bias"))), "lacks 1 weights"),
    "no projector": (lambda f: edit(f, lambda s: s.pop(some(s, "linear_2.weight"))), "lacks 1 weights"),
    "a wider layer": (
        lambda f: edit(f, lambda s: s.update({(n := some(s, "k_proj.weight")): torch.zeros(48, s[n].shape[1])})),
        "have another shape",
    ),
    "another width in config.json": (set_config(intermediate_size=96), "have another shape"),
    "another number of layers": (set_config(num_hidden_layers=3), "lacks"),
    "fewer layers": (
        set_config(num_hidden_layers=1),
        "contains 9 weights of layers that its config.json does not count",
    ),
    "no layers": (set_config(num_hidden_layers=0), "of layers that its config.json does not count"),
    "layers without end": (set_config(num_hidden_layers=10**7), "num_hidden_layers 10000000, more than 100,000"),
    "more layers than its weights": (set_config(num_hidden_layers=99_999), "describes a larger model than its weights"),
    "more words than memory": (set_config(vocab_size=10**10), "describes a larger model than its weights"),
    "a layer in integers": (
        lambda f: edit(f, lambda s: s.update({(n := some(s, "v_proj")): (s[n] * 100).to(torch.int16)})),
        "v_proj.weight as I16, not as floating-point numbers",
    ),
    "a bias in complex numbers": (
        lambda f: edit(f, lambda s: s.update({(n := some(s, "fc1.bias")): s[n].to(torch.complex64)})),
        "fc1.bias as C64, not as floating-point numbers",
    ),
    "a weight in two files of an index": (lambda f: in_two_files(f, "o_proj"), "stores .*o_proj.weight twice"),
    "NaN in config.json": (set_config(initializer_range=float("nan")), "initializer_range NaN"),
    "NaN in a language layer": (with_number("down_proj", float("nan")), "NaN or infinite numbers in"),
    "infinity in the vision tower": (with_number("vision_tower", float("-inf")), "NaN or infinite numbers in"),
    "an adapter's weights beside its own": (
        lambda f: edit(f, lambda s: s.update({"model.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)})),
        "merge the adapter",
    ),
    "weights cut": (cut("model.safetensors"), "can't be read"),
    "weights empty": (write("model.safetensors", b""), "can't be read"),
    "config.json cut": (cut("config.json"), "can't be read"),
    "config.json in UTF-16": (write("config.json", '{"model_type": "llava"}'.encode("utf-16")), "can't be read"),
    "config.json a list": (write("config.json", b"[1, 2]"), "can't be read"),
    "tokenizer.json cut": (cut("tokenizer.json"), "can't be read"),
    "tokenizer.json of another format": (write("tokenizer.json", b'{"model": {"type": "Nothing"}}'), "can't be read"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "can't be read|without its tokenizer"),
    "tokenizer.json binary": (write("tokenizer.json", bytes(range(128, 256))), "can't be read"),
    "deep nesting": (write("config.json", b'{"a":' * 100_000), "can't be read"),
}


@pytest.mark.parametrize("kind", [Llava, Transformers], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_model_folder_is_reported_in_one_line(
    case: str, kind: type[Llava], model: Path, make_questions: Make, caplog: pytest.LogCaptureFixture
) -> None:
    damage, message = DAMAGED[case]
    damage(model)
    with pytest.raises(UserError, match=message) as caught:
        use(model, kind, make_questions(1))
    assert "\n" not in str(caught.value)
    assert str(model) in str(caught.value)
    assert "vlm.model" in str(caught.value)
    assert not [record for record in caplog.records if "MISSING" in record.getMessage()]


@pytest.mark.parametrize("tokens", [0, 3, 5, 576])
def test_the_number_of_image_tokens_must_be_that_of_the_vision_tower(tokens: int, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"image_seq_length": tokens}))
    with pytest.raises(UserError, match=f"image_seq_length {tokens}, its vision tower returns 4 tokens"):
        _ = Llava(str(model)).collator


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
def test_a_judge_holds_floating_point_numbers(kind: torch.dtype, tiny_judges: Path, tmp_path: Path) -> None:
    weights = torch.load(tiny_judges / "alignment" / "epoch_10.pt", weights_only=True)
    torch.save(weights | {"classifier.bias": weights["classifier.bias"].to(kind)}, tmp_path / "judge.pt")
    judge = Judge(str(tmp_path / "judge.pt"), base=str(tiny_judges / "alignment"))
    with pytest.raises(UserError, match=r"classifier\.bias as .*, not as floating-point"):
        judge.judge(["No."])


def test_unused_weight_in_a_model_folder_is_reported(
    model: Path, make_questions: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(model, lambda state: state.update({"language_model.more.weight": torch.ones(3)}))
    use(model, Llava, make_questions(1))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("safervlm: ")]
    assert len(said) == 1
    assert "contains 1 weights" in said[0]
    assert "more.weight" in said[0]


@pytest.mark.parametrize("part", ["adapter_config.json beside a model"])
def test_adapter_config_in_a_model_folder_is_rejected(
    part: str, model: Path, tiny_llava: Path, make_questions: Make
) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_llava), "r": 2, "target_modules": ["q_proj"]}
    (model / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"vlm.model: .*") as caught:
        use(model, Llava, make_questions(1))
    assert "\n" not in str(caught.value)


# Adapters


def adapted(base: Path, folder: Path, config: object, noise: float = 0.1) -> Path:
    """An adapter folder written by PEFT, with random weights."""
    peft = get_peft_model(LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(5)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(folder)
    return folder


LAYERS = r".*language_model.*\.(q_proj|down_proj)"
SIZES = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4, "task_type": "CAUSAL_LM"}
WITH_EFFECT = {
    "LoRA": LoraConfig(r=2, target_modules=LAYERS),
    "DoRA": LoraConfig(r=2, target_modules=LAYERS, use_dora=True),
    "rsLoRA with a rank of its own": LoraConfig(
        r=2, target_modules=LAYERS, use_rslora=True, rank_pattern={"q_proj": 3}
    ),
    "LoRA with bias": LoraConfig(r=2, target_modules=LAYERS, lora_bias=True),
    "LoRA of the embeddings, too": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "LoRA and the projector saved whole": LoraConfig(r=2, target_modules=LAYERS, modules_to_save=["linear_2"]),
    "IA3": IA3Config(target_modules=LAYERS, feedforward_modules=r".*down_proj"),
    "LN tuning": LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("case", WITH_EFFECT)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_adapter_computes_what_peft_computes(
    case: str, form: str, tiny_llava: Path, tmp_path: Path, make_questions: Make
) -> None:
    folder = adapted(tiny_llava, tmp_path / "adapter", WITH_EFFECT[case])
    base = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32)
    vlm = Llava(str(tiny_llava), dtype="float32")
    batch = vlm.collator([Example(question) for question in make_questions(1)])
    inputs = {"input_ids": torch.tensor(batch.prompt_ids), "pixel_values": batch.pixel_values}
    with torch.no_grad():
        plain = base(**inputs).logits
        expected = PeftModel.from_pretrained(base, str(folder)).eval()(**inputs).logits
    if form == "bin":
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    measured = Llava(str(tiny_llava), dtype="float32", adapter=str(folder))
    measured.describe()
    measured.load()
    with torch.no_grad():
        torch.testing.assert_close(measured.base(**inputs).logits, expected)
        with active(measured.base, "reference"):
            torch.testing.assert_close(measured.base(**inputs).logits, plain)
    assert (expected - plain).abs().max() > 1e-3


def no_effect(**settings: object) -> Callable[[Path, Path], object]:
    config = LoraConfig(r=2, target_modules=LAYERS, **settings)
    return lambda base, folder: adapted(base, folder, config, noise=0.0 if "lora_alpha" not in settings else 0.1)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path, Path], object]:
    def make(base: Path, folder: Path) -> None:
        adapted(base, folder, LoraConfig(r=2, target_modules=LAYERS))
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")

    return make


def file(name: str, content: bytes | None) -> Callable[[Path, Path], object]:
    def make(base: Path, folder: Path) -> None:
        adapted(base, folder, LoraConfig(r=2, target_modules=LAYERS))
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return make


def configured(**changes: object) -> Callable[[Path, Path], object]:
    """An adapter of rank 2 whose configuration is changed afterwards."""

    def make(base: Path, folder: Path) -> None:
        adapted(base, folder, LoraConfig(r=2, target_modules=LAYERS))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return make


def pickled(base: Path, folder: Path) -> None:
    """A file of weights that would run code."""
    adapted(base, folder, LoraConfig(r=2, target_modules=LAYERS))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"weights": io.StringIO("x"), "call": print}, folder / "adapter_model.bin")


def first(state: dict[str, torch.Tensor]) -> str:
    return min(state)


REJECTED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "prompt tuning": (lambda b, f: adapted(b, f, PromptTuningConfig(num_virtual_tokens=3, **SIZES)), "PROMPT_TUNING"),
    "prefix tuning": (lambda b, f: adapted(b, f, PrefixTuningConfig(num_virtual_tokens=3, **SIZES)), "PREFIX_TUNING"),
    "p-tuning": (
        lambda b, f: adapted(b, f, PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=32, **SIZES)),
        "P_TUNING",
    ),
    "untrained": (no_effect(), "changes nothing"),
    "alpha 0": (no_effect(lora_alpha=0), "changes nothing"),
    "a weight is missing": (tensors(lambda s: s.pop(first(s))), "1 weights don't fit"),
    "a weight of another model": (tensors(lambda s: s.update({f"{first(s)}2": torch.ones(2)})), "1 weights don't fit"),
    "another width": (tensors(lambda s: s.update({first(s): torch.ones(2, 40)})), "was not made for"),
    "another rank": (configured(r=4), r"adapter_config.json: r is 4, but \S+lora_A.weight in \S+ has rank 2"),
    "a rank of text": (configured(r="2"), r"r must be an integer of at least 1, got '2'"),
    "a rank of 0": (configured(r=0), r"r must be an integer of at least 1, got 0"),
    "a rank of half": (configured(r=2.5), r"r must be an integer of at least 1, got 2.5"),
    "an alpha of text": (configured(lora_alpha="8"), r"lora_alpha must be a number, got '8'"),
    "no alpha": (configured(lora_alpha=None), r"lora_alpha must be a number, got None"),
    "a text for false": (configured(use_rslora="false"), r"use_rslora must be true or false, got 'false'"),
    "another rank of some": (
        configured(rank_pattern={"q_proj": 3}),
        r"rank_pattern\['q_proj'\] is 3, but \S+q_proj.lora_A.weight in adapter_model.safetensors has rank 2",
    ),
    "a rank of none": (configured(rank_pattern={"o_proj": 2}), r"rank_pattern has 'o_proj': 2, but none of the 4"),
    "an alpha of none": (configured(alpha_pattern={"qproj": 64}), r"alpha_pattern has 'qproj': 64, but none of the 4"),
    "patterns in a list": (configured(rank_pattern=["q_proj"]), r"rank_pattern must be an object"),
    "a number for patterns of alpha": (configured(alpha_pattern=-1), r"alpha_pattern must be an object.* got -1"),
    "a large number for patterns of ranks": (configured(rank_pattern=10**30), r"rank_pattern must be an object"),
    "true for patterns": (configured(alpha_pattern=True), r"alpha_pattern must be an object"),
    "a pattern without effect": (
        configured(alpha_pattern={"down_proj": 0}),
        r"alpha_pattern\['down_proj'\] is 0, so that the adapter changes nothing there",
    ),
    "a pattern of text": (configured(alpha_pattern={"q_proj": "x"}), r"alpha_pattern\['q_proj'\] must be a number"),
    "fewer modules": (
        configured(target_modules=r".*language_model.*\.q_proj"),
        r"4 weights don't fit, for example \S+down_proj\S+ \(adapter_model.safetensors contains it",
    ),
    "more modules": (
        configured(target_modules=r".*language_model.*\.(q_proj|down_proj|o_proj)"),
        r"4 weights don't fit, for example \S+o_proj\S+ \(adapter_config.json asks for it",
    ),
    "DoRA without its vectors": (configured(use_dora=True), r"lora_magnitude_vector\S* \(adapter_config.json asks"),
    "integers": (
        tensors(lambda s: s.update({first(s): s[first(s)].to(torch.int32)})),
        "as int32, not as floating-point",
    ),
    "complex numbers": (
        tensors(lambda s: s.update({first(s): s[first(s)].to(torch.complex64)})),
        "as complex64, not as floating-point",
    ),
    "infinity": (
        tensors(lambda s: s[first(s)][0].fill_(float("inf"))),
        r"adapter_model.safetensors has NaN or infinite numbers in \S+lora_A",
    ),
    "NaN": (tensors(lambda s: s[first(s)].fill_(float("nan"))), "NaN or infinite numbers in"),
    "no weights": (file("adapter_model.safetensors", None), "no adapter_model.safetensors or adapter_model.bin"),
    "weights cut": (file("adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{"), "is not a plain state dict"),
    "config cut": (file("adapter_config.json", b'{"peft_type": "LO'), "can't be read"),
    "config of no kind": (file("adapter_config.json", b'{"r": 4}'), "names no peft_type"),
    "config of an unknown kind": (file("adapter_config.json", b'{"peft_type": "NOVEL"}'), "can't be read"),
    "config a list": (file("adapter_config.json", b"[]"), "not a JSON object"),
    "config that backtracks": (
        file("adapter_config.json", b'{"peft_type": "LORA", "target_modules": "(\\\\w+\\\\.?)+!"}'),
        "takes too long to match",
    ),
    "a pickle": (pickled, "adapter_model.bin' is not a plain state dict"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_adapter_without_effect_is_rejected_in_one_line(
    case: str, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safervlm.limits.SECONDS", 0.5)
    make, message = REJECTED[case]
    folder = tmp_path / "adapter"
    make(tiny_llava, folder)
    with pytest.raises(UserError, match=message) as caught:
        Llava(str(tiny_llava), dtype="float32", adapter=str(folder)).load()
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "vlm.adapter" in str(caught.value)


@pytest.fixture
def exported(tiny_llava: Path, tmp_path: Path) -> Path:
    """An adapter exported by SaferVLM."""
    vlm = Llava(str(tiny_llava), dtype="float32", lora=LoRA(r=2, alpha=4))
    vlm.load(train=["policy"])
    for name, parameter in vlm.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    vlm.save_adapter(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "safervlm.json"])
@pytest.mark.parametrize("where", [0.03, 0.4, 0.97])
def test_exported_adapter_with_one_flipped_bit_is_rejected(
    name: str, where: float, exported: Path, tiny_llava: Path
) -> None:
    Llava(str(tiny_llava), dtype="float32", adapter=str(exported)).load()
    content = bytearray((exported / name).read_bytes())
    content[int(len(content) * where)] ^= 4
    (exported / name).write_bytes(content)
    with pytest.raises(UserError, match="damaged") as caught:
        Llava(str(tiny_llava), dtype="float32", adapter=str(exported)).load()
    assert "\n" not in str(caught.value)


def test_exported_adapter_is_rejected_on_other_base_weights(exported: Path, model: Path) -> None:
    edit(model, lambda state: state[some(state, "o_proj")].mul_(1.5))
    with pytest.raises(UserError, match="trained on other base weights"):
        Llava(str(model), dtype="float32", adapter=str(exported)).load()
    (exported / "safervlm.json").unlink()  # as another program writes it: only the shapes matter
    Llava(str(model), dtype="float32", adapter=str(exported)).load()


# Tokenizers and texts


def longer(folder: Path, **tokens: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<word-{number}>" for number in range(9)])  # the head has 5 spare rows
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<box>", "</box>"]})
    tokenizer.save_pretrained(folder)


def test_token_beyond_the_vocabulary_of_the_model_is_rejected(model: Path, make_questions: Make) -> None:
    longer(model)
    (question,) = make_questions(1)
    use(model, Llava, [question])
    with pytest.raises(UserError, match=r"its text has the token \d+, the model has \d+; reword it"):
        use(model, Llava, [replace(question, prompt="Is <word-8> safe?")])


@pytest.mark.parametrize("kind", [Llava, Transformers], ids=lambda kind: kind.__name__)
def test_lone_surrogate_is_tokenized_as_the_replacement_character(
    kind: type[Llava], tiny_llava: Path, make_questions: Make
) -> None:
    settings = {"template": "<image>{question}"} if kind is Transformers else {}
    vlm = kind(str(tiny_llava), dtype="float32", **settings)
    (question,) = make_questions(1)
    broken = vlm.collator([Example(replace(question, prompt="Safe\ud83d?"), ("No\udc00.",))])
    clean = vlm.collator([Example(replace(question, prompt="Safe\ufffd?"), ("No\ufffd.",))])
    assert broken.questions[0].prompt == "Safe\ud83d?"  # stored weights are unchanged
    ids = (lambda batch: batch.prompt_ids) if kind is Llava else (lambda b: b.encodings[0]["input_ids"].tolist())
    assert ids(broken) == ids(clean)


# Logits that are not finite during generation


@pytest.mark.parametrize("kind", [Llava, Transformers], ids=lambda kind: kind.__name__)
def test_a_question_whose_logits_are_not_finite_has_no_response(
    kind: type[Llava], tiny_llava: Path, make_questions: Make
) -> None:
    settings = {"template": "<image>{question}"} if kind is Transformers else {}
    vlm = kind(str(tiny_llava), dtype="float32", **settings)
    vlm.load()
    questions = [make_questions(5)[place] for place in (0, 2, 4)]  # about three images
    batch = vlm.collator([Example(question) for question in questions])
    sampling = Sampling(max_new_tokens=4)
    whole = vlm.generate(batch, sampling, 0)
    head = vlm.base.get_output_embeddings()
    poisoned = []

    def poison(module: torch.nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        if not poisoned and logits.reshape(-1, logits.shape[-1]).shape[0] >= len(questions):
            poisoned.append(1)
            logits = logits.clone()
            logits[1, ..., 3] = float("nan")
        return logits

    handle = head.register_forward_hook(poison)
    first, second, third = vlm.generate(batch, sampling, 0)
    handle.remove()
    assert [first, third] == [whole[place] for place in (0, 2)]
    assert isinstance(second, Unanswered)
    assert second.reason.startswith(f"{questions[1].id}: the model's logits are not finite")


def test_non_finite_logits_in_scoring_raise_an_error(tiny_llava: Path, make_questions: Make) -> None:
    vlm = Llava(str(tiny_llava), dtype="float32")
    vlm.load()
    batch = vlm.collator([Example(question, ("No.",)) for question in make_questions(2)])
    vlm.base.get_output_embeddings().weight.data[7] = float("inf")
    with torch.no_grad(), pytest.raises(UserError, match="not finite"):
        vlm.score(batch)


# Code that the user did not allow


@pytest.fixture
def coded(tmp_path: Path) -> Callable[[Path], Path]:
    """Adds code to a folder that creates a file when it runs."""

    def put(folder: Path) -> Path:
        ran = tmp_path / "it-ran"
        code = f"open({str(ran)!r}, 'w').close()\nclass Mine: pass\n"
        for name in ("configuration_mine.py", "modeling_mine.py", "custom_generate/generate.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(code)
        for name, auto_map in {
            "config.json": {"AutoConfig": "configuration_mine.Mine", "AutoModel": "modeling_mine.Mine"},
            "tokenizer_config.json": {"AutoTokenizer": ["modeling_mine.Mine", "modeling_mine.Mine"]},
            "processor_config.json": {"AutoProcessor": "modeling_mine.Mine"},
        }.items():
            settings = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            (folder / name).write_text(json.dumps(settings | {"auto_map": auto_map}))
        return ran

    return put


class Asked(io.StringIO):
    """Standard input that must not be read."""

    def readline(self, *args: object) -> str:
        raise AssertionError("standard input is read")


@pytest.mark.parametrize("unknown", [False, True], ids=["a known model type", "an unknown one"])
@pytest.mark.parametrize("kind", ["Llava", "Transformers", "Judge"])
def test_code_in_a_folder_never_runs(
    kind: str,
    unknown: bool,
    coded: Callable[[Path], Path],
    model: Path,
    tiny_judges: Path,
    make_questions: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", Asked("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question is asked"))
    folder = Path(shutil.copytree(tiny_judges / "alignment", tmp_path / "judge")) if kind == "Judge" else model
    ran = coded(folder)
    if unknown:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))

    def play() -> None:
        if kind == "Judge":
            Judge(str(folder / "epoch_10.pt"), base=str(folder)).judge(["No."])
        else:
            use(folder, {"Llava": Llava, "Transformers": Transformers}[kind], make_questions(1))

    if unknown:
        with pytest.raises(UserError, match=r"its own Python code|can't be read") as caught:
            play()
        assert "\n" not in str(caught.value)
    else:
        play()
    assert not ran.exists()
