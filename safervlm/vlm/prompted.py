"""Generation with any model of transformers, one question per row: by its ``generate``, or with steps of fixed shapes.

With steps of fixed shapes, ``generate`` computes the prompts, including everything specific to a family. The following
steps call the model with one token per question, its position and a mask.

Shapes: R rows, P tokens of the longest prompt, C coordinates of a position, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from safervlm.errors import first_line
from safervlm.vlm.comparing import agree, attempt
from safervlm.vlm.compat import CACHE
from safervlm.vlm.decoding import Prompts, Rows, State
from safervlm.vlm.prefix import Encoding, PrefixSharing
from safervlm.vlm.sampling import Sampler

DIFFERENT_LOGITS = "the model's logits differ in steps of fixed shapes"


class PromptedRows(Rows):
    """The questions of a batch, each in a row.

    Args:
        sharing: The model, and how prompts about one image share their common prefix.
        encodings: Encodings of the questions.
        tokenwise: Names of the inputs that grow with the tokens.
    """

    def __init__(self, sharing: PrefixSharing, encodings: Sequence[Encoding], tokenwise: set[str]) -> None:
        self.sharing, self.encodings, self.tokenwise = sharing, encodings, tokenwise
        self.questions = [[number] for number in range(len(encodings))]
        self.dtype = sharing.model.get_input_embeddings().weight.dtype

    def prefill(self, rows: Sequence[int]) -> Prompts:
        """Computes the prompts of some of the rows.

        Args:
            rows: Indices of the rows.
        """
        return self.generated(rows, 1)[0]

    def inputs(self, rows: Sequence[int]) -> dict[str, Any]:
        """Returns the inputs of ``generate`` for some of the rows.

        Args:
            rows: Indices of the rows.
        """
        asked = [self.encodings[row] for row in rows]
        return self.sharing.inputs(asked, self.tokenwise) or self.sharing.alone(asked, self.tokenwise)

    def grown(self, sampler: Sampler, ends: list[int]) -> list[list[int]]:
        """Returns the tokens of each response, with anything after the end token, using only ``generate``.

        Args:
            sampler: Chooses the tokens.
            ends: Tokens that end a response.
        """
        inputs = self.inputs(range(len(self.encodings)))
        tokens: Tensor = self.sharing.model.generate(
            **inputs,
            logits_processor=LogitsProcessorList([sampler]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=sampler.sampling.max_new_tokens,
                eos_token_id=ends,
                pad_token_id=self.sharing.pad_token_id,
            ),
        )
        answers: list[list[int]] = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        return answers

    def generated(self, rows: Sequence[int], tokens: int) -> tuple[Prompts, Any]:
        """Computes prompts, and some tokens of the most probable responses.

        Args:
            rows: Numbers of the rows.
            tokens: Number of tokens.

        Returns:
            The prompts, without the tokens, and the output of ``generate``.

        Raises:
            KeyError: The model accepts no positions.
        """
        sharing, inputs = self.sharing, self.inputs(rows)
        positions: list[Tensor] = []  # as passed to the model, whose code may change those that the library computes

        def keep(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
            positions.append(given["position_ids"])

        hook = sharing.model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            output = sharing.model.generate(
                **inputs,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=tokens,
                    pad_token_id=sharing.pad_token_id,
                    output_logits=True,
                    return_dict_in_generate=True,
                ),
            )
        finally:
            hook.remove()
        count, length = inputs["input_ids"].shape
        last = positions[0][..., -1:] if positions[0].dim() == 3 else positions[0][None, :, -1:]
        prompts = Prompts(
            layers=[(each.keys[:, :, :length], each.values[:, :, :length]) for each in inputs[CACHE].layers],
            seen=inputs["attention_mask"].bool()[:, None],
            positions=last.expand(-1, count, -1).movedim(0, -1),
            logits=output.logits[0][:, None],
        )
        return prompts, output

    def logits(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Computes the (R, 1, V) logits that follow a token of each row.

        Args:
            tokens: (R, 1) token ids.
            positions: (R, 1, C) their positions.
            mask: (R, 1, 1, length) mask that attention adds to its scores.
            cache: KV cache that the step writes to and attends to.
        """
        return self.sharing.model(
            input_ids=tokens,
            position_ids=positions.movedim(-1, 0) if positions.shape[-1] > 1 else positions[..., 0],
            attention_mask=mask,
            **{CACHE: cache},
            use_cache=True,
        ).logits

    def obstacle(self) -> str:
        """Returns why the model is not decoded with steps of fixed shapes, or an empty text.

        At the first call, up to two questions are computed both ways, and the logits of two steps are compared.
        """
        if self.sharing.obstacle is None:
            found = attempt(self._difference)
            self.sharing.obstacle = (
                f"{type(found).__name__}: {first_line(found)}" if isinstance(found, Exception) else found
            )
        return self.sharing.obstacle

    def _difference(self) -> str:
        few = range(min(2, len(self.encodings)))
        prompts, expected = self.generated(few, 3)
        columns = prompts.seen.shape[-1]
        state = State(prompts, [[0] for _ in few], 3, columns + 3, self.dtype)
        for place in (1, 2):
            state.advance(torch.ones_like(state.done), expected.sequences[:, columns + place - 1, None])
            found = state.forward(self, columns + 2)[:, 0].float()
            if not agree(expected.logits[place], found, self.sharing.dtype):
                return DIFFERENT_LOGITS
        return ""
