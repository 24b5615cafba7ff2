"""Any vision-language model that transformers loads with ``AutoModelForImageTextToText``.

Each question is encoded by the model's own processor and stands in a row of its own, whatever the model does with
images: nothing is shared between questions, and every score is one plain forward pass. A family that can share
computation has a file of its own.

Shapes: B questions of a batch, C completions, T tokens of the longest, N response tokens, H hidden units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from safervlm.images import BLANK, open_image
from safervlm.records import Example, Question, RecordError, seed_for
from safervlm.vlm.base import Batch, Generation
from safervlm.vlm.local import LocalVLM, Targets, reading
from safervlm.vlm.lora import Adapter, LoRA, active
from safervlm.vlm.sampling import KeyedNoise, Sampling, processors

Encoding = Mapping[str, Tensor]


class EncodedBatch(Batch):
    """Questions as the model's processor encodes them, one by one.

    Args:
        questions: the B questions.
        encodings: of each question, what the processor gives: ``input_ids`` (1, prompt tokens) and whatever else.
        completions: of each question, its completions' tokens; empty to generate.
    """

    def __init__(
        self, questions: list[Question], encodings: list[Encoding], completions: list[list[list[int]]]
    ) -> None:
        super().__init__(questions)
        self.encodings, self.completions = encodings, completions

    def to(self, device: torch.device) -> Self:
        """The same on another device; Lightning calls it."""
        encodings: list[Encoding] = [
            {name: tensor.to(device) for name, tensor in encoding.items()} for encoding in self.encodings
        ]
        return type(self)(self.questions, encodings, self.completions)

    def select(self, rows: Tensor, answers: Sequence[Sequence[int]] | None = None) -> Self:
        """Some of the questions, each with its generated answer as its one completion."""
        chosen = rows.tolist()
        return type(self)(
            [self.questions[row] for row in chosen],
            [self.encodings[row] for row in chosen],
            [[list(answers[row])] if answers else [] for row in chosen],
        )


def extend(encoding: Encoding, completion: Sequence[int]) -> dict[str, Tensor]:
    """A prompt's encoding with a completion behind it.

    What the processor says of each token goes on as text: attended to, of type 0, looking at the images that the
    prompt's last token looks at.
    """
    ids = encoding["input_ids"]
    length, more = ids.shape[1], len(completion)
    extended = dict(encoding)
    for name, tensor in encoding.items():
        if tensor.shape[:2] != (1, length):
            continue
        if name == "input_ids":
            rest = torch.tensor([completion], device=ids.device)
        elif name in ("attention_mask", "cross_attention_mask"):
            rest = tensor[:, -1:].expand(-1, more, *tensor.shape[2:])
        else:
            rest = tensor.new_zeros(1, more, *tensor.shape[2:])
        extended[name] = torch.cat([tensor, rest], dim=1)
    return extended


def join(encodings: Sequence[Encoding], pad_token_id: int, left: bool) -> dict[str, Tensor]:
    """One batch of encodings: tokens are padded on a side, everything else at its end, with zeros.

    Args:
        encodings: of single questions, all of the same model.
        pad_token_id: for the tokens, which the attention mask hides.
        left: pad the tokens on the left, as generating needs it.
    """
    joined = {}
    for name, first in encodings[0].items():
        tensors = [encoding[name] for encoding in encodings]
        tokens = all(e[name].shape[:2] == e["input_ids"].shape[:2] for e in encodings)
        widest = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, first.dim())]
        padded = []
        for tensor in tensors:
            missing = [wide - size for wide, size in zip(widest, tensor.shape[1:], strict=True)]
            sides = [side for gap in reversed(missing[1:]) for side in (0, gap)]
            sides += ([missing[0], 0] if left and tokens else [0, missing[0]]) if missing else []
            padded.append(F.pad(tensor, sides, value=pad_token_id if name == "input_ids" else 0))
        joined[name] = torch.cat(padded)
    return joined


@dataclass
class ProcessorCollator:
    """Examples -> :class:`EncodedBatch` by the model's processor; picklable, without weights.

    Attributes:
        processor: the model's.
        template: the text around a question, for a model without a chat template; None for the chat template.
        system: the conversation's system prompt; empty for none.
        eos_token_ids: the tokens that end an answer.
        max_length: a longer prompt with its completion is refused, never cut.
    """

    processor: ProcessorMixin
    template: str | None
    system: str
    eos_token_ids: list[int]
    max_length: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's."""
        return self.processor.tokenizer

    def __call__(self, examples: Sequence[Example]) -> EncodedBatch:
        """Reads the images and encodes prompts and completions."""
        encodings, completions = [], []
        for example in examples:
            name = example.question.id
            for text in (example.question.prompt, *example.completions):
                found = [token for token in self.tokenizer.all_special_tokens if token in text]
                if found:
                    raise RecordError(f"{name}: its text contains the special token {found[0]!r}; leave it out")
            encoding = self.encode(example.question)
            answers = [self.completion_ids(text) for text in example.completions]
            length = encoding["input_ids"].shape[1] + max(map(len, answers), default=0)
            if length > self.max_length:
                raise RecordError(f"{name}: {length} tokens, the model takes {self.max_length}; shorten the question")
            encodings.append(encoding)
            completions.append(answers)
        return EncodedBatch([example.question for example in examples], encodings, completions)

    def messages(self, question: str, image: Any = None) -> list[dict[str, Any]]:
        """The conversation up to the answer."""
        shown = {"type": "image"} if image is None else {"type": "image", "image": image}
        system = [{"role": "system", "content": [{"type": "text", "text": self.system}]}] if self.system else []
        return [*system, {"role": "user", "content": [shown, {"type": "text", "text": question}]}]

    def encode(self, question: Question) -> Encoding:
        """One question with its image, as the model's processor encodes it; a blank image stands for none."""
        image = BLANK if question.image_path is None else open_image(question.image_path, question.id)
        if self.template is not None:
            text = self.template.format(question=question.prompt)
            return dict(self.processor(images=image, text=text, return_tensors="pt"))
        return dict(
            self.processor.apply_chat_template(
                self.messages(question.prompt, image),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )

    def completion_ids(self, text: str) -> list[int]:
        """The tokens of an answer, the end token included, as they follow the prompt."""
        if self.template is not None:
            stem, whole = "?", f"? {text}"
        else:
            asked = self.messages("?")
            answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
            stem = self.processor.apply_chat_template(asked, add_generation_prompt=True)
            whole = self.processor.apply_chat_template(answered)
            if not whole.startswith(stem):
                raise ValueError(
                    "the chat template writes another beginning before an answer that is given than before one that "
                    "is generated, so answers can't be scored; use a model whose template doesn't"
                )
        before, ids = (self.tokenizer(each, add_special_tokens=False).input_ids for each in (stem, whole))
        if ids[: len(before)] != before:
            raise ValueError(
                f"the tokenizer merges the prompt with the answer {text[:40]!r}; its family needs its own file"
            )
        answer = ids[len(before) :]
        end = next((place for place, token in enumerate(answer) if token in self.eos_token_ids), len(answer))
        return [*answer[:end], answer[end] if end < len(answer) else self.eos_token_ids[0]]


def read_processor(name: str, revision: str | None, config: Any) -> ProcessorMixin:
    """The model's processor, its images handled by PIL, its videos not at all: that part needs torchvision."""
    processor_class: Any = PROCESSOR_MAPPING.get(type(config), None)
    if processor_class is None:
        raise ValueError(f"vlm.model: {name!r} is a {config.model_type}, for which transformers has no processor")

    class ImagesAlone(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in super().get_attributes() if part != "video_processor"]

    ImagesAlone.__name__ = processor_class.__name__  # it is compared with the name that the folder gives
    processor = ImagesAlone.from_pretrained(name, revision=revision, backend="pil")
    processor.__class__ = processor_class  # a local class can't be pickled
    return processor


class Transformers(LocalVLM):
    """Any vision-language model of transformers with a chat template; a plain text ``template`` does instead.

    Args:
        model: name on the Hugging Face Hub, or folder, of the model and its processor.
        revision: branch, tag or commit of a model on the Hub; a commit makes a run repeatable.
        adapter: PEFT folder of the adapter to measure with, for example ``runs/ppo/adapter``; none for the base model.
        lora: the adapter that training makes.
        dtype: of the base weights; the adapter's stay in float32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        system: the conversation's system prompt; empty for none.
        template: for a model without a chat template, the text around ``{question}``, for example ``Question:
            {question} Answer:``; none for the chat template.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        adapter: str | None = None,
        lora: LoRA = LoRA(),  # noqa: B008 (frozen)
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        gradient_checkpointing: bool = False,
        system: str = "",
        template: str | None = None,
    ) -> None:
        super().__init__(model, revision, adapter, lora, dtype, gradient_checkpointing)
        if template is not None and "{question}" not in template:
            raise ValueError(f"vlm.template: it has no {{question}} in it, got {template!r}")
        self.system, self.template = system, template

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        with reading(self.name):
            return AutoConfig.from_pretrained(self.name, revision=self.revision)

    @cached_property
    def collator(self) -> ProcessorCollator:
        """Reads the processor when it is first asked for."""
        with reading(self.name):
            processor = read_processor(self.name, self.revision, self.config)
        if self.template is None and processor.chat_template is None:
            raise ValueError(
                f"vlm.model: {self.name!r} has no chat template; give vlm.template, the text around {{question}}"
            )
        text = self.config.get_text_config()
        return ProcessorCollator(
            processor, self.template, self.system, self.eos_token_ids, getattr(text, "max_position_embeddings", 2**31)
        )

    def describe(self) -> dict[str, Any]:
        """What of the VLM decides an answer."""
        return super().describe() | {"system": self.system, "template": self.template}

    def load_base(self) -> PreTrainedModel:
        """Reads the base weights, from safetensors only."""
        with reading(self.name):
            model = AutoModelForImageTextToText.from_pretrained(
                self.name, revision=self.revision, dtype=self.dtype, use_safetensors=True
            )
        # The model's own habits, such as a repetition penalty, would join the settings of ``sampling``.
        model.generation_config = GenerationConfig()
        return model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's."""
        return self.collator.tokenizer

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """What the model's generation settings name, else the configuration."""
        try:
            settings = GenerationConfig.from_pretrained(self.name, revision=self.revision)
        except OSError:
            settings = GenerationConfig.from_model_config(self.config)
        ends = settings.eos_token_id
        if ends is None:
            raise ValueError(f"vlm.model: {self.name!r} names no token that ends an answer (eos_token_id)")
        return [ends] if isinstance(ends, int) else list(ends)

    @property
    def image_token_ids(self) -> set[int]:
        """The placeholders that the configuration names."""
        names = ("image_token_id", "image_token_index", "video_token_id", "boi_token_index", "eoi_token_index")
        found = (getattr(self.config, name, None) for name in names)
        return {token for token in found if token is not None}

    @property
    def pad_token_id(self) -> int:
        """Whatever: the attention mask hides it."""
        pad = self.tokenizer.pad_token_id
        return self.eos_token_ids[0] if pad is None else pad

    def response_states(self, batch: EncodedBatch, adapter: Adapter) -> tuple[Targets, Tensor]:
        """The response tokens, and the (N, H) hidden states that predict them; a row a completion."""
        if not all(batch.completions):
            raise ValueError("the batch has no completions to score")
        pairs = [(e, answer) for e, those in zip(batch.encodings, batch.completions, strict=True) for answer in those]
        device = pairs[0][0]["input_ids"].device
        target = pad_sequence([torch.tensor(answer) for _, answer in pairs], batch_first=True).to(device)
        lengths = torch.tensor([len(answer) for _, answer in pairs], device=device)
        mask = torch.arange(target.shape[1], device=device) < lengths[:, None]
        starts = torch.tensor([encoding["input_ids"].shape[1] - 1 for encoding, _ in pairs], device=device)
        source = starts[:, None] + torch.arange(target.shape[1], device=device)
        rows = torch.arange(len(pairs), device=device)[:, None].expand_as(source)
        inputs = self.cast(join([extend(*pair) for pair in pairs], self.pad_token_id, left=False))

        kept: list[Tensor] = []

        def keep(head: Any, states: tuple[Tensor]) -> tuple[Tensor]:
            kept.append(states[0])
            return (states[0][:, :1],)  # the model's own head has nothing to do

        hook = self.base.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            with active(self.base, adapter):
                self.base(**inputs, use_cache=False)
        finally:
            hook.remove()
        return Targets(target, mask), kept[0][rows[mask], source[mask]]

    def cast(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images in the precision of the weights."""
        return {n: tensor.to(self.dtype) if tensor.is_floating_point() else tensor for n, tensor in inputs.items()}

    @torch.no_grad()
    def generate(
        self, batch: EncodedBatch, sampling: Sampling, seed: int, adapter: Adapter = "policy"
    ) -> list[Generation]:
        """Answers the questions of a batch, a row a question."""
        inputs = self.cast(join(batch.encodings, self.pad_token_id, left=True))
        chain = processors(sampling, self.suppressed)
        if sampling.temperature > 0:
            chain.append(KeyedNoise([seed_for(seed, question.id) for question in batch.questions]))
        training = self.training
        self.eval()  # no dropout, and a cache also where gradients are checkpointed
        with active(self.base, adapter):
            generated = self.base.generate(
                **inputs,
                logits_processor=chain,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=self.eos_token_ids,
                    pad_token_id=self.pad_token_id,
                ),
            )
        self.train(training)
        return [self.generation(tokens) for tokens in generated[:, inputs["input_ids"].shape[1] :].tolist()]
