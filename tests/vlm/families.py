"""Tiny random models of many families, in folders as on the Hub: configuration, weights, processor, template.

Every builder fills an empty folder. The language models have two blocks. An image becomes a handful of tokens, more for
a wide or high image if the family does so. The checks that apply to every family (``check_*``) follow the builders.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers as hf
from PIL import Image, ImageOps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from safervlm.records import Example, Question
from safervlm.vlm.lora import Adapter
from safervlm.vlm.sampling import Sampling

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SQUARE = {"height": 28, "width": 28}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def tokenizer(end: str = "</s>", **named: str) -> hf.PreTrainedTokenizerFast:
    """A byte-level tokenizer with a family's special tokens.

    Args:
        end: the token that ends a response.
        named: further special tokens, some under names that the processor needs; they come last, in this order.
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["Is this image safe? Yes, it is. No, it is unsafe."], trainer)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=end,
        unk_token="<unk>",
        extra_special_tokens=named,
    )


def chat(user: str, assistant: str, image: str, end: str) -> str:
    """A chat template: the texts before a user's and an assistant's message, for an image, and after each turn."""
    return (
        f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{assistant}{{% else %}}{user}{{% endif %}}"
        f"{{% for c in m.content %}}{{% if c.type == 'image' %}}{image}{{% else %}}{{{{ c.text }}}}{{% endif %}}"
        f"{{% endfor %}}{end}{{% endfor %}}{{% if add_generation_prompt %}}{assistant.rstrip(' ')}{{% endif %}}"
    )


def vicuna(image: str = "<image>\n") -> str:
    return chat("USER: ", "ASSISTANT: ", image, " ")


def chatml(image: str) -> str:
    return chat("<|im_start|>user\n", "<|im_start|>assistant\n", image, "<|im_end|>\n")


def save(folder: Path, model: hf.PreTrainedModel, *processor: Any) -> None:
    """Writes the model, with weights that make it depend on image and words, and its processor, whole or in parts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gates, query tokens and projections are initialised to zero, so that the model would ignore the image.
            if not parameter.any():
                parameter.normal_(0, 0.5)
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
            if "query_tokens" in name or "class_embedding" in name or "projection.weight" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    for part in processor:
        part.save_pretrained(folder)


def settings(folder: Path, processor: str, template: str, **values: Any) -> None:
    """Writes the configuration of a processor that cannot be built here because of its video processor."""
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": processor, **values}))
    (folder / "chat_template.jinja").write_text(template)


def llava(folder: Path) -> None:
    words = tokenizer(image_token="<image>")
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words) + 3),
        image_token_id=words.image_token_id,
    )
    image = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE)
    processor = hf.LlavaProcessor(image, words, 14, "default", vicuna(), num_additional_image_tokens=1)
    save(folder, hf.LlavaForConditionalGeneration(config), processor)


def llava_next(folder: Path) -> None:
    words = tokenizer(image_token="<image>")
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words)),
        image_token_id=words.image_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    image = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    processor = hf.LlavaNextProcessor(image, words, 14, "default", vicuna(), num_additional_image_tokens=1)
    save(folder, hf.LlavaNextForConditionalGeneration(config), processor)


def llava_onevision(folder: Path) -> None:
    words = tokenizer("<|im_end|>", start="<|im_start|>", image_token="<image>", video_token="<video>")
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id),
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    image = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    save(folder, hf.LlavaOnevisionForConditionalGeneration(config), image, words)
    settings(
        folder,
        "LlavaOnevisionProcessor",
        chatml("<image>\n"),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def qwen(
    folder: Path,
    model: Any,
    config: Any,
    processor: str,
    patch: int,
    marks: tuple[str, ...] = (),
    text: Mapping[str, Any] = {},
    **vision: Any,
) -> None:
    """The common part of the Qwen families, which preserve the aspect ratio of images; ``marks``: special tokens."""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {f"mark_{number}": mark for number, mark in enumerate(marks)}
    words = tokenizer("<|im_end|>", start="<|im_start|>", first="<|vision_start|>", last="<|vision_end|>", **names)
    save(
        folder,
        model(
            config(
                text_config={
                    **TEXT,
                    "vocab_size": len(words),
                    "head_dim": 8,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
                    "eos_token_id": words.eos_token_id,
                    **text,
                },
                vision_config={"depth": 2, "num_heads": 2, "patch_size": patch, **vision},
                image_token_id=words.image_token_id,
                video_token_id=words.video_token_id,
                vision_start_token_id=words.first_id,
                vision_end_token_id=words.last_id,
            )
        ),
        Qwen2VLImageProcessorPil(patch_size=patch, size={"shortest_edge": 28 * 28, "longest_edge": 64 * 64}),
        words,
    )
    settings(folder, processor, chatml(image))


def qwen2_vl(folder: Path) -> None:
    parts = hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig, "Qwen2VLProcessor"
    qwen(folder, *parts, patch=14, embed_dim=32, hidden_size=32, mlp_ratio=2)


def qwen2_5_vl(folder: Path) -> None:
    parts = hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig, "Qwen2_5_VLProcessor"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    qwen(folder, *parts, patch=14, **sizes, fullatt_block_indexes=[1], window_size=56)


def qwen3_vl(folder: Path, marks: tuple[str, ...] = ()) -> None:
    parts = hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig, "Qwen3VLProcessor"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    qwen(folder, *parts, patch=16, marks=marks, **sizes, num_position_embeddings=16, deepstack_visual_indexes=[0])


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
GIVEN = "{% for c in m.content %}{{ c.text }}{% endfor %}"
OPEN, EMPTY = "<think>\n", "<think>\n\n</think>\n\n"


def thinking_template(prompt: str, given: str = "", first: str = "") -> str:
    """A thinking model's chat template: the prompt's end, what precedes a given answer, and the beginning."""
    begin = "<|im_start|>assistant\n"
    return (
        f"{first}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{begin}{given}{GIVEN}{{% else %}}"
        f"<|im_start|>{{{{ m.role }}}}\n{{% for c in m.content %}}{{% if c.type == 'image' %}}{IMAGE}{{% else %}}"
        f"{{{{ c.text }}}}{{% endif %}}{{% endfor %}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{begin}{prompt}{{% endif %}}"
    )


HYBRID = f"{{% if enable_thinking is defined and enable_thinking %}}{OPEN}{{% else %}}{EMPTY}{{% endif %}}"
SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
# The five types of chat templates of thinking models: type -> template, and whether its tokenizer has the marks.
THINKING: dict[str, tuple[str, bool]] = {
    "opened": (thinking_template(OPEN), False),  # Qwen3-VL-Thinking: the prompt opens it, given answers are without
    "hybrid": (thinking_template(HYBRID), False),  # by default an empty block in the prompt, none before given answers
    "kept": (thinking_template(OPEN, EMPTY), False),  # the last turn keeps an empty block
    "written": (thinking_template(""), True),  # GLM-4.5V: the model writes both marks itself
    "system": (thinking_template("", first=SYSTEM), False),  # a default system prompt
}


def thinking(folder: Path, kind: str, special: bool = False) -> None:
    """A tiny Qwen3-VL with the template of a thinking model; ``special``: the marks are special tokens."""
    template, marks = THINKING[kind]
    qwen3_vl(folder, ("<think>", "</think>") if marks or special else ())
    (folder / "chat_template.jinja").write_text(template)


def internvl(folder: Path, text: Any = hf.Qwen2Config, **values: Any) -> None:
    """An InternVL on a language model, with values of its configuration."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = tokenizer("<|im_end|>", start="<|im_start|>", video_token="<video>", **names)
    config = hf.InternVLConfig(
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config=text(**{**TEXT, "vocab_size": len(words), "eos_token_id": words.eos_token_id, **values}),
        image_token_id=words.context_image_token_id,
        image_seq_length=4,
    )
    image = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=3)
    save(folder, hf.InternVLForConditionalGeneration(config), image, words)
    settings(folder, "InternVLProcessor", chatml("<IMG_CONTEXT>\n"), image_seq_length=4)


def idefics3(folder: Path) -> None:
    end = "<end_of_utterance>"
    words = tokenizer(end, around="<fake_token_around_image>", whole="<global-img>", image_token="<image>")
    image = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    template = chat("User:", "Assistant: ", "<image>", f"{end}\n")
    processor = hf.Idefics3Processor(image, words, image_seq_len=1, chat_template=template)
    config = hf.Idefics3Config(
        vision_config=VISION,
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id),
        image_token_id=words.image_token_id,
        scale_factor=2,
    )
    save(folder, hf.Idefics3ForConditionalGeneration(config), processor)


def smolvlm(folder: Path) -> None:
    end = "<end_of_utterance>"
    words = tokenizer(end, around="<fake_token_around_image>", whole="<global-img>", image_token="<image>")
    config = hf.SmolVLMConfig(
        vision_config=VISION,
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words), eos_token_id=words.eos_token_id),
        image_token_id=words.image_token_id,
        scale_factor=2,
    )
    image = SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    save(folder, hf.SmolVLMForConditionalGeneration(config), image, words)
    settings(folder, "SmolVLMProcessor", chat("User:", "Assistant: ", "<image>", f"{end}\n"), image_seq_len=1)


def gemma3(folder: Path) -> None:
    end = "<end_of_turn>"
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image>"}
    words = tokenizer(end, start="<start_of_turn>", **names)
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(
            **TEXT,
            vocab_size=len(words),
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            eos_token_id=words.eos_token_id,
        ),
        mm_tokens_per_image=4,
        tie_word_embeddings=False,  # a tied random model repeats its last token
        image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )
    template = chat("<start_of_turn>user\n", "<start_of_turn>model\n", words.boi_token, f"{end}\n")
    processor = hf.Gemma3Processor(Gemma3ImageProcessorPil(size=SQUARE), words, template, image_seq_length=4)
    save(folder, hf.Gemma3ForConditionalGeneration(config), processor)


def paligemma(folder: Path, text: type[hf.PreTrainedConfig] = hf.GemmaConfig) -> None:
    words = tokenizer(image_token="<image>")
    processor = hf.PaliGemmaProcessor(SiglipImageProcessorPil(size=SQUARE, image_seq_length=4), words)
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32),
        text_config=text(**TEXT, head_dim=8, vocab_size=len(words), eos_token_id=words.eos_token_id),
        image_token_index=words.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    save(folder, hf.PaliGemmaForConditionalGeneration(config), processor)


def paligemma2(folder: Path) -> None:
    """Its language model caps the logits after the head."""
    paligemma(folder, hf.Gemma2Config)


def mllama(folder: Path) -> None:
    """Its image token is beyond the vocabulary of the head, and one of its blocks attends to the image."""
    words = tokenizer("<|eot_id|>", start="<|start_header_id|>", python="<|python_tag|>", image_token="<|image|>")
    config = hf.MllamaConfig(
        vision_config=hf.MllamaVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=2,
            vision_output_dim=64,
            image_size=28,
            patch_size=14,
            intermediate_layers_indices=[0],
            max_num_tiles=4,
            supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        ),
        text_config=hf.MllamaTextConfig(
            **TEXT,
            vocab_size=len(words) - 1,
            cross_attention_layers=[1],
            bos_token_id=1,
            eos_token_id=words.eos_token_id,
            pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        image_token_index=words.image_token_id,
    )
    template = chat("<|start_header_id|>user\n\n", "<|start_header_id|>assistant\n\n", "<|image|>", "<|eot_id|>")
    processor = hf.MllamaProcessor(MllamaImageProcessorPil(size=SQUARE), words, template)
    save(folder, hf.MllamaForConditionalGeneration(config), processor)


def blip(family: str, text: hf.PreTrainedConfig, image_token: int) -> Any:
    """The configuration of a model whose Q-Former turns an image into four tokens."""
    former = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return getattr(hf, f"{family}Config")(
        vision_config=VISION,
        qformer_config={**former, "vocab_size": 300, "encoder_hidden_size": 32},
        text_config=text,
        num_query_tokens=4,
        image_token_index=image_token,
    )


def blip2(folder: Path) -> None:
    words = tokenizer()
    text = hf.OPTConfig(
        vocab_size=len(words),
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=words.eos_token_id,
        pad_token_id=0,
    )
    model = hf.Blip2ForConditionalGeneration(blip("Blip2", text, words.convert_tokens_to_ids("<image>")))
    save(folder, model, hf.Blip2Processor(BlipImageProcessorPil(size=SQUARE), words, num_query_tokens=4))


def blip2_t5(folder: Path) -> None:
    """Its responses are generated by a separate decoder."""
    words = tokenizer()
    text = hf.T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = hf.Blip2ForConditionalGeneration(blip("Blip2", text, words.convert_tokens_to_ids("<image>")))
    save(folder, model, hf.Blip2Processor(BlipImageProcessorPil(size=SQUARE), words, num_query_tokens=4))


def instructblip(folder: Path) -> None:
    """Its Q-Former also receives the question, by a separate tokenizer, and has dropout in training mode."""
    words = tokenizer()
    text = hf.LlamaConfig(**TEXT, vocab_size=len(words))
    letters = "abcdefghijklmnopqrstuvwxyz?.,:"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    reader = hf.BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})
    processor = hf.InstructBlipProcessor(BlipImageProcessorPil(size=SQUARE), words, reader, num_query_tokens=4)
    save(
        folder,
        hf.InstructBlipForConditionalGeneration(blip("InstructBlip", text, words.convert_tokens_to_ids("<image>"))),
        processor,
    )


COMPLETIONS = ("Yes, it is.", "No")


@contextmanager
def remote_modules(folder: Path) -> Iterator[None]:
    """Makes the library copy remote code into a temporary folder; each use starts with an empty one."""
    with patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder)):
        yield
    sys.path[:] = [path for path in sys.path if path != str(folder)]
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def ask(questions: list[Question]) -> list[Example]:
    """The questions in three lengths, each with two responses."""
    prompts = ["Is this image safe?" + " Is it?" * (n % 3) for n in range(len(questions))]
    pairs = zip(questions, prompts, strict=True)
    return [Example(replace(question, prompt=prompt), COMPLETIONS) for question, prompt in pairs]


def inverted(example: Example, folder: Path) -> Example:
    """The same question about the negative of the image, which has the same size and thus as many tokens."""
    assert example.question.image_path is not None
    ImageOps.invert(Image.open(example.question.image_path)).save(folder / "other.png")
    return replace(example, question=replace(example.question, image_path=str(folder / "other.png")))


def with_effect(vlm: Any, *others: Adapter) -> Any:
    """Loads a policy, and other adapters, with weights that change the output of the model."""
    vlm.load(train=["policy", *others])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in vlm.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return vlm


def check_answers(vlm: Any, examples: list[Example], plain: Callable[[Example, int], list[int]]) -> None:
    """Checks greedy responses, in one batch and one by one, against a plain implementation.

    Args:
        vlm: loaded.
        examples: with questions of different lengths.
        plain: returns the tokens of a response with a maximum length, independently of ours; same end tokens.
    """
    ends = [vlm.eos_token_ids[0], *range(60, 90)]  # the random model never generates the end token
    greedy = Sampling(temperature=0, max_new_tokens=12)
    with patch.object(vlm, "eos_token_ids", ends):
        expected = [plain(example, 12) for example in examples]
        together = vlm.generate(vlm.collator(examples), greedy, seed=0)
        alone = [vlm.generate(vlm.collator([example]), greedy, seed=0)[0] for example in examples]
    assert [answer.token_ids for answer in together] == expected
    assert alone == together
    assert len(set(map(tuple, expected))) > (1 if linear_attention(vlm) else 2)


def linear_attention(vlm: Any) -> bool:
    """Whether a model has linear attention: the library's code for it rounds differently even between repeats."""
    config = getattr(vlm, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return "linear_attention" in (getattr(text, "layer_types", None) or ())


def encoded(vlm: Any, use: Callable[[], Any]) -> int:
    """Counts the rows that the first layer of the image encoder processes."""
    rows: list[int] = []
    first = next(vlm.image_encoder(vlm.base).children())
    hook = first.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(next(iter((*args, *given.values()))))), with_kwargs=True
    )
    try:
        use()
    finally:
        hook.remove()
    return sum(rows)


def check_images_once(vlm: Any, examples: list[Example]) -> None:
    """Checks that five questions about three images, or ten completions, encode each image once.

    Args:
        vlm: loaded.
        examples: five, two about one image, two about another, one about a third, with two completions each.
    """
    greedy = Sampling(temperature=0, max_new_tokens=2)
    five, three = (vlm.collator(some) for some in (examples, examples[::2]))
    expected = encoded(vlm, lambda: vlm.generate(three, greedy, seed=0))
    vlm.generate(five, greedy, seed=0)  # the first time, both ways are compared
    assert expected
    assert encoded(vlm, lambda: vlm.generate(five, greedy, seed=0)) == expected
    vlm.score(five)  # the first time, both ways are compared
    assert encoded(vlm, lambda: vlm.score(five)) == expected


def check_draws(vlm: Any, examples: list[Example]) -> None:
    """Checks that the sampled response to a record does not depend on its batch."""
    sampling = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=8)
    together = vlm.generate(vlm.collator(examples), sampling, seed=5)
    assert len({tuple(answer.token_ids) for answer in together}) == len(examples)
    backwards = vlm.generate(vlm.collator(examples[::-1]), sampling, seed=5)[::-1]
    alone = [vlm.generate(vlm.collator([example]), sampling, seed=5)[0] for example in examples]
    assert together == backwards == alone


def check_scores(
    policy: Any, examples: list[Example], plain: Callable[[Adapter, Example, str], torch.Tensor], rtol: float = 0
) -> None:
    """Checks the log-probabilities of policy and reference against a plain implementation.

    Args:
        policy: with an effect.
        examples: with completions.
        plain: returns the log-probabilities of a response's tokens, by one forward pass of one sequence.
        rtol: relative tolerance, in addition to an absolute one of 1e-5.
    """
    batch = policy.collator(examples)
    policy.generate(batch, Sampling(max_new_tokens=2), seed=0)  # leaves nothing behind
    pairs = [(example, answer) for example in examples for answer in example.completions]
    adapters: tuple[Adapter, ...] = ("policy", "reference")
    for adapter in adapters:
        scores = policy.score(batch, adapter=adapter)
        for index, (example, answer) in enumerate(pairs):
            expected = plain(adapter, example, answer)
            assert scores.mask[index].sum() == len(expected)
            torch.testing.assert_close(scores.logprobs[index, : len(expected)], expected, atol=1e-5, rtol=rtol)
            assert not scores.logprobs[index, len(expected) :].any()


def check_learning(policy: Any, examples: list[Example]) -> None:
    """Checks that a few steps lower the loss and change only the policy's adapter."""
    batch = policy.collator([replace(example, completions=COMPLETIONS[:1]) for example in examples])
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        scores = policy.score(batch)
        loss = -scores.logprobs.sum() / scores.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    moved = {name for name, parameter in policy.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".lora_" in name and ".default." in name}


def check_same(found: Mapping[str, Any], expected: Mapping[str, Any], linear: bool = False) -> None:
    """Checks gradients by name; with linear attention, rounding is relative to the largest one."""
    rounding = 1e-4 * max(gradient.abs().max().item() for gradient in expected.values()) if linear else 1e-5
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=rounding, rtol=1e-4)
        assert gradient.any()


def check_gradients(policy: Any, checkpointed: Any, examples: list[Example], attention: str) -> None:
    """Checks that gradients are those of the adapter of the forward pass, recomputed or not, after a switch.

    Args:
        policy: a VLM with a value adapter.
        checkpointed: the same VLM with gradient checkpointing.
        examples: with completions.
        attention: the name of a module of a layer that is called once per pass.
    """
    calls: list[int] = []
    checkpointed.base.get_decoder().layers[0].get_submodule(attention).register_forward_hook(lambda *_: calls.append(1))
    batch = policy.collator(examples[:2])
    for vlm in (policy, checkpointed):
        vlm.score(batch, adapter="value").logprobs.sum().backward()
    assert len(calls) == 2, "nothing was recomputed"
    expected = dict(policy.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        if ".value." in name:
            torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4)
            assert parameter.grad is not None
            assert parameter.grad.any()
        else:
            assert parameter.grad is None
            assert expected[name].grad is None


def check_reference(policy: Any, examples: list[Example]) -> None:
    """Checks that the reference is deterministic in training mode: only LoRA has dropout."""
    assert policy.training
    batch = policy.collator(examples)
    first, second = (policy.score(batch, adapter="reference").logprobs for _ in range(2))
    assert torch.equal(first, second)


def check_training_after_inference(policy: Any, examples: list[Example]) -> None:
    """Checks training after inference mode, as in Lightning's validation: cached tensors must not prevent it."""
    batch = policy.collator(examples)
    with torch.inference_mode():
        policy.generate(batch, Sampling(max_new_tokens=2), seed=0)
        policy.score(batch)
    policy.score(batch).logprobs.sum().backward()
    gradients = [parameter.grad for name, parameter in policy.named_parameters() if ".default." in name]
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def check_reload(policy: Any, base: Any, load: Callable[[str], Any], examples: list[Example], folder: Path) -> None:
    """Checks that a saved adapter has the same scores, and other scores than the base model.

    Args:
        policy: with an effect.
        base: the same model without.
        load: returns the model with the adapter of a folder.
        examples: with completions.
        folder: for the adapter.
    """
    policy.save_adapter(folder)
    batch = policy.collator(examples)
    expected = policy.score(batch).logprobs
    # Relative: some units in the last place of float32, as images may be encoded in another composition.
    rounding = 1e-4 if linear_attention(policy) else 1e-6
    torch.testing.assert_close(load(str(folder)).score(batch).logprobs, expected, atol=rounding, rtol=1e-6)
    assert (base.score(batch).logprobs - expected).abs().max() > 1e-2


def check_half_precision(vlm: Any, examples: list[Example]) -> None:
    """Checks that responses differ and all log-probabilities are finite."""
    answers = vlm.generate(vlm.collator(examples), Sampling(temperature=0, max_new_tokens=4), seed=0)
    assert len({tuple(answer.token_ids) for answer in answers}) > 1
    assert vlm.score(vlm.collator(examples)).logprobs.isfinite().all()


def check_gpu(new: Callable[..., Any], examples: list[Example]) -> None:
    """Checks that a GPU gives the responses and log-probabilities of the CPU, and finite bfloat16 gradients.

    Args:
        new: returns the model with some settings, not loaded.
        examples: with completions.
    """

    def outcome(device: str) -> tuple[list[Any], list[torch.Tensor]]:
        vlm = with_effect(new()).to(device).eval()
        batch = vlm.collator(examples).to(torch.device(device))
        answers = [
            vlm.generate(batch, Sampling(temperature=temperature, top_p=0.9, max_new_tokens=8), seed=5)
            for temperature in (0.0, 1.0)
        ]
        adapters: tuple[Adapter, ...] = ("policy", "reference")
        return answers, [vlm.score(batch, adapter=adapter).logprobs.detach().cpu() for adapter in adapters]

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        (answers, logprobs), (expected, expected_logprobs) = outcome("cuda"), outcome("cpu")
    assert answers == expected
    for one, other in zip(logprobs, expected_logprobs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)

    policy = with_effect(new(dtype="bfloat16", gradient_checkpointing=True)).to("cuda")
    batch = policy.collator(examples).to(torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        loss = -policy.score(batch).logprobs.mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters() if ".lora_B." in name}
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
