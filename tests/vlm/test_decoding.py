"""Steps of fixed shapes: their responses are those of the growing loops, token by token."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import more_families
import pytest
import torch
from graph_recorder import Recorder, Recording

from safervlm.errors import ArgumentError
from safervlm.records import Example, Question
from safervlm.vlm import decoding, lean, local
from safervlm.vlm import sampling as sampling_module
from safervlm.vlm.auto import Transformers
from safervlm.vlm.base import UnansweredNotFinite
from safervlm.vlm.decoding import REQUESTED, Decoding
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import active
from safervlm.vlm.prefix import GROWS
from safervlm.vlm.prompted import DIFFERENT_LOGITS
from safervlm.vlm.sampling import Sampling

SAMPLINGS = {
    "greedy": Sampling(temperature=0, max_new_tokens=24),
    "sampled": Sampling(temperature=1, top_p=1, max_new_tokens=24),
    "nucleus": Sampling(temperature=0.7, top_p=0.9, max_new_tokens=24),
    "one token": Sampling(temperature=0, max_new_tokens=1),
}


@pytest.fixture(scope="module")
def vlm(tiny_llava: Path) -> Iterator[Llava]:
    """In float64, and with many end tokens, so that responses have different lengths."""
    vlm = Llava(str(tiny_llava), dtype="float32")
    vlm.load()
    vlm.base.double()
    end = vlm.tokenizer.eos_token_id
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Llava, "eos_token_ids", [end, *range(40, 70)])
        yield vlm


@pytest.fixture(scope="module")
def examples(make_questions: Callable[[int], list[Question]]) -> list[Example]:
    """Fourteen questions about four images: up to nine about one of them, which need two rows."""
    questions = make_questions(6)
    shown = [0, 0, 2, 0, 4, 2, 0, 0, 5, 0, 0, 4, 0, 0]
    return [
        Example(replace(questions[shown[n]], id=f"q{n}", prompt=f"{questions[n % 6].prompt} {'why ' * (n % 4)}"))
        for n in range(len(shown))
    ]


def tokens(vlm: Any, examples: Sequence[Example], sampling: Sampling, how: Decoding) -> list[list[int]]:
    vlm.decoding = how
    found = vlm.generate(vlm.collator(examples), sampling, seed=3)
    return [list(answer.token_ids) for answer in found]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(local, "capture_for", lambda device: recorder)
    return recorder


@pytest.mark.parametrize("rows", [None, 1, 2, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_fixed_shape_decoding_equals_the_growing_loop(
    vlm: Llava, examples: list[Example], sampling: Sampling, rows: int | None
) -> None:
    expected = tokens(vlm, examples, sampling, Decoding("growing"))
    assert sampling.max_new_tokens == 1 or len({len(answer) for answer in expected}) > 4
    assert tokens(vlm, examples, sampling, Decoding(rows=rows)) == expected
    assert vlm.decoded == {"steps": "fixed"}
    backwards = tokens(vlm, examples[::-1], sampling, Decoding(rows=rows))
    assert backwards[::-1] == expected
    some = [tokens(vlm, examples[start : start + 5], sampling, Decoding(rows=rows)) for start in range(0, 14, 5)]
    assert [answer for answers in some for answer in answers] == expected


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_captured_steps_return_the_same(
    vlm: Llava, examples: list[Example], sampling: Sampling, rows: int | None, recorder: Recorder, monkeypatch: Any
) -> None:
    monkeypatch.setattr(decoding, "BUCKET", 4)  # several lengths of attention
    expected = tokens(vlm, examples, sampling, Decoding("growing"))
    assert tokens(vlm, examples, sampling, Decoding(rows=rows)) == expected
    assert vlm.decoded == {"steps": "fixed, captured"}
    replays = [captured.replays for captured in recorder.captured]
    assert sampling.max_new_tokens == 1 or (len(replays) > 1 and max(replays) > 1)


def test_a_step_is_captured_once_per_rows_and_length(
    vlm: Llava, examples: list[Example], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All responses have the maximum length, and the second half of the rows waits for the first."""
    monkeypatch.setattr(vlm, "eos_token_ids", vlm.eos_token_ids[:1])
    monkeypatch.setattr(vlm, "suppressed", torch.tensor(sorted({*vlm.suppressed.tolist(), vlm.eos_token_ids[0]})))
    asked = [replace(each, question=replace(each.question, image_path=None, prompt="why")) for each in examples]
    asked = [replace(each, question=replace(each.question, id=f"s{n}")) for n, each in enumerate(asked)]
    monkeypatch.setattr("safervlm.vlm.packing.ROW", 1)
    tokens(vlm, asked[:4], Sampling(temperature=0, max_new_tokens=70), Decoding(rows=2))
    # 69 steps of each half, in lengths of 64 columns; the first step of each is made as it is.
    assert sum(captured.replays for captured in recorder.captured) == 2 * 69 - len(recorder.captured)
    assert len(recorder.captured) == 2


def test_insufficient_sorted_logits_are_sorted_again(
    vlm: Llava, examples: list[Example], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured steps can't look which rows need more: these wait until more logits are sorted."""
    sampling = Sampling(temperature=3, top_p=0.95, max_new_tokens=12)
    expected = tokens(vlm, examples, sampling, Decoding("growing"))
    monkeypatch.setattr(sampling_module, "NUCLEUS", 2)
    assert tokens(vlm, examples, sampling, Decoding(rows=3)) == expected


def test_step_that_cannot_be_captured_is_computed_without_a_graph(
    vlm: Llava, examples: list[Example], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a mixture of experts that are chosen on the CPU; it is tried once."""
    monkeypatch.setattr(vlm, "uncaptured", "")
    sampling = SAMPLINGS["sampled"]
    expected = tokens(vlm, examples, sampling, Decoding("growing"))
    head = vlm.base.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: output + 0 * output.max().item())
    try:
        for _ in range(2):
            assert tokens(vlm, examples, sampling, Decoding()) == expected
            assert vlm.decoded == {"steps": "fixed", "reason": vlm.uncaptured}
    finally:
        hook.remove()
    assert "no CUDA graph: operation not permitted" in vlm.uncaptured
    assert recorder.tried == 1


@pytest.mark.parametrize("tries", [1, 3])
def test_out_of_memory_graph_capture_falls_back_without_splitting_the_batch(
    vlm: Llava, examples: list[Example], recorder: Recorder, monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    """Its steps are computed anew; the graphs that did fit are removed, as they hold memory."""

    def capture(step: Callable[[], None]) -> Any:
        if recorder.tried + 1 >= tries:
            recorder.tried += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return recorder(step)

    monkeypatch.setattr(vlm, "uncaptured", "")
    monkeypatch.setattr(decoding, "BUCKET", 4)
    monkeypatch.setattr(local, "capture_for", lambda device: capture)
    expected = tokens(vlm, examples, SAMPLINGS["sampled"], Decoding("growing"))
    for _ in range(2):
        assert tokens(vlm, examples, SAMPLINGS["sampled"], Decoding()) == expected
        assert vlm.decoded == {"steps": "fixed", "reason": "no CUDA graph: it doesn't fit into memory"}
    assert recorder.tried == tries


def test_one_token_responses_do_not_deepen_the_call_stack(
    vlm: Llava, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start of a waiting question is followed by another one."""
    depths: list[int] = []
    started = decoding.Decoder._started

    def counted(*args: Any) -> Any:
        depths.append(len(inspect.stack(0)))
        return started(*args)

    monkeypatch.setattr(decoding.Decoder, "_started", counted)
    sampling = Sampling(temperature=0, max_new_tokens=1)
    assert tokens(vlm, examples, sampling, Decoding(rows=1)) == tokens(vlm, examples, sampling, Decoding("growing"))
    assert len(depths) > 3
    assert len(set(depths[1:])) == 1


@pytest.mark.parametrize("rows", [None, 1])
def test_logits_that_are_not_finite_end_one_response(vlm: Llava, examples: list[Example], rows: int | None) -> None:
    asked = [examples[0], examples[2]]
    vlm.decoding = Decoding("growing")
    good = vlm.generate(vlm.collator(asked), SAMPLINGS["greedy"], seed=0)
    steps = []

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        return output.index_fill(0, torch.tensor([0]), torch.nan) if len(steps) == 3 else output

    hook = vlm.base.get_output_embeddings().register_forward_hook(spoil)
    vlm.decoding = Decoding(rows=rows)
    try:
        found = vlm.generate(vlm.collator(asked), SAMPLINGS["greedy"], seed=0)
    finally:
        hook.remove()
    assert isinstance(found[0], UnansweredNotFinite)
    assert found[1] == good[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ["policy", "reference"])
def test_an_adapter_takes_two_operations_per_layer(
    tiny_llava: Path, examples: list[Example], adapter: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 the responses are those that PEFT computes; in bfloat16 the layers agree up to rounding."""
    vlm = families.with_effect(Llava(str(tiny_llava), dtype=dtype))
    vlm.eval()  # no dropout
    layer = vlm.language_model().layers[0].mlp.down_proj
    if dtype == "float32":
        vlm.base.double()
        vlm.decoding = Decoding("growing")
        expected = vlm.generate(vlm.collator(examples), SAMPLINGS["sampled"], 0, adapter)
        vlm.decoding = Decoding(rows=3)
        assert vlm.generate(vlm.collator(examples), SAMPLINGS["sampled"], 0, adapter) == expected
    states = torch.randn(3, 2, layer.in_features, generator=torch.Generator().manual_seed(0)).to(
        layer.base_layer.weight.dtype
    )
    counts = []
    with torch.no_grad(), active(vlm.base, adapter):
        plain = layer(states)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == "bfloat16"):
                with lean.lean_lora(vlm.base, adapter), Recording() as recording:
                    assert "forward" in vars(layer)
                    lean_result = layer(states)
                assert "forward" not in vars(layer)
            bound = 1e-9 if dtype == "float32" else 0.03
            assert (lean_result - plain).abs().max() <= bound * plain.abs().max()
            names = [operation[0]._schema.name for operation in recording.operations]
            counts.append([name for name in names if name in ("aten::mm", "aten::addmm", "aten::addmm_")])
    assert all(len(each) == (3 if adapter == "policy" else 1) for each in counts)
    if adapter == "policy":
        with active(vlm.base, "reference"):
            assert (layer(states) - plain).abs().max() > 0.05 * plain.abs().max()


def test_out_of_memory_while_preparing_lora_leaves_layers_unchanged(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = families.with_effect(Llava(str(tiny_llava), dtype="float32"))
    made, prepare = [], lean._lean

    def full(*args: Any) -> Any:
        if len(made) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(prepare(*args))
        return made[-1]

    monkeypatch.setattr(lean, "_lean", full)
    with pytest.raises(torch.OutOfMemoryError), lean.lean_lora(vlm.base, "policy"):
        pass
    assert None not in made
    assert not any("forward" in vars(layer) for layer in lean.switched(vlm.base))


FIXED: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "rotary positions": (families.llava, ""),
    "positions of three coordinates": (families.qwen2_5_vl, ""),
    "images in patches": (families.idefics3, ""),
    "positions from 1 on": (families.paligemma, ""),
    "a sliding window": (families.gemma3, GROWS),
    "linear attention": (more_families.qwen3_5, GROWS),
    "attention to images in layers of their own": (families.mllama, DIFFERENT_LOGITS),
}


@pytest.mark.parametrize(("build", "reason"), FIXED.values(), ids=FIXED)
def test_decoding_method_of_transformers_models(
    build: Callable[[Path], None],
    reason: str,
    tmp_path: Path,
    make_questions: Callable[[int], list[Question]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their cache decides, and whether two steps have the same logits."""
    build(tmp_path)
    vlm = Transformers(
        str(tmp_path), dtype="float32", template="<image>{question}" if build is families.paligemma else None
    )
    vlm.load()
    monkeypatch.setattr(vlm, "eos_token_ids", [*vlm.eos_token_ids, *range(40, 60)])
    if not reason:
        vlm.base.double()
        vlm.dtype = torch.float64
    examples = families.ask(make_questions(5))
    lengths: set[int] = set()
    for name in ("greedy", "nucleus"):
        expected = tokens(vlm, examples, SAMPLINGS[name], Decoding("growing"))
        assert vlm.decoded == {"steps": "growing", "reason": REQUESTED}
        lengths |= {len(answer) for answer in expected}
        for rows in (None, 2):
            assert tokens(vlm, examples, SAMPLINGS[name], Decoding(rows=rows)) == expected
            assert vlm.decoded == ({"steps": "growing", "reason": reason} if reason else {"steps": "fixed"})
    assert len(lengths) > 1
    if not reason:
        recorder = Recorder()
        monkeypatch.setattr(local, "capture_for", lambda device: recorder)
        assert tokens(vlm, examples, SAMPLINGS["nucleus"], Decoding(rows=3)) == expected
        assert vlm.decoded == {"steps": "fixed, captured"}
        assert max(captured.replays for captured in recorder.captured) > 1


def test_model_that_fails_with_fixed_shapes_uses_the_growing_loop(
    tmp_path: Path, make_questions: Callable[[int], list[Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    families.llava(tmp_path)
    vlm = Transformers(str(tmp_path), dtype="float32")
    vlm.load()
    examples = families.ask(make_questions(3))
    expected = tokens(vlm, examples, SAMPLINGS["greedy"], Decoding("growing"))

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("only masks of two dimensions\nwith a traceback")

    monkeypatch.setattr("safervlm.vlm.prompted.PromptedRows.logits", fails)
    assert tokens(vlm, examples, SAMPLINGS["greedy"], Decoding()) == expected
    assert vlm.decoded == {"steps": "growing", "reason": "ValueError: only masks of two dimensions"}


def test_out_of_memory_does_not_disable_fixed_shape_decoding(
    tmp_path: Path, make_questions: Callable[[int], list[Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch fails, and is asked again in halves; these are decoded as any other batch."""
    families.llava(tmp_path)
    vlm = Transformers(str(tmp_path), dtype="float32")
    vlm.load()
    examples = families.ask(make_questions(3))

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("safervlm.vlm.prompted.PromptedRows.logits", fails)
        with pytest.raises(torch.OutOfMemoryError):
            tokens(vlm, examples, SAMPLINGS["greedy"], Decoding())
    tokens(vlm, examples, SAMPLINGS["greedy"], Decoding())
    assert vlm.decoded == {"steps": "fixed"}


def test_rows_are_at_least_one() -> None:
    with pytest.raises(ArgumentError, match=r"vlm.decoding.rows"):
        Decoding(rows=0)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_gpu_replays_graphs(tiny_llava: Path, examples: list[Example], sampling: Sampling) -> None:
    vlm = families.with_effect(Llava(str(tiny_llava), dtype="float32"))
    vlm.base.double()
    vlm.to("cuda")
    for adapter in ("policy", "reference"):
        answers = []
        for how in (Decoding("growing"), Decoding("eager"), Decoding(), Decoding(rows=2)):
            vlm.decoding = how
            batch = vlm.collator(examples).to(torch.device("cuda"))
            answers.append(vlm.generate(batch, sampling, 0, adapter))
            if how.step == "automatic":
                assert vlm.decoded == {"steps": "fixed, captured"}
        assert answers[1:] == answers[:1] * 3
