"""Any vision-language model that transformers loads with ``AutoModelForImageTextToText``.

Each question is encoded by the model's own processor, whatever the model does with images, and every score is one plain
forward pass, a row a completion. What the questions about an image have in common is computed once (:mod:`~.rows`).

Shapes: B questions of a batch, C completions, T tokens of the longest, N response tokens, H hidden units.
"""

from collections.abc import Iterator
from functools import cached_property
from inspect import signature
from pathlib import Path
from string import Formatter
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from safervlm.errors import ArgumentError, first_line
from safervlm.hashing import seed_for
from safervlm.io.images import ImageSettings
from safervlm.records import Question
from safervlm.vlm.base import Generation, Unanswered, answered
from safervlm.vlm.compat import PROCESSOR_MAPPING, grown_inputs
from safervlm.vlm.encoding import EncodedBatch, ProcessorCollator, special_tokens
from safervlm.vlm.local import LocalVLM, Targets
from safervlm.vlm.lora import Adapter, LoRA, active
from safervlm.vlm.prefix import EachOnce, Encoding, Sharing, extend, join
from safervlm.vlm.sampling import Finite, KeyedNoise, Sampling, processors
from safervlm.vlm.weights import load_model, reading


def switch_off_dropout(config: Any) -> None:
    """Sets every probability of dropping something to 0, in the parts of a configuration, too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            switch_off_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def read_processor(name: str, revision: str | None, config: Any) -> ProcessorMixin:
    """The model's processor, its images handled by PIL, its videos not at all: that part needs torchvision."""
    processor_class: Any = PROCESSOR_MAPPING.get(type(config), None)
    if processor_class is None:
        raise ArgumentError(f"vlm.model: {name!r} is a {config.model_type}, for which transformers has no processor")

    class ImagesAlone(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in super().get_attributes() if part != "video_processor"]

    ImagesAlone.__name__ = processor_class.__name__  # it is compared with the name that the folder gives
    parameter = signature(processor_class.__init__).parameters.get("video_processor")
    no_videos = {"video_processor": None} if parameter and parameter.default is parameter.empty else {}
    processor = ImagesAlone.from_pretrained(
        name, revision=revision, backend="pil", trust_remote_code=False, **no_videos
    )
    processor.__class__ = processor_class  # a local class can't be pickled
    if no_videos:  # where it has to be there, it is also asked for its settings, videos or not
        processor.video_processor = SimpleNamespace(num_frames=None, fps=None)
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
        images: how images are decoded, and which are too large.
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
        images: ImageSettings = ImageSettings(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(model, revision, adapter, lora, dtype, gradient_checkpointing)
        if template is not None and {name for _, name, _, _ in Formatter().parse(template)} - {None} != {"question"}:
            raise ArgumentError(f"vlm.template: it holds {{question}}, and nothing else in braces, got {template!r}")
        self.system, self.template, self.images = system, template, images

    @cached_property
    def config(self) -> Any:
        """The model's configuration, without dropout: LoRA has its own, and the reference has to be one model."""
        with reading(self.name):
            config = AutoConfig.from_pretrained(self.name, revision=self.revision, trust_remote_code=False)
        if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
            raise ArgumentError(
                f"vlm.model: {self.name!r} reads the question by an encoder and answers by a decoder of its own, so "
                "there is no prompt that the answer goes on with; use a model with a decoder alone"
            )
        for part in (config, config.get_text_config(), getattr(config, "vision_config", None)):
            attention = str(getattr(part, "_attn_implementation", None))
            if "/" in attention:
                raise ArgumentError(
                    f"vlm.model: the config.json of {self.name!r} asks for the code of {attention!r} from the Hub "
                    "(attn_implementation), which is not run; remove the entry"
                )
        switch_off_dropout(config)
        return config

    @cached_property
    def processor(self) -> ProcessorMixin:
        """The model's."""
        with reading(self.name):
            return read_processor(self.name, self.revision, self.config)

    @cached_property
    def collator(self) -> ProcessorCollator:
        """Reads the processor when it is first asked for."""
        if self.template is None and self.processor.chat_template is None:
            raise ArgumentError(
                f"vlm.model: {self.name!r} has no chat template; give vlm.template, the text around {{question}}"
            )
        text = self.config.get_text_config()
        collator = ProcessorCollator(
            self.processor,
            self.template,
            self.system,
            self.eos_token_ids,
            getattr(text, "max_position_embeddings", 2**31),
            self.config.qformer_config.max_position_embeddings if hasattr(self.processor, "qformer_tokenizer") else 0,
            images=self.images,
            # A placeholder may be beyond the embeddings: the image's features stand in its place.
            words=max(getattr(text, "vocab_size", 2**31), *(token + 1 for token in self.image_token_ids), 0),
        )
        if self.template is None:
            with reading(self.name):
                collator.written(collator.messages("Safe?"), add_generation_prompt=True)
        else:
            try:
                encoded = collator.encode(Question("", "", "", None, "alignment", 0, "Safe?", "", "", ""))
                # Before transformers 5.23 not every processor counts the places of images in a text.
                if self.image_token_ids and not self.image_token_ids & set(encoded["input_ids"].flatten().tolist()):
                    raise ValueError("the encoded text has no place for it")
            except ValueError as error:
                reason = str(error).strip().splitlines()[0]
                raise ArgumentError(
                    f"vlm.template: the model's processor refuses {self.template!r} with an image ({reason}); write "
                    "where the image stands, as in '<image>{question}'"
                ) from error
        return collator

    def describe(self) -> dict[str, Any]:
        """What of the VLM decides an answer."""
        return super().describe() | {"system": self.system, "template": self.template} | self.images.describe()

    def load_base(self) -> PreTrainedModel:
        """Reads the base weights, from safetensors only."""
        model = load_model(
            AutoModelForImageTextToText,
            self.name,
            revision=self.revision,
            config=self.config,
            dtype=self.dtype,
            use_safetensors=True,
        )
        return self.prepare(model)

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model as it was read, made to see an image once and to have no habits of its own."""
        encoder = self.image_encoder(model)
        if encoder not in (model, model.base_model):  # which the library gives where it knows of no encoder
            encoder.forward = EachOnce(encoder.forward)
        # The model's own habits, such as a repetition penalty, would join the settings of ``sampling``.
        model.generation_config = GenerationConfig()
        return model

    def image_encoder(self, model: PreTrainedModel) -> nn.Module:
        """What of the model goes through the pixels of an image, whatever is asked about it."""
        return model.get_encoder(modality="image")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's."""
        return self.processor.tokenizer

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """The tokenizer's end token, then what the generation settings name, else the configuration."""
        with reading(self.name):
            try:
                settings = GenerationConfig.from_pretrained(self.name, revision=self.revision)
            except OSError as error:
                if (Path(self.name) / "generation_config.json").is_file():
                    raise ValueError(f"its generation_config.json: {first_line(error)}") from error
                settings = GenerationConfig.from_model_config(self.config)
        named = settings.eos_token_id
        every = [self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
        ends = [token for token in dict.fromkeys(every) if token is not None]
        if not ends:
            raise ArgumentError(f"vlm.model: {self.name!r} names no token that ends an answer (eos_token_id)")
        return ends

    @property
    def image_token_ids(self) -> set[int]:
        """The placeholders that the configuration names."""
        names = ("image_token_id", "image_token_index", "video_token_id", "boi_token_index", "eoi_token_index")
        found = (getattr(self.config, name, None) for name in names)
        return {token for token in found if token is not None}

    @cached_property
    def suppressed(self) -> Tensor:
        """Tokens that an answer never contains, of those that the head knows: some placeholders are beyond them."""
        never = {*super().suppressed.tolist(), *special_tokens(self.tokenizer)} - set(self.eos_token_ids)
        return torch.tensor(sorted(never & set(range(self.base.get_output_embeddings().out_features))))

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
        sequences = [extend(encoding, answer, self.written(encoding)) for encoding, answer in pairs]
        inputs = join(sequences, self.pad_token_id, self.dtype)

        kept: list[Tensor] = []

        def keep(head: Any, states: tuple[Tensor]) -> tuple[Tensor]:
            kept.append(states[0])
            return (states[0][:, :1],)  # the model's own head has nothing to do

        hook = self.base.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            with active(self.base, adapter):
                logits = self.base(**inputs, use_cache=False).logits
        finally:
            hook.remove()
        with torch.no_grad():
            bare = self.base.get_output_embeddings()(kept[0][:, :1])
        if not torch.allclose(logits.float(), bare.float(), atol=1e-3, rtol=1e-3):
            raise ArgumentError(
                f"vlm.model: {self.name!r} changes the logits behind its head (caps or scales them), which scoring "
                "doesn't: it can be measured, not trained; train one whose head has the last word"
            )
        return Targets(target, mask), kept[0][rows[mask], source[mask]]

    def written(self, encoding: Encoding) -> Encoding:
        """What the model's own ``generate`` notes of a token that it writes, (1, 1, ...).

        The attention mask has it, and whatever the family has beside it: token types, what the token looks at.
        """
        grown = grown_inputs(self.base, dict(encoding))
        return {name: grown[name][:, -1:] for name, tensor in encoding.items() if grown[name].shape != tensor.shape}

    @cached_property
    def sharing(self) -> Sharing:
        """Of what the questions about an image begin with."""
        return Sharing(self.base, self.pad_token_id, self.image_token_ids, self.dtype)

    def without_room(self, batch: EncodedBatch, sampling: Sampling) -> dict[int, str]:
        """The questions whose answers may need positions that the model hasn't learnt, and the reason for each."""
        learned = (part for name, part in self.base.get_decoder().named_modules() if name.endswith("embed_positions"))
        if not any(isinstance(part, nn.Embedding) for part in learned):
            return {}  # it computes positions, as many as there are
        limit, new = self.collator.max_length, sampling.max_new_tokens
        lengths = [encoding["input_ids"].shape[1] for encoding in batch.encodings]
        return {
            row: f"{batch.questions[row].id}: {length} tokens and as many as {new} new ones, the model takes {limit}; "
            "shorten the question, or lower sampling.max_new_tokens"
            for row, length in enumerate(lengths)
            if length + new > limit
        }

    @torch.no_grad()
    def generate(
        self, batch: EncodedBatch, sampling: Sampling, seed: int, adapter: Adapter = "policy"
    ) -> list[Generation]:
        """Answers the questions of a batch; those about one image share what they begin with, where they can."""
        if reasons := self.without_room(batch, sampling):
            some = torch.tensor([row for row in range(len(batch)) if row not in reasons])
            answers: Iterator[Generation | str]
            try:
                answers = iter([*self.generate(batch.select(some), sampling, seed, adapter)] if len(some) else [])
            except Unanswered as error:
                answers = iter(error.answers)
            raise Unanswered(
                next(iter(reasons.values())), [reasons.get(row) or next(answers) for row in range(len(batch))]
            )
        tokenwise = {"input_ids", *self.written(batch.encodings[0])}
        finite = Finite()
        chain = LogitsProcessorList([finite, *processors(sampling, self.suppressed)])
        if sampling.temperature > 0:
            chain.append(KeyedNoise([seed_for(seed, question.id) for question in batch.questions]))
        training = self.training
        self.eval()  # no dropout, and a cache also where gradients are checkpointed
        with active(self.base, adapter):
            sharing, asked = self.sharing, batch.encodings
            inputs = sharing.inputs(asked, tokenwise) or sharing.alone(asked, tokenwise)
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
        found = [self.generation(tokens) for tokens in generated[:, inputs["input_ids"].shape[1] :].tolist()]
        return answered(batch.questions, found, [False] * len(found) if finite.bad is None else finite.bad.tolist())
