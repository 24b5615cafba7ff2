"""Reference computations of on-policy objectives: plain forward passes of the Hugging Face model, one response each.

They use nothing of the package except the sampled responses.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from safervlm.protocol import LABELS
from safervlm.vlm.llava import Llava


@dataclass
class Run:
    """A fit of an on-policy objective with its recorded steps."""

    objective: Any
    steps: Any
    rollouts: list[Any]
    orders: list[int]  # the seeds of the mini-batches


def bias_head(vlm: Llava, biases: dict[int, float]) -> None:
    """Changes the probability of tokens, identically for every model of the test."""
    old = vlm.base.lm_head
    new = nn.Linear(old.in_features, old.out_features).requires_grad_(False)
    new.weight, new.bias.data[:] = old.weight, 0.0
    for token, bias in biases.items():
        new.bias[token] = bias
    vlm.base.lm_head = new


class Hand:
    """The same models as separate copies, switched by PEFT; a forward pass is one whole sequence."""

    def __init__(self, objective: Any, temperature: float) -> None:
        peft_model = objective.vlm.model
        self.policy, self.value, self.reference = (copy.deepcopy(peft_model) for _ in range(3))
        self.policy.set_adapter("default")
        self.on_adapter = getattr(objective, "value_on", "") == "adapter"
        if self.on_adapter:
            self.value.set_adapter("value")
        self.head = copy.deepcopy(getattr(objective, "value_head", None)) or nn.Linear(objective.vlm.hidden_size, 1)
        self.temperature = temperature
        tokenizer = AutoTokenizer.from_pretrained(objective.vlm.name)
        rows = self.policy.get_base_model().lm_head.out_features
        self.impossible = [0, 1, 3, 4, *range(len(tokenizer), rows)]  # <pad> <s> <unk> <image>, spare rows
        self.tokenizer = tokenizer

    def load(self, weights: dict[str, Tensor]) -> None:
        """Loads trained weights, with the names of the objective, into the copies."""
        for name, weight in weights.items():
            if name.startswith("value_head."):
                getattr(self.head, name.removeprefix("value_head.")).data.copy_(weight)
            else:
                owner = self.value if ".value." in name else self.policy
                owner.get_parameter(name.removeprefix("vlm.model.")).data.copy_(weight)
        for module in (self.policy, self.value, self.head):
            module.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """The back-propagated gradients, with the names of the objective."""
        found = {f"value_head.{name}": p.grad for name, p in self.head.named_parameters()}
        for model, adapter in ((self.policy, ".default."), (self.value, ".value.")):
            found |= {f"vlm.model.{name}": p.grad for name, p in model.named_parameters() if adapter in name}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def forward(self, model: nn.Module, inputs: dict[str, Tensor], start: int) -> tuple[Tensor, Tensor]:
        """(n, V) logits and (n, H) hidden states that predict the tokens from ``start`` on."""
        output = model(**inputs, output_hidden_states=True)
        return output.logits[0, start - 1 : -1], output.hidden_states[-1][0, start - 1 : -1]

    def log_softmax(self, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, self.impossible] = -math.inf
        return (logits / self.temperature).log_softmax(-1)

    def tokens(self, rollout: Any, row: int) -> list[dict[str, Any]]:
        """Each response token's scores by policy, reference and value function."""
        batch, answer = rollout.batch, rollout.answers[row].token_ids
        prompt = batch.prompt_ids[row]
        inputs = {
            "input_ids": torch.tensor([prompt + answer]),
            "pixel_values": batch.pixel_values[batch.image_rows[row]][None],
        }
        logits, states = self.forward(self.policy, inputs, len(prompt))
        if self.on_adapter:
            _, states = self.forward(self.value, inputs, len(prompt))
        else:
            states = states.detach()
        values = self.head(states)[:, 0]
        with torch.no_grad(), self.reference.disable_adapter():
            reference = self.log_softmax(self.forward(self.reference, inputs, len(prompt))[0])
        distribution = self.log_softmax(logits)
        possible = [token for token in range(logits.shape[1]) if token not in set(self.impossible)]
        return [
            {
                "logprob": distribution[t, token],
                "reference": reference[t, token].item(),
                "value": values[t],
                "entropy": -(distribution[t, possible].exp() * distribution[t, possible]).sum(),
            }
            for t, token in enumerate(answer)
        ]


def judged_by_hand(folder: Path, text: str, label: str) -> float:
    """Minus the cross entropy, by the published form of the judge, one text at a time."""
    state = torch.load(folder / "epoch_10.pt", weights_only=True)
    roberta = RobertaModel(RobertaConfig.from_pretrained(folder), add_pooling_layer=False).eval()
    roberta.load_state_dict(
        {name.removeprefix("roberta."): weight for name, weight in state.items() if name.startswith("roberta.")}
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=65).input_ids
    with torch.no_grad():
        first = roberta(input_ids=ids).last_hidden_state[0, 0]
    logits = state["classifier.weight"] @ first + state["classifier.bias"]
    return logits.log_softmax(-1)[LABELS["alignment"].index(label)].item()


def most_probable(tiny_judges: Path, texts: Sequence[str]) -> list[str]:
    """The most probable labels."""
    folder, labels = tiny_judges / "alignment", LABELS["alignment"]
    return [max(labels, key=lambda label: judged_by_hand(folder, text, label)) for text in texts]
