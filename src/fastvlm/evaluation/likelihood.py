"""Log-likelihoods of given replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlm.decoding import Request
from fastvlm.functional.errors import InputError
from fastvlm.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The likelihood of a reply.

    Args:
        text: Log-likelihood of its tokens, natural logarithm.
        end: Log-likelihood that the reply ends there; 0 for a model whose replies never end.
        greedy: Whether greedy decoding gives its tokens.
    """

    text: float
    end: float
    greedy: bool

    @property
    def whole(self) -> float:
        """Log-likelihood of the text and its end together."""
        return self.text + self.end


@torch.inference_mode()
def likelihoods(
    vlm: VisionLanguageModel, request: Request, replies: Sequence[str], batch: int = 20
) -> list[Likelihood]:
    """Return the likelihoods of replies to one prompt, which is computed once.

    Args:
        vlm: The model.
        request: The prompt, as `VisionLanguageModel.request` returns it.
        replies: The replies.
        batch: Batch size.

    Raises:
        InputError: A reply is empty, or doesn't fit into the model's context with its prompt.
    """
    decoder, inputs = vlm.decoder, request.inputs
    length = len(inputs.token_ids)
    rows = [vlm.tokenizer.encode(reply, add_special_tokens=False) for reply in replies]
    if not all(rows):
        raise InputError("An empty reply has no likelihood.")
    longest = max(map(len, rows))
    if length + longest > decoder.context:
        raise InputError(
            f"The prompt and a reply to it have {length + longest} tokens with the image, but the"
            f" model's context is {decoder.context}."
        )
    cache = decoder.cache(1, length)
    cache.assign(0, inputs)
    x = inputs.embeddings[None].to(decoder.device, decoder.dtype)
    x = decoder.forward_layers(x, cache.positions([0], length), cache, range(decoder.depth))
    first = decoder.head(x[:, -1:])
    known = cache.export_slot(0, length, decoder.depth)
    found = []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        width = max(map(len, some))
        cache = decoder.cache(len(some), length + width)
        for slot in range(len(some)):
            cache.assign(slot, inputs)
            cache.import_slot(slot, known, length)
        # Padding stands on the right, where the causal mask hides it.
        tokens = torch.tensor(
            [row + [0] * (width - len(row)) for row in some], device=decoder.device
        )
        x = decoder.embed(tokens)
        positions = cache.positions([length] * len(some), width)
        x = decoder.forward_layers(x, positions, cache, range(decoder.depth))
        logits = torch.cat((first.expand(len(some), 1, -1), decoder.head(x)), 1)
        ends = sorted(vlm.end_tokens)
        found += [
            _likelihood(logits[index, : len(row) + 1], row, ends) for index, row in enumerate(some)
        ]
    return found


def _likelihood(logits: Tensor, tokens: Sequence[int], ends: Sequence[int]) -> Likelihood:
    """Return the likelihood of tokens.

    Args:
        logits: Before each token and after the last: (tokens + 1, vocabulary).
        tokens: The reply's.
        ends: Those that end a reply.
    """
    logs = logits.double().log_softmax(-1)
    chosen = torch.tensor(tokens, device=logits.device)
    return Likelihood(
        float(logs[:-1].gather(1, chosen[:, None]).sum()),
        float(logs[-1, list(ends)].logsumexp(0)) if ends else 0.0,
        logits[:-1].argmax(-1).tolist() == list(tokens),
    )
