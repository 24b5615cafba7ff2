"""LLaVA in its authors' format: the same model under other names."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safervlm.errors import ArgumentError
from safervlm.io.caches import TEMPORARY
from safervlm.protocol import ALIGNMENT_QUESTIONS
from safervlm.recipes import CONFIGS
from safervlm.records import Example, Question
from safervlm.vlm.base import VLM
from safervlm.vlm.llava_original import LlavaOriginal, convert, renamed
from safervlm.vlm.sampling import Sampling


class Original:
    """A Llama, a CLIP and a projector, combined by hand as in the authors' code, and written in their format."""

    def __init__(self, folder: Path, vision: Path, tower_inside: bool) -> None:
        self.folder, self.vision = folder, vision
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<unk>", "<s>", "</s>"]
        bpe.train_from_iterator(
            ALIGNMENT_QUESTIONS,
            trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
        )
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.llama = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(self.tokenizer), max_position_embeddings=512, rms_norm_eps=1e-3, **sizes)
        )
        tower = sizes | {"hidden_size": 16, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
        self.clip = CLIPVisionModel(CLIPVisionConfig(**tower)).eval()
        self.projector = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32))
        with torch.no_grad():  # larger weights than at initialisation, so that image and words matter
            for parameter in (*self.llama.parameters(), *self.projector.parameters()):
                parameter.mul_(8 if parameter.ndim == 2 else 1)
        self.write(tower_inside)

    def write(self, tower_inside: bool) -> None:
        state = dict(self.llama.state_dict())
        state |= {f"model.mm_projector.{key}": value for key, value in self.projector.state_dict().items()}
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        if tower_inside:
            inside = self.clip.state_dict()
            state |= {f"model.vision_tower.vision_tower.{key}": value for key, value in inside.items()}
            save_file({key: value.contiguous() for key, value in state.items()}, self.folder / "model.safetensors")
        else:
            keys = sorted(state)
            for number, part in enumerate((keys[::2], keys[1::2]), 1):
                shard = {key: state[key] for key in part}
                torch.save(shard, self.folder / f"pytorch_model-0000{number}-of-00002.bin")
        config = self.llama.config.to_dict() | {
            "model_type": "llava",
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_vision_tower": str(self.vision),
            "mm_vision_select_layer": -2,
            "mm_projector_type": "mlp2x_gelu",
        }
        (self.folder / "config.json").write_text(json.dumps(config))
        self.tokenizer.save_pretrained(self.folder)
        self.clip.save_pretrained(self.vision)
        square = {"height": 28, "width": 28}
        LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=square).save_pretrained(self.vision)

    def logits(self, ids: list[int], image_token: int, pixel_values: Tensor) -> Tensor:
        """(tokens, vocabulary) logits: each run of placeholders is replaced by the projected image."""
        features = self.clip(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        tokens = torch.tensor([ids])
        places = tokens == image_token
        embedded = self.llama.get_input_embeddings()(tokens.masked_fill(places, 0))
        embedded = embedded.masked_scatter(places[..., None], self.projector(features))
        return self.llama(inputs_embeds=embedded).logits[0]


@pytest.fixture(params=[False, True], ids=["bin", "safetensors with the vision tower"])
def original(request: pytest.FixtureRequest, tmp_path: Path) -> Original:
    folders = [tmp_path / name for name in ("original", "clip")]
    for folder in folders:
        folder.mkdir()
    return Original(*folders, tower_inside=request.param)


def load(original: Original, tmp_path: Path, **settings: str) -> LlavaOriginal:
    vlm = LlavaOriginal(
        str(original.folder),
        dtype="float32",
        vision=str(original.vision),
        cache_dir=str(tmp_path / "cache"),
        system="",
        **settings,
    )
    assert vlm.collator
    vlm.load()
    return vlm


@torch.no_grad()
def test_logits_equal_a_manual_composition_of_the_parts(
    original: Original, tmp_path: Path, make_questions: Callable[[int], list[Question]]
) -> None:
    vlm = load(original, tmp_path)
    words = len(original.tokenizer)
    assert vlm.image_token_id == words
    assert vlm.base.get_output_embeddings().out_features == 64 * (words // 64 + 1)
    assert set(range(words, 64 * (words // 64 + 1))) <= set(vlm.suppressed.tolist())
    for question in make_questions(3):
        batch = vlm.collator([Example(question)])
        ids = torch.tensor(batch.prompt_ids)
        found = vlm.base(input_ids=ids, pixel_values=batch.pixel_values).logits[0, :, :words]
        expected = original.logits(batch.prompt_ids[0], words, batch.pixel_values)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        other = original.logits(batch.prompt_ids[0], words, batch.pixel_values.flip(-1))
        assert (other - expected).abs().max() > 1e-2  # the output depends on the image
    assert vlm.describe()["model"] == str(original.folder)


def test_checkpoint_is_converted_once_and_generates(
    original: Original, tmp_path: Path, make_questions: Callable[[int], list[Question]]
) -> None:
    vlm = load(original, tmp_path)
    (converted,) = (tmp_path / "cache" / "converted").iterdir()
    made = (converted / "model.safetensors").stat().st_mtime_ns
    again = load(original, tmp_path)
    assert (converted / "model.safetensors").stat().st_mtime_ns == made
    batch = [Example(question) for question in make_questions(4)]
    answers = [each.generate(each.collator(batch), Sampling(max_new_tokens=6), seed=0) for each in (vlm, again)]
    assert answers[0] == answers[1]
    assert len({answer.text for answer in answers[0]}) > 1


def changed_words(original: Original) -> None:
    file = original.folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 77}))


def changed_tower(original: Original) -> None:
    with torch.no_grad():
        original.clip.embeddings.class_embedding.add_(1)
    original.clip.save_pretrained(original.vision)


def changed_image_processor(original: Original) -> None:
    square = {"height": 28, "width": 28}
    LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=square, image_mean=[0, 0, 0]).save_pretrained(
        original.vision
    )


@pytest.mark.parametrize("change", [changed_words, changed_tower, changed_image_processor])
def test_conversion_cache_key_covers_every_input(
    original: Original, tmp_path: Path, change: Callable[[Original], None]
) -> None:
    cache = tmp_path / "cache"
    before = convert(str(original.folder), None, str(original.vision), cache)
    change(original)
    after = convert(str(original.folder), None, str(original.vision), cache)
    assert after != before
    assert sorted(cache.iterdir()) == sorted([before, after])


def test_leftovers_of_a_killed_conversion_are_removed(original: Original, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / f"{TEMPORARY}1-dead").mkdir(parents=True)
    folder = convert(str(original.folder), None, str(original.vision), cache)
    assert list(cache.iterdir()) == [folder]


def test_unwritable_cache_is_reported_in_one_line(original: Original, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(ArgumentError, match=r"^vlm\.cache_dir: .*: name another folder$"):
        convert(str(original.folder), None, str(original.vision), tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1: not JSON"),
        ("", "is empty"),
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    ],
)
def test_damaged_configuration_is_reported_in_one_line(
    original: Original, tmp_path: Path, text: str, said: str
) -> None:
    (original.folder / "config.json").write_text(text)
    with pytest.raises(ArgumentError, match=r"^vlm\.model: ") as caught:
        convert(str(original.folder), None, str(original.vision), tmp_path / "cache")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_in_the_original_format_is_applied(
    original: Original, tmp_path: Path, make_questions: Callable[[int], list[Question]], file: str
) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(original.llama, lora)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    if file.endswith(".bin"):
        from safetensors.torch import load_file

        torch.save(load_file(folder / "adapter_model.safetensors"), folder / file)
        (folder / "adapter_model.safetensors").unlink()
    vlm = load(original, tmp_path, adapter=str(folder))
    plain = load(original, tmp_path)
    batch = vlm.collator([Example(make_questions(1)[0])])
    inputs = {"input_ids": torch.tensor(batch.prompt_ids), "pixel_values": batch.pixel_values}
    words = len(original.tokenizer)
    found = vlm.base(**inputs).logits[0, :, :words]
    original.llama.eval()
    expected = original.logits(batch.prompt_ids[0], words, batch.pixel_values)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (plain.base(**inputs).logits[0, :, :words] - found).abs().max() > 1e-2


def test_an_adapter_that_also_trained_the_projector_is_rejected(original: Original, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    get_peft_model(original.llama, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    torch.save({}, folder / "non_lora_trainables.bin")
    with pytest.raises(ValueError, match=r"vlm\.adapter: .* has also trained the projector"):
        LlavaOriginal(str(original.folder), adapter=str(folder), cache_dir=str(tmp_path))


def test_a_model_of_another_format_is_rejected(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a LLaVA in the original format; use safervlm\.vlm\.llava\.Llava"):
        _ = LlavaOriginal(str(tiny_llava), cache_dir=str(tmp_path)).collator
    with pytest.raises(ValueError, match=r"the weight 'vision\.x' is none of"):
        renamed("vision.x")


def test_shipped_recipe_builds(original: Original, tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(VLM, "vlm")
    given = [f"--vlm={CONFIGS / 'vlm' / 'llava-v1.5-7b-original.yaml'}", f"--vlm.model={original.folder}"]
    given += [f"--vlm.vision={original.vision}", f"--vlm.cache_dir={tmp_path}"]
    vlm = parser.instantiate(parser.parse_args(given)).vlm
    assert isinstance(vlm, LlavaOriginal)
    assert vlm.collator.image_tokens == 4
