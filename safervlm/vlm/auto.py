"""Any vision-language model that transformers loads with ``AutoModelForImageTextToText``.

Each question is encoded by the model's own processor, independently of how the model represents images. The common
prefix of the questions about an image is computed once, in generation (:mod:`safervlm.vlm.prefix`) and in scoring
(:mod:`safervlm.vlm.scoring`), where the model allows it.

Shapes: B questions of a batch, N response tokens, H hidden units.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from safervlm.errors import ArgumentError, first_line
from safervlm.io.images import ImageSettings
from safervlm.io.tables import say
from safervlm.limits import TextLimits
from safervlm.vlm.base import Answer, Unanswered
from safervlm.vlm.compat import grown_inputs
from safervlm.vlm.conversation import template_arguments_of
from safervlm.vlm.decoding import REQUESTED, DecodedTokens, Decoding
from safervlm.vlm.deduplicated import DeduplicatedEncoder
from safervlm.vlm.encoding import EncodedBatch, ProcessorCollator, special_tokens
from safervlm.vlm.heads import transform_between
from safervlm.vlm.layers import evaluated, switch_off_dropout
from safervlm.vlm.local import LocalVLM, Targets
from safervlm.vlm.lora import Adapter, LoRA, active
from safervlm.vlm.prefix import Encoding, PrefixSharing
from safervlm.vlm.processors import read_processor
from safervlm.vlm.prompted import PromptedRows
from safervlm.vlm.sampling import Sampler, Sampling
from safervlm.vlm.scoring import EncodedCompletions, Scoring
from safervlm.vlm.selfcheck import PROCESSOR_FAILS, UNLIKE, self_check, works
from safervlm.vlm.sizes import bounded_config
from safervlm.vlm.thinking import Setting, Thinking, valid_setting
from safervlm.vlm.weights import load_model, reading


class Transformers(LocalVLM):
    """Any vision-language model of transformers with a chat template, or with a plain text ``template`` instead.

    Args:
        model: Name on the Hugging Face Hub, or folder, of the model and its processor.
        revision: Branch, tag or commit of a model on the Hub. A commit makes a run reproducible.
        adapter: PEFT folder of the adapter to measure, for example ``runs/ppo/adapter``. None for the base model.
        lora: Settings of the LoRA adapters that training creates.
        dtype: Data type of the base weights. Adapter weights stay in float32.
        gradient_checkpointing: Recompute activations in the backward pass. Takes less memory and about a third more
            time.
        system: System prompt of the conversation; empty for none.
        template: Prompt text with the placeholder ``{question}``, for a model without a chat template, for example
            ``Question: {question} Answer:``. None for the chat template.
        images: How images are decoded, and the size limits above which they are rejected.
        limits: Limits of texts and of the time to render or match them.
        template_arguments: Further variables of the chat template, for example ``{enable_thinking: false}``.
        thinking: The marks around the model's reasoning, ``[<think>, </think>]``. ``detected`` looks for common ones in
            the chat template, then in the tokenizer; ``none`` separates nothing. An empty opening
            mark means that the prompt ends inside the reasoning.
        train_without_thinking: Whether a thinking model may be trained on answers that the template writes without
            reasoning, which trains it not to think.
        decoding: How the steps of generation are computed.

    Raises:
        ArgumentError: ``template`` has other placeholders than ``{question}``, or the adapter or model folder is
            missing.
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
        limits: TextLimits = TextLimits(),  # noqa: B008 (frozen)
        template_arguments: dict[str, Any] | None = None,
        thinking: Setting = "detected",
        train_without_thinking: bool = False,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(model, revision, adapter, lora, dtype, gradient_checkpointing, limits, decoding)
        if template is not None and {name for _, name, _, _ in Formatter().parse(template)} - {None} != {"question"}:
            raise ArgumentError(
                f"vlm.template: it must contain {{question}}, and nothing else in braces, got {template!r}"
            )
        self.system, self.template, self.images = system, template, images
        self.template_arguments = template_arguments_of(template_arguments, template)
        self.thinking_setting, self.train_without_thinking = valid_setting(thinking), train_without_thinking
        self.checked: dict[str, Any] = {}  # result of the self-check; empty before loading

    @property
    def one_by_one(self) -> bool:
        """Whether each question is computed separately, because a batch would change its result."""
        return bool(self.checked.get("one_by_one"))

    @cached_property
    def config(self) -> Any:
        """The model's configuration with all dropout set to 0.

        LoRA has its own dropout, and the reference must be deterministic.

        Raises:
            ArgumentError: The model can't be read, needs code that is not installed, or has an encoder and a decoder.
        """
        with reading(self.name):
            config = bounded_config(self.name, self.revision)
        if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
            raise ArgumentError(
                f"vlm.model: {self.name!r} encodes the question with an encoder and generates the response with a "
                "decoder, so the response does not continue the prompt; use a model with a decoder alone"
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
        """The model's processor."""
        with reading(self.name):
            return read_processor(self.name, self.revision, self.config)

    @cached_property
    def collator(self) -> ProcessorCollator:
        """The collator; the processor is loaded on first access.

        Raises:
            ArgumentError: The processor has no chat template, and none is given.
        """
        if self.template is None and self.processor.chat_template is None:
            raise ArgumentError(
                f"vlm.model: {self.name!r} has no chat template; give vlm.template, the text around {{question}}"
            )
        text = self.config.get_text_config()
        collator = ProcessorCollator(
            self.processor,
            self.template,
            self.system,
            self.named_ends,
            min(getattr(text, "max_position_embeddings", 2**31), self.limits.max_tokens),
            self.config.qformer_config.max_position_embeddings if hasattr(self.processor, "qformer_tokenizer") else 0,
            images=self.images,
            seconds=self.limits.seconds,
            template_arguments=self.template_arguments,
            # A placeholder id may exceed the embedding table, because image features replace its embedding.
            words=max(getattr(text, "vocab_size", 2**31), *(token + 1 for token in self.image_token_ids), 0),
        )
        with reading(self.name):
            collator.begin(self.thinking_setting)
        if self.template is not None:
            with works(self, PROCESSOR_FAILS):
                collator.require_image_in_template(self.image_token_ids)
        return collator

    def describe(self) -> dict[str, Any]:
        """Returns the settings of the VLM that determine a response."""
        described = super().describe() | {"system": self.system, "template": self.template} | self.images.describe()
        return described | self.collator.describe(self.thinking_setting)

    @property
    def thinking(self) -> Thinking:
        """How the model marks its reasoning."""
        return self.collator.thinking

    @cached_property
    def mark_tokens(self) -> dict[int, str]:
        """Special tokens by id that belong to the marks of reasoning, and so may be generated."""
        return self.thinking.mark_tokens(special_tokens(self.tokenizer))

    def require_thinking_preserved(self) -> None:
        """Validates, before training on given answers, that they don't train a thinking model not to think."""
        if not self.train_without_thinking:
            self.collator.require_thinking_preserved()

    def load(self, train: Sequence[Adapter] = (), seed: int = 0) -> None:
        """Loads the weights, checks them once (:mod:`safervlm.vlm.selfcheck`) and adds the adapters.

        Args:
            train: Adapters to create for training; see :meth:`LocalVLM.load`.
            seed: Seed of the initial weights of the new adapters.

        Raises:
            ArgumentError: The model or an adapter can't be loaded, or the model fails the self-check.
        """
        if self.model is None:
            super().load(train, seed)
            if (end := self.collator.turn_end) is not None:
                token = self.tokenizer.convert_ids_to_tokens(end)
                say(f"vlm.model: {token} ends a response, too, because the chat template ends responses with it")
            try:
                with evaluated(self), active(self.base, "reference"):
                    self_check(self)
            except BaseException:
                self.model = None  # a second call fails, too
                raise

    def load_base(self) -> PreTrainedModel:
        """Loads the base weights, from safetensors only."""
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
        """Deduplicates image encoding and resets the generation configuration of a loaded model.

        Args:
            model: The loaded model; changed in place.

        Returns:
            The same model.
        """
        encoder = self.image_encoder(model)
        if encoder not in (model, model.base_model):  # transformers returns one of these if it knows no encoder
            encoder.forward = DeduplicatedEncoder(encoder.forward)
        # The model's own defaults, such as a repetition penalty, would be combined with ``sampling``.
        model.generation_config = GenerationConfig()
        return model

    def image_encoder(self, model: PreTrainedModel) -> nn.Module:
        """Returns the submodule that encodes the pixels of an image, independently of the question.

        Args:
            model: The loaded model.
        """
        return model.get_encoder(modality="image")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """End tokens of a response: those that the model's files name, and the one that its chat template writes."""
        return self.collator.eos_token_ids

    @cached_property
    def named_ends(self) -> list[int]:
        """End tokens of a response that the model's files name.

        The tokenizer's comes first, then those of the generation configuration, or of the model configuration if there
        is not a generation configuration.

        Raises:
            ArgumentError: The settings can't be read, or name no token that ends a response.
        """
        with reading(self.name):
            try:
                settings = GenerationConfig.from_pretrained(self.name, revision=self.revision)
            except OSError as error:
                if (Path(self.name) / "generation_config.json").is_file():
                    raise ValueError(f"its generation_config.json: {first_line(error)}") from error
                settings = GenerationConfig.from_model_config(self.config)
        named = settings.eos_token_id
        every = [self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
        if wrong := [token for token in every if token is not None and type(token) is not int]:
            raise ArgumentError(f"vlm.model: eos_token_id of {self.name!r} has {wrong[0]!r}, which is not a token id")
        ends = [token for token in dict.fromkeys(every) if token is not None and token >= 0]  # -1 stands for none
        if not ends:
            raise ArgumentError(f"vlm.model: {self.name!r} names no token that ends a response (eos_token_id)")
        return ends

    @property
    def image_token_ids(self) -> set[int]:
        """Image and video placeholder ids in the model's configuration."""
        names = ("image_token_id", "image_token_index", "video_token_id", "boi_token_index", "eoi_token_index")
        found = (getattr(self.config, name, None) for name in names)
        return {token for token in found if token is not None}

    @cached_property
    def suppressed(self) -> Tensor:
        """Tokens that a response never contains.

        Only ids that the head can output are included: some placeholder ids are larger.
        """
        never = {*super().suppressed.tolist(), *special_tokens(self.tokenizer)}
        never -= {*self.eos_token_ids, *self.mark_tokens}
        return torch.tensor(sorted(never & set(range(self.base.get_output_embeddings().out_features))))

    @property
    def pad_token_id(self) -> int:
        """Padding token id; falls back to an end token (padding is hidden by the attention mask)."""
        pad = self.tokenizer.pad_token_id
        return self.eos_token_ids[0] if pad is None else pad

    def response_states(self, batch: EncodedBatch, adapter: Adapter) -> tuple[Targets, Tensor]:
        """Computes the hidden states that predict the response tokens (:mod:`safervlm.vlm.scoring`).

        Args:
            batch: Encoded questions, each with at least one completion.
            adapter: Which adapter is active.

        Returns:
            The response tokens, and the (N, H) hidden states that predict them.

        Raises:
            ValueError: A question has no completion.
            ArgumentError: The model transforms the logits after its head in an unknown way, so that scores computed
                from the hidden states would be wrong.
        """
        if not all(batch.completions):
            raise ValueError("the batch has no completions to score")
        encodings = batch.before_answers({"input_ids", *self.written(batch.encodings[0])})
        asked = EncodedCompletions(encodings, batch.completions, list(map(self.written, encodings)), batch.image_names)
        with active(self.base, adapter):
            targets, found = self.scoring.states(asked)
        last, self.scoring.last = self.scoring.last, None  # large for many rows: not kept until the next batch
        if self.logit_transform is None and last is not None:
            self.logit_transform = transform_between(self.base.config, *last)
        if self.logit_transform is None:
            raise ArgumentError(
                f"vlm.model: {self.name!r} changes the logits behind its head in a way that its config.json does not "
                "name, so that scoring can't repeat it: it can be measured, not trained; train another model"
            )
        return targets, found

    def written(self, encoding: Encoding) -> Encoding:
        """Returns the values that the model's own ``generate`` appends to the inputs for each generated token.

        In addition to the attention mask, these are family-specific inputs such as token types.

        Args:
            encoding: Encoding of one prompt.

        Returns:
            Tensors of shape (1, 1, ...), for the inputs that grow with the tokens.
        """
        grown = grown_inputs(self.base, dict(encoding))
        own = {name: grown[name][:, -1:] for name, tensor in encoding.items() if grown[name].shape != tensor.shape}
        # Some models extend their token types themselves; a response is text, as the end of the prompt is.
        return {name: encoding[name][:, -1:] for name in self.checked.get("aligned", ())} | own

    @cached_property
    def sharing(self) -> PrefixSharing:
        """Prefix sharing between questions about the same image."""
        return PrefixSharing(self.base, self.pad_token_id, self.image_token_ids, self.dtype)

    @cached_property
    def scoring(self) -> Scoring:
        """Scoring of completions, in rows that share an image and its questions where the model allows it."""
        return Scoring(self)

    def exceeding_positions(self, batch: EncodedBatch, sampling: Sampling) -> dict[int, str]:
        """Returns the questions whose responses may exceed the learned position embeddings, with the reason for each.

        Args:
            batch: Encoded questions.
            sampling: Decoding settings; ``max_new_tokens`` is used.

        Returns:
            Row of the question -> reason. Empty for models that compute positions, which have no such limit.
        """
        learned = (part for name, part in self.base.get_decoder().named_modules() if name.endswith("embed_positions"))
        if not any(isinstance(part, nn.Embedding) for part in learned):
            return {}  # positions are computed, without a limit
        return batch.too_long(self.collator.max_length, sampling.max_new_tokens)

    @torch.no_grad()
    def generate(self, batch: EncodedBatch, sampling: Sampling, seed: int, adapter: Adapter = "policy") -> list[Answer]:
        """Generates a response to each question of a batch.

        Questions about one image share the computation of their common prefix, where the model supports it.

        Args:
            batch: Encoded questions; completions are ignored.
            sampling: Decoding settings.
            seed: The sampling noise depends on (seed, record id, sample, step, token) and nothing else.
            adapter: Which adapter is active. Without adapters, every choice is the base model.

        Returns:
            For each question its response, or the reason why it has none: the prompt with its response may exceed the
            learned positions, or the logits were not finite.

        Raises:
            ArgumentError: The model's own ``generate`` ignores the sampling.
        """
        if reasons := self.exceeding_positions(batch, sampling):
            some = torch.tensor([row for row in range(len(batch)) if row not in reasons])
            answers = iter(self.generate(batch.select(some), sampling, seed, adapter) if len(some) else [])
            return [Unanswered(reasons[row]) if row in reasons else next(answers) for row in range(len(batch))]
        if self.one_by_one and len(batch) > 1:
            each = torch.arange(len(batch)).split(1)
            return [answer for row in each for answer in self.generate(batch.select(row), sampling, seed, adapter)]
        tokenwise = {"input_ids", *self.written(batch.encodings[0])}
        keys = batch.noise_keys(seed)
        # Evaluation mode disables dropout, and allows a cache with gradient checkpointing.
        with evaluated(self), active(self.base, adapter):
            rows = PromptedRows(self.sharing, batch.encodings, tokenwise)
            if reason := REQUESTED if self.decoding.step == "growing" else rows.obstacle():
                self.record_decoding("growing", reason)
                decoded = self._grow(rows, keys, sampling)
            else:
                decoded = self.decode(rows, keys, sampling, adapter)
        return self.answers(batch.questions, decoded)

    def _grow(self, rows: PromptedRows, keys: list[int], sampling: Sampling) -> DecodedTokens:
        """Decodes with the library's loop."""
        sampler = Sampler(sampling, self.suppressed, keys, rows.encodings[0]["input_ids"].device)
        answers = rows.grown(sampler, self.eos_token_ids)
        if not sampler.steps:  # the self-check of a large model computes no logits
            raise ArgumentError(
                f"vlm.model: {self.name!r} {UNLIKE}: its generate never called the logits processor, so it ignores "
                "vlm.sampling; use another model"
            )
        logprobs = torch.stack(sampler.logprobs, 1).tolist() if sampler.logprobs else None
        return DecodedTokens(answers, sampler.bad.tolist(), logprobs)
