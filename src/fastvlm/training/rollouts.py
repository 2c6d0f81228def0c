"""Rollouts: replies that a model decodes in the midst of its training, scored as it learns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from fastvlm.checkpoints.processors import tokenizer_of
from fastvlm.language.structure import text_decoder
from fastvlm.training.branches import IGNORED, WrittenConversation
from fastvlm.training.reply_scores import score_replies
from fastvlm.training.rows import FastViTHDRows


class Rollouts:
    """Has a model reply, and says how likely it finds its replies.

    Args:
        model: The model.
        rows: What makes its rows.
    """

    def __init__(self, model: PreTrainedModel, rows: FastViTHDRows) -> None:
        self.model, self.rows = model, rows

    @torch.no_grad()
    def decode(
        self, prompts: Sequence[Tensor], pixels: Sequence[Tensor], times: int = 1, **settings: Any
    ) -> list[list[list[int]]]:
        """Return `times` replies to each prompt, each with its end token where it has ended.

        Args:
            prompts: (length,) each.
            pixels: The images of each, (parts, 3, side, side) in [0, 1].
            times: Replies to each.
            settings: How they are decoded, as `GenerationConfig` takes it.
        """
        model: Any = self.model
        end = self.rows.end
        tokens = pad_sequence([*prompts], batch_first=True, padding_value=end, padding_side="left")
        mask = pad_sequence(
            [torch.ones_like(one) for one in prompts], batch_first=True, padding_side="left"
        )
        generation = GenerationConfig(
            num_return_sequences=times,
            eos_token_id=end,
            pad_token_id=end,
            suppress_tokens=[self.rows.image],
            **settings,
        )
        decoder = text_decoder(self.model)
        training = decoder.training
        # With gradient checkpointing, training mode has no cache: each token would see only itself.
        decoder.eval()
        try:
            said: Tensor = model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=mask.to(model.device),
                pixel_values=torch.cat([*pixels]).to(model.device),
                generation_config=generation,
            )
        finally:
            decoder.train(training)
        replies = [
            reply[: reply.index(end) + 1] if end in reply else reply
            for reply in said[:, tokens.shape[1] :].tolist()
        ]
        return [replies[place : place + times] for place in range(0, len(replies), times)]

    def losses(
        self,
        prompts: Sequence[Tensor],
        pixels: Sequence[Tensor],
        replies: Sequence[Sequence[Sequence[int]]],
    ) -> Tensor:
        """Return the cross-entropy of every token of the replies, one after another: (tokens,).

        Args:
            prompts: As `decode` takes them.
            pixels: As `decode` takes them.
            replies: As `decode` returns them.
        """
        rows = []
        for prompt, images, said in zip(prompts, pixels, replies, strict=True):
            asked = prompt.tolist()
            written = [
                WrittenConversation([*asked, *one], [IGNORED] * len(asked) + [*one], len(asked))
                for one in said
            ]
            # Replies to one prompt share a row where the decoder allows it.
            rows += self.rows.lay_out(written, {"pixel_values": images})
        return torch.cat([one.losses for one in score_replies(self.model, self.rows, rows)])

    def has_ended(self, reply: Sequence[int]) -> bool:
        """Return whether a reply came to its end, or ran into the limit."""
        return bool(reply) and reply[-1] == self.rows.end

    def text(self, reply: Sequence[int]) -> str:
        """Return a reply's text."""
        tokenizer = tokenizer_of(self.rows.tokenizer)
        return str(tokenizer.decode([*reply], skip_special_tokens=True))
