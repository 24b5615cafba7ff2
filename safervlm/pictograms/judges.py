"""Trains the judges of the pictogram world: RoBERTa classifiers of responses, saved in the published format."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

from safervlm.io.progress import track
from safervlm.pictograms.judge_texts import ANSWER
from safervlm.protocol import LABELS, Capability

MAX_TOKENS = 128
CHECKPOINT = "epoch_10.pt"  # the published name


class TinyJudge(nn.Module):
    """A small RoBERTa with a linear layer on the first token's last hidden state, like the published judges.

    Args:
        labels: Labels that the judge distinguishes, in the order of its outputs.
        tokenizer: Tokenizer (see :func:`train_judge_tokenizer`).
    """

    def __init__(self, labels: tuple[str, ...], tokenizer: RobertaTokenizer) -> None:
        super().__init__()
        config = RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=MAX_TOKENS + 2,
            type_vocab_size=1,
        )
        self.labels, self.tokenizer = labels, tokenizer
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, len(labels))

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenizes texts.

        Args:
            texts: Texts, truncated at ``MAX_TOKENS`` tokens.

        Returns:
            ``input_ids`` and ``attention_mask``, each of shape (n, length), padded.
        """
        return dict(self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt"))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes the logits of the labels.

        Args:
            input_ids: Token ids, (n, length).
            attention_mask: Attention mask, (n, length).

        Returns:
            Logits, (n, labels).
        """
        states = self.roberta(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.classifier(states[:, 0])

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> list[str]:
        """Classifies texts; returns the most probable label of each.

        Args:
            texts: Texts to classify.
        """
        return [self.labels[number] for number in self(**self.tokens(texts)).argmax(dim=-1)]

    def save(self, folder: Path) -> None:
        """Saves the judge in the published format: RoBERTa's configuration, the tokenizer and the weights.

        Args:
            folder: Folder to write to.
        """
        self.roberta.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        torch.save(self.state_dict(), folder / CHECKPOINT)


def train_judge_tokenizer() -> RobertaTokenizer:
    """Trains a tokenizer in RoBERTa's format on sampled responses."""
    rng = random.Random(0)
    corpus = [answer(rng)[0] for answer in ANSWER.values() for _ in range(4000)]
    learnt = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learnt.train_from_iterator(corpus, 1200, min_frequency=3, special_tokens=special, show_progress=False)
    merges = [tuple(merge) for merge in json.loads(learnt.to_str())["model"]["merges"]]
    return RobertaTokenizer(vocab=learnt.get_vocab(), merges=merges, model_max_length=MAX_TOKENS)


def train_judge(capability: Capability, tokenizer: RobertaTokenizer, seed: int, steps: int) -> TinyJudge:
    """Trains a judge of a capability's responses.

    Args:
        capability: ``perception`` or ``alignment``.
        tokenizer: Tokenizer (see :func:`train_judge_tokenizer`).
        seed: Seed of the responses and, by torch's global generator, of the initial weights.
        steps: Number of updates, each on a batch of 64 responses.

    Returns:
        The judge, in evaluation mode.
    """
    torch.manual_seed(seed)
    judge = TinyJudge(LABELS[capability], tokenizer).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    rng = random.Random(seed)
    for _ in track(range(steps), f"{capability} judge"):
        texts, answers = zip(*(ANSWER[capability](rng) for _ in range(64)), strict=True)
        tokens = judge.tokens(texts)
        hidden = (torch.rand(tokens["input_ids"].shape) < 0.05) & (tokens["input_ids"] > tokenizer.unk_token_id)
        tokens["input_ids"] = tokens["input_ids"].masked_fill(hidden, tokenizer.mask_token_id)
        # Label smoothing bounds the log-probabilities, and thereby a reward computed from them.
        right = torch.tensor([judge.labels.index(answer) for answer in answers])
        loss = F.cross_entropy(judge(**tokens), right, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()
