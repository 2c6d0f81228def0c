"""Several replies to one prompt in a row of training: each of them a branch of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from fastvlm.data.conversations import Conversation
from fastvlm.functional.messages import Message
from fastvlm.language.structure import text_decoder

IGNORED = -100
"""The label of a token whose loss `transformers` leaves out."""
BRANCHES = "branches"
"""The input of a row with several replies to one prompt that says which reply a token is of: 0 for
the prompt, which all of them see, then a number for each. The model itself doesn't take it."""


@dataclass(frozen=True, slots=True)
class WrittenConversation:
    """A conversation in tokens.

    Args:
        token_ids: All of them, with a placeholder for every visual token.
        labels: What is learnt at each, see `TrainingRow`.
        prompt_length: Tokens before the last reply.
    """

    token_ids: list[int]
    labels: list[int]
    prompt_length: int


def longest_shared_row(model: PreTrainedModel) -> int:
    """Return the length up to which a decoder computes a row of several replies as each alone.

    It has to take positions and a mask of ours, and to see all of the row: 0 for one that doesn't.
    """
    config: Any = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return 0
    if not hasattr(text_decoder(model), "rotary_emb"):
        return 0
    return int(getattr(config, "sliding_window", None) or config.max_position_embeddings)


def alternatives_of(conversation: Conversation) -> list[tuple[Message, ...]]:
    """Return a conversation once with each of its last replies."""
    *before, last = conversation.messages
    others = [
        (*before, {**last, "content": [{"type": "text", "text": text}]})
        for text in conversation.alternatives
    ]
    return [conversation.messages, *others]


def share_prompt(written: Sequence[WrittenConversation]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs and the labels of one row of conversations that differ in the last reply.

    The prompt's last token, which predicts a reply's first, stands before each reply: a branch.
    """
    first = written[0]
    shared = first.prompt_length - 1
    tokens, labels = first.token_ids[:shared], first.labels[:shared]
    positions, branches = [*range(shared)], [0] * shared
    for number, one in enumerate(written, 1):
        branch = one.token_ids[shared:]
        tokens += branch
        # Beyond the first, the prompt's last token is a repetition, which is learnt once.
        again = number > 1
        labels += [IGNORED] * again + one.labels[shared + again :]
        positions += range(shared, shared + len(branch))
        branches += [number] * len(branch)
    inputs = {
        "input_ids": torch.tensor(tokens),
        "position_ids": torch.tensor(positions),
        BRANCHES: torch.tensor(branches),
    }
    return inputs, torch.tensor(labels)


def branched(rows: Sequence[Mapping[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the positions of rows of which some share prompts, and what each position sees.

    Args:
        rows: Their inputs.
        dtype: The model's precision.

    Returns:
        `position_ids`, (batch, length), and `attention_mask`, (batch, 1, length, length), which is
        added to the attention's scores.
    """
    branches, positions = [], []
    for row in rows:
        plain = torch.zeros_like(row["input_ids"])
        branches.append(row.get(BRANCHES, plain))
        positions.append(row.get("position_ids", torch.arange(len(plain))))
    of = pad_sequence(branches, batch_first=True, padding_value=-1)
    sees = (of[:, None, :] == 0) | (of[:, None, :] == of[:, :, None])
    sees = sees.tril()[:, None]
    hidden = torch.finfo(dtype).min
    return {
        "position_ids": pad_sequence(positions, batch_first=True),
        "attention_mask": torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, hidden),
    }
