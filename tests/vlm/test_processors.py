"""The processor of a model: the class that its files name, with Pillow, without its video and audio parts."""

import json
import pickle
from pathlib import Path
from typing import Any

import families
import more_families
import pytest
import transformers as hf
from transformers.utils import is_torchvision_available

from safervlm.errors import ArgumentError, RecordError
from safervlm.vlm.auto import Transformers
from safervlm.vlm.processors import processor_class, read_processor


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "LlavaProcessor"),
        ({"processor_config.json": "AyaVisionProcessor"}, "AyaVisionProcessor"),
        ({"tokenizer_config.json": "AyaVisionProcessor"}, "AyaVisionProcessor"),
        (
            {"preprocessor_config.json": "Blip2Processor", "tokenizer_config.json": "AyaVisionProcessor"},
            "Blip2Processor",
        ),
        ({"processor_config.json": "TheirOwnProcessor"}, "LlavaProcessor"),
        ({"processor_config.json": "LlamaModel"}, "LlavaProcessor"),
        ({"processor_config.json": ["LlavaProcessor"]}, "LlavaProcessor"),
    ],
)
def test_processor_class_is_read_from_the_model_files(files: dict[str, Any], expected: str, tmp_path: Path) -> None:
    for file, name in files.items():
        (tmp_path / file).write_text(json.dumps({"processor_class": name}))
    assert processor_class(str(tmp_path), None, hf.LlavaConfig()).__name__ == expected


def test_a_type_without_a_processor_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        ArgumentError, match=r"^vlm\.model: .* is a fast_vlm, for which transformers has no processor; use"
    ):
        processor_class(str(tmp_path), None, hf.FastVlmConfig())


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(more_families.gemma4, marks=more_families.NEEDS_5_24),
        more_families.llava_next_video,
        more_families.minicpmv4_6,
    ],
)
def test_processor_is_loaded_without_its_video_processor(build: Any, tmp_path: Path) -> None:
    build(tmp_path)
    processor: Any = read_processor(str(tmp_path), None, hf.AutoConfig.from_pretrained(tmp_path))
    assert type(processor).__module__.startswith("transformers.")
    for copied in (processor, pickle.loads(pickle.dumps(processor))):
        assert copied.video_processor.any_setting is None
        assert type(copied.image_processor).__name__.endswith("Pil")
        assert copied.tokenizer.image_token


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
@pytest.mark.parametrize("build", [more_families.pixtral, more_families.llama4])
def test_a_processor_that_needs_another_package_names_it(build: Any, tmp_path: Path) -> None:
    """A Pixtral is a LLaVA whose files name another processor; Llama 4 has no image processor for Pillow."""
    build(tmp_path)
    with pytest.raises(ArgumentError, match=r"^vlm\.model: .*(?i:torchvision).*; pip install 'safervlm\[vision\]'"):
        _ = Transformers(str(tmp_path)).processor


@pytest.mark.torchvision
@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
def test_with_torchvision_the_processor_of_the_files_is_compared(tmp_path: Path) -> None:
    """LLaVA's processor would write Pixtral's prompt without the tokens that end a row of an image."""
    more_families.pixtral(tmp_path)
    vlm = Transformers(str(tmp_path), dtype="float32")
    vlm.load()
    assert vlm.checked["processor"] == "PixtralProcessor, compared"
    assert vlm.checked["images"] == "PixtralImageProcessorPil"
    (tmp_path / "llama4").mkdir()
    more_families.llama4(tmp_path / "llama4")
    with pytest.raises(ArgumentError, match=r"^vlm\.model: .*: its code in transformers fails \(.*\); use another"):
        Transformers(str(tmp_path / "llama4"), dtype="float32").load()


@pytest.mark.parametrize(("build", "template"), [(more_families.got_ocr2, None), (more_families.fuyu, "{question}")])
def test_a_type_whose_processor_fails_is_rejected(build: Any, template: str | None, tmp_path: Path) -> None:
    build(tmp_path)
    vlm = Transformers(str(tmp_path), dtype="float32", template=template)
    with pytest.raises(ArgumentError, match=r"^vlm\.\w+: .* processor (fails|rejects) .*; (use|write)"):
        vlm.load()


def test_error_names_a_damaged_processor_file(tmp_path: Path) -> None:
    families.llava(tmp_path)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(RecordError, match=rf"^{tmp_path}/processor_config\.json"):
        _ = Transformers(str(tmp_path)).processor
