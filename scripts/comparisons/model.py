"""A random LLaVA in the proportions of LLaVA-1.5-7B, examples for it, and its adapter."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safervlm.records import Example, Question
from safervlm.vlm.llava import Llava
from safervlm.vlm.lora import LoRA

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its inputs; the defaults have the proportions of LLaVA-1.5-7B.

    Attributes:
        hidden: width of the language model; layers, heads, intermediate and vocabulary also belong to it.
        vision_hidden: width of the vision tower; vision_layers and vision_heads also belong to it.
        image_size: side of an image in pixels; it becomes ``(image_size / patch_size) ** 2`` image tokens.
        patch_size: side of a patch in pixels.
        rank: rank of LoRA.
        question: minimum and maximum number of tokens of a question.
        answer: minimum and maximum number of tokens of a response.
        pairs: examples of a DPO step.
        targets: examples of an SFT step.
        rollouts: responses of a PPO step.
        response_length: the length to which the three-pass structure pads responses.
    """

    hidden: int = 512
    layers: int = 6
    heads: int = 8
    intermediate: int = 1376
    vocabulary: int = 768
    vision_hidden: int = 128
    vision_layers: int = 3
    vision_heads: int = 2
    image_size: int = 336
    patch_size: int = 14
    rank: int = 16
    question: tuple[int, int] = (20, 24)
    answer: tuple[int, int] = (24, 36)
    pairs: int = 4
    targets: int = 8
    rollouts: int = 4
    response_length: int = 512


# Attention and the vision tower have larger shares of the work than in the default shape.
SMALL = Shape(
    hidden=256, layers=2, heads=4, intermediate=688, vocabulary=128, vision_hidden=32, vision_layers=2, vision_heads=1
)


def write_model(shape: Shape, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Writes a random LLaVA with a word-level tokenizer, in the format of ``save_pretrained``.

    Args:
        shape: the sizes of the model.
        folder: the folder to write.
        dtype: the type of the weights.
        device: the device on which the weights are created.
    """
    special = [PAD, BOS, EOS, UNK, "USER:", "ASSISTANT:"]
    words = special + [f"w{number}" for number in range(shape.vocabulary - len(special) - 1)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=4 * shape.vision_hidden,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
        ),
        text_config=LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=4096,
        ),
        image_token_id=fast.convert_tokens_to_ids("<image>"),
        image_seq_length=(shape.image_size // shape.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    with torch.no_grad():  # the outputs of a freshly initialised model hardly depend on its input
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("language_model" in name or "lm_head" in name):
                parameter.mul_(2)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            size={"shortest_edge": shape.image_size},
            crop_size={"height": shape.image_size, "width": shape.image_size},
        ),
        tokenizer=fast,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def examples(shape: Shape, folder: Path, count: int, completions: int, questions: int = 1) -> list[Example]:
    """Creates questions with random responses of different lengths.

    Args:
        shape: the lengths of questions and responses.
        folder: the folder for the images.
        count: number of questions.
        completions: number of responses per question.
        questions: number of questions about each image.
    """
    rng = random.Random(1)

    def words(lengths: tuple[int, int]) -> str:
        return " ".join(f"w{rng.randrange(shape.vocabulary - 7)}" for _ in range(rng.randint(*lengths)))

    made = []
    for number in range(count):
        path = folder / f"{number // questions}.png"
        pixels = np.random.default_rng(number // questions).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((448, 336)).save(path)
        question = Question(
            id=f"Benchmark/{path.name}/alignment/{number % questions}",
            dataset="Benchmark",
            image=path.name,
            image_path=str(path),
            capability="alignment",
            prompt_number=number % questions,
            prompt=words(shape.question),
            category="",
            concept="",
            answer="Safe",
        )
        made.append(Example(question, tuple(words(shape.answer) for _ in range(completions))))
    return made


def llava(shape: Shape, folder: Path, gradient_checkpointing: bool = False) -> Llava:
    """Returns the model as a VLM of SaferVLM, not loaded yet.

    Args:
        shape: see :func:`write_model`.
        folder: the folder of the model.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
    """
    return Llava(
        str(folder),
        dtype="float32",
        lora=LoRA(r=shape.rank, alpha=2 * shape.rank, dropout=0.0),
        gradient_checkpointing=gradient_checkpointing,
        image_fit="crop",
        system="w1 w2",
    )


def lora_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Returns the parameters of an adapter by their names.

    Args:
        model: the PEFT model.
        adapter: the name of the adapter in PEFT.
    """
    return {name: parameter for name, parameter in model.named_parameters() if f".{adapter}." in name}


def perturb(parameters: dict[str, nn.Parameter]) -> None:
    """Sets an adapter to fixed random weights, the same for every side.

    The second factor of LoRA is initialised to zero; there the loss of DPO is ln 2 whatever a side computes.

    Args:
        parameters: see :func:`lora_parameters`.
    """
    generator = torch.Generator().manual_seed(3)
    for name in sorted(parameters):
        scale = 0.02 if ".lora_B." in name else 0.05
        parameters[name].data.copy_(torch.randn(parameters[name].shape, generator=generator) * scale)
