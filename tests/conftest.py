"""Fixtures shared by several tests: a tiny LLaVA in the real format, and questions about small images."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models are so small that a second thread slows them down. Inherited by started processes.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from checkout import CHECKOUT, contents
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safervlm import protocol
from safervlm.pictograms.world import build
from safervlm.records import Question, record_id, write_jsonl

torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and this machine has none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest files first, so that at the end no process waits for the last file of another one."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.name != "test_demo.py", -slow[item.path]))  # stable within a file


@pytest.fixture(scope="session", autouse=True)
def _checkout_unchanged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Checks that the suite neither reads nor writes its working directory, nor changes the checkout.

    Fixtures whose scope is wider than a test run in a temporary folder.
    """
    before, started_in = contents(CHECKOUT), Path.cwd()
    os.chdir(tmp_path_factory.mktemp("session"))
    try:
        yield
    finally:
        os.chdir(started_in)
    after = contents(CHECKOUT)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0))
    assert not changed, f"changed while the tests ran: {', '.join(changed[:10])}"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test, with the processes that it starts, runs in a temporary folder."""
    monkeypatch.chdir(tmp_path)


def byte_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with LLaVA's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA of 4 image tokens, its tokenizer and its image processor.

    As in the real model, the embedding has more rows than the tokenizer has tokens (five).
    """
    folder = tmp_path_factory.mktemp("tiny-llava")
    tokenizer = byte_tokenizer(
        [*protocol.ALIGNMENT_QUESTIONS, *protocol.TEXT_ONLY_QUESTIONS]
        + [
            protocol.aligned_response(label, n, "a knife")
            for label in (protocol.SAFE, protocol.UNSAFE)
            for n in range(5)
        ]
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer) + 5,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=512,
            ),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )
    with torch.no_grad():  # larger weights than at initialisation: another image or word has to change the response
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "vision_tower" not in name:
                parameter.mul_(10)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_center_crop=True
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``unsafe/`` (3 concepts of 10 images, with perception options) and ``safe/`` (60 images)."""
    root = tmp_path_factory.mktemp("tiny-sets")

    def images(folder: Path, count: int, seed: int) -> list[str]:
        (folder / "images").mkdir(parents=True)
        for index in range(count):
            noise = np.random.default_rng(seed + index).integers(0, 255, (28, 20 + index % 3 * 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "images" / f"{index}.png")
        return [f"images/{index}.png" for index in range(count)]

    concepts = [("Hate", "Angry Mob"), ("Violence", "Knife"), ("Self-harm", "Razor")]
    metadata, options = [], []
    for index, image in enumerate(images(root / "unsafe", 30, seed=0)):
        category, concept = concepts[index // 10]
        metadata.append({"image_filename": image, "category": category, "unsafe_concept": concept})
        shown = " \n".join(
            f"{letter}: {name}" for letter, name in zip("ABCD", [concept, "Fraud", "Pills", "Gun"], strict=True)
        )
        options.append(metadata[-1] | {"option_str": shown, "correct_option": "A"})
    write_jsonl(root / "unsafe" / "metadata.jsonl", metadata)
    write_jsonl(root / "unsafe" / "perception.jsonl", options)
    safe = [
        {"image_filename": image, "concept": ["tulip", "kitten"][index % 2]}
        for index, image in enumerate(images(root / "safe", 60, seed=100))
    ]
    write_jsonl(root / "safe" / "metadata.jsonl", safe)
    return root


@pytest.fixture(scope="session")
def tiny_judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``alignment/`` and ``perception/``: random judges in the published form."""
    root = tmp_path_factory.mktemp("tiny-judges")
    tokenizer = byte_tokenizer([])
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    for seed, capability in enumerate(("alignment", "perception")):
        folder = root / capability
        torch.manual_seed(seed)
        roberta = RobertaModel(config, add_pooling_layer=False)
        classifier = torch.nn.Linear(16, len(protocol.LABELS[capability]))
        state = {f"roberta.{name}": value for name, value in roberta.state_dict().items()}
        state |= {f"classifier.{name}": value * 10 for name, value in classifier.state_dict().items()}
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.save(state, folder / "epoch_10.pt")
    return root


@pytest.fixture(scope="session")
def tiny_panel(tiny_judges: Path) -> dict[str, object]:
    """The settings of the two judges, as in a configuration."""
    return {
        name: {
            "class_path": "safervlm.judging.classifier.Judge",
            "init_args": {
                "checkpoint": str(tiny_judges / name / "epoch_10.pt"),
                "base": str(tiny_judges / name),
                "labels": labels,
            },
        }
        for name, labels in {"alignment": ["Safe", "Unsafe", "N/A"], "perception": [*"ABCD", "N/A"]}.items()
    }


@pytest.fixture(scope="session")
def measuring_line(tiny_llava: Path, tiny_panel: dict[str, object]) -> Callable[[Path, Path], list[str]]:
    """``measuring_line(run, folder)``: the command that measures a tiny LLaVA on a test split, and judges."""
    callbacks = [
        {"class_path": "callbacks.record_writer.RecordWriter"},
        {"class_path": "callbacks.judge_responses.JudgeResponses", "init_args": {"panel": tiny_panel}},
        {"class_path": "callbacks.score_table.ScoreTable"},
    ]
    return lambda run, folder: [
        "predict",
        "--config=configs/measure.yaml",
        f"--model.vlm.model={tiny_llava}",
        "--model.vlm.dtype=float32",
        "--model.sampling.max_new_tokens=4",
        f"--data.folder={folder}",
        "--data.capabilities=[alignment]",
        "--data.split=test",
        "--data.batch_size=auto",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.callbacks={json.dumps(callbacks)}",
        f"--run={run}",
    ]


@pytest.fixture(scope="session")
def make_questions(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Question]]:
    """``make_questions(n)``: n alignment questions of different lengths; two consecutive ones are about one image."""
    folder = tmp_path_factory.mktemp("images")
    sizes = [(40, 30), (28, 28), (20, 50), (33, 31)]

    def make(count: int) -> list[Question]:
        questions = []
        for index in range(count):
            number, name = index % 5, f"images/{index // 2}.png"
            path = folder / f"{index // 2}.png"
            if not path.exists():
                width, height = sizes[(index // 2) % 4]
                noise = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
                Image.fromarray(noise).save(path)
            questions.append(
                Question(
                    id=record_id("Tiny", name, "alignment", index),
                    dataset="Tiny",
                    image=name,
                    image_path=str(path),
                    capability="alignment",
                    prompt_number=number,
                    prompt=protocol.ALIGNMENT_QUESTIONS[number],
                    category="Violence",
                    concept="knife",
                    answer=protocol.UNSAFE if index % 2 else protocol.SAFE,
                )
            )
        return questions

    return make


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictogram world of seed 0, built as ``safervlm pictograms`` builds it."""
    base = tmp_path_factory.getbasetemp()  # of this process; several share the folder above
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return build(shared / "world" / "pictograms", seed=0)
